"""What is peculiar to InternVLChatModel: generate() runs the language model by itself; InternLM2 has fused weights."""

import copy
from types import SimpleNamespace

import pytest
import qts_video
import torch
from qts_video.adapters import find_adapter
from qts_video.adapters.internlm2 import is_fused, split_wqkv
from qts_video.methods import QTSplus, Uniform
from test_internvl import TOKENIZER
from tiny import HIDDEN, Image, Keep, Oracle, Video, every, keep_all, keep_mask, prompt, user
from tiny_internvl import inputs
from tiny_internvl_chat import FAMILIES, LANGUAGE_MODELS, build_model
from torch import nn
from transformers import DynamicCache, StaticCache

GREEDY = {"max_new_tokens": 4, "do_sample": False}
POSITIONS = pytest.mark.parametrize("positions", ["original", "compact"])
SEVERAL = FAMILIES[0].prompts["several"]


@pytest.fixture(scope="module", params=LANGUAGE_MODELS)
def model(request):
    return build_model(language_model=request.param)


def kept_embeddings(model, batch, kept):
    """The oracle's embeddings of the kept columns, left-padded, and their mask."""
    keep = keep_mask(model, batch, kept)
    rows = [embeds[columns] for embeds, columns in zip(Oracle(model, batch, keep).embeds, keep, strict=True)]
    longest = max(map(len, rows))
    embeds = torch.stack([nn.functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.arange(longest) >= longest - len(row) for row in rows]).long()
    return embeds, mask


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_beams": 2, "cache_implementation": "static"},
        {"cache_implementation": "static"},
        {},
    ],
    ids=["beams", "beam sequences", "static beams", "static", "greedy"],
)
def test_compact_generation_is_that_of_the_kept_columns_alone(model, options):
    batch, selector = inputs(*SEVERAL), Keep(every(2))
    with qts_video.attach(model, selector, positions="compact"):
        ours = model.generate(**batch, **GREEDY, **options)
    assert len(selector.calls) == 1
    embeds, mask = kept_embeddings(model, batch, selector.kept)
    theirs = model.language_model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("beams", [1, 3])
def test_keeping_everything_generates_the_same(model, beams):
    batch = inputs(*SEVERAL)
    plain = model.generate(**batch, **GREEDY, num_beams=beams)
    with qts_video.attach(model, Keep(keep_all)) as handle:
        assert torch.equal(model.generate(**batch, **GREEDY, num_beams=beams), plain)
    assert handle.last.kept == handle.last.total


@POSITIONS
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decoding_by_hand_with_the_language_model(model, positions, cache):
    batch, selector = inputs(*SEVERAL), Keep(every(2))
    config = model.language_model.config
    past = DynamicCache() if cache == "dynamic" else StaticCache(config=config, max_cache_len=160)
    with qts_video.attach(model, selector, positions=positions), torch.no_grad():
        output = model(**batch, past_key_values=past)
        tokens, mask = [output.logits[:, -1].argmax(-1)], batch["attention_mask"]
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = model.language_model(input_ids=tokens[-1][:, None], past_key_values=past, attention_mask=mask)
            tokens.append(output.logits[:, -1].argmax(-1))
    keep = keep_mask(model, batch, selector.kept)
    wanted, _ = Oracle(model, batch, keep, compact=positions == "compact").greedy(4)
    assert torch.equal(torch.stack(tokens, 1), wanted)


def test_chat_selects(model):
    pixels = inputs(prompt(user(Video(3), [30])))["pixel_values"]
    question = "Frame1: <image>\nFrame2: <image>\nFrame3: <image>\nwhat is this"
    selector = Keep(every(2), needs_question=True)
    with qts_video.attach(model, selector, tokenizer=TOKENIZER) as handle:
        answer = model.chat(TOKENIZER, pixels, question, GREEDY, [1, 1, 1])
    assert isinstance(answer, str)
    assert (handle.last.kept, handle.last.total) == (6, 12)
    assert TOKENIZER.decode(selector.calls[0].question_ids[0].tolist()) == "what is this"


