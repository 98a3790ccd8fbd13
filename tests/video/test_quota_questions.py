"""QuoTA with a scorer that reads text: whose question it is given, and what the report says of it."""

from types import SimpleNamespace

import pytest
import torch
from clips import write_clip
from qts_video import embedded
from qts_video.answer import answer, prepare
from qts_video.attach import attach
from qts_video.methods import Chain, QuoTA, Uniform, Videos
from qts_video.quota import decouple as decoupling
from qts_video.quota.decouple import Decoupled
from qts_video.quota.frame_scorer import FrameScorer
from qts_video.video import Video

QUESTION = "Which colour is the shape that moves?"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def built():
    return embedded.build("qwen2_5_vl")


class Reads:
    """A scorer that remembers what it was asked."""

    reads_text, questions = True, None

    def score(self, videos, questions):
        self.asked = questions
        return torch.ones(sum(t for t, _, _ in videos.grids))


class Letters:
    """A tokenizer of single characters."""

    chat_template = "there is one"

    def decode(self, ids, skip_special_tokens):
        assert skip_special_tokens
        return "".join(map(chr, ids))


def made_up(question):
    return Decoupled(("dog",), question, None, ()) if "dog" in question else Decoupled((), question, "it says so", ())


@pytest.fixture
def calls(monkeypatch):
    """What was decoupled, call by call."""
    seen = []

    def decouple(model, processor, questions):
        seen.append((model, processor, list(questions)))
        return [made_up(question) for question in questions]

    monkeypatch.setattr(decoupling, "decouple", decouple)
    return seen


def videos_of(*questions, tokenizer):
    number = len(questions)
    return Videos(
        tokens=torch.zeros(8 * number, 4),
        cu_seqlens=torch.arange(0, 8 * number + 1, 8, dtype=torch.int32),
        lengths=[8] * number,
        grids=[(2, 2, 2)] * number,
        timestamps=torch.zeros(8 * number),
        sample=list(range(number)),
        question_ids=[torch.tensor([ord(c) for c in question]) for question in questions],
        context=SimpleNamespace(model="the model", tokenizer=tokenizer),
    )


def test_each_question_is_decoupled_once_by_the_attached_model(calls):
    letters, scorer = Letters(), Reads()
    selector = QuoTA(scorer, 4)
    assert selector.needs_question
    selection = selector.select(videos_of("where is the dog?", " why? ", "where is the dog?", tokenizer=letters))
    assert calls == [("the model", letters, ["where is the dog?", "why?"])]
    assert scorer.asked == [made_up("where is the dog?"), made_up("why?"), made_up("where is the dog?")]
    assert selection.notes == (
        "frames are scored by dog (video 0, 2)",
        "frames are scored by the question itself: it says so (video 1)",
    )
    assert QuoTA(scorer, 4).select(videos_of("why?", tokenizer=letters)).notes == (
        "frames are scored by the question itself: it says so",
    )


def test_a_processor_is_asked_and_its_tokenizer_reads(calls):
    processor = SimpleNamespace(tokenizer=Letters(), chat_template="another one")
    QuoTA(Reads(), 4).select(videos_of("why?", tokenizer=processor))
    assert calls == [("the model", processor, ["why?"])]


def test_without_decoupling_the_scorer_is_asked_the_question(calls):
    scorer = Reads()
    selector = QuoTA(scorer, 4, decouple=False)
    assert selector.needs_question
    selection = selector.select(videos_of("a dog?", tokenizer=SimpleNamespace(tokenizer=Letters())))
    assert (calls, scorer.asked) == ([], ["a dog?"])
    assert selection.notes == ("frames are scored by the question itself",)


def test_bound_questions_take_the_place_of_the_prompts(calls):
    scorer = Reads()
    scorer.questions = ["a dog?", given := Decoupled(("cat",), "a dog?", None, ())]
    assert not QuoTA(scorer, 4).needs_question
    letters = Letters()
    QuoTA(scorer, 4).select(videos_of("x", "y", tokenizer=letters))
    assert calls == [("the model", letters, ["a dog?"])]
    assert scorer.asked == [made_up("a dog?"), given]
    scorer.questions = [given, given]
    QuoTA(scorer, 4).select(videos_of("x", "y", tokenizer=None))  # there is nothing to ask
    assert len(calls) == 1
    scorer.questions = ["a dog?", "why?"]
    QuoTA(scorer, 4, decouple=False).select(videos_of("x", "y", tokenizer=None))
    assert scorer.asked == ["a dog?", "why?"]


def test_other_scorers_read_no_text(calls):
    for scorer in ([1.0, 1.0], "relevance"):
        selector = QuoTA(scorer, 4)
        assert selector.needs_question == (scorer == "relevance")
        selector.check_tokenizer(None)
    assert QuoTA([1.0, 1.0], 4).select(videos_of("why?", tokenizer=None)).notes == ()
    assert calls == []


def test_nothing_is_asked_where_everything_stays(calls):
    scorer = Reads()
    assert QuoTA(scorer, 8).select(videos_of("why?", tokenizer=None)).notes == ()
    assert calls == []


