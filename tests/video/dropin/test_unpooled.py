"""QuoTA in LLaVA-OneVision on the grid before its pooling: the model's own pooling is then one of its choices."""

import pytest
import qts_video
import torch
import torch.nn.functional as F
from qts_video.adapters import find_adapter
from qts_video.methods import Chain, QuoTA, Uniform
from qts_video.newlines import newline_layout
from tiny import VERSION, Image, Oracle, Video, assistant, keep_mask, prompt, rows, user
from tiny_llava import build_onevision
from tiny_llava import inputs as llava_inputs

from qts_kernels.testing import assert_within_budget

FRAMES = 3
GREEDY = {"max_new_tokens": 4, "do_sample": False}
POSITIONS = pytest.mark.parametrize("position", ["grid", "frame", "one_token"])
NEWLINES = {"grid": lambda side: side, "frame": lambda side: 1, "one_token": lambda side: 0}
"""Of a frame."""
UNEQUAL = (
    prompt(user([40], Video(FRAMES), [30, 31, 32])),
    prompt(user(Video(FRAMES), [33]), assistant(50), user([36])),
)
TWO_VIDEOS = (prompt(user(Image(), Video(FRAMES), [30], Video(FRAMES), [31])),)
SEVERAL = (*TWO_VIDEOS, prompt(user([33], Video(FRAMES), [34])))


@pytest.fixture(scope="module")
def built():
    return build_onevision()


@pytest.fixture
def model(built):
    before = set(built.model.__dict__)
    yield built
    assert set(built.model.__dict__) == before, "a test left something in the model"


def given(position, *samples, pooled=False, patches=5, **options):
    side = (patches + 1) // 2 if pooled else patches
    tokens = (side * side, NEWLINES[position](side), int(position == "one_token"))
    return llava_inputs(*samples, tokens=tokens, patches=patches, **options)


def price(position, side, videos=1):
    """Tokens and newlines of videos whose frames are ``side`` x ``side``."""
    return videos * (FRAMES * (side * side + NEWLINES[position](side)) + (position == "one_token"))


