"""The method of a model that encodes videos, wrapped: to see the vision tower's features, to encode a video once, to
encode it a few frames at a time."""

import inspect
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import nn

from qts_video.adapters.base import Adapter
from qts_video.cache import VideoCache, content_key
from qts_video.dropin.chunks import arguments_of, encode_in_chunks
from qts_video.newlines import NewlineLayout

# An argument of the language model, which forward() passes on and generate() does not.
_NO_ARGUMENT = ("use_cache",)


class VideoEncoder:
    """Stands in for ``adapter.video_encoder`` of a model's multimodal part. A deep copy belongs to the copied model."""

    def __init__(
        self,
        model: nn.Module,
        adapter: Adapter,
        cache: VideoCache | None,
        on_features: Callable[[torch.Tensor], None] | None,
        chunk_frames: int | None = None,
    ) -> None:
        """``on_features`` is called with what goes into the projector, in every call of the encoder; ``chunk_frames``
        is how many frames are encoded at a time (None: all)."""
        self.model, self.adapter, self.cache, self.on_features = model, adapter, cache, on_features
        self.chunk_frames = chunk_frames
        # generate() reads the signature, which inspect finds behind this name.
        self.__wrapped__ = getattr(adapter.parts(model).base, adapter.video_encoder)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.cache is None:
            output, vision = self._encode(args, kwargs)
        else:
            output, vision = self._find(self.cache, args, kwargs)
        if self.on_features is not None:
            self.on_features(vision)
        return output

    def _encode(self, args: tuple, kwargs: dict) -> tuple[Any, torch.Tensor | None]:
        if self.on_features is None:
            return self._run(args, kwargs), None
        seen = []

        def record(module: nn.Module, inputs: tuple) -> None:
            seen.append(inputs[0] if torch.is_grad_enabled() else inputs[0].detach())

        hook = self.adapter.projector(self.model).register_forward_pre_hook(record)
        try:
            output = self._run(args, kwargs)
        finally:
            hook.remove()
        return output, seen[0] if len(seen) == 1 else torch.cat(seen)

    def _run(self, args: tuple, kwargs: dict) -> Any:
        encode = self.__wrapped__
        if self.chunk_frames is None:
            return encode(*args, **kwargs)
        if isinstance(encode, NewlineLayout):  # its newlines are those of whole videos
            return encode.lay_out(self._in_chunks(encode.inner), args, kwargs)
        return self._in_chunks(encode)(*args, **kwargs)

    def _in_chunks(self, encode: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: encode_in_chunks(
            self.model, self.adapter, self.chunk_frames, encode, args, kwargs
        )

    def _find(self, cache: VideoCache, args: tuple, kwargs: dict) -> tuple[Any, torch.Tensor | None]:
        cache.bind(self.model)
        arguments = self._arguments(args, kwargs)
        weights = self._weights()
        tensors = chain(weights, (value for value in arguments.values() if isinstance(value, torch.Tensor)))
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            raise RuntimeError(
                "a VideoCache has no gradients for the vision tower or its projector: run under torch.no_grad(), "
                "freeze what encodes videos with requires_grad_(False), or attach without cache="
            )
        tower = self.adapter.parts(self.model).vision
        attention = getattr(getattr(tower, "config", None), "_attn_implementation", None)
        device = weights[0].device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        # A layout of qts_video.newlines, inside this object or around it, decides what the model gives.
        outer = getattr(self.adapter.parts(self.model).base, self.adapter.video_encoder)
        layouts = [getattr(encoder, "key", None) for encoder in (outer, self.__wrapped__)]
        key = content_key(arguments, weights, (tower.training, attention, autocast, layouts, self.chunk_frames))
        found = cache.get(key, vision=self.on_features is not None)
        if found is not None:
            return found.output, found.vision
        output, vision = self._encode(args, kwargs)
        cache.put(key, output, vision)
        return output, vision

    def _arguments(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """By name, with the config's values of those that are not given: forward() fills them in, generate() does
        not."""
        given, config = arguments_of(self.__wrapped__, args, kwargs), self.model.config
        parameters = inspect.signature(self.__wrapped__).parameters.values()
        missing = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and given.get(p.name) is None]
        arguments = given | {name: getattr(config, name, None) for name in missing}
        return {name: value for name, value in arguments.items() if value is not None and name not in _NO_ARGUMENT}

    def _weights(self) -> list[torch.Tensor]:
        """Parameters and buffers of the multimodal part that are not the language model's."""
        parts = self.adapter.parts(self.model)
        text = parts.decoder if parts.generator is None else parts.generator
        known = {id(tensor) for tensor in chain(text.parameters(), text.buffers())}
        return [t for t in chain(parts.base.parameters(), parts.base.buffers()) if id(t) not in known]