def test_features_may_be_encoded_beforehand(model):
    batch = inputs(*SEVERAL)
    with qts_video.attach(model, Keep(every(2))) as handle:
        ours = model.generate(**batch, **GREEDY)
        with torch.no_grad():
            features = model.extract_feature(batch["pixel_values"])
        encoded = batch | {"pixel_values": torch.zeros_like(batch["pixel_values"])}
        assert torch.equal(model.generate(**encoded, visual_features=features, **GREEDY), ours)
    assert handle.last.kept < handle.last.total


def test_image_flags_leave_tiles_out(model):
    batch = inputs(*SEVERAL)
    flags = torch.ones(len(batch["pixel_values"]) + 1, 1, dtype=torch.int64)
    flags[0] = 0
    flagged = batch | {"pixel_values": torch.cat([torch.zeros(1, 3, 56, 56), batch["pixel_values"]])}
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        assert torch.equal(model(**flagged, image_flags=flags).logits, model(**batch).logits)


@pytest.mark.parametrize("return_dict", [True, False])
def test_the_loss_where_nothing_is_dropped_is_the_model_s_own(model, return_dict):
    batch = inputs(*SEVERAL)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        plain = model(**batch, labels=labels, return_dict=return_dict)[0]
        with qts_video.attach(model, Keep(keep_all)):
            ours = model(**batch, labels=labels, return_dict=return_dict)[0]
    torch.testing.assert_close(ours.double(), plain, rtol=1e-6, atol=0)  # transformers takes logits to float32


def test_pixels_that_are_missing_are_missed(model):
    batch = inputs(*SEVERAL)
    del batch["pixel_values"]
    with qts_video.attach(model, Keep(every(2))), pytest.raises(ValueError, match="no video was given"):
        model.generate(**batch, **GREEDY)


def test_a_generate_that_fails_leaves_no_call_open(model):
    batch, selector = inputs(*SEVERAL), Keep(every(2))
    embeds = torch.zeros(2, 5, HIDDEN, dtype=torch.float64)
    with qts_video.attach(model, selector), torch.no_grad():
        with pytest.raises(ValueError, match="not used by the model"):
            model.generate(**batch, **GREEDY, no_such_option=1)
        assert model.language_model(inputs_embeds=embeds).logits.shape[1] == 5
    assert selector.calls == []


def test_what_the_decoder_never_saw_is_not_selected(model):
    batch = inputs(*SEVERAL)
    with qts_video.attach(model, Keep(every(2))):
        generate = model.language_model.generate
        model.language_model.generate = lambda **kwargs: None
        try:
            with pytest.raises(RuntimeError, match=r"selected nothing: generate\(\) ran past its hooks"):
                model.generate(**batch, **GREEDY)
        finally:
            del model.language_model.generate
    assert model.language_model.generate == generate


def test_the_placeholder_must_be_known(model):
    unset = copy.copy(model)
    unset.img_context_token_id = None
    with qts_video.attach(unset, Keep(every(2))), pytest.raises(ValueError, match="img_context_token_id is None: chat"):
        unset.generate(**inputs(*SEVERAL), **GREEDY)


def test_a_copy_has_an_attachment_of_its_own(model):
    batch = inputs(*SEVERAL)
    with qts_video.attach(model, Keep(every(2))):
        ours, twin = model.generate(**batch, **GREEDY), copy.deepcopy(model)
    assert torch.equal(twin.generate(**batch, **GREEDY), ours)
    assert twin._qts_video_attachment.selector.calls
    assert twin._qts_video_attachment.generator is twin.language_model


class Named(nn.Module):
    """A module of the right model type."""

    config = SimpleNamespace(model_type="internvl_chat")


def test_the_remote_class_is_told_by_its_parts(model):
    assert find_adapter(model).model_type == model.config.model_type == "internvl_chat"
    with pytest.raises(TypeError, match="got Named without vision_model, mlp1, language_model, extract_feature"):
        qts_video.attach(Named(), Uniform(0.5))
    for missing in ("mlp1", "num_image_token"):
        other = copy.copy(model)
        other._modules = {name: module for name, module in model._modules.items() if name != missing}
        other.__dict__.pop(missing, None)
        with pytest.raises(TypeError, match=f"expected an InternVLChatModel, got InternVLChatModel without {missing}$"):
            qts_video.attach(other, Uniform(0.5))
    headless = copy.copy(model)
    headless._modules = {**model._modules, "language_model": model.language_model.model}
    with pytest.raises(TypeError, match=r"without language_model.model, .*language_model.model.layers$"):
        qts_video.attach(headless, Uniform(0.5))


