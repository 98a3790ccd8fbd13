"""The embedded models are real ones in everything but their weights. What families share is in
``test_families_end_to_end.py``."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.adapters import find_adapter
from qts_video.answer import answer, prepare
from qts_video.video import Video
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor


def short_video(frames: int = 4, height: int = 56, width: int = 84, fps: float = 2.0) -> Video:
    noise = np.random.default_rng(0).integers(0, 255, (frames, 3, height, width), np.uint8)
    seconds = [i / fps for i in range(frames)]
    return Video(torch.from_numpy(noise), seconds, fps, list(range(frames)), frames, frames / fps, "noise", "test")


@pytest.fixture(scope="module")
def built():
    return embedded.build()


def test_real_classes_and_few_million_parameters(built):
    model, processor = built
    assert type(model) is Qwen2_5_VLForConditionalGeneration
    assert type(processor) is Qwen2_5_VLProcessor
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 10e6
    assert not model.training


def test_seeded_and_leaves_the_global_generator_alone(built):
    model, _ = built
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again, _ = embedded.build(seed=0)
    assert torch.equal(torch.rand(1), expected)
    other, _ = embedded.build(seed=1)
    weights = model.state_dict()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in weights.items())
    assert not torch.equal(weights["lm_head.weight"], other.state_dict()["lm_head.weight"])


@pytest.mark.parametrize("model_type", embedded.MODEL_TYPES)
def test_every_family_is_its_own_and_small(model_type):
    model, processor = embedded.build(model_type, seed=2)
    assert model.config.model_type == find_adapter(model).model_type == model_type
    assert sum(p.numel() for p in model.parameters()) < 10e6
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not model.training
    assert len(processor.tokenizer) == model.get_input_embeddings().num_embeddings
    assert model.generation_config.eos_token_id == processor.tokenizer.eos_token_id
    again, _ = embedded.build(model_type, seed=2)
    weights = again.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_unknown_family():
    with pytest.raises(ValueError, match="no embedded model of type 'bert'; known types: qwen2_5_vl, qwen3_vl, "):
        embedded.build("bert")


def test_inputs_are_those_of_qwen(built):
    model, processor = built
    inputs = prepare(processor, short_video(), "What moves?")
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith("<|im_start|>system\n")
    assert "<|im_start|>user\n<|vision_start|><|video_pad|>" in text
    assert text.endswith("<|vision_end|>What moves?<|im_end|>\n<|im_start|>assistant\n")
    assert inputs["video_grid_thw"].tolist() == [[2, 4, 6]]
    assert (inputs["input_ids"] == model.config.video_token_id).sum() == 2 * 2 * 3
    assert float(inputs["second_per_grid_ts"][0]) == 1.0


@pytest.mark.parametrize("fps", [0.5, 2.0, 4.0])
def test_seconds_of_a_step_follow_the_sampling_rate(built, fps):
    inputs = prepare(built[1], short_video(fps=fps), "?")
    assert float(inputs["second_per_grid_ts"][0]) == pytest.approx(2 / fps)


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava_next_video"])
@pytest.mark.parametrize("text", ["Which colour is the circle?", "zwölf Äpfel 😀", "a\n\nb   c 123"])
def test_tokenizer_loses_nothing(model_type, text):
    tokenizer = embedded.build_processor(model_type).tokenizer
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_checkpoint_loads_the_ordinary_way(built, tmp_path):
    model, processor = built
    embedded.save(tmp_path)
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    read = AutoProcessor.from_pretrained(tmp_path)
    video, question = short_video(), "What happens?"
    inputs, again = prepare(processor, video, question), prepare(read, video, question)
    assert set(inputs) == set(again)
    assert all(torch.equal(torch.as_tensor(inputs[k]), torch.as_tensor(again[k])) for k in inputs)
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, loaded(**again).logits)


def test_an_answer_is_measured(built):
    model, processor = built
    result = answer(model, processor, prepare(processor, short_video(), "What?"), max_new_tokens=3)
    assert (result.tokens, result.kept, result.report) == (12, 12, None)
    assert result.generated_tokens <= 3
    times = result.timings
    assert times["selection"] == 0
    assert min(times["vision"], times["prefill"]) > 0
    assert times["vision"] + times["prefill"] <= times["total"]


def test_selection_is_taken_out_again(built):
    from qts_video.methods import Uniform

    model, processor = built
    inputs = prepare(processor, short_video(), "What?")
    plain = answer(model, processor, inputs, max_new_tokens=3)
    fewer = answer(model, processor, inputs, Uniform(max_tokens=5), max_new_tokens=3)
    assert (fewer.tokens, fewer.kept) == (12, 5)
    assert answer(model, processor, inputs, max_new_tokens=3).text == plain.text