def to_float(batch):
    return {name: value.float() if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize("samples", [UNEQUAL, TWO_VIDEOS], ids=["two samples", "two videos"])
@pytest.mark.parametrize("patches", [2, 3, 5, 6])
@POSITIONS
def test_equal_scores_and_the_pooled_budget_are_the_models_own_pooling(position, patches, samples):
    """The model pools by F.interpolate, as the mode bilinear does."""
    model, side = build_onevision(patches=patches), (patches + 1) // 2
    batch = given(position, *samples, pooled=True, patches=patches)
    with torch.no_grad(), newline_layout(model, position):
        exact = model(**batch).logits
        own = model.generate(**batch, **GREEDY)[:, -4:]
    videos = len(batch["pixel_values_videos"]) // len(samples)
    scores = [1.0] * len(batch["pixel_values_videos"]) * FRAMES
    quota = QuoTA(scores, total_tokens=price(position, side, videos))
    long = given(position, *samples, patches=patches)
    with newline_layout(model, position, pooled=False), qts_video.attach(model, quota, positions="compact") as handle:
        with torch.no_grad():
            ours = model(**long).logits
        assert torch.equal(model.generate(**long, **GREEDY)[:, -4:], own)
    torch.testing.assert_close(ours, exact, rtol=0, atol=1e-10)
    assert [video.grid for video in handle.last.videos] == [(FRAMES, patches, patches)] * len(handle.last.videos)
    assert handle.last.kept == price(position, side, len(handle.last.videos))

    model, batch, long = model.float(), to_float(batch), to_float(long)
    with torch.no_grad():
        with newline_layout(model, position):
            eager = model(**batch).logits
        with newline_layout(model, position, pooled=False), qts_video.attach(model, quota, positions="compact"):
            ours = model(**long).logits
    assert_within_budget(ours, eager, exact)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@POSITIONS
def test_keeping_everything_is_bit_identical(model, position, options):
    """To the model that reads every token of the towers, in a batch, with two videos in a sample where the version can
    repeat them."""
    batch = given(position, *(SEVERAL if VERSION >= (5, 18) or not options else UNEQUAL))
    with newline_layout(model, position, pooled=False), torch.no_grad():
        plain, generated = model(**batch).logits, model.generate(**batch, **GREEDY, **options)
        for kept in ({"retention_ratio": 1.0}, {"total_tokens": price(position, 5, 2)}):
            with qts_video.attach(model, QuoTA([1.0] * 9, **kept)) as handle:
                assert torch.equal(model(**batch).logits, plain)
                assert torch.equal(model.generate(**batch, **GREEDY, **options), generated)
                assert handle.last.kept == handle.last.total == price(position, 5, len(handle.last.videos))


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
@POSITIONS
def test_the_answer_is_that_of_the_resized_frames(model, position, side, positions):
    """Grids by plain Python from the projector's output; the rest by masking."""
    batch, quota = given(position, *SEVERAL, side=side), QuoTA([1, 2, 3, 0, 1, 2, 3, 1, 1], total_tokens=60)
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(lambda module, args, output: seen.append(output))
    with newline_layout(model, position, pooled=False), torch.no_grad():
        with qts_video.attach(model, quota, positions=positions) as handle:
            logits = model(**batch).logits
        hook.remove()
        frames = seen[-1].view(9, 5, 5, -1).permute(0, 3, 1, 2)
        tokens, kept = [], []
        for number, video in enumerate(handle.last.videos):
            for step in range(FRAMES):
                places = video.indices[video.frame == step]
                if len(places):
                    size = [len(set(of[video.frame == step].tolist())) for of in (video.row, video.column)]
                    assert size[0] * size[1] == len(places)
                    resized = F.interpolate(frames[number * FRAMES + step][None], size=size, mode="bilinear")
                    tokens.append(resized[0].flatten(1).T)
                    kept.append(places + number * FRAMES * 25)
        keep = keep_mask(model, batch, torch.cat(kept))
        oracle = Oracle(model, batch, keep, compact=positions == "compact", replaced=torch.cat(tokens))
        wanted = oracle.logits()
    assert len({len(one) for one in tokens}) > 2
    for ours, theirs in zip(rows(logits, handle.last.columns >= 0), rows(wanted, keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@POSITIONS
def test_a_frame_may_have_more_tokens_than_the_pooling_leaves(model, position):
    batch, budget = given(position, *UNEQUAL[:1]), price(position, 3)
    selections = []

    class Watch(QuoTA):
        def select(self, videos):
            selections.append(super().select(videos))
            return selections[-1]

    watch = Watch([3, 1, 1], total_tokens=budget)
    with (
        newline_layout(model, position, pooled=False),
        qts_video.attach(model, watch, positions="compact") as handle,
        torch.no_grad(),
    ):
        model(**batch)
    (video,) = handle.last.videos
    shares, sizes, (unused,) = selections[0].extras
    steps = [int((video.frame == step).sum()) for step in range(FRAMES)]
    assert steps == sizes.prod(1).tolist()
    assert steps[0] > 9 > steps[1]
    assert handle.last.kept == len(video.indices) + video.kept_newlines == budget - unused
    newlines = {"grid": int(sizes[:, 0].sum()), "frame": FRAMES, "one_token": 1}[position]
    assert (video.kept_newlines, video.newlines) == (newlines, price(position, 5) - FRAMES * 25)
    assert int(shares.sum()) == budget - (position == "one_token")
    assert unused < 6  # the price of one more row or column


def test_in_a_chain(model):
    batch = given("grid", *SEVERAL)
    chain = Chain([QuoTA([1.0] * 9, total_tokens=36), Uniform(max_tokens=5)])
    with newline_layout(model, "grid", pooled=False), qts_video.attach(model, chain, positions="compact") as handle:
        assert model.generate(**batch, **GREEDY).shape[0] == 2
    assert [len(video.indices) for video in handle.last.videos] == [5, 5, 5]


def test_who_wants_it():
    """The release merges behind a 2 x 2 pooling, and resizes before it."""
    wanted = {mode: QuoTA([1.0], mode=mode).wants_unpooled for mode in ("bilinear", "merge", "merge_separable")}
    assert wanted == {"bilinear": True, "merge": False, "merge_separable": True}
    assert Chain([QuoTA([1.0]), Uniform()]).wants_unpooled
    assert not Chain([QuoTA([1.0], mode="merge"), Uniform()]).wants_unpooled
    assert not Chain([Uniform(), Uniform()]).wants_unpooled


def test_two_images_and_a_prompt_without_a_video(model):
    """Their tokens are pooled as ever: not at all."""
    batch = given("grid", prompt(user(Image(), [30])), prompt(user([31], Image(), Image())))
    with torch.no_grad():
        plain = model(**batch).logits
        with newline_layout(model, "grid", pooled=False), qts_video.attach(model, QuoTA([])):
            assert torch.equal(model(**batch).logits, plain)


def test_both_grids_are_found_by_their_placeholders(model):
    for position, side in (("grid", 3), ("grid", 5), ("one_token", 3), ("one_token", 5)):
        batch = given(position, *SEVERAL, pooled=side == 3)
        layout = find_adapter(model).locate(model, batch["input_ids"], batch["attention_mask"].bool(), batch, None)
        assert layout.grids == [(FRAMES, side, side)] * 3
    assert "apply_pooling" not in model.model.__dict__
