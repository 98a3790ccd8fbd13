"""The vision tower's features for selectors that want them, and the cache that encodes a video once."""

import copy

import pytest
import qts_video
import torch
from families import FAMILIES
from qts_video import VideoCache
from qts_video.adapters import find_adapter
from qts_video.adapters.vision_order import first_copies
from qts_video.methods import QTSplus, Uniform
from qts_video.newlines import newline_layout
from tiny import VERSION, Keep, Video, every, keep_all, prompt, user

GREEDY = {"max_new_tokens": 3, "do_sample": False}


class Sees(Keep):
    """Remembers the vision features of every call."""

    needs_vision = True

    def select(self, videos):
        self.vision = [*getattr(self, "vision", []), videos.context.vision]
        return super().select(videos)


class Passes:
    """Counts forward passes of the vision tower and of the projector."""

    def __init__(self, family, model):
        self.tower = self.projector = 0
        modules = {"tower": model.get_submodule(family.vision), "projector": find_adapter(model).projector(model)}
        self.hooks = [module.register_forward_hook(self._count(name)) for name, module in modules.items()]

    def _count(self, name):
        return lambda *call: setattr(self, name, getattr(self, name) + 1)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


def projector_input(model, batch, run):
    """What goes into the projector while ``run(batch)`` encodes videos, caught by hand."""
    adapter, seen = find_adapter(model), []
    hook = adapter.projector(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        run(batch)
    hook.remove()
    return seen[-1]  # models encode images before videos


@pytest.mark.parametrize("name", ["one", "several", "unequal"])
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_selector_that_asks_is_given_what_went_into_the_projector(family, model, name, way):
    batch = family.inputs(*family.prompts[name])
    adapter = find_adapter(model)
    with qts_video.attach(model, Sees(every(2))), torch.no_grad():
        selector = model._qts_video_attachment.selector
        model(**batch) if way == "forward" else model.generate(**batch, **GREEDY)
    (vision,) = selector.vision
    assert vision.ndim == 3
    plain = projector_input(model, batch, lambda given: model(**given))
    videos = selector.calls[0]
    if family.name in ("qwen2_5_vl", "qwen3_vl"):
        merge = model.config.vision_config.spatial_merge_size**2
        assert vision.shape == (len(videos.tokens), merge, plain.shape[-1])
        projected = adapter.projector(model)(vision.flatten(0, 1))
        torch.testing.assert_close(projected, videos.tokens, rtol=0, atol=1e-10)
    else:
        assert torch.equal(vision, plain)


def test_images_are_not_recorded(family, model):
    selector = Sees(every(2))
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        model(**family.inputs(*family.prompts["images"]))
        model(**family.inputs(*family.prompts["one"]))
    assert len(selector.vision) == 1
    assert handle.last.kept < handle.last.total


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_copies_of_a_sample_are_seen_once(family, model, options):
    if not family.repeats:
        pytest.skip("this transformers version can't repeat this model's videos, with or without selection")
    batch = family.inputs(*family.prompts["several"])
    selector = Sees(every(2))
    with qts_video.attach(model, selector), torch.no_grad():
        model(**batch)
        model.generate(**batch, **GREEDY | options)
    once, repeated = selector.vision
    torch.testing.assert_close(repeated, once, rtol=0, atol=1e-10)


def test_without_a_cache_every_step_sees_the_features(family, model):
    if find_adapter(model).parts(model).generator is not None:
        pytest.skip("this model's generate() always uses a cache")
    selector = Sees(every(2))
    batch = family.inputs(*family.prompts["one"])
    with qts_video.attach(model, selector):
        model.generate(**batch, **GREEDY, use_cache=False)
    assert len(selector.vision) == 3
    assert all(torch.equal(vision, selector.vision[0]) for vision in selector.vision)


def test_features_have_gradients_where_they_are_enabled(family, model):
    selector = Sees(every(2))
    with qts_video.attach(model, selector):
        model(**family.inputs(*family.prompts["one"]))
        with torch.no_grad():
            model(**family.inputs(*family.prompts["one"]))
    assert [vision.requires_grad for vision in selector.vision] == [True, False]


def test_nothing_is_recorded_that_nobody_asks_for(family, model):
    selector = Keep(every(2))
    base, name = find_adapter(model).parts(model).base, find_adapter(model).video_encoder
    before = base.__dict__.get(name)
    with qts_video.attach(model, selector), torch.no_grad():
        assert base.__dict__.get(name) is before
        model(**family.inputs(*family.prompts["one"]))
    assert selector.calls[0].context.vision is None


def ask(model, batch, way):
    """The logits or the tokens, and those of every step."""
    with torch.no_grad():
        if way == "forward":
            return [model(**batch).logits]
        output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
        return [output.sequences, *output.logits]


def other_question(family, batch):
    """The same videos, another last text token."""
    ids = batch["input_ids"].clone()
    ids[0, int(((ids[0] >= 30) & (ids[0] < 40)).nonzero()[-1])] = 77
    return batch | {"input_ids": ids}


METHODS = pytest.mark.parametrize(
    "make",
    [lambda m: Keep(keep_all), lambda m: Uniform(0.3), QTSplus.from_language_model, lambda m: Sees(every(2))],
    ids=["keep all", "uniform", "qtsplus", "needs vision"],
)


@METHODS
@pytest.mark.parametrize("name", ["one", "several"])
@pytest.mark.parametrize("way", ["forward", "generate"])
def test_a_second_question_about_a_video_runs_no_vision_tower(family, model, make, name, way):
    batch = family.inputs(*family.prompts[name])
    second = other_question(family, batch)
    selector, cache = make(model), VideoCache()
    with qts_video.attach(model, selector) as handle:
        handle.question([30, 31])
        wanted = [ask(model, given, way) for given in (batch, second, batch)]
    with Passes(family, model) as passes, qts_video.attach(model, selector, cache=cache) as handle:
        handle.question([30, 31])
        ours = [ask(model, batch, way)]
        first = passes.tower, passes.projector
        ours.append(ask(model, second, way))
        images = (passes.tower - first[0], passes.projector - first[1])
        ours.append(ask(model, batch, way))
    assert min(first) >= 1
    without_video = 1 if name == "several" and find_adapter(model).video_encoder == "get_video_features" else 0
    assert images == (without_video, without_video)  # images are encoded by another method
    assert (cache.hits, cache.misses, len(cache)) == (2, 1, 1)
    for got, expected in zip(ours, wanted, strict=True):
        assert all(map(torch.equal, got, expected))
    assert not torch.equal(ours[0][-1], ours[1][-1])


def test_forward_and_generate_find_each_others_videos(family, model):
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    with qts_video.attach(model, Uniform(0.5), cache=cache):
        ask(model, batch, "generate")
        ask(model, batch, "forward")
    assert (cache.hits, cache.misses) == (1, 1)


def test_a_cache_outlives_the_handle_and_serves_the_next_selector(family, model):
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    with qts_video.attach(model, Uniform(0.5), cache=cache):
        ask(model, batch, "forward")
    selector = Sees(every(2))
    with qts_video.attach(model, selector, cache=cache):  # its features were not recorded
        ask(model, batch, "forward")
        assert (cache.hits, cache.misses, len(cache)) == (0, 2, 1)
        ask(model, batch, "forward")
    assert torch.equal(*selector.vision)
    with qts_video.attach(model, Uniform(0.5), cache=cache):
        ask(model, batch, "forward")
    assert (cache.hits, cache.misses, len(cache)) == (2, 2, 1)


def test_beams_are_found_too(family, model):
    if not family.repeats:
        pytest.skip("this transformers version can't repeat this model's videos, with or without selection")
    batch, cache = family.inputs(*family.prompts["several"]), VideoCache()
    options = GREEDY | {"num_beams": 3}
    with qts_video.attach(model, Keep(every(2))):
        wanted = model.generate(**batch, **options)
    with qts_video.attach(model, Keep(every(2)), cache=cache):
        for _ in range(3):
            assert torch.equal(model.generate(**batch, **options), wanted)
    assert (cache.hits, cache.misses) == (2, 1)


def test_other_pixels_and_other_weights_are_not_found(family, model):
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    other = family.inputs(*family.prompts["one"], seed=2)
    weight = next(weight for weight in find_adapter(model).projector(model).parameters() if weight.ndim == 2)
    with qts_video.attach(model, Uniform(0.5)):
        wanted = ask(model, other, "forward")
    with qts_video.attach(model, Uniform(0.5), cache=cache):
        before = ask(model, batch, "forward")
        assert all(map(torch.equal, ask(model, other, "forward"), wanted))
        assert (cache.hits, cache.misses) == (0, 2)
        with torch.no_grad():
            weight.mul_(2)
        after = ask(model, batch, "forward")
        assert (cache.hits, cache.misses) == (0, 3)
        with torch.no_grad():
            weight.div_(2)
        assert not torch.equal(before[0], after[0])


def test_removal_restores_the_encoder(family, model):
    base, name = find_adapter(model).parts(model).base, find_adapter(model).video_encoder
    before, method = base.__dict__.get(name), getattr(base, name)
    handle = qts_video.attach(model, Sees(every(2)), cache=VideoCache())
    assert getattr(base, name) != method
    handle.remove()
    assert base.__dict__.get(name) is before
    assert getattr(base, name) == method


def test_a_copy_of_the_model_has_an_encoder_and_a_cache_of_its_own(family, model):
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    with qts_video.attach(model, Sees(every(2)), cache=cache):
        wanted = ask(model, batch, "forward")
        twin = copy.deepcopy(model)
        with Passes(family, twin) as passes:
            assert all(map(torch.equal, ask(twin, batch, "forward"), wanted))
            assert passes.tower == 1
            ask(twin, batch, "forward")
            assert passes.tower == 1
    assert (cache.hits, cache.misses) == (0, 1)
    assert len(twin._qts_video_attachment.selector.vision) == 3  # the copied one of the first call


def test_a_cache_belongs_to_one_model(family, model):
    cache = VideoCache()
    qts_video.attach(model, Uniform(0.5), cache=cache).remove()
    with pytest.raises(ValueError, match="belongs to another model"):
        qts_video.attach(family.build_model(), Uniform(0.5), cache=cache)


def test_a_trainable_tower_raises_and_a_frozen_one_is_found(family, model):
    batch, cache = family.inputs(*family.prompts["one"]), VideoCache()
    decoder = find_adapter(model).parts(model).decoder
    with qts_video.attach(model, Uniform(0.5), cache=cache):
        with pytest.raises(RuntimeError, match="has no gradients for the vision tower"):
            model(**batch)
        assert cache.misses == 0
        model.requires_grad_(False)
        decoder.requires_grad_(True)
        for _ in range(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        model.requires_grad_(True)
    assert (cache.hits, cache.misses) == (1, 1)
    assert any(parameter.grad is not None for parameter in decoder.parameters())
    model.zero_grad(set_to_none=True)


def test_vision_takes_no_time_where_the_video_is_found(family, model):
    batch = family.inputs(*family.prompts["one"])
    with qts_video.attach(model, Uniform(0.5), cache=VideoCache()) as handle:
        ask(model, batch, "generate")
        assert handle.last.timings["vision"] > 0
        ask(model, batch, "generate")
        assert handle.last.timings["vision"] == 0


@pytest.mark.skipif(VERSION < (5, 18), reason="videos can be encoded beforehand from 5.18 on")
def test_features_of_videos_that_were_encoded_before_are_not_guessed():
    family = FAMILIES["qwen3_vl"]
    model = family.build_model()
    batch = family.inputs(prompt(user(Video(2), [30])))
    with torch.no_grad(), qts_video.attach(model, Sees(every(2))):
        encoded = model.get_video_features(batch["pixel_values_videos"], batch["video_grid_thw"])
        batch.pop("pixel_values_videos")
        with pytest.raises(RuntimeError, match="the videos were encoded before this call"):
            model(**batch, mm_encoder_outputs={"video": encoded})


@pytest.mark.parametrize("size", [(3, 5, 3), (2, 1, 4), (1, 2, 2), (2, 4, 7)])
def test_qwen2_5_sees_windows_put_back_in_order(size):
    """Videos of which no window, some windows or all windows are whole, behind another video."""
    family = FAMILIES["qwen2_5_vl"]
    model, selector = family.build_model(), Sees(every(2))
    batch = family.inputs(prompt(user(Video(2, 3, 3), Video(*size), [30])), prompt(user(Video(1, 3, 2), [31])))
    with qts_video.attach(model, selector), torch.no_grad():
        model(**batch)
    (vision,), (videos,) = selector.vision, selector.calls
    projected = model.model.visual.merger(vision.flatten(0, 1))
    torch.testing.assert_close(projected, videos.tokens, rtol=0, atol=1e-10)


def test_features_of_another_number_of_samples_raise():
    features = torch.arange(6).view(6, 1)
    assert first_copies(features, [2, 4], copies=3) is features
    assert first_copies(features, [1, 2], copies=2).flatten().tolist() == [0, 2, 3]
    with pytest.raises(RuntimeError, match=r"given 6 rows of features, but 2 samples with \[1, 2\] rows in 3 copies"):
        first_copies(features, [1, 2], copies=3)


@pytest.mark.parametrize("cache", [{}, True])
def test_a_cache_is_a_video_cache(cache):
    with pytest.raises(TypeError, match="cache must be a VideoCache, got"):
        qts_video.attach(FAMILIES["qwen3_vl"].build_model(), Uniform(0.5), cache=cache)


def test_what_else_the_result_depends_on_tells_calls_apart():
    family, cache = FAMILIES["qwen3_vl"], VideoCache()
    model, batch = family.build_model(), family.inputs(*family.prompts["one"])
    with qts_video.attach(model, Uniform(0.5), cache=cache):
        ask(model, batch, "forward")
        model.train()
        ask(model, batch, "forward")
        model.eval()
        with torch.autocast("cpu", torch.bfloat16):
            ask(model, batch, "forward")
        model.set_attn_implementation("eager")
        ask(model, batch, "forward")
        assert (cache.hits, cache.misses) == (0, 4)
        model.set_attn_implementation("sdpa")
        ask(model, batch, "forward")
    assert (cache.hits, cache.misses) == (1, 4)


def test_a_newline_layout_tells_calls_apart():
    family, cache = FAMILIES["llava_onevision"], VideoCache()
    model, batch = family.build_model(), family.inputs(*family.prompts["one"])
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    tokens = []
    for position in ("grid", "frame", "grid"):
        with newline_layout(model, position), qts_video.attach(model, Uniform(0.5), cache=cache), torch.no_grad():
            encoded = model.model.get_video_features(batch["pixel_values_videos"], **options)
            tokens.append(len(getattr(encoded, "pooler_output", encoded)[0]))
    assert tokens[0] == tokens[2] > tokens[1]
    assert (cache.hits, cache.misses) == (1, 2)
