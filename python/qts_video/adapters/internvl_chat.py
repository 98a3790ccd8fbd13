"""InternVL as its checkpoints bring it: ``InternVLChatModel``, of the code that ``trust_remote_code`` loads."""

import inspect
import math
from typing import Any

from torch import nn

from qts_video.adapters.base import Parts
from qts_video.adapters.internlm2 import is_fused
from qts_video.adapters.internvl import InternVL
from qts_video.dropin.layout import Layout

_PARTS = ("vision_model", "mlp1", "language_model", "extract_feature", "num_image_token", "img_context_token_id")


class InternVLChat(InternVL):
    """Adapter of ``InternVLChatModel``, told by its parts. Its generate() and chat() embed the prompt by themselves and
    give the embeddings to generate() of the language model, which is transformers' Qwen2 or the remote InternLM2.
    """

    model_type = "internvl_chat"
    video_encoder = "extract_feature"

    def check(self, model: nn.Module) -> None:
        missing = [name for name in _PARTS if not hasattr(model, name)]
        language_model = getattr(model, "language_model", None)
        missing += [f"language_model.{name}" for name in ("model", "generate") if not hasattr(language_model, name)]
        missing += [] if hasattr(getattr(language_model, "model", None), "layers") else ["language_model.model.layers"]
        if missing:
            raise TypeError(f"expected an InternVLChatModel, got {type(model).__name__} without " + ", ".join(missing))
        layer = language_model.model.layers[0]
        if is_fused(layer) and "position_ids" not in _parameters(layer.attention.rotary_emb.forward):
            raise TypeError(
                f"the code of {type(language_model).__name__} is too old: it looks rotary angles up by the length of "
                "the cache and keeps tuples for a cache; take one with rotary_emb(x, position_ids) and a Cache"
            )

    def parts(self, model: nn.Module) -> Parts:
        return Parts(
            base=model,
            decoder=model.language_model.model,
            vision=model.vision_model,
            generator=model.language_model,
        )

    def projector(self, model: nn.Module) -> nn.Module:
        return model.mlp1

    def tile_grid(self, model: nn.Module) -> tuple[int, int]:
        side = math.isqrt(model.num_image_token)
        return side, side

    def video_token_id(self, model: nn.Module) -> int:
        if model.img_context_token_id is None:
            raise ValueError(
                "model.img_context_token_id is None: chat() sets it; before forward() or generate() set it to "
                "tokenizer.convert_tokens_to_ids('<IMG_CONTEXT>')"
            )
        return model.img_context_token_id

    def regroup_copies(self, model: nn.Module, inputs: dict[str, Any], layout: Layout, copies: int) -> dict[str, Any]:
        return inputs  # its generate() embeds every sample once

    def _is_official(self, model: nn.Module) -> bool:
        return model.img_context_token_id is not None and super()._is_official(model)


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)
