"""QuoTA's scoring: how many frames, which objects, and how much each frame helps."""

import json
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
from clips import write_clip
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video import embedded
from qts_video.answer import prepare
from qts_video.attach import attach
from qts_video.methods import Uniform
from qts_video.quota.decouple import Decoupled, decouple
from qts_video.quota.frame_scorer import FRAME_PIXELS, FrameScorer, answer_ids, frame_prompt
from qts_video.quota.objects import MAX_CHARACTERS, MAX_OBJECTS, MAX_WORDS, parse_objects
from qts_video.quota.sampler import number_of_frames, read_sampled
from qts_video.quota.score_cache import model_fingerprint
from qts_video.video import Video

QUESTION = "Which colour is the shape that moves?"
# The model computes in float64; its two logits, their difference and the score are rounded to float32.
ROUNDING = 8 * torch.finfo(torch.float32).eps


def pictures(number, height=56, width=84, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (number, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exact():
    """A small Qwen2.5-VL in float64, and its processor."""
    model, processor = embedded.build("qwen2_5_vl")
    return model.double(), processor


@pytest.fixture
def calls(exact):
    """The batch sizes that the model is run with."""
    seen = []
    hook = exact[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    yield seen
    hook.remove()


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


# The scores.


def reference(model, processor, frame, question):
    """P(A) / (P(A) + P(B)) by one plain forward of one frame, without generate(), batch or padding."""
    content = [{"type": "image"}, {"type": "text", "text": frame_prompt(question)}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = processor(text=[text], images=[frame], return_tensors="pt")
    inputs["pixel_values"] = inputs["pixel_values"].double()
    with torch.no_grad():
        probabilities = model(**inputs).logits[0, -1].softmax(-1)
    vocabulary = processor.tokenizer.get_vocab()
    yes, no = probabilities[vocabulary["A"]], probabilities[vocabulary["B"]]
    return float(yes / (yes + no))


@pytest.mark.parametrize("question", [QUESTION, Decoupled(("red car", "dog"), QUESTION, None, ())])
def test_scores_are_the_probabilities_of_a_forward_of_each_frame(exact, question):
    frames = [*pictures(2), *pictures(1, 84, 112, seed=1), *pictures(2, 28, 140, seed=2)]  # padded in a batch
    expected = torch.tensor([reference(*exact, frame, question) for frame in frames], dtype=torch.float64)
    assert (expected.max() - expected.min()) > 1e-3  # they differ between frames
    for batch_size in (1, 3, 64):
        scores = FrameScorer(*exact, batch_size=batch_size).scores_for(frames, question)
        assert (scores.dtype, scores.device.type) == (torch.float32, "cpu")
        assert (scores.double() - expected).abs().max() < ROUNDING


def test_objects_and_question_are_asked_differently(exact):
    scorer, frames = FrameScorer(*exact), pictures(2)
    by_question = scorer.scores_for(frames, QUESTION)
    fell_back = Decoupled((), QUESTION, "the model named no object", ())
    assert torch.equal(scorer.scores_for(frames, fell_back), by_question)
    assert not torch.equal(scorer.scores_for(frames, Decoupled(("dog",), QUESTION, None, ())), by_question)


@pytest.mark.parametrize("family", embedded.MODEL_TYPES)
def test_every_family_scores_frames_one_by_one_as_in_a_batch(family):
    model, processor = embedded.build(family)
    model = model.double()
    frames = [*pictures(2), *pictures(1, 112, 84, seed=1)]
    scores = FrameScorer(model, processor).scores_for(frames, QUESTION)
    alone = [FrameScorer(model, processor).scores_for([frame], QUESTION) for frame in frames]
    assert (scores - torch.cat(alone)).abs().max() < ROUNDING
    assert len(set(scores.tolist())) == 3


def test_large_frames_are_shrunk_before_the_processor_has_them(exact, monkeypatch):
    model, processor = exact
    sizes, process = [], type(processor).__call__

    def spy(self, *args, images, **kwargs):
        sizes.extend(tuple(picture.shape) for (picture,) in images)
        return process(self, *args, images=images, **kwargs)

    monkeypatch.setattr(type(processor), "__call__", spy)
    frames = pictures(2, 224, 448)
    small = FrameScorer(model, processor, max_pixels=112 * 112).scores_for(frames, QUESTION)
    as_it_is = FrameScorer(model, processor, max_pixels=None).scores_for(frames, QUESTION)
    by_default = FrameScorer(model, processor).scores_for(frames, QUESTION)
    assert sizes == [(3, 56, 140)] * 2 + [(3, 224, 448)] * 4
    assert FRAME_PIXELS > 224 * 448
    assert torch.equal(as_it_is, by_default)
    assert not torch.equal(as_it_is, small)


def test_floating_point_frames_are_rounded(exact):
    scorer, frames = FrameScorer(*exact), pictures(2)
    expected = scorer.scores_for(frames, QUESTION)
    assert torch.equal(scorer.scores_for(frames.float() + 0.25, QUESTION), expected)


class Vocabulary:
    """A tokenizer of these entries; other text is one unknown token a character."""

    unk_token_id = 0

    def __init__(self, **entries):
        self.entries = {name.replace("_", " "): number for name, number in entries.items()}

    def encode(self, text, add_special_tokens):
        return [self.entries[text]] if text in self.entries else [0] * len(text)

    def convert_tokens_to_ids(self, token):
        return self.entries.get(token, 0)


def test_a_spelling_counts_where_both_letters_have_it():
    assert answer_ids(Vocabulary(A=5, B=6)) == ([5], [6])
    assert answer_ids(Vocabulary(A=5, B=6, _A=7, _B=3)) == ([5, 7], [3, 6])
    assert answer_ids(Vocabulary(A=5, B=6, _A=7)) == ([5], [6])
    with pytest.raises(ValueError, match="no single tokens for the answers A and B"):
        answer_ids(Vocabulary(A=5, _B=6))


def test_bad_scorers_and_frames(exact):
    model, processor = exact
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        FrameScorer(model, processor, batch_size=0)
    with pytest.raises(ValueError, match="max_pixels must be at least 1, got 0"):
        FrameScorer(model, processor, max_pixels=0)
    with pytest.raises(ValueError, match="this one has no image_processor"):
        FrameScorer(model, processor.tokenizer)
    with pytest.raises(ValueError, match="must be in eval mode"):
        FrameScorer(SimpleNamespace(training=True), processor)
    scorer = FrameScorer(model, processor)
    with pytest.raises(ValueError, match="there are no frames"):
        scorer.scores_for(pictures(0), QUESTION)
    with pytest.raises(ValueError, match=r"a frame must be \[3, H, W\], got \[56, 84, 3\]"):
        scorer.scores_for(pictures(2).permute(0, 2, 3, 1), QUESTION)
    with pytest.raises(TypeError, match=r"got torch\.int64"):
        scorer.scores_for(pictures(2).long(), QUESTION)
    with pytest.raises(ValueError, match="the question is empty"):
        scorer.scores_for(pictures(2), " ")


def test_a_checkpoint_becomes_a_scorer(tmp_path):
    embedded.save(tmp_path)
    model, _ = embedded.build()
    scorer = FrameScorer.from_pretrained(str(tmp_path), dtype=torch.float64, batch_size=2)
    frames = pictures(3)
    assert scorer.batch_size == 2
    expected = FrameScorer(model.double(), scorer.processor).scores_for(frames, QUESTION)
    assert (scorer.scores_for(frames, QUESTION) - expected).abs().max() < ROUNDING
    with pytest.raises(FileNotFoundError, match="absent: no such folder"):
        FrameScorer.from_pretrained(str(tmp_path / "absent"))


# The cache.


def test_a_second_run_scores_nothing(exact, calls, tmp_path):
    model, processor = exact
    frames = pictures(3)
    first = FrameScorer(model, processor, batch_size=2, cache_dir=tmp_path / "a" / "b").scores_for(frames, QUESTION)
    assert calls == [2, 1]
    again = FrameScorer(model, processor, batch_size=64, cache_dir=tmp_path / "a" / "b")
    assert torch.equal(again.scores_for(list(frames), QUESTION), first)
    assert torch.equal(again.scores_for(frames.float(), QUESTION), first)
    assert calls == [2, 1]
    (file,) = (tmp_path / "a" / "b").iterdir()  # no temporary file is left
    kept = json.loads(file.read_text())
    assert kept["scores"] == first.tolist()
    assert kept["prompt"] == frame_prompt(QUESTION)


def test_what_changes_the_scores_is_scored_again(exact, calls, tmp_path):
    model, processor = exact
    frames = pictures(2)
    scorer = FrameScorer(model, processor, cache_dir=tmp_path)

    def misses(scorer, *arguments):
        before = len(calls)
        scorer.scores_for(*arguments)
        return len(calls) > before

    assert misses(scorer, frames, QUESTION)
    assert not misses(scorer, frames, QUESTION)
    assert misses(scorer, frames, QUESTION + " And when?")
    assert misses(scorer, frames, Decoupled(("dog",), QUESTION, None, ()))
    changed = frames.clone()
    changed[1, 2, 55, 83] ^= 1
    assert misses(scorer, changed, QUESTION)
    assert misses(scorer, frames.flip(0), QUESTION)
    assert misses(scorer, frames[:1], QUESTION)
    assert misses(scorer, frames.view(2, 3, 84, 56), QUESTION)  # the same bytes in another shape
    assert misses(FrameScorer(model, processor, max_pixels=28 * 28, cache_dir=tmp_path), frames, QUESTION)
    assert not misses(FrameScorer(model, processor, batch_size=1, cache_dir=tmp_path), frames, QUESTION)
    patches = processor.image_processor.size
    try:
        processor.image_processor.size = {**dict(patches), "shortest_edge": 16 * 28 * 28}
        assert misses(scorer, frames, QUESTION)
    finally:
        processor.image_processor.size = patches
    assert not misses(scorer, frames, QUESTION)


def test_other_models_have_other_fingerprints(tmp_path):
    model, _ = embedded.build()
    before = model_fingerprint(model)
    assert model_fingerprint(embedded.build()[0]) == before
    loaded = [type(model).from_pretrained(embedded.save(tmp_path / name)) for name in ("one", "another")]
    assert model_fingerprint(loaded[0]) == model_fingerprint(loaded[1])
    assert model_fingerprint(embedded.build(seed=1)[0]) != before
    assert model_fingerprint(embedded.build()[0].bfloat16()) != before
    for parameter in (model.lm_head.weight, model.model.visual.blocks[0].norm1.weight):
        with torch.no_grad():
            parameter.mul_(1.01)
        after = model_fingerprint(model)
        assert after != before
        before = after


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"scores": 3}',
        b'{"scores": [0.5]}',
        b'{"scores": [0.5, "0.5"]}',
        b'{"scores": [0.5, NaN]}',
        b'{"scores": [0.5, 1.5]}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
    ],
)
def test_a_damaged_file_is_reported_and_written_anew(exact, calls, tmp_path, content):
    frames = pictures(2, 28, 28)
    scorer = FrameScorer(*exact, cache_dir=tmp_path)
    expected = scorer.scores_for(frames, QUESTION)
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=rf"{file.name} is damaged \(.*\): its frames are scored again"):
        assert torch.equal(scorer.scores_for(frames, QUESTION), expected)
    assert calls == [2, 2]
    assert file.read_bytes() == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scorer.scores_for(frames, QUESTION)
    assert calls == [2, 2]


