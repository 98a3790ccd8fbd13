"""LLaVA-NeXT-Video: ``LlavaNextVideoForConditionalGeneration``."""

from typing import Any

from torch import nn

from qts_video.adapters._llava import BLANKS, Llava, chatml_markers
from qts_video.dropin.question import ChatMarkers, resolve_text_markers


class LlavaNextVideo(Llava):
    """Adapter of LLaVA-NeXT-Video: frames pooled by a stride, no newlines (layout "no_token"), and turns as the
    checkpoint's language model knows them: Vicuna's ``USER: ... ASSISTANT:``, Mistral's ``[INST] ... [/INST]``, or
    ChatML."""

    model_type = "llava_next_video"
    class_name = "LlavaNextVideoForConditionalGeneration"

    def frame_grids(self, model: nn.Module) -> tuple[tuple[int, int], ...]:
        vision = model.config.vision_config
        side = vision.image_size // vision.patch_size // model.config.spatial_pool_stride
        return ((side, side),)

    def chat_markers(self, model: nn.Module, tokenizer: Any | None) -> ChatMarkers | None:
        if tokenizer is None:
            return None
        if "<|im_start|>" in tokenizer.get_vocab():
            return chatml_markers(tokenizer)
        return resolve_text_markers(
            tokenizer, opening=("USER:", "[INST]"), closing=("ASSISTANT:", "[/INST]"), blanks=BLANKS
        )
