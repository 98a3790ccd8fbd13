"""QuoTA: how many frames, and which objects a question asks for."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from clips import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video import embedded
from qts_video.quota.decouple import decouple
from qts_video.quota.frame_scorer import frame_prompt
from qts_video.quota.objects import MAX_CHARACTERS, MAX_OBJECTS, MAX_WORDS, parse_objects
from qts_video.quota.sampler import number_of_frames, read_sampled

QUESTION = "Which colour is the shape that moves?"


@pytest.fixture(scope="module")
def exact():
    """A small Qwen2.5-VL in float64, and its processor."""
    model, processor = embedded.build("qwen2_5_vl")
    return model.double(), processor


# The sampler.


@pytest.mark.parametrize("seconds, frames", [(0, 96), (56.2, 96), (56.25, 97), (1800, 128), (3600, 160), (7200, 224)])
def test_the_published_numbers_of_frames(seconds, frames):
    assert number_of_frames(seconds) == frames
    assert number_of_frames(seconds, max_frames=128) == min(frames, 128)


def test_other_numbers_of_frames():
    assert number_of_frames(90, base_frames=8, extra_frames_per_hour=100) == 10
    assert number_of_frames(90, base_frames=8, extra_frames_per_hour=0) == 8


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"seconds": -1}, "seconds must be at least 0 and finite, got -1"),
        ({"seconds": math.inf}, "seconds must be at least 0 and finite, got inf"),
        ({"seconds": math.nan}, "seconds must be at least 0 and finite, got nan"),
        ({"seconds": 1, "extra_frames_per_hour": -2}, "extra_frames_per_hour must be at least 0 and finite, got -2"),
        ({"seconds": 1, "base_frames": 0}, "base_frames must be at least 1, got 0"),
        ({"seconds": 1, "max_frames": 0}, "max_frames must be at least 1, got 0"),
    ],
)
def test_numbers_of_frames_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        number_of_frames(**arguments)


def test_a_film_is_read_with_the_frames_that_its_duration_asks_for(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=48, rate=12)  # 4 seconds
    video = read_sampled(path, base_frames=3, extra_frames_per_hour=1800)
    assert 4 <= video.duration < 4.01
    assert len(video.frames) == 3 + 2
    assert video.frame_indices == [0, 12, 24, 35, 47]  # of 0, 11.75, 23.5, 35.25, 47
    assert len(read_sampled(path, base_frames=3, extra_frames_per_hour=1800, max_frames=4).frames) == 4
    assert len(read_sampled(path).frames) == 48  # all it has
    with pytest.raises(ValueError, match="base_frames must be at least 1"):
        read_sampled(tmp_path / "absent.mp4", base_frames=0)


# The parser.


@pytest.mark.parametrize(
    "text, objects",
    [
        ('["red car", "dog"]', ["red car", "dog"]),
        ("['red car', 'dog']", ["red car", "dog"]),
        ("[\"the man's hat\", 'a dog']", ["man's hat", "dog"]),
        ("['man's hat', 'dog']", ["man's hat", "dog"]),
        ("[red car, dog]", ["red car", "dog"]),
        ('["caf\\u00e9 sign"]', ["café sign"]),
        ('```json\n["red car",\n "dog"]\n```', ["red car", "dog"]),
        ('Here is the list: ["red car", "dog"]. I hope that helps!', ["red car", "dog"]),
        ('{"objects": ["red car", "dog"]}', ["red car", "dog"]),
        ('["red car", "do', ["red car"]),
        ('["red car", "dog",]', ["red car", "dog"]),
        ("[]", []),
        ("", []),
        ("   \n ", []),
        ("none", []),
        ("None.", []),
        ("null", []),
        ("N/A", []),
        ('["None"]', []),
        ("[null]", []),
        ("[1, 2, true]", []),
        ("no", []),
        ("1. red car\n2. dog\n3. The tree", ["red car", "dog", "tree"]),
        ("1) red car\n2) dog", ["red car", "dog"]),
        ("Sure:\n- **red car**\n- dog\n* an umbrella", ["red car", "dog", "umbrella"]),
        ("1. **red car** - what moves\n2. **dog**: a pet\n3. ball (round)", ["red car", "dog", "ball"]),
        ("- red car, dog", ["red car", "dog"]),
        ("Yes, dog", ["dog"]),
        ("red car\ndog", ["red car", "dog"]),
        ("red car, dog and a tree", ["red car", "dog", "tree"]),
        ("Objects: red car, dog", ["red car", "dog"]),
        ("Objects: None", []),
        ("Red Car, red car, RED CAR", ["Red Car"]),
        ("rocking horse", ["rocking horse"]),
        ("I think that this question is about how people feel when they lose something dear", []),
        ("red car, " + "very " * MAX_WORDS + "big dog", ["red car"]),
        ("x" * (MAX_CHARACTERS + 1), []),
        ('["' + "x" * 100_000, []),
        ("[" * 100_000, []),
        ("[" * 3000 + "]" * 3000, []),
        ("[" + "9" * 3900 + "]", []),
        ("-" * 100_000, []),
        (" " * 100_000 + "dog", []),
        ("'" * 5000, []),
        ("红色汽车, 狗", ["红色汽车", "狗"]),
        ("do\x00g\x1b[31m, cat", ["31m", "cat"]),
    ],
)
def test_what_a_model_may_write(text, objects):
    assert parse_objects(text) == objects


def test_a_list_without_end():
    text = json.dumps([f"thing {number}" for number in range(1000)])
    assert parse_objects(text) == [f"thing {number}" for number in range(MAX_OBJECTS)]


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="[]\"'{},:;.-*`\\ \n1aN“”\x00", max_size=200))
def test_any_text_is_read_without_an_error(text):
    found = parse_objects(text)
    assert len(found) <= MAX_OBJECTS
    assert len({name.casefold() for name in found}) == len(found)
    for name in found:
        assert 0 < len(name) <= MAX_CHARACTERS
        assert name.isprintable()
        assert name == name.strip()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.from_regex(r"[b-m]{1,8}( [b-m]{1,8})?", fullmatch=True), max_size=MAX_OBJECTS, unique=True))
def test_a_list_as_asked_for_comes_back(names):
    assert parse_objects(json.dumps(names)) == names
    assert parse_objects(repr(names)) == names
    assert parse_objects("\n".join(f"{number}. {name}" for number, name in enumerate(names, 1))) == names


def test_nothing_that_a_model_writes_is_run(tmp_path):
    made = tmp_path / "made"
    for text in (f"open({str(made)!r}, 'w')", f"[__import__('pathlib').Path({str(made)!r}).touch()]"):
        parse_objects(text)
    assert not made.exists()


# The decoupling.


class Scripted:
    """A model and its tokenizer in one: answers are looked up by words of the prompt, batches are remembered."""

    device = torch.device("cpu")
    chat_template = "there is one"
    bos_token = None

    def __init__(self, answers):
        self.answers, self.batches = answers, []

    def modules(self):
        return []

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert not tokenize
        return messages[0]["content"]

    def __call__(self, texts, padding, padding_side, add_special_tokens, return_tensors):
        assert padding_side == "left"
        self.batches.append(texts)
        ids = torch.arange(len(texts)).unsqueeze(1) + 7
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return SimpleNamespace(to=lambda device: tokens)

    def generate(self, input_ids, attention_mask, max_new_tokens, do_sample, num_beams):
        assert (do_sample, num_beams, max_new_tokens) == (False, 1, 9)
        return torch.cat([input_ids, torch.arange(len(input_ids)).unsqueeze(1) + 100], 1)

    def batch_decode(self, output, skip_special_tokens):
        assert output.shape[1] == 1  # without the prompt
        return [f" {self._answer(self.batches[-1][row - 100])}\n" for (row,) in output.tolist()]

    def _answer(self, prompt):
        return next(answer for words, answer in self.answers if all(word in prompt for word in words))


def test_three_steps_make_a_list():
    model = Scripted(
        [
            (["the dog", "Yes or No"], "Yes."),
            (["the dog", "Which things"], '["dog", "bravery", "ball"]'),
            (['["dog", "bravery", "ball"]', "physical"], '["dog", "ball"]'),
        ]
    )
    (found,) = decouple(model, model, ["Where does the dog go?"], max_new_tokens=9)
    assert found.objects == ("dog", "ball")
    assert found.fell_back is None
    assert found.raw == ("Yes.", '["dog", "bravery", "ball"]', '["dog", "ball"]')
    assert str(found) == "frames are scored by dog, ball"
    assert "dog; ball" in frame_prompt(found)
    assert found.question not in frame_prompt(found)


def test_samples_take_their_steps_together_and_fall_back_apart():
    model = Scripted(
        [
            (["Q-none", "Yes or No"], "no, there is none"),
            (["Q-odd", "Yes or No"], "It depends."),
            (["Yes or No"], "YES"),
            (["Q-unnamed", "Which things"], "null"),
            (["Q-abstract", "Which things"], '["love"]'),
            (["Which things"], "a {cat}"),
            (['["love"]', "physical"], "[]"),
            (['["cat"]', "physical"], "1. cat"),
        ]
    )
    questions = ["Q-none", "Q-fine", "Q-odd", "Q-unnamed", "Q-abstract", "Q {braces} fine"]
    found = decouple(model, model, questions, max_new_tokens=9)
    assert [len(batch) for batch in model.batches] == [6, 4, 3]
    assert [one.question for one in found] == questions
    assert [one.objects for one in found] == [(), ("cat",), (), (), (), ("cat",)]
    assert [one.fell_back for one in found] == [
        "the model says that there is no object to find",
        None,
        "asked whether there is an object to find, the model said neither yes nor no",
        "the model named no object",
        "the model found no physical thing among the objects",
        None,
    ]
    assert [len(one.raw) for one in found] == [1, 3, 1, 2, 3, 3]
    assert str(found[0]) == ("frames are scored by the question itself: the model says that there is no object to find")
    assert "Q-none" in frame_prompt(found[0])


@pytest.mark.parametrize("family", embedded.MODEL_TYPES)
def test_a_random_model_falls_back_and_says_so(family):
    model, processor = embedded.build(family)
    alone = [decouple(model, processor, [q], max_new_tokens=3)[0] for q in (QUESTION, "Where?")]
    assert decouple(model, processor, [QUESTION, "Where?"], max_new_tokens=3) == alone
    for found in alone:
        assert found.objects == ()
        assert "neither yes nor no" in found.fell_back
        assert len(found.raw) == 1


def test_bad_questions_to_decouple(exact):
    model, processor = exact
    assert decouple(model, processor, []) == []
    with pytest.raises(TypeError, match="questions must be a list of texts"):
        decouple(model, processor, QUESTION)
    with pytest.raises(ValueError, match="question 1 is empty"):
        decouple(model, processor, [QUESTION, " "])
    with pytest.raises(ValueError, match="has no chat template"):
        decouple(model, SimpleNamespace(chat_template=None), [QUESTION])