def test_a_write_that_fails_leaves_nothing_behind(exact, tmp_path, monkeypatch):
    scorer = FrameScorer(*exact, cache_dir=tmp_path)

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(json, "dump", fail)
    with pytest.raises(OSError, match="no space left"):
        scorer.scores_for(pictures(1, 28, 28), QUESTION)
    assert list(tmp_path.iterdir()) == []


# Scores of a prompt's videos.


def grids(*steps):
    return SimpleNamespace(grids=[(count, 2, 3) for count in steps])


def test_a_step_has_the_best_score_of_its_frames(exact):
    scorer = FrameScorer(*exact)
    odd, even = pictures(5), pictures(4, 28, 56, seed=1)
    a, b = scorer.scores_for(odd, QUESTION), scorer.scores_for(even, "Where?")
    one_each = scorer.bind([odd, even], [QUESTION, "Where?"]).score(grids(5, 4))
    assert torch.equal(one_each, torch.cat([a, b]))
    assert scorer.questions == [QUESTION, "Where?"]
    pairs = scorer.bind([odd, even], [QUESTION, "Where?"]).score(grids(3, 2))
    assert torch.equal(pairs, torch.stack([a[:2].max(), a[2:4].max(), a[4], b[:2].max(), b[2:].max()]))
    assert pairs.dtype == torch.float32
    shared = scorer.bind([odd, odd], Decoupled((), QUESTION, "no object", ())).score(grids(5, 1))
    assert torch.equal(shared, torch.cat([a, a.max()[None]]))