def test_what_is_missing_is_said_before_anything_is_asked(calls, built):
    model, processor = built
    scorer = FrameScorer(model, processor)
    for tokenizer, got in ((None, "none"), (SimpleNamespace(), "SimpleNamespace, which has no chat template")):
        for selector in (QuoTA(scorer), Chain([QuoTA(scorer), Uniform()])):
            with pytest.raises(ValueError, match=rf"tokenizer=processor\), or .* with decouple=False \(got {got}\)"):
                attach(model, selector, tokenizer=tokenizer)
    assert not hasattr(model, "_qts_video_attachment")
    with pytest.raises(ValueError, match=r"reads the question as text: give attach\(.*or scorer\.bind\(frames, ques"):
        QuoTA(Reads(), 4, decouple=False).select(videos_of("why?", tokenizer=None))
    with pytest.raises(RuntimeError, match=r"call scorer\.bind\(frames\) before every prompt"):
        QuoTA(scorer, 4).select(videos_of("why?", tokenizer=Letters()))
    assert calls == []


def film():
    frames = torch.randint(0, 256, (6, 3, 56, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Video(frames, [i / 2 for i in range(6)], 2.0, list(range(6)), 6, 3.0, "made up", "none")


@pytest.mark.parametrize("family", embedded.MODEL_TYPES)
def test_the_model_that_answers_decouples_in_the_middle_of_its_prefill(family, monkeypatch):
    """The scores, and the answer, are those of given scores; the report says what frames were scored by."""
    model, processor = embedded.build(family)
    video = film()
    inputs = prepare(processor, video, QUESTION, model)
    decouple, asked = decoupling.decouple, []

    def short(model, processor, questions):
        asked.append(questions)
        return decouple(model, processor, questions, max_new_tokens=2)

    monkeypatch.setattr(decoupling, "decouple", short)
    scorer = FrameScorer(model, processor)
    scorer.bind([video.frames])
    result = answer(model, processor, inputs, QuoTA(scorer, retention_ratio=0.5), max_new_tokens=3)
    assert asked == [[QUESTION]]
    note = result.report.notes[0]
    assert note == str(decouple(model, processor, [QUESTION], max_new_tokens=2)[0])
    assert note in str(result.report).splitlines()
    scores = scorer.scores_for(video.frames, QUESTION)
    steps = result.report.videos[0].grid[0]
    by_step = scores.view(steps, -1).amax(1)
    given = answer(model, processor, inputs, QuoTA(by_step, retention_ratio=0.5), max_new_tokens=3)
    assert given.text == result.text
    assert torch.equal(given.report.videos[0].indices, result.report.videos[0].indices)
    assert not any("scored" in note for note in given.report.notes)


def test_what_no_frame_can_use_is_in_the_notes():
    videos = videos_of("", "", tokenizer=None)
    videos.newline_spans = [2, 2]
    selection = QuoTA([1.0] * 4, total_tokens=5).select(videos)  # a grid and its newlines take 0, 2, 3 or 6
    assert selection.extras[2].tolist() == [0, 0]
    assert selection.notes == ()
    selection = QuoTA([1.0] * 4, total_tokens=7).select(videos)
    assert selection.extras[2].tolist() == [1, 1]
    assert selection.notes == (
        "no frame can use 1 of the 7 tokens of the budget of sample 0",
        "no frame can use 1 of the 7 tokens of the budget of sample 1",
    )
    videos.sample = [0, 0]
    assert QuoTA([1.0] * 4, total_tokens=13).select(videos).notes == (
        "no frame can use 1 of the 13 tokens of the budget",
    )


def test_notes_of_a_chain_add_up():
    class Says(Uniform):
        def select(self, videos):
            selection = super().select(videos)
            selection.notes = ("a second thing",)
            return selection

    videos = videos_of("", tokenizer=None)
    videos.context, videos.newline_spans = None, [2]
    chain = Chain([QuoTA([1.0] * 2, total_tokens=7), Says()])
    assert chain.select(videos).notes == ("no frame can use 1 of the 7 tokens of the budget", "a second thing")
    assert chain.drops_empty_steps
    assert not Chain([Uniform()]).drops_empty_steps


def test_a_film_is_read_with_the_methods_own_numbers(tmp_path):
    path = write_clip(tmp_path / "clip.mp4", frames=48, rate=12)  # 4 seconds
    video = QuoTA([1.0], base_frames=3, extra_frames_per_hour=1800).read(path)
    assert video.frame_indices == [0, 12, 24, 35, 47]
    assert len(QuoTA([1.0], base_frames=3, extra_frames_per_hour=1800, max_frames=4).read(path).frames) == 4
    assert QuoTA([1.0], base_frames=2).read(path, max_pixels=28 * 28).frames.shape[-1] < video.frames.shape[-1]
    selector = QuoTA([1.0])
    assert (selector.base_frames, selector.extra_frames_per_hour, selector.max_frames) == (96, 64, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"base_frames": 0}, "base_frames must be at least 1, got 0"),
        ({"extra_frames_per_hour": -1}, "extra_frames_per_hour must be at least 0 and finite, got -1"),
        ({"max_frames": 0}, "max_frames must be at least 1, got 0"),
    ],
)
def test_bad_numbers_of_frames(options, message):
    with pytest.raises(ValueError, match=message):
        QuoTA([1.0], **options)


def test_the_signature():
    selector = QuoTA([1.0], 100, "merge", 3, 8, 10, 20, False, False, 0.5)
    assert repr(selector) == (
        "QuoTA(GivenScores, total_tokens=100, mode='merge', power=3, base_frames=8, extra_frames_per_hour=10, "
        "max_frames=20, decouple=False, include_newlines=False, retention_ratio=0.5)"
    )
