"""Checkpoints: an ordinary Qwen2.5-VL, a whole QTSplus one by the released names, and everything else."""

import json

import pytest
import torch
from qts_video import embedded, released
from qts_video.checkpoints import load_model
from qts_video.methods import QTSplus
from qts_video.weights import Checkpoint
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qts_kernels.nn import QTSplus as SelectorModule

# As transformers 4.57, with which the released checkpoints were written, flattens a text config.
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 50000.0,
    "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
    "use_sliding_window": False,
}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 56,
    "fullatt_block_indexes": [1],
    "tokens_per_second": 2,
}
SELECTOR = {
    "qts_plus_tau_s": 0.5,
    "qts_plus_nmax": 512,
    "qts_plus_rho_min": 0.1,
    "qts_plus_rho_max": 0.4,
    "qts_plus_scoring_layers": 1,
    "qts_plus_reencode_layers": 2,
    "qts_plus_reencode": True,
    "enable_qts_plus": True,
    "vision_tower": "qwen2_5_vl_vision",
    "pretrain_vision_model": "somewhere/else/model.safetensors",
    "embedding_dim": 64,
    "vision_embed_size": 64,
    "lambda_t": 0.1,
}


@pytest.fixture(scope="module")
def processor():
    return embedded.build_processor()


def build_source(processor, tied):
    tokenizer = processor.tokenizer
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in released._TOKENS.items()}
    text = TEXT | {"vocab_size": len(tokenizer), "tie_word_embeddings": tied, "bos_token_id": None}
    text |= {"eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": 0}
    config = Qwen2_5_VLConfig(text_config=dict(text), vision_config=VISION, tie_word_embeddings=tied, **ids)
    torch.manual_seed(0)
    return Qwen2_5_VLForConditionalGeneration(config).eval(), text, ids


def build_selector():
    torch.manual_seed(1)
    return SelectorModule(64, 4, 2, reencode_layers=2, tau_s=0.5, n_max=512, rho_min=0.1, rho_max=0.4).eval()


def released_selector_state(selector):
    """Its state dict as released: no time embedding, and the dead weights of the last scoring layer."""
    state = {k: v for k, v in selector.state_dict().items() if not k.startswith("time_embedding")}
    core = {k.removeprefix("reencode_layers.0.core."): v for k, v in state.items() if "layers.0.core" in k}
    return {f"scoring_layers.0.{k}": torch.randn_like(v) for k, v in core.items()} | state


