"""QuoTA's scoring: how much each frame helps with the question."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from qts_video import embedded
from qts_video.answer import prepare
from qts_video.attach import attach
from qts_video.methods import Uniform
from qts_video.quota.decouple import Decoupled, decouple
from qts_video.quota.frame_scorer import FRAME_PIXELS, FrameScorer, answer_ids, frame_prompt
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
    assert scorer.questions is None
    pairs = scorer.bind([odd, even], [QUESTION, "Where?"]).score(grids(3, 2))
    assert torch.equal(pairs, torch.stack([a[:2].max(), a[2:4].max(), a[4], b[:2].max(), b[2:].max()]))
    assert pairs.dtype == torch.float32
    shared = scorer.bind([odd, odd], Decoupled((), QUESTION, "no object", ())).score(grids(5, 1))
    assert torch.equal(shared, torch.cat([a, a.max()[None]]))


def test_frames_that_are_not_those_of_the_prompt(exact):
    scorer, frames = FrameScorer(*exact), pictures(5, 28, 28)
    with pytest.raises(RuntimeError, match=r"call scorer\.bind\(frames\) before every prompt"):
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
