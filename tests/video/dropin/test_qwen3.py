"""What is peculiar to Qwen3-VL: DeepStack features, and time labels in the prompt."""

import re
from typing import ClassVar

import pytest
import qts_video
import torch
from qts_video.adapters import ADAPTERS
from tiny import (
    IM_END,
    IM_START,
    NEWLINE,
    SYSTEM,
    USER,
    VERSION,
    Image,
    Keep,
    Oracle,
    Video,
    every,
    keep_mask,
    prompt,
    user,
)
from tiny_qwen3 import LABEL, build_model, inputs, label

ADAPTER = ADAPTERS["qwen3_vl"]
MIXED = [
    prompt(user(Image(), Video(3), [30], Video(2, 2, 2), [31, 32])),
    prompt(user([33], Video(4, 2, 2), Image(2, 3), [34])),
]


class Tokenizer:
    """Words with fixed ids; 460 is punctuation that a vocabulary merges with the "<" of a label."""

    words: ClassVar = LABEL | {
        "<|im_start|>": IM_START, "<|im_end|>": IM_END, "user": USER, "system": SYSTEM, "\n": NEWLINE, ":<": 460,
    }  # fmt: skip
    unk_token_id = None

    def convert_tokens_to_ids(self, token):
        return self.words.get(token)

    def encode(self, text, add_special_tokens=True):
        longest_first = sorted(self.words, key=len, reverse=True)
        return [self.words[word] for word in re.findall("|".join(map(re.escape, longest_first)), text)]

    def decode(self, ids):
        pieces = {number: word for word, number in self.words.items()}
        return "".join(pieces.get(number, f" w{number}") for number in ids)


@pytest.fixture(scope="module")
def shared_model():
    return build_model()


def last(model, batch, **options):
    selector = Keep(every(2), scores=True)
    with qts_video.attach(model, selector, **options) as handle, torch.no_grad():
        model(**batch)
    return handle.last, selector.calls[0]


def shuffled(features):
    return [layer.flip(0) for layer in features]


@pytest.mark.parametrize("change", [lambda features: [layer * 0 for layer in features], shuffled], ids=["0", "flip"])
def test_deepstack_matters_to_what_is_tested(model, change):
    """Without its features, or with those of other tokens, the oracle gives something else."""
    batch, selector = inputs(*MIXED), Keep(every(2))
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        output = model(**batch).logits
    ours = output[handle.last.columns >= 0]
    keep = keep_mask(model, batch, selector.kept)
    oracle = Oracle(model, batch, keep)
    torch.testing.assert_close(ours, oracle.logits()[keep], rtol=0, atol=1e-10)
    oracle.extras["deepstack_visual_embeds"] = change(oracle.extras["deepstack_visual_embeds"])
    assert (oracle.logits()[keep] - ours).abs().max() > 1e-3


