"""A checkpoint with code of its own: what it takes to load it, its prompt, and an answer."""

import json
import re

import pytest
import torch
from qts_video.answer import answer, prepare
from qts_video.checkpoints import load_model
from qts_video.data import Collator, Sample
from qts_video.embedded.tokenizer import build_qwen_tokenizer
from qts_video.evaluate.predict import Predictor
from qts_video.methods import QTSplus, Uniform
from qts_video.video import Video
from safetensors.torch import save_file
from tiny_internvl_chat import SIZE, build_model

QUESTION = "Which colour is the circle?"

# What the real code has and the tiny model lacks: the template of chat(), and weights that are loaded.
CODE = """
import copy
from tiny_internvl_chat import LANGUAGE_MODELS, InternVLChatConfig, InternVLChatModel


class Config(InternVLChatConfig):
    def __init__(self, **options):
        super().__init__(**options)


class Conversation:
    sep = "<|im_end|>\\n"
    roles = ("<|im_start|>user\\n", "<|im_start|>assistant\\n")

    def __init__(self):
        self.system_message, self.messages = "", []

    def copy(self):
        return copy.deepcopy(self)

    def append_message(self, role, text):
        self.messages.append(role + (text + self.sep if text else ""))

    def get_prompt(self):
        return "<|im_start|>system\\n" + self.system_message + self.sep + "".join(self.messages)


class Model(InternVLChatModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config, LANGUAGE_MODELS["qwen2"]("sdpa"))
        self.conv_template, self.system_message = Conversation(), "You are a helpful assistant."
        self.post_init()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("internvl_chat")
    config = {
        "model_type": "internvl_chat",
        "architectures": ["Model"],
        "auto_map": {"AutoConfig": "tiny_remote.Config", "AutoModel": "tiny_remote.Model"},
        "force_image_size": SIZE,
        "tie_word_embeddings": False,
        "dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tiny_remote.py").write_text(CODE)
    save_file(build_model().float().state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    build_qwen_tokenizer(("<img>", "</img>", "<IMG_CONTEXT>")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def video():
    frames = torch.randint(0, 255, (3, 3, 40, 60), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return Video(frames, [0.0, 0.5, 1.0], 2.0, [0, 6, 12], 18, 1.5, "noise", "test")


@pytest.fixture(scope="module")
def loaded(folder):
    model, processor, selector = load_model(folder, trust_remote_code=True)
    assert selector is None
    return model, processor


def test_its_code_runs_only_where_it_is_trusted(folder):
    with pytest.raises(ValueError, match=r"\(internvl_chat\) runs code of its own: .*trust_remote_code=True; .*-hf"):
        load_model(folder)


def test_weights_and_what_chat_would_set(loaded):
    model, processor = loaded
    assert not model.training
    source = build_model().float().state_dict()
    assert all(torch.equal(value, source[name]) for name, value in model.state_dict().items())
    assert model.img_context_token_id == processor.tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    assert model.language_model.generation_config.eos_token_id == processor.tokenizer.eos_token_id


def test_the_prompt(loaded, video):
    model, processor = loaded
    inputs = prepare(processor, video, QUESTION)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    text = re.sub("(?:<IMG_CONTEXT>)+", lambda run: f"<{run[0].count('<IMG_CONTEXT>')}>", text)
    frames = "".join(f"Frame{i}: <img><{model.num_image_token}></img>\n" for i in (1, 2, 3))
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{frames}{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert inputs["pixel_values"].shape == (3, 3, SIZE, SIZE)
    assert inputs.seconds_per_step == 0.5


def test_pixels_are_of_imagenet(loaded):
    processor = loaded[1]
    white = torch.full((1, 3, 10, 20), 255, dtype=torch.uint8)
    video = Video(white, [0.0], 1.0, [0], 1, 1.0, "white", "test")
    pixels = prepare(processor, video, QUESTION)["pixel_values"]
    expected = (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels, expected.view(1, 3, 1, 1).expand(1, 3, SIZE, SIZE))


def test_an_answer(loaded, video):
    model, processor = loaded
    inputs = prepare(processor, video, QUESTION)
    tokens = 3 * model.num_image_token
    plain = answer(model, processor, inputs, max_new_tokens=4)
    kept = answer(model, processor, inputs, Uniform(retention_ratio=1.0), max_new_tokens=4)
    assert (plain.tokens, kept.kept, kept.text) == (tokens, tokens, plain.text)
    assert 1 <= plain.generated_tokens <= 4
    for selector in (Uniform(max_tokens=3), QTSplus.from_language_model(model, max_tokens=3)):
        fewer = answer(model, processor, inputs, selector, max_new_tokens=2)
        assert (fewer.kept, fewer.generated_tokens <= 2) == (3, True)
        assert fewer.report.videos[0].frame_seconds.tolist() == pytest.approx([0, 0.5, 1])


def test_evaluation(loaded, video):
    """Answered turns, letters and what is kept, through the model's own template and generate()."""
    model, processor = loaded
    sample = Sample(video, QUESTION, "B", choices=("red", "blue"))
    batch = Collator(processor)([sample])
    learnt = batch["labels"][0][batch["labels"][0] >= 0]
    assert processor.tokenizer.decode(learnt) == "B<|im_end|>"
    (prediction,) = Predictor(model, processor, Uniform(max_tokens=5), max_new_tokens=2)([sample])
    expected = answer(
        model, processor, prepare(processor, video, sample.prompt), Uniform(max_tokens=5), max_new_tokens=2
    )
    assert (prediction.text, prediction.kept) == (expected.text, 5)
    assert sum(prediction.probabilities) == pytest.approx(1)
