"""Lite selectors from checkpoints: our own folder, and the released names of the three families at a small size."""

import json

import pytest
import torch
from qts_video.lite import LiteConfig, LiteSelector
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM

HIDDEN, VOCAB, LAYERS, VISION = 32, 96, 3, 12
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "use_sliding_window": False,
    "tie_word_embeddings": False,
}
MROPE = {"type": "default", "rope_type": "default", "mrope_section": [2, 1, 1]}
DEAD = {
    f"layers.{LAYERS - 1}.{part}"
    for part in (
        "self_attn.v_proj.weight",
        "self_attn.v_proj.bias",
        "self_attn.o_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "mlp.down_proj.weight",
        "post_attention_layernorm.weight",
    )
}


def language_model():
    torch.manual_seed(0)
    ids = {"bos_token_id": None, "eos_token_id": None}
    return Qwen2ForCausalLM(Qwen2Config(**TEXT, **ids, vocab_size=VOCAB, rope_theta=5000.0)).double()


def linear(name, into, out_of):
    return {f"{name}.weight": torch.randn(into, out_of).double(), f"{name}.bias": torch.randn(into).double()}


def llava():
    """As LlavaQwenForCausalLM names them. Returns config, state, the decoder's and the projector's prefix."""
    state = language_model().state_dict()
    state |= linear("model.mm_projector.0", HIDDEN, VISION) | linear("model.mm_projector.2", HIDDEN, HIDDEN)
    state["model.image_newline"] = torch.randn(HIDDEN).double()
    state["model.vision_tower.vision_tower.vision_model.post_layernorm.weight"] = torch.zeros(VISION)
    config = {**TEXT, "model_type": "llava_qwen", "rope_theta": 5000.0, "rope_scaling": None, "vocab_size": VOCAB + 7}
    config |= {"mm_hidden_size": VISION, "mm_spatial_pool_mode": "bilinear", "mm_newline_position": "grid"}
    return config, state, "model.", "model.mm_projector."


def qwen(root="model.language_model.", visual="model.visual."):
    """As Qwen2_5_VLForConditionalGeneration names them: nested, as since transformers 4.52, or by older names."""
    ids = {"bos_token_id": None, "eos_token_id": None, "vocab_size": VOCAB}
    vision = {
        "depth": 1,
        "hidden_size": VISION,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "fullatt_block_indexes": [0],
    }
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(text_config={**TEXT, **ids, "rope_scaling": MROPE}, vision_config=vision)
    state = Qwen2_5_VLForConditionalGeneration(config).double().state_dict()
    state = {
        name.replace("model.language_model.", root).replace("model.visual.", visual): tensor
        for name, tensor in state.items()
    }
    flat = {**TEXT, "rope_theta": 5000.0, "model_type": "qwen2_5_vl", "vision_config": vision}
    return flat | {"rope_scaling": {"type": "mrope", "mrope_section": [2, 1, 1]}}, state, root, visual + "merger."


def internvl():
    """As InternVLChatModel names them."""
    state = {f"language_model.{name}": tensor for name, tensor in language_model().state_dict().items()}
    state |= {"mlp1.0.weight": torch.randn(4 * VISION).double(), "mlp1.0.bias": torch.randn(4 * VISION).double()}
    state |= linear("mlp1.1", HIDDEN, 4 * VISION) | linear("mlp1.3", HIDDEN, HIDDEN)
    state["vision_model.embeddings.class_embedding"] = torch.zeros(VISION)
    text = {**TEXT, "rope_theta": 5000.0, "rope_scaling": {"factor": 2.0, "type": "dynamic"}}
    config = {"model_type": "internvl_chat", "llm_config": text, "vision_config": {"hidden_size": VISION}}
    return config, state, "language_model.model.", "mlp1."


RELEASED = {
    "llava": llava,
    "qwen": qwen,
    "qwen, older": lambda: qwen("model.", "visual."),
    "qwen, merger alone": lambda: qwen("model.", ""),
    "internvl": internvl,
}


def write(folder, config, state, name="model.safetensors"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in state.items()}, folder / name, metadata={"format": "pt"})


def write_released(folder, kind):
    config, state, decoder, projector = RELEASED[kind]()
    if kind == "qwen, merger alone":  # without the rest of the tower
        state = {k: v for k, v in state.items() if not k.startswith(("blocks.", "patch_embed.", "rotary"))}
    write(folder, config, state)
    return config, state, decoder, projector