def test_deepstack_features_are_gathered_for_any_rows_and_columns():
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 11, generator=generator) < 0.6
    layers = [torch.randn(int(mask.sum()), 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    sample = torch.tensor([2, 0, 2, 1])
    columns = torch.tensor([[0, 3, 4, 10, -1], [-1, -1, 0, 1, 2], [10, 9, 9, 0, 5], [-1] * 5])
    given = {"visual_pos_masks": mask, "deepstack_visual_embeds": layers}
    gathered = ADAPTER.gather_extras(given, sample, columns)
    number = {place: index for index, place in enumerate(map(tuple, mask.nonzero().tolist()))}
    places = [[(row, c) for c in wanted] for row, wanted in zip(sample.tolist(), columns.tolist(), strict=True)]
    assert gathered["visual_pos_masks"].tolist() == [[place in number for place in row] for row in places]
    order = [number[place] for row in places for place in row if place in number]
    assert len(order) >= 8
    for ours, layer in zip(gathered["deepstack_visual_embeds"], layers, strict=True):
        assert torch.equal(ours, layer[order])
    assert ADAPTER.gather_extras({"visual_pos_masks": None, "deepstack_visual_embeds": None}, sample, columns) == {}


@pytest.mark.skipif(VERSION < (5,), reason="4.57 takes every time step for a video when it repeats a sample's")
def test_every_beam_keeps_the_deepstack_features_of_its_sample(model):
    batch, seen = inputs(*MIXED), {}

    class Takes(Keep):
        def select(self, videos):
            width = videos.context.layout.columns
            columns = torch.stack([torch.arange(width), torch.arange(width).flip(0)])
            seen["taken"] = videos.context.take(torch.tensor([1, 0]), columns)
            return super().select(videos)

    def capture(module, args, kwargs):
        if kwargs.get("visual_pos_masks") is not None:
            seen["decoder"] = kwargs

    with qts_video.attach(model, Takes(every(2))) as handle:
        hook = model.model.language_model.register_forward_pre_hook(capture, with_kwargs=True)
        model.generate(**batch, num_beams=3, max_new_tokens=2, do_sample=False)
        hook.remove()
        repeated = seen["decoder"]
        taken = seen["taken"]
        with torch.no_grad():
            hook = model.model.language_model.register_forward_pre_hook(capture, with_kwargs=True)
            model(**batch)
            hook.remove()
    once = seen["decoder"]
    mask = once["visual_pos_masks"]
    assert torch.equal(repeated["visual_pos_masks"], mask.repeat_interleave(3, 0))
    for ours, wanted in zip(repeated["deepstack_visual_embeds"], once["deepstack_visual_embeds"], strict=True):
        of_beams = [of_sample for of_sample in wanted.split(mask.sum(1).tolist()) for _ in range(3)]
        torch.testing.assert_close(ours, torch.cat(of_beams), rtol=0, atol=1e-12)
    assert handle.last.kept < handle.last.total
    again = seen["taken"]
    assert torch.equal(taken["visual_pos_masks"], again["visual_pos_masks"])
    for ours, wanted in zip(taken["deepstack_visual_embeds"], again["deepstack_visual_embeds"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
def test_times_are_read_from_the_prompt(model, side):
    """Labels of unequal lengths, a video of one step, and several videos a sample."""
    batch = inputs(
        prompt(user(Video(3, seconds=10.0), [30], Video(1, 2, 2), [31])), prompt(user(Video(2, 2, 2, 0.4))), side=side
    )
    report, videos = last(model, batch, tokenizer=Tokenizer())
    times, areas = [[2.5, 12.5, 22.5], [0.2], [0.1, 0.5]], (6, 4, 4)
    assert report.seconds_from == "prompt"
    for video, wanted in zip(report.videos, map(torch.tensor, times), strict=True):
        assert torch.equal(video.frame_seconds, wanted)
        assert torch.equal(video.seconds, wanted[video.frame])
    expected = [time for of_video, area in zip(times, areas, strict=True) for time in of_video for _ in range(area)]
    assert torch.equal(videos.timestamps, torch.tensor(expected))


def test_the_first_step_starts_at_its_label(model):
    """It is shorter than the others here, so that only reading it tells where it starts."""
    batch = inputs(prompt(user([40, 41], Video(2, 1, 2, seconds=20.0), [30])))
    ids = batch["input_ids"][0].tolist()
    report, videos = last(model, batch, tokenizer=Tokenizer())
    (spans,) = videos.context.layout.frame_spans
    first, second = label(5.0), label(25.0)
    start = next(i for i in range(len(ids)) if ids[i : i + len(first)] == first)
    lengths = [len(first) + 4, len(second) + 4]  # start tag, two tokens, end tag
    assert len(second) == len(first) + 1
    assert spans.tolist() == [[start, start + lengths[0]], [start + lengths[0], start + sum(lengths)]]
    assert report.videos[0].frame_seconds.tolist() == [5.0, 25.0]


def test_a_vocabulary_may_merge_the_start_of_a_label_with_what_stands_before(model):
    batch = inputs(prompt(user([40], Video(2), [30])))
    ids = batch["input_ids"]
    first = (ids == LABEL["<"]).nonzero()[0]
    ids[first[0], first[1]] = Tokenizer.words[":<"]
    report, videos = last(model, batch, tokenizer=Tokenizer())
    assert report.seconds_from == "prompt"
    assert int(videos.context.layout.frame_spans[0][0, 0]) == int(first[1])


@pytest.mark.parametrize("tokenizer", [None, Tokenizer()], ids=["no tokenizer", "a label is missing"])
def test_without_labels_the_default_holds_and_the_report_says_so(model, tokenizer):
    batch = inputs(prompt(user(Video(3, seconds=7.0), [30], Video(2), [31])))
    if tokenizer is not None:
        ids = batch["input_ids"]
        ids[ids == LABEL[" seconds"]] = 40
    report, _ = last(model, batch, tokenizer=tokenizer)
    assert report.seconds_from == "default"
    assert [video.frame_seconds.tolist() for video in report.videos] == [[0.0, 1.0, 2.0], [0.0, 1.0]]


def test_labels_are_not_the_question(model):
    batch = inputs(
        prompt(user([28], Video(3, seconds=10.0), [30, 31], Image(), Video(1), [32])), prompt(user(Video(2), [33]))
    )
    selector = Keep(every(2), needs_question=True)
    with qts_video.attach(model, selector, tokenizer=Tokenizer()), torch.no_grad():
        model(**batch)
    (videos,) = selector.calls
    assert [ids.tolist() for ids in videos.question_ids] == [[28, 30, 31, 32]] * 2 + [[33]]


def test_a_prompt_of_labels_alone_holds_no_question(model):
    selector = Keep(every(2), needs_question=True)
    with (
        qts_video.attach(model, selector, tokenizer=Tokenizer()),
        torch.no_grad(),
        pytest.raises(ValueError, match="holds no text"),
    ):
        model(**inputs(prompt(user(Video(2)))))


def test_positions_grow_block_by_block(model):
    """No step's position says when it is: the same video, ten times as long, has the same positions."""
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    with torch.no_grad():
        for seconds in (0.8, 2.0):
            model(**inputs(prompt(user(Video(3, seconds=seconds), [30]))))
    hook.remove()
    assert torch.equal(*seen)
    assert not ADAPTER.positions_carry_time
