"""Records of every format, as people write them, and what is said of those that can't be used."""

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers")

from qts_video.data import RecordError, read_records
from qts_video.data.formats import FORMATS, detect


def parse(fields, format=None):
    return FORMATS[format or detect(fields)](fields)


def one(fields, format=None):
    (record,) = parse(fields, format)
    return record


CHOICES = {
    "list": {"options": ["red", "blue", "green"]},
    "numbers": {"choices": ["red", "blue", "green"]},
    "letters before": {"candidates": ["A. red", "B. blue", "C. green"]},
    "brackets": {"options": ["(A) red", "(B) blue", "(C) green"]},
    "dict": {"options": {"A": "red", "B": "blue", "C": "green"}},
    "fields": {"A": "red", "B": "blue", "C": "green"},
    "lines": {"options": "A. red\nB. blue\nC. green"},
}


@pytest.mark.parametrize("choices", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("answer", ["B", "b", "(B)", "B.", "B. blue", "blue", "Blue.", "(B) blue"])
def test_choices_and_answers(choices, answer):
    record = one({"video": "a.mp4", "question": "Which?", "answer": answer} | choices)
    assert (record.question, record.choices, record.answer) == ("Which?", ("red", "blue", "green"), "B")
    assert record.media == "a.mp4"


def test_choices_in_the_question():
    question = "<video>\nWhich?\nOf these:\nA. red\nB) blue\n(C) green\nPlease answer with a letter."
    record = one({"video": "a", "question": question, "answer": "C"})
    assert (record.question, record.choices, record.answer) == ("Which?\nOf these:", ("red", "blue", "green"), "C")


def test_letters_that_are_texts():
    """A letter is a letter first; choices that begin with one keep it unless all do, in order."""
    record = one({"video": "a", "question": "Which key?", "options": ["C", "A", "B"], "answer": "A"})
    assert (record.choices, record.answer) == (("C", "A", "B"), "A")
    record = one({"video": "a", "question": "Which?", "options": ["B. Lee", "A. Poe"], "answer": "A. Poe"})
    assert (record.choices, record.answer) == (("B. Lee", "A. Poe"), "B")


@pytest.mark.parametrize("index", range(2))
def test_answer_by_index(index):
    record = one({"vid": "a", "question": "Which?", "options": ["x", "y"], "answer_idx": index})
    assert record.answer == "AB"[index]


def test_aliases():
    record = one({"video_id": "v_1.2", "query": "What?", "correct_answer": 3, "question_id": 7})
    assert (record.media, record.question, record.answer, record.id) == ("v_1.2", "What?", "3", "7")


def test_rounds_become_samples():
    turns = ["<image>\nWhat?", "A dog.", "Where?", "At home."]
    conversation = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    records = parse({"id": "k", "video": "a/b.mp4", "conversations": conversation, "data_source": "x"})
    assert [(r.question, r.answer, r.id, r.media) for r in records] == [
        ("What?", "A dog.", "k#1", "a/b.mp4"),
        ("Where?", "At home.", "k#2", "a/b.mp4"),
    ]
    roles = [{"role": "user", "content": "What? <video>"}, {"role": "assistant", "content": "A dog."}]
    record = one({"id": "k", "video": "b", "messages": roles})
    assert (record.question, record.answer, record.id) == ("What?", "A dog.", "k")


V = {"video": "a.mp4", "question": "Which?"}
BAD = {
    "no format": ({"video": "a"}, "expected a record with 'question' or 'query', or with 'conversations'"),
    "no video": ({"question": "Which?", "answer": "x"}, "expected a text in 'video' or 'video_path'"),
    "no answer": (V, "expected a text in 'answer' or 'correct_answer' or 'answer_letter', got None (fields: video, qu"),
    "empty answer": (V | {"answer": " "}, "got ' '"),
    "a truth value": (V | {"answer": True}, "got True"),
    "one choice": (V | {"options": ["x"], "answer": "A"}, "expected 2 to 26 choices"),
    "27 choices": (V | {"options": [str(i) for i in range(27)], "answer": "A"}, "got 27"),
    "letter beyond": (V | {"options": ["x", "y"], "answer": "C"}, "expected an answer from A to B, or the text of one"),
    "another text": (V | {"options": ["x", "y"], "answer": "B. x"}, "got 'B. x'"),
    "two equal texts": (V | {"options": ["x", "x"], "answer": "x"}, "or the text of one choice, got 'x'"),
    "index beyond": (V | {"options": ["x", "y"], "answer_index": 2}, "from 0 to 1, got 2"),
    "letters missing": (V | {"options": {"A": "x", "C": "y"}, "answer": "A"}, "named A, B, ... in this order"),
    "not a list": (V | {"options": 3, "answer": "A"}, "expected choices as a list of texts, got 3"),
    "not texts": (V | {"options": ["x", None], "answer": "A"}, "got ['x', None]"),
    "empty choice": (V | {"options": ["x", ""], "answer": "A"}, "a text each, got ['x', '']"),
    "no lines": (V | {"options": "x, y", "answer": "A"}, "in lines 'A. ...', 'B. ...', got 'x, y'"),
    "id": (V | {"answer": "x", "id": [1]}, "'id' or 'question_id' or 'qid' or 'sample_id' to be a text or a number"),
    "no turns": ({"video": "a", "conversations": []}, "expected turns of human and gpt by turns, got []"),
    "odd turns": ({"video": "a", "conversations": [{"from": "human", "value": "x"}]}, "got ['human']"),
    "order": (
        {"video": "a", "messages": [{"role": "assistant", "content": "x"}, {"role": "user", "content": "y"}]},
        "got ['gpt', 'human']",
    ),
    "a system turn": ({"video": "a", "messages": [{"role": "system", "content": "x"}]}, "expected a turn from one of"),
    "turns of text": ({"video": "a", "conversations": ["x"]}, "to be a list of turns, got ['x']"),
    "no question": (
        {"video": "a", "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]},
        "expected a question, got '<image>'",
    ),
}


@pytest.mark.parametrize("fields, message", BAD.values(), ids=BAD)
def test_bad_records(fields, message, tmp_path):
    with pytest.raises(RecordError, match=re.escape(message)):
        parse(fields)
    path = tmp_path / "train.jsonl"
    path.write_text(f"\n{json.dumps(fields)}\n")
    with pytest.raises(RecordError, match=rf"train.jsonl:2: .*{re.escape(message)}"):
        read_records(path)


@settings(max_examples=50)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(
    st.sampled_from(["video", "question", "options", "answer", "A", "B", "conversations", "from", "value", "id"]), x
)))  # fmt: skip
def test_whatever_is_written_is_a_record_or_refused(value):
    """Nothing but RecordError: a bad line must not end the reading of a file."""
    for format in FORMATS:
        try:
            for record in parse(value if isinstance(value, dict) else {"video": value, "question": value}, format):
                assert all((record.media, record.question, record.answer))
        except RecordError:
            continue


