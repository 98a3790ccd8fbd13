"""Times written into the prompt, as LLaVA-Video was trained with: they go with the steps that keep nothing."""

import re
from typing import ClassVar

import pytest
import qts_video
import torch
import torch.nn.functional as F
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from qts_video import embedded
from qts_video.dropin.time_list import find_lost_times, find_time_sentence, write_time_sentence
from qts_video.methods import Chain, QuoTA, Uniform
from tiny import (
    ASSISTANT,
    IM_END,
    IM_START,
    NEWLINE,
    SYSTEM,
    USER,
    Keep,
    Oracle,
    Video,
    keep_all,
    keep_mask,
    prompt,
    rows,
    user,
)
from tiny_qwen3 import LABEL


class Pieces:
    """Each token is a piece of this text."""

    def __init__(self, pieces):
        self.pieces = pieces

    def decode(self, ids):
        return "".join(self.pieces[i] for i in ids)


def lose(pieces, stays, tokenizer=None, vision=()):
    ids = torch.arange(len(pieces))
    lost, notes = find_lost_times(ids, torch.isin(ids, torch.tensor(vision)), tokenizer or Pieces(pieces), stays)
    return "".join(piece for piece, gone in zip(pieces, lost.tolist(), strict=True) if not gone), notes


@st.composite
def lists(draw):
    steps = draw(st.integers(2, 6))
    times = [f"{draw(st.integers(0, 99))}.{draw(st.integers(0, 9))}" for _ in range(steps)]
    comma, end = draw(st.sampled_from([",", ", "])), draw(st.sampled_from([".", "", ".Please", " and"]))
    pieces = ["at ", *draw(st.sampled_from([[], ["3s", " or "]]))]
    for number, time in enumerate(times):
        cut = draw(st.integers(0, len(time)))
        behind = comma if number + 1 < steps else end
        merged = draw(st.booleans())
        pieces += [piece for piece in (time[:cut], time[cut:]) if piece]
        pieces += ["s" + behind] if merged else [piece for piece in ("s", behind) if piece]
    stays = draw(st.lists(st.booleans(), min_size=steps, max_size=steps).filter(any))
    return pieces, [f"{time}s" for time in times], stays, comma, end


@given(lists())
def test_what_is_left_reads_as_a_list(case):
    pieces, times, stays, comma, end = case
    before = "".join(pieces)
    text, notes = lose(pieces, [stays])
    kept = [time for time, stay in zip(times, stays, strict=True) if stay]
    assert text == before[: before.index(times[0])] + comma.join(kept) + end or "3s or" in before
    assert text.endswith(comma.join(kept) + end)
    assert notes == []


def test_none_stays():
    assert lose(["at ", "0", "s", ",", "1", "s", ".Please"], [[False, False]]) == ("at .Please", [])


def test_lists_belong_to_videos_in_order_and_by_their_length():
    pieces = re.findall(r"\d+|\D", "1s,2s; 3s,4s,5s; 6s,7s; 8s,9s,10s,11s")
    text, _ = lose(pieces, [[True, False, True], [False, True]])
    assert text == "1s,2s; 3s,5s; 7s; 8s,9s,10s,11s"
    text, _ = lose(pieces, [[True, False], [True, True], [False] * 5])
    assert text == "1s; 3s,4s,5s; 6s,7s; 8s,9s,10s,11s"
    assert lose(pieces, [[False]])[0] == "".join(pieces)  # one time is no list


def test_what_is_no_list_stays():
    for text in ("1s 2s 3s", "1sec,2sec,3sec", "a1s,b2s,c3s", "1s,2s", "1s,2s,3s,4s", "v1.1s,2s,3s"):
        assert lose(list(text), [[True, False, True]])[0] == text
    pieces = ["1", "s", ",", "<video>", "2", "s", ",", "3", "s"]
    assert lose(pieces, [[True, False, True]], vision=[3])[0] == "".join(pieces)


def test_a_list_whose_tokens_reach_over_its_times_is_left_and_said_so():
    for pieces in (["0", "s,1", "s", ",", "2", "s"], ["0s", ",", "1", "s", ",", "2s."]):
        text, notes = lose(pieces, [[True, True, False]])
        assert text == "".join(pieces) or notes == []
    text, notes = lose(["0", "s,1", "s", ",", "2", "s"], [[False, True, True]])
    assert text == "0s,1s,2s"
    (note,) = notes
    assert note.startswith("the list of times of video 0 in the prompt is left whole")
    assert lose(["0", "s,1", "s", ",", "2", "s"], [[True, True, False]])[0] == "0s,1s"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_next_video"])
