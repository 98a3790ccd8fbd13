"""Whole models with random weights, vision tower included: at the published sizes on a GPU, and small ones on a CPU.

Nothing is downloaded: the configurations are those of the checkpoints, built on the card. A film's frames are random.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from qts_video import embedded
from qts_video.adapters import find_adapter
from torch import nn

GPU = torch.cuda.is_available()
IMAGE, VIDEO, START, END = 1000, 1001, 1002, 1003
"""Ids of placeholders, but for InternVL's, which its processor writes; the words of a prompt are below."""
TEXT_TOKENS = 64


@dataclass(frozen=True)
class Size:
    """A language model, and the width, layers, heads and feed-forward of the vision tower in front of it."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocabulary: int
    vision: tuple[int, int, int, int]
    side: int
    """Patches along a side of a frame."""


SIZES = {
    "Qwen2.5-VL-3B": Size(36, 2048, 16, 2, 11008, 151936, (1280, 32, 16, 3420), 28),
    "Qwen2.5-VL-7B": Size(28, 3584, 28, 4, 18944, 152064, (1280, 32, 16, 3420), 28),
    "LLaVA-Video-7B": Size(28, 3584, 28, 4, 18944, 152064, (1152, 26, 16, 4304), 27),
    "InternVL3-8B": Size(28, 3584, 28, 4, 18944, 151674, (1024, 24, 16, 4096), 32),
}
SMALL = Size(8, 256, 4, 2, 1024, 1024, (128, 4, 4, 256), 8)


def names() -> list[str]:
    return list(SIZES) if GPU else ["Qwen2.5-VL-7B", "LLaVA-Video-7B", "InternVL3-8B"]


def build(name: str, device: str) -> nn.Module:
    """In bfloat16 on a GPU; on a CPU the small model of that family, in float32."""
    model = made_on(device, lambda: _family(name).build(_size(name)))
    model.generation_config.eos_token_id = None  # random weights must not stop early
    model.generation_config.pad_token_id = 0
    return model


def made_on(device: torch.device | str, make: Callable[[], nn.Module]) -> nn.Module:
    """A model in eval mode, made on ``device`` from one seed: in bfloat16 on a GPU, else float32."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    try:
        with torch.device(device):
            return make().eval()
    finally:
        torch.set_default_dtype(before)


def prompt(name: str, model: nn.Module, frames: int) -> dict[str, torch.Tensor]:
    """What the model is given for a film of ``frames`` frames and a question."""
    ids, inputs = _family(name).prompt(_size(name), frames)
    ids = torch.tensor([[*range(1, 15), *ids, *range(20, 20 + TEXT_TOKENS)]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **inputs}
    if "video_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == VIDEO).long() * 2
    return {
        key: value.to(model.device, model.dtype) if key.startswith("pixel") else value.to(model.device)
        for key, value in inputs.items()
    }


def processor(name: str) -> Any:
    """Of the class of that model's family, over a vocabulary of a few hundred tokens."""
    return _processor(_family(name).embedded)


_processor = cache(embedded.build_processor)


def vision_tokens(model: nn.Module, inputs: dict[str, torch.Tensor]) -> int:
    """How many of a prompt are a film's."""
    return int((inputs["input_ids"] == find_adapter(model).video_token_id(model)).sum())


def _size(name: str) -> Size:
    return SIZES[name] if GPU else SMALL


def _text(size: Size, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen2",
        "hidden_size": size.width,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "vocab_size": size.vocabulary,
        "max_position_embeddings": 262144,
        "pad_token_id": 0,
        **more,
    }


def _vision(size: Size, **more: Any) -> dict[str, Any]:
    width, layers, heads, inner = size.vision
    shape = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return {**shape, "intermediate_size": inner, "patch_size": 14, **more}


def mrope(size: Size) -> dict[str, Any]:
    """The rotary axes of Qwen's models: time, rows and columns."""
    half = size.width // size.heads // 2
    sections = [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]
    return {"type": "default", "rope_type": "default", "mrope_section": sections}


def frames_of(name: str, frames: int) -> torch.Tensor:
    """[F, 3, H, W] uint8 on the CPU: a film, as large as ``prompt`` says."""
    pixels = _size(name).side * 14
    return torch.randint(0, 256, (frames, 3, pixels, pixels), dtype=torch.uint8)


def build_qwen(size: Size) -> nn.Module:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    width, layers, heads, inner = size.vision
    text = _text(size, rope_scaling=mrope(size))
    del text["model_type"]
    vision = {"depth": layers, "hidden_size": width, "intermediate_size": inner, "num_heads": heads}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config={
            **vision,
            "out_hidden_size": size.width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": list(range(7, layers, 8)),
            "tokens_per_second": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _prompt_qwen(size: Size, frames: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    steps, side = max(1, frames // 2), size.side
    return [START, *[VIDEO] * (steps * side * side // 4), END], {
        "pixel_values_videos": torch.randn(steps * side * side, 3 * 2 * 14 * 14),
        "video_grid_thw": torch.tensor([[steps, side, side]]),
        "second_per_grid_ts": torch.ones(1),
    }


def _build_llava(size: Size) -> nn.Module:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    pixels = size.side * 14
    config = LlavaOnevisionConfig(
        text_config=_text(size),
        vision_config=_vision(size, model_type="siglip_vision_model", image_size=pixels, vision_use_head=False),
        image_grid_pinpoints=[[pixels, pixels]],
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        vision_feature_layer=-1,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _prompt_llava(size: Size, frames: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    pooled, pixels = -(-size.side // 2), size.side * 14
    return [VIDEO] * (frames * pooled * pooled + 1), {"pixel_values_videos": torch.randn(1, frames, 3, pixels, pixels)}


def _build_internvl(size: Size) -> nn.Module:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    pixels = [size.side * 14] * 2
    config = InternVLConfig(
        text_config=_text(size),
        vision_config=_vision(size, image_size=pixels, patch_size=[14, 14]),
        image_token_id=_processor("internvl").image_token_id,
        image_seq_length=(size.side // 2) ** 2,
        tie_word_embeddings=False,
    )
    return InternVLForConditionalGeneration(config)


def _prompt_internvl(size: Size, frames: int) -> tuple[list[int], dict[str, torch.Tensor]]:
    pixels, writes = size.side * 14, _processor("internvl")
    tile = writes.image_token * (size.side // 2) ** 2
    text = "".join(f"Frame{frame + 1}: <img>{tile}</img>\n" for frame in range(frames))
    return writes.tokenizer.encode(text), {"pixel_values": torch.randn(frames, 3, pixels, pixels)}


class _Family(NamedTuple):
    build: Callable[[Size], nn.Module]
    prompt: Callable[[Size, int], tuple[list[int], dict[str, torch.Tensor]]]
    embedded: str
    """The model with the same classes, of ``qts_video.embedded``."""


FAMILIES = {
    "Qwen2.5-VL": _Family(build_qwen, _prompt_qwen, "qwen2_5_vl"),
    "LLaVA-Video": _Family(_build_llava, _prompt_llava, "llava_onevision"),
    "InternVL3": _Family(_build_internvl, _prompt_internvl, "internvl"),
}


def _family(name: str) -> _Family:
    return FAMILIES[name.rpartition("-")[0]]