def write(path, *lines):
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


GOOD = V | {"answer": "x"}


def test_the_first_record_decides_the_format(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{", GOOD, b"", V | {"options": ["x", "y"], "answer": "A"}, b"[1]", b"\xff{}")
    found = read_records(path, on_bad="skip")
    assert (found.format, [record.source for record in found.records]) == ("vqa", [f"{path}:2"])
    reasons = [str(bad).removeprefix(f"{path}:") for bad in found.bad]
    assert [reason.split(":")[0] for reason in reasons] == ["1", "4", "5", "6"]
    assert reasons[0].startswith("1: expected a JSON object (")
    assert reasons[1] == f"4: expected a record of format vqa, as {path}:2 is, got one of vscq"
    assert reasons[2] == "5: expected a JSON object, got list"
    assert "utf-8" in reasons[3]
    with pytest.raises(RecordError) as error:
        read_records(path)
    assert str(error.value).splitlines() == [str(bad) for bad in found.bad]


def test_a_given_format_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.jsonl", GOOD, V | {"options": ["x", "y"], "answer": "A"})
    found = read_records(path, format="vqa")
    assert [record.answer for record in found.records] == ["x", "A"]
    assert [record.choices for record in found.records] == [(), ()]
    assert len(read_records(path, format="vscq", on_bad="skip").bad) == 1


def test_an_array(tmp_path):
    path = write(tmp_path / "a.json", [GOOD, 3, GOOD])
    found = read_records(path, on_bad="skip")
    assert [record.source for record in found.records] == [f"{path}:1", f"{path}:3"]
    assert [str(bad) for bad in found.bad] == [f"{path}:2: expected a JSON object, got int"]
    path.write_text('[\n{"video": }]')
    with pytest.raises(RecordError, match=r"a.json:2: expected a JSON array"):
        read_records(path)


def test_a_byte_order_mark(tmp_path):
    assert len(read_records(write(tmp_path / "a", b"\xef\xbb\xbf" + json.dumps(GOOD).encode())).records) == 1
    assert len(read_records(write(tmp_path / "b", b"\xef\xbb\xbf" + json.dumps([GOOD]).encode())).records) == 1


def test_many_bad_records_are_counted(tmp_path):
    with pytest.raises(RecordError) as error:
        read_records(write(tmp_path / "a.jsonl", *[b"x"] * 25))
    lines = str(error.value).splitlines()
    assert (len(lines), lines[-1]) == (21, "... and 5 more")


def test_arguments(tmp_path):
    path = write(tmp_path / "empty.jsonl", b"", b" ")
    with pytest.raises(RecordError, match=r"empty.jsonl: expected records, got an empty file"):
        read_records(path)
    with pytest.raises(ValueError, match="format must be auto, vscq, vqa, llava_video_178k, got 'csv'"):
        read_records(path, format="csv")
    with pytest.raises(ValueError, match='on_bad must be "raise" or "skip", got \'ignore\''):
        read_records(path, on_bad="ignore")
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.jsonl")