def test_the_sentence_is_found_in_real_vocabularies(family):
    tokenizer = embedded.build_processor(family).tokenizer
    sentence = write_time_sentence(12, [0, 4, 8, 12])
    assert sentence == (
        "The video lasts for 12.00 seconds, and 4 frames are uniformly sampled from it. These frames are located at "
        "0.00s,4.00s,8.00s,12.00s.Please answer the following questions related to this video."
    )
    for question in ("What happens?", "Is 0.00s,1.00s a time?"):
        ids = torch.tensor(tokenizer.encode(f"Hello!\n{sentence}\n{question}", add_special_tokens=False))
        vision = torch.zeros(len(ids), dtype=torch.bool)
        inside = find_time_sentence(ids, vision, tokenizer)
        assert tokenizer.decode(ids[inside]).strip() == sentence
        left = re.sub(r"\s+", " ", tokenizer.decode(ids[~inside]))
        assert left == f"Hello! {question}"
        for stays in ([False, True, True, True], [True, False, False, True], [True, True, False, False]):
            lost, notes = find_lost_times(ids, vision, tokenizer, [stays])
            assert notes == []
            kept = [f"{4 * i}.00s" for i, stay in enumerate(stays) if stay]
            assert f"located at {','.join(kept)}.Please answer" in tokenizer.decode(ids[~lost])
            assert "4 frames are uniformly" in tokenizer.decode(ids[~lost])  # as many were sampled


# In the models.


class Tokenizer:
    words: ClassVar = LABEL | {
        "<|im_start|>": IM_START, "<|im_end|>": IM_END, "user": USER, "assistant": ASSISTANT, "system": SYSTEM,
        "\n": NEWLINE, "s": 486, ",": 487, " at ": 488,
    }  # fmt: skip
    unk_token_id = None

    def convert_tokens_to_ids(self, token):
        return self.words.get(token)

    def encode(self, text, add_special_tokens=True):
        longest_first = sorted(self.words, key=len, reverse=True)
        return [self.words[word] for word in re.findall("|".join(map(re.escape, longest_first)), text)]

    def decode(self, ids):
        names = {token: word for word, token in self.words.items()}
        return "".join(names.get(token, f"<{token}>") for token in ids)


TOKENIZER = Tokenizer()
LIST = TOKENIZER.encode(" at 0.00s,1.00s,2.00s.")


class Scores:
    """These, of the time steps of every video of three."""

    def __init__(self, *scores):
        self.scores = torch.tensor(scores)

    def score(self, videos):
        return self.scores.repeat(len(videos.grids))


def quota(*scores):
    return QuoTA(Scores(*(scores or (0.0, 1.0, 1.0))), total_tokens=9)


def batch_of(family, side):
    return family.inputs(
        prompt(user([33], Video(3), LIST, [34, 35])),
        prompt(user(Video(3), LIST, [30], Video(3), LIST, [31, 32])),
        side=side,
    )


def in_lists(ids):
    """[L] bool: which tokens of a sample are a list of times."""
    text = "".join(chr(i) for i in ids.tolist())
    found = torch.zeros(len(ids), dtype=torch.bool)
    for match in re.finditer("".join(map(chr, LIST)), text):
        found[match.start() : match.end()] = True
    return found


CHATML = pytest.mark.parametrize(
    "family",
    [FAMILIES[name] for name in FAMILIES if name.startswith(("qwen", "llava_onevision"))],
    ids=lambda family: family.name,
)


