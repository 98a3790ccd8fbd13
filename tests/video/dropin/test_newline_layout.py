"""``newline_layout``: transformers' LLaVA-OneVision with the newlines that LLaVA-Video was trained with."""

import copy

import pytest
import qts_video
import torch
from qts_video.newlines import newline_layout
from tiny import VERSION, VIDEO, Image, Keep, Oracle, Video, assistant, every, keep_mask, prompt, rows, user
from tiny_llava import TOKENS, build_next, build_onevision, walk
from tiny_llava import inputs as llava_inputs


@pytest.fixture(scope="module")
def built():
    return build_onevision()


@pytest.fixture
def onevision(built):
    assert not {"get_video_features", "apply_pooling"} & set(built.model.__dict__)
    yield built
    assert "apply_pooling" not in built.model.__dict__
    left = "get_video_features" in built.model.__dict__
    built.model.__dict__.pop("get_video_features", None)
    assert not left, "a test left a newline layout in the model"


def given(position, *samples, **options):
    return llava_inputs(*samples, tokens=TOKENS[position], patches=5, **options)


TWO = (prompt(user(Image(), Video(3), [30], Video(3), [31])), prompt(user([33], Video(3), [34])))


def decoder_embeddings(model, run):
    seen = []

    def capture(module, args, kwargs):
        seen.append(kwargs["inputs_embeds"])

    hook = model.model.language_model.register_forward_pre_hook(capture, with_kwargs=True)
    with torch.no_grad():
        run()
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token"])
def test_the_model_sees_its_newlines_where_they_belong(onevision, position, way):
    plain = given("one_token", *TWO)
    embeddings = decoder_embeddings(onevision, lambda: onevision(**plain))
    contents = embeddings[plain["input_ids"] == VIDEO].view(3, 28, -1)
    newline = onevision.model.image_newline.detach()
    assert torch.equal(contents[:, -1], newline.expand(3, -1))
    wanted = [
        newline if isinstance(what, frozenset) else video[what[0] * 9 + what[1] * 3 + what[2]]
        for video in contents
        for what in walk((3, 3, 3), position)
    ]
    batch = given(position, *TWO)
    with newline_layout(onevision, position):
        run = {
            "forward": lambda: onevision(**batch),
            "generate": lambda: onevision.generate(**batch, max_new_tokens=1, do_sample=False),
        }[way]
        ours = decoder_embeddings(onevision, run)
    assert torch.equal(ours[batch["input_ids"] == VIDEO], torch.stack(wanted))


UNPOOLED = {"grid": (25, 5, 0), "frame": (25, 1, 0), "one_token": (25, 0, 1)}


def unpooled(position, *samples, **options):
    return llava_inputs(*samples, tokens=UNPOOLED[position], patches=5, **options)


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token"])
def test_unpooled_the_model_sees_what_its_projector_gave(onevision, position, way):
    seen = []
    hook = onevision.model.multi_modal_projector.register_forward_hook(
        lambda module, args, output: seen.append(output.detach())
    )
    batch = unpooled(position, *TWO)
    with newline_layout(onevision, position, pooled=False):
        run = {
            "forward": lambda: onevision(**batch),
            "generate": lambda: onevision.generate(**batch, max_new_tokens=1, do_sample=False),
        }[way]
        ours = decoder_embeddings(onevision, run)
    hook.remove()
    frames, newline = seen[-1].view(3, 3, 5, 5, -1), onevision.model.image_newline.detach()
    wanted = [
        newline if isinstance(what, frozenset) else video[what]
        for video in frames
        for what in walk((3, 5, 5), position)
    ]
    assert torch.equal(ours[batch["input_ids"] == VIDEO], torch.stack(wanted))


def test_an_error_leaves_the_pooling_in_place(onevision):
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    pixels = given("grid", *TWO)["pixel_values_videos"]
    pool = onevision.model.apply_pooling
    onevision.model.apply_pooling = mine = lambda features: pool(features)
    with newline_layout(onevision, "grid", pooled=False):
        with pytest.raises((ValueError, RuntimeError)):
            onevision.model.get_video_features(pixels[:, :, :1], **options)
        assert onevision.model.apply_pooling is mine
        onevision.model.get_video_features(pixels, **options)
        assert onevision.model.apply_pooling is mine
    del onevision.model.apply_pooling