def test_rotary_angles_by_the_length_of_the_cache_are_refused():
    model = build_model(language_model="internlm2")
    model.language_model.model.layers[0].attention.rotary_emb.forward = lambda x, seq_len=None: None
    with pytest.raises(TypeError, match="the code of InternLM2ForCausalLM is too old"):
        qts_video.attach(model, Uniform(0.5))


def reference_split(fused, heads, key_heads, width):
    """Row by row of ``fused`` [(Hq + 2 Hk) * Dh, ...]."""
    group = heads // key_heads + 2
    rows = {"q": [], "k": [], "v": []}
    for number, row in enumerate(fused):
        place = number // width % group
        rows["v" if place == group - 1 else "k" if place == group - 2 else "q"].append(row)
    return [torch.stack(rows[name]) for name in "qkv"]


@pytest.mark.parametrize(("heads", "key_heads", "width"), [(4, 2, 3), (6, 1, 2), (3, 3, 4), (8, 2, 1)])
def test_fused_projections_are_split_by_key_head(heads, key_heads, width):
    attention = SimpleNamespace(num_heads=heads, num_key_value_heads=key_heads, head_dim=width)
    weight = torch.randn((heads + 2 * key_heads) * width, 5, dtype=torch.float64)
    wanted = reference_split(weight, heads, key_heads, width)
    for ours, theirs in zip(split_wqkv(attention, weight, dim=0), wanted, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(split_wqkv(attention, weight[:, 0]), wanted, strict=True):
        assert torch.equal(ours, theirs[:, 0])
    x = torch.randn(2, 3, 5, dtype=torch.float64)
    for ours, theirs in zip(split_wqkv(attention, x @ weight.T), wanted, strict=True):
        torch.testing.assert_close(ours, x @ theirs.T, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=rf"expected {len(weight)} entries along axis -1, for {heads} query"):
        split_wqkv(attention, weight)


def test_fused_layers_are_known():
    fused, plain = (build_model(language_model=name).language_model.model.layers[0] for name in ("internlm2", "qwen2"))
    assert is_fused(fused)
    assert not is_fused(plain)
    assert not is_fused(nn.Linear(2, 2))


def test_qtsplus_starts_from_fused_projections():
    model = build_model(language_model="internlm2")
    layers = model.language_model.model.layers
    selector = QTSplus.from_language_model(model, reencode_layers=2).selector
    sources = [(layers[-1], selector.scoring_layers[0])]
    sources += [(layer, ours.core) for layer, ours in zip(layers, selector.reencode_layers, strict=False)]
    for source, ours in sources:
        attention = source.attention
        size = attention.num_heads, attention.num_key_value_heads, attention.head_dim
        weights = reference_split(attention.wqkv.weight, *size)
        for name, weight in zip(("q_proj", "k_proj", "v_proj"), weights, strict=True):
            if hasattr(ours, name):
                assert torch.equal(getattr(ours, name).weight, weight)
        assert torch.equal(ours.q_norm.weight, source.attention_norm.weight)
    core = selector.reencode_layers[1].core
    assert torch.equal(core.v_proj.bias, reference_split(layers[1].attention.wqkv.bias, *size)[2])
    assert torch.equal(core.o_proj.weight, layers[1].attention.wo.weight)


def test_prompts_of_images_alone_run_as_they_are(model):
    batch = inputs(prompt(user(Image(2), Image(1), Image(1), [30])))
    plain = model.generate(**batch, **GREEDY)
    for tokenizer in (None, TOKENIZER):
        selector = Keep(every(2))
        with qts_video.attach(model, selector, tokenizer=tokenizer):
            assert torch.equal(model.generate(**batch, **GREEDY), plain)
        assert selector.calls == []