@pytest.mark.parametrize("scores", [(0.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, 1.0, 0.0), (0.0, 1.0, 0.0)])
@pytest.mark.parametrize("side", ["left", "right"])
@CHATML
def test_the_prompt_names_the_times_that_are_left(family, side, scores):
    model, batch = family.build_model(), batch_of(family, side)
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.masked_fill(~valid, -100)
    labels[torch.arange(2), valid.int().argmax(1)] = -100  # a first token may have padding before it, or not
    made = {}

    class Watch(QuoTA):
        def select(self, videos):
            made["selection"] = super().select(videos)
            return made["selection"]

    # Enough for every frame that scores, and for no other: "merge" leaves none of its budget to them.
    watch = Watch(Scores(*scores), total_tokens=6 if "qwen" in family.name else 9, mode="merge")
    with qts_video.attach(model, watch, tokenizer=TOKENIZER) as handle:
        with torch.no_grad():
            output = model(**batch, labels=labels)
            report = handle.last
        generated = model.generate(**batch, max_new_tokens=4, do_sample=False) if side == "left" else None
        if family.repeats and side == "left":
            model.generate(**batch, max_new_tokens=2, do_sample=False, num_beams=2)
            assert torch.equal(handle.last.columns, report.columns)
    selection = made["selection"]
    wanted = " at " + ",".join(f"{i}.00s" for i, score in enumerate(scores) if score) + "."
    keep = keep_mask(model, batch, selection.indices, drop_steps=True)
    for row, columns, stays, lists in zip(ids, report.columns, keep, (1, 2), strict=True):
        listed, columns = in_lists(row), columns[columns >= 0]
        left = torch.zeros_like(stays).index_fill(0, columns, True)
        assert torch.equal(left & ~listed, stays & ~listed)
        assert TOKENIZER.decode(row[left & listed].tolist()) == wanted * lists
        stays &= left
    assert [set(video.frame.tolist()) for video in report.videos] == [{i for i in range(3) if scores[i]}] * 3
    oracle = Oracle(model, batch, keep, replaced=selection.tokens)
    wanted = rows(oracle.logits(), keep)
    for ours, theirs in zip(rows(output.logits, report.columns >= 0), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    pairs = [(logits[:-1], row[stays][1:]) for logits, row, stays in zip(wanted, labels, keep, strict=True)]
    loss = F.cross_entropy(torch.cat([a for a, _ in pairs]).float(), torch.cat([b for _, b in pairs]))
    torch.testing.assert_close(output.loss.float(), loss, rtol=1e-5, atol=0)
    if side == "left":
        assert torch.equal(generated[:, -4:], oracle.greedy(4)[0])


@CHATML
def test_methods_behind_quota_read_the_same_prompt(family):
    model, batch = family.build_model(), batch_of(family, "left")
    columns = []
    third = Uniform()
    for selector in (quota(), Chain([quota(), Uniform(), third])):
        with qts_video.attach(model, selector, tokenizer=TOKENIZER) as handle, torch.no_grad():
            model(**batch)
        columns.append(handle.last.columns)
    assert torch.equal(*columns)
    assert int((columns[0] >= 0).sum()) < int(batch["attention_mask"].sum())


def test_each_method_of_a_chain_shortens_the_list_that_the_last_one_left():
    family = FAMILIES["qwen2_5_vl"]
    model, batch = family.build_model(), batch_of(family, "left")
    last = Keep(lambda videos: [end[None].long() - 1 for end in videos.cu_seqlens[1:]])
    third = Keep(keep_all)
    with qts_video.attach(model, Chain([quota(), last, third]), tokenizer=TOKENIZER), torch.no_grad():
        model(**batch)
    context = third.calls[0].context
    for row, valid, lists in zip(context.input_ids, context.layout.valid, (1, 2), strict=True):
        assert TOKENIZER.decode(row[valid].tolist()).count(" at 2.00s.") == lists


@CHATML
def test_without_a_tokenizer_the_list_stays_and_so_it_does_for_other_methods(family):
    model, batch = family.build_model(), batch_of(family, "left")
    for selector, tokenizer in ((quota(), None), (Uniform(max_tokens=2), TOKENIZER)):
        with qts_video.attach(model, selector, tokenizer=tokenizer) as handle, torch.no_grad():
            model(**batch)
        for row, columns in zip(batch["input_ids"], handle.last.columns, strict=True):
            assert " at 0.00s,1.00s,2.00s." in TOKENIZER.decode(row[columns[columns >= 0]].tolist())


def test_a_list_that_is_left_is_in_the_notes():
    class Merging(Tokenizer):
        words: ClassVar = {**Tokenizer.words, "0s,1": 489}

    family = FAMILIES["llava_onevision"]
    tokenizer, model = Merging(), family.build_model()
    ids = [*tokenizer.encode(" at 0.0"), 489, *tokenizer.encode(".00s,2.00s.")]
    batch = family.inputs(prompt(user(Video(3), ids, [30])), prompt(user(Video(3), [31])))
    with qts_video.attach(model, quota(), tokenizer=tokenizer) as handle, torch.no_grad():
        model(**batch)
    assert any(note.startswith("sample 0: the list of times of video 0") for note in handle.last.notes)
    assert handle.last.notes[-1] in str(handle.last)


# As qts ask writes it.


@pytest.mark.parametrize("position", ["grid", "frame", None])
def test_a_converted_llava_video_is_told_the_times(position):
    from qts_video.answer import answer, prepare
    from qts_video.video import Video as Film

    model, processor = embedded.build("llava_onevision")
    model.config.mm_newline_position = position
    frames = torch.randint(0, 256, (4, 3, 84, 84), dtype=torch.uint8)
    film = Film(frames, [0.0, 1.5, 3.0, 4.5], 2 / 3, list(range(4)), 4, 6.0, "made up", "none")
    inputs = prepare(processor, film, "What moves?", model)
    sentence = write_time_sentence(6.0, [0.0, 1.5, 3.0, 4.5])
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert (f"\n{sentence}\nWhat moves?<|im_end|>" in text) == (position is not None)

    class Watch(QuoTA):
        needs_question = True

        def select(self, videos):
            self.asked = videos.question_ids
            return super().select(videos)

    watch = Watch([1.0, 0.0, 2.0, 0.0], 10, mode="merge")
    result = answer(model, processor, inputs, watch, max_new_tokens=2)
    assert processor.tokenizer.decode(watch.asked[0]) == "What moves?"
    steps = set(result.report.videos[0].frame.tolist())
    assert steps == {0, 2}
    if position is not None:
        columns = result.report.columns[0]
        assert int((columns >= 0).sum()) == len(columns)
        removed = result.prompt_tokens - result.tokens + result.kept - len(columns)
        assert removed == len(processor.tokenizer.encode("1.50s,")) + len(processor.tokenizer.encode("s,4.50"))
