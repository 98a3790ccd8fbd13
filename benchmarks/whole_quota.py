"""QuoTA's own work for whole models: its frame scorer with random weights, of Qwen2-VL-2B's size on a GPU and small on
a CPU, and the decoupling by the model that answers."""

import time
from typing import Any

import torch
from qts_video import embedded
from qts_video.quota.frame_scorer import FrameScorer
from torch import nn
from torch.utils.hooks import RemovableHandle
from whole_models import GPU, Size, made_on, mrope

PUBLISHED = Size(28, 1536, 12, 2, 8960, 151936, (1280, 32, 16, 5120), 0)
SMALL = Size(8, 128, 2, 1, 512, 1024, (128, 4, 4, 512), 0)
QUESTION = "Which colour is the shape that moves?"
OBJECT = "red circle"
STEPS = ("Yes.", f'["{OBJECT}"]', f'["{OBJECT}"]')
"""What the model is made to say in the steps of the decoupling, of which random weights would end the first at the
most tokens that it may have, and leave the others out."""


class Scorer(FrameScorer):
    """A frame scorer that keeps the seconds of its work and of ``model``'s. That says ``STEPS`` when it is asked, each
    token by a forward of its own, as any; without that it never ends an answer by itself."""

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        scoring = made_on(model.device, lambda: build(PUBLISHED if GPU else SMALL))
        super().__init__(scoring, embedded.build_processor("qwen2_5_vl"))
        self.decoupling_s = self.scoring_s = 0.0
        """Since the frames were bound."""
        self.scores: torch.Tensor | None = None
        """The last ones."""
        self._answers, self._dictation, self._asked = (model, tokenizer), None, 0.0

    def bind(self, frames, questions=None):
        self.decoupling_s = self.scoring_s = 0.0
        return super().bind(frames, questions)

    def check(self, videos):
        """Before the decoupling, and again before the scoring."""
        found = super().check(videos)
        if self._dictation is None:
            self._dictation, self._asked = _dictate(*self._answers), self._now()
        return found

    def score(self, videos, questions=None):
        start = self._now()
        self.decoupling_s = start - self._asked
        self.scores = super().score(videos, questions)
        self._dictation.remove()
        self._dictation = None
        self._answers[0].generation_config.eos_token_id = None
        self.scoring_s = self._now() - start
        return self.scores

    @property
    def megabytes(self) -> float:
        """Of its weights."""
        return sum(weight.nbytes for weight in self.model.parameters()) / 2**20

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def _dictate(model: nn.Module, tokenizer: Any) -> RemovableHandle:
    end = model.generation_config.eos_token_id = tokenizer.eos_token_id
    script = iter([token for step in STEPS for token in (*tokenizer.encode(step), end)])

    def dictate(module: nn.Module, args: tuple, logits: torch.Tensor) -> None:
        logits[..., next(script)] = 1e4

    return model.get_output_embeddings().register_forward_hook(dictate)


def build(size: Size) -> nn.Module:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = embedded.build_processor("qwen2_5_vl").tokenizer.convert_tokens_to_ids
    width, layers, heads, inner = size.vision
    config = Qwen2VLConfig(
        text_config={
            "hidden_size": size.width,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "vocab_size": size.vocabulary,
            "rope_scaling": mrope(size),
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": layers,
            "embed_dim": width,
            "hidden_size": size.width,
            "num_heads": heads,
            "mlp_ratio": inner // width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = ids("<|endoftext|>")
    return model
