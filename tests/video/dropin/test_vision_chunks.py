"""``attach(..., vision_chunk_frames=N)``: the vision tower sees N frames at a time, and the results are the same."""

import copy

import pytest
import qts_video
import torch
from families import FAMILIES
from qts_video import VideoCache
from qts_video.adapters import find_adapter
from qts_video.methods import QuoTA, Uniform
from qts_video.newlines import newline_layout
from test_families import state
from test_vision import GREEDY, Sees, ask, other_question
from tiny import VERSION, Keep, Video, every, keep_all, prompt, user
from tiny_llava import TOKENS, build_onevision
from tiny_llava import inputs as llava_inputs
from torch.utils._pytree import tree_flatten

LARGE = 1000
CHUNKS = pytest.mark.parametrize("frames", [1, 2, 3, LARGE])
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])
WAYS = pytest.mark.parametrize("way", ["forward", "generate"])


class Frames:
    """How many frames of videos each call of the vision tower got while ``model`` encoded videos."""

    def __init__(self, model):
        self.calls = []
        vision = find_adapter(model).parts(model).vision
        self._hook = vision.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module, args, kwargs):
        if "grid_thw" in kwargs:
            grid = kwargs["grid_thw"]
            assert int(grid.prod(1).sum()) == len(args[0])
            self.calls.append(int(grid[:, 0].sum()) * module.config.temporal_patch_size)
        else:
            self.calls.append(len(kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._hook.remove()


def cut(total, frames, model):
    """The lengths of the chunks of ``total`` frames."""
    step = getattr(model.config.vision_config, "temporal_patch_size", 1)
    frames = max(step, frames // step * step)
    return [min(frames, total - start) for start in range(0, total, frames)]


def encode(model, batch, **options):
    """The model's own video encoder, called with the pixels of ``batch``."""
    adapter = find_adapter(model)
    method = getattr(adapter.parts(model).base, adapter.video_encoder)
    if adapter.model_type.startswith("internvl"):
        return method(batch["pixel_values"], **options)
    if "video_grid_thw" in batch:
        return method(batch["pixel_values_videos"], batch["video_grid_thw"], **options)
    if adapter.model_type == "llava_onevision":  # 4.57 has no defaults for these
        options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} | options
    return method(batch["pixel_values_videos"], **options)


def assert_same(ours, theirs):
    """Bits, types of containers and names of fields."""
    leaves, spec = tree_flatten(ours)
    wanted, wanted_spec = tree_flatten(theirs)
    assert spec == wanted_spec
    for got, expected in zip(leaves, wanted, strict=True):
        assert got is expected is None or (got.dtype == expected.dtype and torch.equal(got, expected))


def without_layers(output):
    if isinstance(output, dict):
        return type(output)(**{k: v for k, v in output.items() if k not in ("hidden_states", "attentions")})
    return output


@CHUNKS
@NAMES
@WAYS
def test_the_same_bits_as_at_once(family, model, name, frames, way):
    """Logits, generated tokens, kept columns, and what selectors see of the vision tower; in float64."""
    batch = family.inputs(*family.prompts[name])
    plain, chunked = Sees(every(2)), Sees(every(2))
    with qts_video.attach(model, plain) as handle:
        wanted = ask(model, batch, way)
        columns = handle.last.columns
    with qts_video.attach(model, chunked, vision_chunk_frames=frames) as handle:
        ours = ask(model, batch, way)
        assert torch.equal(handle.last.columns, columns)
    assert_same(ours, wanted)
    assert_same(chunked.vision, plain.vision)
    assert torch.equal(chunked.calls[0].tokens, plain.calls[0].tokens)


@CHUNKS
@NAMES
def test_the_encoder_returns_what_it_returns_at_once(family, model, name, frames):
    batch = family.inputs(*family.prompts[name])
    with torch.no_grad():
        wanted = encode(model, batch)
        with qts_video.attach(model, Uniform(0.5), vision_chunk_frames=frames), Frames(model) as seen:
            ours = encode(model, batch)
    total = sum(seen.calls)
    assert seen.calls == cut(total, frames, model)
    assert (len(seen.calls) > 1) == (frames < total)
    one_call = len(seen.calls) == 1
    assert_same(ours, wanted if one_call else without_layers(wanted))


@pytest.mark.skipif(VERSION < (5,), reason="transformers 4 returns features alone")
@pytest.mark.parametrize("what", ["hidden_states", "attentions"])
def test_states_of_layers_are_joined_where_they_are_asked_for(family, what):
    if find_adapter(model := family.build_model(attn="eager")).model_type == "internvl_chat":
        pytest.skip("extract_feature returns features alone")
    batch = family.inputs(*family.prompts["one"])
    with torch.no_grad():
        wanted = encode(model, batch, **{f"output_{what}": True})
        with qts_video.attach(model, Uniform(0.5), vision_chunk_frames=2), Frames(model) as seen:
            ours = encode(model, batch, **{f"output_{what}": True})
    other = {"hidden_states": "attentions", "attentions": "hidden_states"}[what]
    assert len(seen.calls) > 1
    assert isinstance(ours[what], tuple)
    assert ours.get(other) is None
    assert_same(ours, type(wanted)(**{name: value for name, value in wanted.items() if name != other}))


def test_the_language_models_hidden_states_may_be_asked_for(family, model):
    """The model's forward may hand the wish on to its video encoder."""
    if find_adapter(model).parts(model).generator is not None:
        pytest.skip("the remote forward returns logits alone")
    batch, options = family.inputs(*family.prompts["one"]), {"output_hidden_states": True}
    with torch.no_grad():
        with qts_video.attach(model, Keep(every(2))):
            wanted = model(**batch, **options).hidden_states
        with qts_video.attach(model, Keep(every(2)), vision_chunk_frames=2):
            assert_same(model(**batch, **options).hidden_states, wanted)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_the_tower_never_sees_more(family, model, frames):
    """In generate() too, which may encode before the model runs."""
    batch = family.inputs(*family.prompts["unequal"])
    with qts_video.attach(model, Uniform(0.5)), Frames(model) as seen:
        ask(model, batch, "forward")
    (total,) = seen.calls
    for way in ("forward", "generate"):
        with qts_video.attach(model, Uniform(0.5), vision_chunk_frames=frames), Frames(model) as seen:
            ask(model, batch, way)
        assert seen.calls == cut(total, frames, model)
        assert max(seen.calls) <= max(frames, 2 if "video_grid_thw" in batch else 1)


def test_images_alone_run_as_they_are(family, model):
    batch = family.inputs(*family.prompts["images"])
    with torch.no_grad():
        wanted = model(**batch).logits
        with qts_video.attach(model, Keep(every(2)), vision_chunk_frames=1):
            assert torch.equal(model(**batch).logits, wanted)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_copies_of_a_sample(family, model, options):
    if not family.repeats:
        pytest.skip("this transformers version can't repeat this model's videos, with or without selection")
    batch, tokens = family.inputs(*family.prompts["several"]), []
    for frames in (None, 2):
        torch.manual_seed(3)
        with qts_video.attach(model, Keep(every(2)), vision_chunk_frames=frames):
            tokens.append(model.generate(**batch, **GREEDY | options))
    assert torch.equal(*tokens)


def test_without_selection_it_is_the_unpatched_model(family, model):
    batch = family.inputs(*family.prompts["several"])
    wanted = ask(model, batch, "generate")
    with qts_video.attach(model, Keep(keep_all), vision_chunk_frames=1):
        assert_same(ask(model, batch, "generate"), wanted)


@WAYS
def test_a_cache_keeps_what_the_chunks_gave_together(family, model, way):
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    second = other_question(family, batch)
    with qts_video.attach(model, Keep(every(2))):
        wanted = [ask(model, given, way) for given in (batch, second)]
    with qts_video.attach(model, Keep(every(2)), cache=cache, vision_chunk_frames=2), Frames(model) as seen:
        ours = [ask(model, batch, way)]
        first = list(seen.calls)
        ours.append(ask(model, second, way))
    assert len(first) > 1
    assert seen.calls == first
    assert (cache.hits, cache.misses, len(cache)) == (1, 1, 1)
    assert_same(ours, wanted)


def test_a_cache_tells_chunk_sizes_apart(family, model):
    """In lower precision they may give other bits."""
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    for frames in (None, 2, 3, 2, None):
        with qts_video.attach(model, Uniform(0.5), cache=cache, vision_chunk_frames=frames):
            ask(model, batch, "forward")
    assert (cache.hits, cache.misses) == (2, 3)


def test_a_copy_of_the_model_encodes_in_chunks_itself(family, model):
    batch = family.inputs(*family.prompts["one"])
    with qts_video.attach(model, Sees(every(2)), vision_chunk_frames=2):
        wanted = ask(model, batch, "forward")
        twin = copy.deepcopy(model)
        with Frames(model) as original, Frames(twin) as copied:
            assert_same(ask(twin, batch, "forward"), wanted)
    assert original.calls == []
    assert len(copied.calls) > 1


def test_gradients_are_those_of_the_video_at_once(family, model):
    """The sums over frames have another order, so the bits may differ."""
    batch, gradients = family.inputs(*family.prompts["unequal"]), []
    for frames in (None, 2):
        with qts_video.attach(model, Keep(every(2)), vision_chunk_frames=frames), Frames(model) as seen:
            model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        model.zero_grad(set_to_none=True)
    assert len(seen.calls) > 1
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    names = [name for name, _ in model.named_parameters()]
    of_tower = [g for name, g in zip(names, gradients[1], strict=True) if name.startswith(family.vision)]
    assert sum(float(gradient.abs().sum()) for gradient in of_tower if gradient is not None) > 0


def test_removal_leaves_the_model_as_it_was(family, model):
    base, name = find_adapter(model).parts(model).base, find_adapter(model).video_encoder
    batch = family.inputs(*family.prompts["one"])
    ask(model, batch, "forward")  # transformers hooks towers itself the first time that it records their states
    before, encoder, layout = state(model), getattr(base, name), dict(getattr(base.__dict__.get(name), "__dict__", {}))
    with qts_video.attach(model, Uniform(0.5), vision_chunk_frames=1), Frames(model) as seen:
        assert getattr(base, name) != encoder
        ask(model, batch, "forward")
    assert len(seen.calls) > 1
    assert state(model) == before
    assert getattr(base, name) == encoder
    assert dict(getattr(base.__dict__.get(name), "__dict__", {})) == layout
    with Frames(model) as seen:
        ask(model, batch, "forward")
    assert len(seen.calls) == 1


@pytest.mark.parametrize("wrong", [0, -1, True, False, 2.0, "2", torch.tensor(2)])
def test_a_wrong_number_of_frames_hooks_nothing(family, model, wrong):
    before, cache = state(model), VideoCache()
    error = ValueError if wrong in (0, -1) and not isinstance(wrong, bool) else TypeError
    with pytest.raises(error, match="vision_chunk_frames must be"):
        qts_video.attach(model, Uniform(0.5), cache=cache, vision_chunk_frames=wrong)
    assert state(model) == before
    assert cache._model is None


# What can't be cut.


def test_pixels_that_cannot_be_cut_raise(family, model):
    batch = family.inputs(*family.prompts["one"])
    pixels = "pixel_values" if "pixel_values_videos" not in batch else "pixel_values_videos"
    if "video_grid_thw" in batch:
        wrong, message = batch[pixels][:-1], r"a row for every patch of video_grid_thw, got \[95, .*\[\[4, 4, 6\]\]"
    else:
        wrong, message = batch[pixels][0], r"must have shape \[(V, F|tiles), C, H, W\], got \[[\d, ]+\]$"
    with (
        qts_video.attach(model, Uniform(0.5), vision_chunk_frames=2),
        Frames(model) as seen,
        pytest.raises(ValueError, match=message),
    ):
        encode(model, batch | {pixels: wrong})
    assert seen.calls == []


@pytest.mark.skipif(VERSION < (5,), reason="the encoders of transformers 4 take nothing else")
def test_tensors_that_span_all_frames_raise(family, model):
    if find_adapter(model).model_type == "internvl_chat":
        pytest.skip("extract_feature takes nothing else")
    batch, mask = family.inputs(*family.prompts["one"]), torch.ones(4)
    with (
        qts_video.attach(model, Uniform(0.5), vision_chunk_frames=2),
        Frames(model) as seen,
        pytest.raises(ValueError, match=r"was given some_mask besides pixel_values.*vision_chunk_frames$"),
    ):
        encode(model, batch, some_mask=mask)
    assert seen.calls == []


@pytest.mark.skipif(VERSION < (5,), reason="the encoders of transformers 4 know no return_dict")
@pytest.mark.parametrize("by", ["argument", "configuration"])
def test_tuples_are_refused(family, model, by):
    if find_adapter(model).model_type == "internvl_chat":
        pytest.skip("extract_feature knows no return_dict")
    config = find_adapter(model).parts(model).base.config
    batch, options = family.inputs(*family.prompts["one"]), {"return_dict": False} if by == "argument" else {}
    config.return_dict = by == "argument"
    try:
        with (
            qts_video.attach(model, Uniform(0.5), vision_chunk_frames=2),
            pytest.raises(ValueError, match="return_dict=False is not supported"),
        ):
            encode(model, batch, **options)
    finally:
        config.return_dict = True


def test_a_missing_grid_raises():
    family = FAMILIES["qwen3_vl"]
    model, batch = family.build_model(), family.inputs(*family.prompts["one"])
    with (
        qts_video.attach(model, Uniform(0.5), vision_chunk_frames=2),
        pytest.raises(ValueError, match=r"got \[96, 1536\] and None$"),
    ):
        model.model.get_video_features(batch["pixel_values_videos"], None)


def test_another_pooling_than_the_model_has_raises():
    """The tokens of a frame are not guessed."""
    family = FAMILIES["llava_onevision"]
    model, batch = family.build_model(), family.inputs(*family.prompts["one"])
    model.model.apply_pooling = lambda features: features[:, :7]
    with (
        qts_video.attach(model, Uniform(0.5), vision_chunk_frames=2),
        pytest.raises(RuntimeError, match=r"2 frames were encoded as 1[45] tokens; expected 9 or 25 a frame"),
    ):
        encode(model, batch)


# The newline layouts of LLaVA-Video: newlines are of whole videos, whoever came first.

UNPOOLED = {"grid": (25, 5, 0), "frame": (25, 1, 0), "one_token": (25, 0, 1)}
TWO = (prompt(user(Video(3), [30], Video(3), [31])), prompt(user([33], Video(3), [34])))


@pytest.fixture(scope="module")
def onevision():
    return build_onevision()


def entered(model, position, pooled, attached_first, selector, **options):
    """(what leaves first, what leaves last) of a layout and an attached selector."""
    make = [
        lambda: newline_layout(model, position, pooled),
        lambda: qts_video.attach(model, selector, **options),
    ]
    inner, outer = [one() for one in (reversed(make) if attached_first else make)]
    return outer, inner


@pytest.mark.parametrize("attached_first", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("position", ["grid", "frame", "one_token"])
@WAYS
def test_newlines_are_those_of_whole_videos(onevision, position, pooled, attached_first, way):
    batch = llava_inputs(*TWO, tokens=(TOKENS if pooled else UNPOOLED)[position], patches=5)
    selector = Sees(every(3))
    with newline_layout(onevision, position, pooled), qts_video.attach(onevision, selector):
        wanted = ask(onevision, batch, way)
    before = state(onevision)
    for frames in (1, 2, 4, LARGE):
        chunked = Sees(every(3))
        options = {"vision_chunk_frames": frames}
        outer, inner = entered(onevision, position, pooled, attached_first, chunked, **options)
        with Frames(onevision) as seen:
            assert_same(ask(onevision, batch, way), wanted)
        assert seen.calls == cut(9, frames, onevision)
        assert_same(chunked.vision, selector.vision)
        outer.remove()
        inner.remove()
        assert state(onevision) == before


def test_a_layout_can_not_be_taken_from_below_the_chunks(onevision):
    layout = newline_layout(onevision, "grid")
    with qts_video.attach(onevision, Uniform(0.5), vision_chunk_frames=2), pytest.raises(RuntimeError, match="last in"):
        layout.remove()
    layout.remove()


@pytest.mark.parametrize("attached_first", [True, False])
def test_quota_on_unpooled_frames(onevision, attached_first):
    batch = llava_inputs(*TWO, tokens=UNPOOLED["grid"], patches=5)
    quota = [QuoTA([3.0, 1.0, 1.0] * 3, total_tokens=40) for _ in range(2)]
    options = {"positions": "compact"}
    with newline_layout(onevision, "grid", pooled=False), qts_video.attach(onevision, quota[0], **options):
        wanted = ask(onevision, batch, "generate")
    options["vision_chunk_frames"] = 2
    outer, inner = entered(onevision, "grid", False, attached_first, quota[1], **options)
    with Frames(onevision) as seen:
        assert_same(ask(onevision, batch, "generate"), wanted)
    outer.remove()
    inner.remove()
    assert max(seen.calls) == 2


@pytest.mark.skipif(VERSION < (5, 18), reason="videos can be encoded beforehand from 5.18 on")
@pytest.mark.parametrize("name", ["llava_onevision", "llava_next_video", "qwen2_5_vl", "qwen3_vl"])
def test_what_was_encoded_in_chunks_beforehand_is_understood(name):
    """LLaVA's adapter counts the frames by the hidden states that came along."""
    family = FAMILIES[name]
    model, batch = family.build_model(), family.inputs(*family.prompts["unequal"])
    with torch.no_grad(), qts_video.attach(model, Keep(every(2)), vision_chunk_frames=2):
        wanted = model(**batch).logits
        encoded = encode(model, batch)
        batch.pop("pixel_values_videos")
        assert torch.equal(model(**batch, mm_encoder_outputs={"video": encoded}).logits, wanted)