def test_leaving_the_block_leaves_nothing(onevision):
    plain, batch = given("one_token", *TWO), given("grid", *TWO)
    with torch.no_grad():
        logits = onevision(**plain).logits
        with newline_layout(onevision, "grid"):
            assert onevision(**batch).logits.shape[1] > logits.shape[1]
            with pytest.raises((ValueError, RuntimeError), match="do not match"):
                onevision(**plain)
        layout = newline_layout(onevision, "one_token")
        assert torch.equal(onevision(**plain).logits, logits)
        layout.remove()
        layout.remove()
        assert torch.equal(onevision(**plain).logits, logits)
        with pytest.raises((ValueError, RuntimeError), match="do not match"):
            onevision(**batch)
        with newline_layout(onevision, "grid", pooled=False):
            assert onevision(**unpooled("grid", *TWO)).logits.shape[1] > batch["input_ids"].shape[1]
            with pytest.raises((ValueError, RuntimeError), match="do not match"):
                onevision(**batch)
        assert torch.equal(onevision(**plain).logits, logits)


@pytest.mark.parametrize("attached_first", [True, False])
def test_layouts_and_selectors_go_in_and_out_in_any_order(onevision, attached_first):
    batch, logits = given("grid", *TWO), []
    for leave_first in ("selector", "layout"):
        selector = Keep(every(7))
        enter = [lambda: newline_layout(onevision, "grid"), lambda s=selector: qts_video.attach(onevision, s)]
        layout, handle = [make() for make in (reversed(enter) if attached_first else enter)][
            :: -1 if attached_first else 1
        ]
        with torch.no_grad():
            logits.append(onevision(**batch).logits)
            keep = keep_mask(onevision, batch, selector.kept)
            (handle if leave_first == "selector" else layout).remove()
            (layout if leave_first == "selector" else handle).remove()
        assert keep.sum() < batch["attention_mask"].sum()
    assert torch.equal(*logits)
    with torch.no_grad(), newline_layout(onevision, "grid"):
        wanted = Oracle(onevision, batch, keep).logits()
    with qts_video.attach(onevision, Keep(every(7))) as handle, newline_layout(onevision, "grid"), torch.no_grad():
        onevision(**batch)
    for ours, theirs in zip(rows(logits[0], handle.last.columns >= 0), rows(wanted, keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("pooled", [True, False])
def test_a_deep_copy_has_a_layout_of_its_own(onevision, pooled):
    batch = (given if pooled else unpooled)("grid", *TWO)
    with torch.no_grad():
        with newline_layout(onevision, "grid", pooled):
            logits = onevision(**batch).logits
            copied = copy.deepcopy(onevision)
        onevision.model.image_newline.mul_(2)
        assert torch.equal(copied(**batch).logits, logits)
        onevision.model.image_newline.div_(2)
        copied.model.image_newline.mul_(2)
        assert not torch.equal(copied(**batch).logits, logits)


def test_gradients_reach_the_newline(onevision):
    with newline_layout(onevision, "frame"):
        onevision(**given("frame", *TWO)).logits.sum().backward()
    gradient = onevision.model.image_newline.grad
    onevision.zero_grad(set_to_none=True)
    assert gradient.abs().sum() > 0


def test_wrong_layouts_raise(onevision):
    with pytest.raises(ValueError, match="always writes a newline behind a video"):
        newline_layout(onevision, "no_token")
    with pytest.raises(ValueError, match="always writes a newline behind a video"):
        newline_layout(onevision, "no_token", pooled=False)
    with pytest.raises(ValueError, match="one of grid, frame, one_token, got 'row'"):
        newline_layout(onevision, "row")
    with pytest.raises(TypeError, match="expected a LlavaOnevisionForConditionalGeneration, got LlavaOnevisionModel"):
        newline_layout(onevision.model, "grid")
    with pytest.raises(TypeError, match="got LlavaNextVideoForConditionalGeneration"):
        newline_layout(build_next(), "grid")
    layout = newline_layout(onevision, "grid")
    with pytest.raises(RuntimeError, match="a newline layout already"):
        newline_layout(onevision, "frame")
    onevision.model.get_video_features = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="replaced after newline_layout"):
        layout.remove()
    onevision.model.get_video_features = layout
    layout.remove()


@pytest.mark.skipif(VERSION < (5,), reason="return_dict came with transformers 5")
def test_a_tuple_of_features_is_refused(onevision):
    pixels = given("grid", *TWO)["pixel_values_videos"]
    with newline_layout(onevision, "grid"), pytest.raises(ValueError, match="return_dict=False is not supported"):
        onevision.model.get_video_features(pixels, return_dict=False)


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token"])
def test_prepare_writes_the_placeholders(onevision, position, side, pooled):
    turns = (*TWO, prompt(user([30])), prompt(user(Video(3), [34]), assistant(50), user([36] * 99)))
    plain, wanted = given("one_token", *turns, side=side), (given if pooled else unpooled)(position, *turns, side=side)
    plain["mm_token_type_ids"] = (plain["input_ids"] == VIDEO).long()
    plain["labels"] = plain["input_ids"].masked_fill(plain["attention_mask"] == 0, -100)
    with newline_layout(onevision, position, pooled) as layout:
        prepared = layout.prepare(plain)
    assert set(prepared) == set(plain)
    for name, value in wanted.items():
        assert torch.equal(prepared[name], value), name
    assert torch.equal(prepared["mm_token_type_ids"] == 1, wanted["input_ids"] == VIDEO)
    assert torch.equal(prepared["labels"], wanted["input_ids"].masked_fill(wanted["attention_mask"] == 0, -100))
    with pytest.raises(ValueError, match=r"expected 28 placeholders for every video of grid \(3, 3, 3\).*got \[29\]"):
        layout.prepare(plain | {k: torch.tensor([[VIDEO] * 29]) for k in ("input_ids", "attention_mask")})


@pytest.mark.parametrize("attached_first", [True, False])
def test_a_cache_of_encoded_videos(onevision, attached_first):
    """It keeps the features of the layout, or those that the layout is made from; last in, first out."""
    batch, cache, logits = given("grid", *TWO), qts_video.VideoCache(), []
    enter = [
        lambda: newline_layout(onevision, "grid"),
        lambda: qts_video.attach(onevision, Keep(every(7)), cache=cache),
    ]
    inner, outer = [make() for make in (reversed(enter) if attached_first else enter)]
    with torch.no_grad():
        logits = [onevision(**batch).logits for _ in range(2)]
    assert (cache.hits, cache.misses) == (1, 1)
    if not attached_first:
        with pytest.raises(RuntimeError, match="last in, first out"):
            inner.remove()
    outer.remove()
    inner.remove()
    with newline_layout(onevision, "grid"), qts_video.attach(onevision, Keep(every(7))), torch.no_grad():
        logits.append(onevision(**batch).logits)
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[0], logits[2])


@pytest.mark.parametrize("attached_first", [True, False])
def test_a_cache_tells_pooled_videos_from_unpooled_ones(onevision, attached_first):
    cache, counts = qts_video.VideoCache(), []
    layouts = [("grid", True), ("grid", False), ("one_token", False), ("grid", True), ("grid", False)]
    for position, pooled in layouts:
        batch = (given if pooled else unpooled)(position, *TWO)
        enter = [
            lambda layout=(position, pooled): newline_layout(onevision, *layout),
            lambda: qts_video.attach(onevision, Keep(every(7)), cache=cache),
        ]
        inner, outer = [make() for make in (reversed(enter) if attached_first else enter)]
        with torch.no_grad():
            onevision(**batch)
        handle = inner if attached_first else outer
        counts.append(handle.last.total)
        outer.remove()
        inner.remove()
    assert counts == [3 * 36, 3 * 90, 3 * 76, 3 * 36, 3 * 90]
    assert (cache.hits, cache.misses) == (2, 3)