def test_frames_that_are_not_those_of_the_prompt(exact):
    scorer, frames = FrameScorer(*exact), pictures(5, 28, 28)
    with pytest.raises(RuntimeError, match=r"call scorer\.bind\(frames, question\) before every prompt"):
        scorer.score(grids(5))
    scorer.bind([frames], QUESTION)
    with pytest.raises(ValueError, match="the frames of 1 videos were bound, and the prompt has 2"):
        scorer.score(grids(5, 5))
    for steps in (4, 6):
        with pytest.raises(ValueError, match=f"5 frames were bound for video 0, which has {steps} time steps"):
            scorer.score(grids(steps))
    assert len(scorer.score(grids(5))) == 5  # what was bound is still there
    with pytest.raises(RuntimeError, match="has no pictures"):
        scorer.score(grids(5))
    with pytest.raises(TypeError, match="a list with the frames of each video, got one tensor"):
        scorer.bind(frames, QUESTION)
    with pytest.raises(ValueError, match="expected one question, or one for each of 1 videos, got 2"):
        scorer.bind([frames], [QUESTION, QUESTION])
    with pytest.raises(ValueError, match="the question is empty"):
        scorer.bind([frames], [""])
    with pytest.raises(ValueError, match=r"a frame must be \[3, H, W\]"):
        scorer.bind([frames.permute(0, 2, 3, 1)], QUESTION)


