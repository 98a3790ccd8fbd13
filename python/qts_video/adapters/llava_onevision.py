"""LLaVA-OneVision and LLaVA-Video: ``LlavaOnevisionForConditionalGeneration``."""

import math
from typing import Any

from torch import nn

from qts_video.adapters._llava import Llava, chatml_markers
from qts_video.dropin.question import ChatMarkers

# The official vocabulary is Qwen2's, by whose placeholders a model without a tokenizer is recognised.
_OFFICIAL_PLACEHOLDERS = (151646, 151647)
_OFFICIAL_MARKERS = ChatMarkers(
    opening=((151644, 872, 198), (151644, 872)),
    closing=((151645,),),
    blanks=(198, 220, 271, 715),  # "\n", " ", "\n\n" and " \n"
)


class LlavaOnevision(Llava):
    """Adapter of LLaVA-OneVision, which converted LLaVA-Video checkpoints use: a Qwen2 decoder, ChatML turns, frames
    pooled by 2 in either direction. transformers' class puts one newline behind every video (layout "one_token");
    ``qts_video.newlines`` makes it write those that LLaVA-Video was trained with, and frames as they were before the
    pooling.
    """

    model_type = "llava_onevision"
    class_name = "LlavaOnevisionForConditionalGeneration"

    def frame_grids(self, model: nn.Module) -> tuple[tuple[int, int], ...]:
        """Pooled, and unpooled (only under ``qts_video.newlines``)."""
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size
        pooled = math.ceil(side / 2)
        return (pooled, pooled), (side, side)

    def chat_markers(self, model: nn.Module, tokenizer: Any | None) -> ChatMarkers | None:
        if tokenizer is not None:
            return chatml_markers(tokenizer)
        return _OFFICIAL_MARKERS if self.vision_token_ids(model) == _OFFICIAL_PLACEHOLDERS else None
