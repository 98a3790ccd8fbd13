"""A selector that starts from a language model."""

import json

import pytest
import torch
from qts_video.lite.pretrained import from_language_model
from safetensors.torch import load_file, save_file
from tiny_qwen import build_model
from transformers import Qwen2Config, Qwen2ForCausalLM


@pytest.fixture(scope="module")
def model():
    return build_model()


@pytest.fixture
def language_model(tmp_path):
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=600,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    built = Qwen2ForCausalLM(config).bfloat16()
    built.save_pretrained(tmp_path)
    return built


def test_the_language_model_is_taken_and_the_projector_is_new(model, language_model, tmp_path):
    student = from_language_model(model, tmp_path, seed=3)
    assert (student.config.family, student.config.layers, student.config.vocab_size) == ("qwen", 3, 600)
    assert student.dtype == torch.float32
    assert not student.training
    theirs = language_model.model.state_dict()
    for name, tensor in student.decoder.state_dict().items():
        assert torch.equal(tensor, theirs[name].float()), name
    other = from_language_model(model, tmp_path, seed=4)
    assert not torch.equal(student.projector.mlp[0].weight, other.projector.mlp[0].weight)
    again = from_language_model(model, tmp_path, seed=3)
    assert torch.equal(student.projector.mlp[0].weight, again.projector.mlp[0].weight)


@pytest.mark.parametrize(
    "entries, message",
    [
        ({"model_type": "llama"}, "expected a language model with model_type 'qwen2', got 'llama'"),
        ({"hidden_act": "gelu"}, "asks for hidden_act 'gelu', which is not supported"),
        ({"num_hidden_layers": 4}, "lacks layers.3.input_layernorm.weight, "),
        ({"num_hidden_layers": 2}, "has, without a place for them, layers.2.input_layernorm.weight, "),
    ],
)
def test_other_checkpoints_are_refused(model, language_model, tmp_path, entries, message):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(ValueError, match=message):
        from_language_model(model, tmp_path)


def test_another_vocabulary_is_refused(model, language_model, tmp_path):
    weights = load_file(tmp_path / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file(weights | {name: weights[name].repeat(4, 1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"has a vocabulary of 2400 tokens, and .* one of 512"):
        from_language_model(model, tmp_path)
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lacks model\.embed_tokens\.weight"):
        from_language_model(model, tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        from_language_model(model, tmp_path / "absent")