def write(folder, config, state, shards=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    state = {name: tensor.contiguous().clone() for name, tensor in state.items()}
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(state), {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: state[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_released(folder, processor, *, tied=False, keep_head=True, dtype=torch.float32, shards=3, ids_in_config=True):
    """A whole QTSplus checkpoint by the released names. Returns the model and the selector that it came from."""
    model, text, ids = build_source(processor, tied)
    selector = build_selector()
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.visual.", "model.vision_tower.").replace("model.language_model.", "model.")
        if keep_head or name != "lm_head.weight":
            state[name] = tensor.to(dtype)
    for name, tensor in released_selector_state(selector).items():
        state[f"model.qts_plus.selector.{name}"] = tensor.to(dtype)
    config = text | SELECTOR | {"model_type": released.MODEL_TYPE, "architectures": ["Other"], "vision_config": VISION}
    config |= {
        "auto_map": {"AutoModelForCausalLM": "code.Other"},
        "dtype": "bfloat16",
        "transformers_version": "4.57.1",
    }
    config |= {name: ids[name] for name in ("image_token_id", "video_token_id")} if ids_in_config else {}
    processor.save_pretrained(folder)
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            described = json.loads((folder / name).read_text()) | {"processor_class": "Qwen2_5_VLVisionProcessor"}
            (folder / name).write_text(json.dumps(described))
    write(folder, config, state, shards)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": 7, "temperature": 0.5, "do_sample": True})
    )
    return model, selector


def logits(model, processor):
    frames = torch.randint(0, 255, (4, 3, 56, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Where is the circle?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], videos=[frames], do_sample_frames=False, return_tensors="pt")
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(model.dtype)
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("tied, keep_head", [(False, True), (True, True), (True, False)])
def test_whole_qtsplus_checkpoint(tmp_path, processor, tied, keep_head):
    source, selector = write_released(tmp_path, processor, tied=tied, keep_head=keep_head)
    model, loaded_processor, loaded = load_model(tmp_path)
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert not model.training
    assert torch.equal(logits(model, loaded_processor), logits(source, processor))
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    rotary = model.model.language_model.rotary_emb.inv_freq
    torch.testing.assert_close(rotary, 50000.0 ** (-torch.arange(0, 16, 2) / 16))
    assert model.generation_config.temperature == 0.5
    assert model.config.video_token_id == loaded_processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")

    assert isinstance(loaded, QTSplus)
    assert loaded.selector.config == selector.config
    x, question = torch.randn(1, 40, 64), torch.randn(1, 5, 64)
    assert torch.equal(loaded.selector(x, question).tokens, selector(x, question).tokens)
    assert not loaded.selector.time_embedding.proj.weight.any()


def test_head_that_was_tuned_apart_is_kept(tmp_path, processor):
    write_released(tmp_path, processor, tied=True, shards=1)
    from safetensors.torch import load_file

    state = load_file(tmp_path / "model.safetensors")
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, _, _ = load_model(tmp_path)
    assert torch.equal(model.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(model.get_input_embeddings().weight, state["model.embed_tokens.weight"])


def test_dtype_and_token_ids_from_the_tokenizer(tmp_path, processor):
    write_released(tmp_path, processor, dtype=torch.bfloat16, ids_in_config=False)
    model, loaded_processor, selector = load_model(tmp_path)
    assert {p.dtype for p in [*model.parameters(), *selector.parameters()]} == {torch.bfloat16}
    exact = load_model(tmp_path, dtype=torch.float32)[0]
    for (name, buffer), (_, wanted) in zip(model.named_buffers(), exact.named_buffers(), strict=True):
        assert torch.equal(buffer, wanted), f"{name} was rounded"  # rotary frequencies stay in float32
    assert model.config.video_token_id == loaded_processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert logits(model, loaded_processor).isfinite().all()
    model, _, selector = load_model(tmp_path, dtype=torch.float32, device="cpu", attn_implementation="eager")
    assert {p.dtype for p in [*model.parameters(), *selector.parameters()]} == {torch.float32}
    assert model.config._attn_implementation == model.config.text_config._attn_implementation == "eager"


def test_saved_again_it_is_an_ordinary_checkpoint(tmp_path, processor):
    write_released(tmp_path / "a", processor)
    model, loaded_processor, _ = load_model(tmp_path / "a")
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "b")
    loaded_processor.save_pretrained(tmp_path / "b")
    again, again_processor, selector = load_model(tmp_path / "b")
    assert selector is None
    assert torch.equal(logits(again, again_processor), logits(model, loaded_processor))


def test_ordinary_checkpoint(tmp_path):
    embedded.save(tmp_path)
    source, _ = embedded.build()
    model, processor, selector = load_model(str(tmp_path), attn_implementation="sdpa")
    assert selector is None
    assert not model.training
    assert model.dtype == torch.float32
    assert torch.equal(logits(model, processor), logits(source, processor))
    assert load_model(tmp_path, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_selector_out_of_a_whole_checkpoint(tmp_path, processor):
    """Nothing else of it is read: the shards without the selector may be absent."""
    _, selector = write_released(tmp_path, processor, shards=1)
    whole = Checkpoint(tmp_path)
    config, state = whole.config, whole.tensors()
    write(tmp_path / "two", config, state, shards=2)
    index = json.loads((tmp_path / "two" / "model.safetensors.index.json").read_text())
    parts = {k: v for k, v in state.items() if k.startswith("model.qts_plus")}
    save_file(parts, tmp_path / "two" / "selector.safetensors")
    index["weight_map"] |= dict.fromkeys(parts, "selector.safetensors")
    (tmp_path / "two" / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in (tmp_path / "two").glob("model-*.safetensors"):
        file.unlink()
    loaded = QTSplus.from_pretrained(tmp_path / "two", max_tokens=9)
    assert loaded.max_tokens == 9
    assert loaded.selector.config == selector.config
    for name, parameter in selector.named_parameters():
        if not name.startswith("time_embedding"):
            assert torch.equal(loaded.selector.get_parameter(name), parameter)


@pytest.mark.parametrize("prefix", ["model.qts_plus.selector.", "selector.", ""])
def test_selector_alone_by_the_released_names(tmp_path, prefix):
    selector = build_selector().bfloat16()
    state = {prefix + name: tensor for name, tensor in released_selector_state(selector).items()}
    write(tmp_path, {"num_attention_heads": 4, "qts_plus_nmax": 512}, state, shards=2)
    loaded = QTSplus.from_pretrained(str(tmp_path))
    assert loaded.selector.config["n_max"] == 512
    assert loaded.selector.config["num_kv_heads"] == 2
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    x, question = torch.randn(1, 40, 64).bfloat16(), torch.randn(1, 5, 64).bfloat16()
    assert torch.equal(loaded.selector(x, question).scores, selector(x, question).scores)


def test_from_the_hub(tmp_path, processor, monkeypatch):
    write_released(tmp_path, processor)
    asked = []

    def snapshot_download(repo_id, allow_patterns):
        assert repo_id == "someone/QTSplus-3B"
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    loaded = QTSplus.from_pretrained("someone/QTSplus-3B")
    assert loaded.selector.config["reencode_layers"] == 2
    assert not any("safetensors" in pattern for pattern in asked[0] if "*" not in pattern)
    assert asked[1] == sorted(asked[1])
    assert all(file.endswith(".safetensors") for file in asked[1])
    _, _, selector = load_model("someone/QTSplus-3B")
    assert selector is not None


def test_official_vision_tower_needs_no_config(tmp_path):
    write(tmp_path, {"model_type": released.MODEL_TYPE}, {})
    state = {f"model.visual.blocks.{i}.norm1.weight": torch.empty(0) for i in range(32)}
    state["model.visual.patch_embed.proj.weight"] = torch.empty(1280, 3, 2, 14, 14, device="meta")
    state["model.visual.merger.mlp.2.weight"] = torch.empty(3584, 5120, device="meta")
    config = released.vision_config(Checkpoint(tmp_path), state)
    assert (config["num_heads"], config["out_hidden_size"], config["depth"]) == (16, 3584, 32)
    del state["model.visual.blocks.31.norm1.weight"]
    with pytest.raises(ValueError, match="31 blocks of width 1280 is not"):
        released.vision_config(Checkpoint(tmp_path), state)


class TestRefused:
    def test_absent(self, tmp_path, monkeypatch):
        for load in (load_model, QTSplus.from_pretrained):
            with pytest.raises(FileNotFoundError, match="no such folder"):
                load(tmp_path / "none")
            with pytest.raises(FileNotFoundError, match=r"no config\.json"):
                load(tmp_path)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(FileNotFoundError, match="nobody/none: no such folder, and the hub does not give it"):
            load_model("nobody/none")

    def test_another_model(self, tmp_path):
        write(tmp_path, {"model_type": "bert"}, {"a": torch.zeros(1)})
        known = r"internvl, .*llava_onevision, qwen2_5_vl, qwen3_vl, and qts_plus_qwen2_5_vl_causal_lm"
        with pytest.raises(ValueError, match=rf"type 'bert'; known types: {known}"):
            load_model(tmp_path)
        with pytest.raises(ValueError, match="holds no QTSplus selector"):
            QTSplus.from_pretrained(tmp_path)

    def test_a_selector_alone_is_no_model(self, tmp_path):
        build_selector().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"qts_kernels\.QTSplus.*known types"):
            load_model(tmp_path)

    def test_heads_are_needed(self, tmp_path):
        write(tmp_path, {}, released_selector_state(build_selector()))
        with pytest.raises(ValueError, match="lacks num_attention_heads"):
            QTSplus.from_pretrained(tmp_path)

    @pytest.mark.parametrize("gone", ["model.norm.weight", "model.vision_tower.blocks.0.norm1.weight"])
    def test_missing_tensor(self, tmp_path, processor, gone):
        write_released(tmp_path, processor, shards=1)
        whole = Checkpoint(tmp_path)
        state = whole.tensors()
        del state[gone]
        write(tmp_path, whole.config, state)
        with pytest.raises(RuntimeError, match="Missing key"):
            load_model(tmp_path)

    def test_tensor_without_a_place(self, tmp_path, processor):
        write_released(tmp_path, processor, shards=1)
        whole = Checkpoint(tmp_path)
        write(tmp_path, whole.config, whole.tensors() | {"model.mm_projector.weight": torch.zeros(2, 2)})
        with pytest.raises(RuntimeError, match="mm_projector"):
            load_model(tmp_path)

    def test_missing_shard(self, tmp_path, processor):
        write_released(tmp_path, processor)
        (tmp_path / "model-00002-of-00003.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"model-00002-of-00003\.safetensors, which is absent"):
            load_model(tmp_path)
