"""InternVL checkpoints that bring their own code (``InternVLChatModel``): loading them, and the processor they lack."""

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer, BatchFeature

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet's, of 0..1, with which InternViT was trained."""


def load(name: str, dtype: torch.dtype | None, attn_implementation: str | None) -> tuple[Any, "InternVLChatProcessor"]:
    """The model and a processor for it. Runs the code that lies with the checkpoint."""
    options = {} if attn_implementation is None else {"attn_implementation": attn_implementation}
    model = AutoModel.from_pretrained(name, dtype=dtype or "auto", trust_remote_code=True, **options)
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    # What chat() would set and pass on.
    model.img_context_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    generation = model.language_model.generation_config
    generation.eos_token_id = tokenizer.convert_tokens_to_ids(model.conv_template.sep.strip())
    generation.pad_token_id = tokenizer.pad_token_id
    return model, InternVLChatProcessor(model, tokenizer)


class InternVLChatProcessor:
    """Makes what the checkpoints' model cards make by hand: every frame one tile, ``Frame1: <img>...</img>``, in the
    template that the model's own ``chat`` uses."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._conversation, self._system = model.conv_template, model.system_message
        self._size = model.config.force_image_size or model.config.vision_config.image_size
        self._image = f"<img>{'<IMG_CONTEXT>' * model.num_image_token}</img>"

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool
    ) -> str:
        """A turn of the user (a video, written as ``<video>``, and text), and the answer to it, or what opens one."""
        texts = [
            "".join("<video>" if part["type"] == "video" else part["text"] for part in message["content"])
            for message in messages
        ]
        conversation = self._conversation.copy()
        conversation.system_message = self._system
        question, answer = texts if len(texts) == 2 else (*texts, None)
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def __call__(
        self, *, text: list[str], videos: list[torch.Tensor], do_sample_frames: bool, return_tensors: str
    ) -> BatchFeature:
        """Of one prompt with one video [F, 3, H, W] in 0..255: ``input_ids``, ``attention_mask``, and ``pixel_values``
        [F, 3, S, S]."""
        from torchvision.transforms.v2 import functional as pictures

        (prompt,), (frames,) = text, videos
        lines = "".join(f"Frame{number}: {self._image}\n" for number in range(1, len(frames) + 1))
        size = [self._size, self._size]
        tiles = pictures.resize(frames, size, pictures.InterpolationMode.BICUBIC, antialias=True)
        pixels = pictures.normalize(tiles.float() / 255, MEAN, STD)
        encoded = self.tokenizer(prompt.replace("<video>", lines, 1), return_tensors=return_tensors)
        return BatchFeature({**encoded, "pixel_values": pixels})