@pytest.mark.parametrize("kind", RELEASED)
def test_released_names(tmp_path, kind):
    _, state, decoder, projector = write_released(tmp_path, kind)
    lite = LiteSelector.from_pretrained(tmp_path)
    assert not lite.training
    assert lite.dtype == torch.float64
    parts = (f"{decoder}embed_tokens.", f"{decoder}layers.")
    language = {k.removeprefix(decoder): v for k, v in state.items() if k.startswith(parts)}
    expected = {f"decoder.{k}": v for k, v in language.items() if k not in DEAD}
    expected |= {f"projector.{k.removeprefix(projector)}": v for k, v in state.items() if k.startswith(projector)}
    if kind == "llava":
        expected["image_newline"] = state["model.image_newline"]
    loaded = lite.state_dict()
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert lite.config == LiteConfig(
        family=kind.split(",")[0],
        vision_size=4 * VISION if kind == "internvl" else VISION,
        hidden_size=HIDDEN,
        intermediate_size=48,
        layers=LAYERS,
        heads=4,
        kv_heads=2,
        vocab_size=VOCAB,
        rope_theta=5000.0,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        mrope_section=(2, 1, 1) if "qwen" in kind else None,
        merge=2 if "qwen" in kind else None,
    )
    torch.testing.assert_close(lite.decoder.rotary_emb.inv_freq, 5000.0 ** (-torch.arange(0, 8, 2) / 8))
    assert lite.decoder.layers[0].input_layernorm.variance_epsilon == 1e-5