class AsksWhileItSelects(Uniform):
    """Decouples the question and scores the frames with the model that it is attached to, then selects."""

    def __init__(self, scorer, **budget):
        super().__init__(**budget)
        self.scorer = scorer
        self.scores = None

    def select(self, videos):
        model = videos.context.model
        self.decoupled = decouple(model, self.scorer.processor, [QUESTION], max_new_tokens=2)
        self.scores = self.scorer.score(videos)
        return super().select(videos)


def generated_logits(model, prompt, selector):
    """Of 4 tokens [4, V], with ``selector`` attached, and its handle."""
    pixels = {name: value.double() for name, value in prompt.items() if name.startswith("pixel_values")}
    with attach(model, selector) as handle:
        output = model.generate(
            **{**prompt, **pixels},
            max_new_tokens=4,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=None,
        )
    return torch.cat(output.logits), handle.last


@pytest.mark.parametrize("family", embedded.MODEL_TYPES)
def test_asking_the_model_in_the_middle_of_its_prefill_changes_nothing(family):
    model, processor = embedded.build(family)
    model = model.double()
    frames = pictures(6)
    video = Video(frames, [i / 2 for i in range(6)], 2.0, list(range(6)), 6, 3.0, "made up", "none")
    prompt = prepare(processor, video, QUESTION)
    scorer = FrameScorer(model, processor).bind([frames], QUESTION)
    asking = AsksWhileItSelects(scorer, retention_ratio=0.5)
    expected, _ = generated_logits(model, prompt, Uniform(retention_ratio=0.5))
    got, report = generated_logits(model, prompt, asking)
    assert got.shape[0] == 4
    assert (got - expected).abs().max() < 1e-6  # generate() returns them as float32
    assert report.retention_ratio < 0.6
    of_frame = scorer.scores_for(frames, QUESTION)
    steps = report.videos[0].grid[0]
    assert (asking.scores - of_frame.view(steps, -1).amax(1)).abs().max() < ROUNDING
    assert "neither yes nor no" in asking.decoupled[0].fell_back


def test_positions_of_a_running_generation_are_put_back(exact):
    model, processor = exact
    frames = pictures(4)
    inputs = processor(
        text=["<|vision_start|><|video_pad|><|vision_end|> What happens?"], videos=[frames], return_tensors="pt"
    )
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].double()
    model.generate(**inputs, max_new_tokens=1, do_sample=False)
    before = model.model.rope_deltas
    decouple(model, processor, [QUESTION, "Where?"], max_new_tokens=2)
    FrameScorer(model, processor).scores_for(frames, QUESTION)
    assert model.model.rope_deltas is before
    assert int(before) != 0
