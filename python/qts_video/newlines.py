"""The newline tokens that LLaVA-Video was trained with among those of a video. transformers' LLaVA-OneVision class, in
which converted checkpoints run, writes one behind the whole video alone. And the frames' tokens before the pooling."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from qts_video.adapters._llava import count_tokens, newline_layouts
from qts_video.adapters.llava_onevision import LlavaOnevision

_METHOD, _POOLING = "get_video_features", "apply_pooling"
_ADAPTER = LlavaOnevision()


def newline_layout(model: nn.Module, position: str, pooled: bool = True) -> "NewlineLayout":
    """Make a LLaVA-OneVision model write its newline tokens where ``position`` says, from here on.

    Use it as a context manager, or call ``remove()`` at the end. The prompt must hold a placeholder for every token and
    newline: ``prepare`` turns what the processor returned into that. Goes with ``attach``, before or after it::

        with newline_layout(model, "grid") as layout, attach(model, selector):
            model.generate(**layout.prepare(processor(text=..., videos=..., return_tensors="pt")))

    Args:
        model: a ``LlavaOnevisionForConditionalGeneration``.
        position: as in a checkpoint's ``mm_newline_position``: "grid", a newline behind every row of every frame;
            "frame", one behind every frame; "one_token", one behind the video, which transformers does by itself.
        pooled: False leaves out the model's pooling of a video's frames, [h, w] to [ceil(h/2), ceil(w/2)]: for methods
            that resize frames themselves (QuoTA), with ``attach(..., positions="compact")``, for a prompt of four
            times the tokens may have more positions than the model was made for. Images stay as they are.

    Raises:
        TypeError: another model.
        ValueError: another position; "no_token" too, for the class always writes a newline behind a video.
        RuntimeError: the model has a newline layout already.
    """
    _ADAPTER.check(model)
    positions = [name for name, span in newline_layouts((1, 1, 1)).items() if span]
    if position == "no_token":
        raise ValueError(
            "\"no_token\" can't be had: transformers' LLaVA-OneVision always writes a newline behind a video"
        )
    if position not in positions:
        raise ValueError(f"position must be one of {', '.join(positions)}, got {position!r}")
    if isinstance(model.model.__dict__.get(_METHOD), NewlineLayout):
        raise RuntimeError("this model has a newline layout already: remove it first")
    return NewlineLayout(model, position, pooled)


class NewlineLayout:
    """What ``newline_layout`` returns. It takes the place of the method that encodes videos, of this model alone: an
    object instead of a function, so that a deep copy of the model gets one of its own."""

    def __init__(self, model: nn.Module, position: str, pooled: bool) -> None:
        self.key = position, pooled
        """What tells the features of one layout from those of another."""
        self.position, self.pooled = position, pooled
        self._model, self._base = model, model.model
        self.inner = self._base.get_video_features
        """What it encodes videos with: the method whose place it took."""
        self._replaced = self._base.__dict__.get(_METHOD)
        # By the names of these arguments, generate() finds what the method needs (from transformers 5.18 on).
        self.__signature__ = inspect.signature(self.inner)
        setattr(self._base, _METHOD, self)

    def __enter__(self) -> "NewlineLayout":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Leave the model as it was before. Does nothing the second time.

        Raises RuntimeError where ``get_video_features`` was replaced since, as ``attach`` does for a cache or a method
        that needs vision features: the last in must be the first out.
        """
        if self._base is None:
            return
        if self._base.__dict__.get(_METHOD) is not self:
            raise RuntimeError(f"{_METHOD} was replaced after newline_layout: undo that first (last in, first out)")
        if self._replaced is None:
            delattr(self._base, _METHOD)
        else:
            setattr(self._base, _METHOD, self._replaced)
        self._base = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's ``get_video_features``, with its newlines among the features."""
        return self.lay_out(self.inner, args, kwargs)

    def lay_out(self, encode: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """The same, by an ``encode`` that stands in for ``inner``."""
        pixels = next(iter(self.__signature__.bind(*args, **kwargs).arguments.values()))
        with nullcontext() if self.pooled else _without_pooling(self._base):
            encoded = encode(*args, **kwargs)
        if isinstance(encoded, torch.Tensor):  # transformers 4
            return self._interleave(encoded, pixels.shape[1])
        if isinstance(encoded, tuple):
            raise ValueError("return_dict=False is not supported under newline_layout")
        encoded.pooler_output = self._interleave(encoded.pooler_output, pixels.shape[1])
        return encoded

    def _interleave(self, features: torch.Tensor, frames: int) -> torch.Tensor:
        """``features`` [V, tokens, D] with the newlines of this layout, without the last where the model appends it
        itself (as it does before transformers 5.18)."""
        grid = self._grid(frames)
        span, tokens = newline_layouts(grid)[self.position], count_tokens(grid, 0)
        appended = features.shape[1] - tokens
        if appended not in (0, 1):
            raise RuntimeError(f"expected {tokens} features of a video of grid {grid}, got {features.shape[1]}")
        lines = features[:, :tokens].unflatten(1, (tokens // span, span))
        newline = self._base.image_newline.to(features).expand(*lines.shape[:2], 1, -1)
        return torch.cat([lines, newline], 2).flatten(1, 2)[:, : count_tokens(grid, span) - 1 + appended]

    def _grid(self, frames: int) -> tuple[int, int, int]:
        pooled, unpooled = _ADAPTER.frame_grids(self._model)
        return frames, *(pooled if self.pooled else unpooled)

    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """``inputs`` with as many placeholders for every video as this layout has tokens.

        Args:
            inputs: what the processor returned: ``input_ids`` [B, L] with F*h*w + 1 placeholders for every video (h, w
                after the pooling), ``attention_mask`` and ``pixel_values_videos`` [V, F, C, H, W].

        Returns:
            The same, with ``input_ids``, ``attention_mask`` and every other tensor [B, L] made longer, and padded on
            the side where it was padded (on the left where nothing was).

        Raises:
            ValueError: there are other numbers of placeholders.
        """
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        token = _ADAPTER.video_token_id(self._model)
        frames = inputs["pixel_values_videos"].shape[1]
        written, grid = (frames, *_ADAPTER.frame_grids(self._model)[0]), self._grid(frames)
        before = count_tokens(written, newline_layouts(written)["one_token"])
        after = count_tokens(grid, newline_layouts(grid)[self.position])
        placeholder = (ids == token).cpu()
        if bool((placeholder.sum(1) % before != 0).any()):
            raise ValueError(
                f"expected {before} placeholders for every video of grid {written}, as the processor writes them, got "
                f"{placeholder.sum(1).tolist()} in the samples"
            )
        # The first placeholder of each video is repeated: they are all the same.
        first = placeholder & ((placeholder.cumsum(1) - 1) % before == 0)
        times = torch.where(first, after - before + 1, 1)
        columns = [
            torch.arange(ids.shape[1]).repeat_interleave(row)[of.repeat_interleave(row) != 0]
            for row, of in zip(times, mask.cpu(), strict=True)
        ]
        side = "left" if bool(mask[:, -1].all()) else "right"
        source = pad_sequence(columns, batch_first=True, padding_value=-1, padding_side=side).to(ids.device)
        fill = {"input_ids": self._model.config.get_text_config().pad_token_id or 0, "labels": -100}
        lengthened = {
            name: value.gather(1, source.clamp(min=0)).masked_fill(source < 0, fill.get(name, 0))
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.shape == ids.shape
        }
        return {**inputs, **lengthened}


@contextmanager
def _without_pooling(base: nn.Module) -> Iterator[None]:
    """While it encodes videos, ``base`` leaves their frames as the projector gave them."""
    before = base.__dict__.get(_POOLING)
    setattr(base, _POOLING, lambda features: features)
    try:
        yield
    finally:
        if before is None:
            delattr(base, _POOLING)
        else:
            setattr(base, _POOLING, before)