@pytest.mark.parametrize("kind", ["llava", "qwen", "internvl"])
def test_projectors_are_the_published_ones(tmp_path, kind):
    """Against their formulas, from the tensors as released."""
    _, state, _, projector = write_released(tmp_path, kind)
    lite = LiteSelector.from_pretrained(tmp_path)
    w = {name.removeprefix(projector): tensor for name, tensor in state.items() if name.startswith(projector)}
    torch.manual_seed(1)

    def apply(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    if kind == "llava":
        x = torch.randn(2, 25, VISION).double()
        grid = apply(gelu(apply(x, "0")), "2").view(2, 5, 5, HIDDEN)
        # Bilinear, from 5 to 3 without aligned corners: centre i + .5 of 3 lies at (i + .5) 5/3 - .5 of 5.
        weights = torch.zeros(3, 5).double()
        for i in range(3):
            at = (i + 0.5) * 5 / 3 - 0.5
            low = int(at)
            weights[i, low] += 1 - (at - low)
            weights[i, min(low + 1, 4)] += at - low
        expected = torch.einsum("ai,bj,fijd->fabd", weights, weights, grid).reshape(-1, HIDDEN)
    elif kind == "qwen":
        x = torch.randn(7, 4, VISION).double()
        normed = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w["ln_q.weight"]
        expected = apply(gelu(apply(normed.reshape(7, 4 * VISION), "mlp.0")), "mlp.2")
    else:
        x = torch.randn(2, 3, 4 * VISION).double()
        centred = x - x.mean(-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
        normed = (normed * w["0.weight"] + w["0.bias"]).reshape(6, 4 * VISION)
        expected = apply(gelu(apply(normed, "1")), "3")
    torch.testing.assert_close(lite.projector(x), expected, rtol=0, atol=1e-10)


def test_only_the_shards_that_are_needed_are_read(tmp_path):
    config, state, _, _ = llava()
    write(tmp_path, config, {k: v for k, v in state.items() if "vision_tower" not in k}, "a.safetensors")
    weight_map = {k: "absent.safetensors" if "vision_tower" in k else "a.safetensors" for k in state}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert LiteSelector.from_pretrained(tmp_path).config.layers == LAYERS


@pytest.mark.parametrize("kind", ["llava", "qwen", "internvl"])
def test_own_folder(tmp_path, kind):
    write_released(tmp_path / "released", kind)
    lite = LiteSelector.from_pretrained(tmp_path / "released").bfloat16()
    lite.save_pretrained(tmp_path / "own")
    again = LiteSelector.from_pretrained(str(tmp_path / "own"))
    assert again.config == lite.config
    assert again.state_dict().keys() == lite.state_dict().keys() == load_file(tmp_path / "own/model.safetensors").keys()
    for name, tensor in lite.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
        assert tensor.dtype == torch.bfloat16


def test_rotary_frequencies_stay_exact(tmp_path):
    write_released(tmp_path, "llava")
    exact = 5000.0 ** (-torch.arange(0, 8, 2) / 8)
    lite = LiteSelector.from_pretrained(tmp_path).bfloat16().double().to("cpu", torch.float16)
    assert lite.decoder.rotary_emb.inv_freq.dtype == torch.float32
    torch.testing.assert_close(lite.decoder.rotary_emb.inv_freq, exact)


class TestRefused:
    def change(self, tmp_path, kind, config=None, drop=None, add=None):
        described, state, _, _ = RELEASED[kind]()
        described = {k: v for k, v in (described | (config or {})).items() if v != "gone"}
        state = {k: v for k, v in state.items() if k != drop} | (add or {})
        write(tmp_path, described, state)
        return tmp_path

    @pytest.mark.parametrize(
        "kind, gone, named",
        [
            ("llava", "model.layers.1.self_attn.v_proj.weight", r"decoder\.layers\.1\.self_attn\.v_proj\.weight"),
            ("llava", "model.layers.2.self_attn.q_proj.bias", r"decoder\.layers\.2\.self_attn\.q_proj\.bias"),
            ("llava", "model.image_newline", "image_newline"),
            ("llava", "model.embed_tokens.weight", r"decoder\.embed_tokens\.weight"),
            ("qwen", "model.visual.merger.mlp.0.weight", r"projector\.mlp\.0\.weight"),
            ("internvl", "mlp1.3.bias", r"projector\.3\.bias"),
        ],
    )
    def test_missing_tensor(self, tmp_path, kind, gone, named):
        with pytest.raises(ValueError, match=f"lacks {named}"):
            LiteSelector.from_pretrained(self.change(tmp_path, kind, drop=gone))

    @pytest.mark.parametrize("dead", sorted(DEAD))
    def test_dead_tensors_may_be_missing(self, tmp_path, dead):
        assert LiteSelector.from_pretrained(self.change(tmp_path, "llava", drop=f"model.{dead}"))

    @pytest.mark.parametrize(
        "kind, name",
        [
            ("llava", "model.mm_projector.4.weight"),
            ("llava", "model.layers.2.self_attn.q_norm.weight"),
            ("llava", "score.weight"),
            ("internvl", "mlp2.weight"),
        ],
    )
    def test_tensor_without_a_place(self, tmp_path, kind, name):
        with pytest.raises(ValueError, match="place.*" + name.split(".")[-2]):
            LiteSelector.from_pretrained(self.change(tmp_path, kind, add={name: torch.zeros(2)}))

    def test_two_tensors_for_one_place(self, tmp_path):
        add = {"visual.merger.ln_q.weight": torch.zeros(VISION)}
        with pytest.raises(ValueError, match=r"same place: model\.visual\.merger\.ln_q\.weight, visual\.merger"):
            LiteSelector.from_pretrained(self.change(tmp_path, "qwen", add=add))

    @pytest.mark.parametrize(
        "kind, config, match",
        [
            ("llava", {"num_attention_heads": "gone", "rms_norm_eps": "gone"}, "num_attention_heads, rms_norm_eps"),
            ("llava", {"rope_theta": "gone"}, "lacks rope_theta"),
            ("qwen", {"rope_scaling": None}, "lacks mrope_section"),
            ("llava", {"hidden_act": "relu"}, "hidden_act 'relu'"),
            ("llava", {"mm_spatial_pool_mode": "average"}, "mm_spatial_pool_mode 'average'"),
            ("llava", {"rope_scaling": {"type": "yarn"}, "use_sliding_window": True}, "sliding_window True, rope type"),
            ("llava", {"num_key_value_heads": 3}, "4 heads and 3 key heads"),
            ("qwen", {"rope_scaling": {"type": "mrope", "mrope_section": [2, 2, 1]}}, "sum to the 4 frequencies"),
        ],
    )
    def test_config(self, tmp_path, kind, config, match):
        with pytest.raises(ValueError, match=match):
            LiteSelector.from_pretrained(self.change(tmp_path, kind, config))

    def test_tensors_of_another_shape(self, tmp_path):
        with pytest.raises(RuntimeError, match=r"mlp\.gate_proj"):
            LiteSelector.from_pretrained(self.change(tmp_path, "llava", {"intermediate_size": 64}))

    def test_another_model(self, tmp_path):
        write(tmp_path, {"model_type": "bert"}, {"a": torch.zeros(1)})
        with pytest.raises(ValueError, match=r"'bert'.*holds no Lite selector"):
            LiteSelector.from_pretrained(tmp_path)
        with pytest.raises(FileNotFoundError, match="no such folder"):
            LiteSelector.from_pretrained(tmp_path / "none")

    def test_own_folder(self, tmp_path):
        write_released(tmp_path / "released", "llava")
        LiteSelector.from_pretrained(tmp_path / "released").save_pretrained(tmp_path)
        state = load_file(tmp_path / "model.safetensors")
        newline = state.pop("image_newline")
        save_file(state | {"image_newlines": newline}, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match="lacks image_newline; has, without a place for them, image_newlines"):
            LiteSelector.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"family": "clip"}, "internvl, llava, qwen, got 'clip'"),
        ({"family": "qwen"}, "for the qwen family alone"),
        ({"family": "llava", "merge": 2}, "for the qwen family alone"),
        ({"family": "llava", "norm": "none"}, "norm"),
        ({"family": "llava", "heads": 13}, "13 heads"),
    ],
)
def test_config_is_checked(options, match):
    with pytest.raises(ValueError, match=match):
        LiteConfig(vision_size=8, **options)


def test_released_shape_is_the_default():
    """Qwen2-0.5B."""
    config = LiteConfig(family="qwen", vision_size=1280, merge=2, mrope_section=(8, 12, 12))
    assert (config.hidden_size, config.layers, config.heads, config.kv_heads) == (896, 24, 14, 2)
