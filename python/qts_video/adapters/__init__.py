"""The models that a selector can be attached to, found by ``config.model_type``."""

from torch import nn

from qts_video.adapters.base import Adapter, Parts
from qts_video.adapters.internvl import InternVL
from qts_video.adapters.internvl_chat import InternVLChat
from qts_video.adapters.llava_next_video import LlavaNextVideo
from qts_video.adapters.llava_onevision import LlavaOnevision
from qts_video.adapters.qwen2_5_vl import Qwen2_5_VL
from qts_video.adapters.qwen3_vl import Qwen3_VL

__all__ = ["ADAPTERS", "Adapter", "Parts", "find_adapter"]

ADAPTERS: dict[str, Adapter] = {
    adapter.model_type: adapter
    for adapter in (
        Qwen2_5_VL(),
        Qwen3_VL(),
        LlavaOnevision(),
        LlavaNextVideo(),
        InternVL(),
        InternVLChat(),
    )
}


def find_adapter(model: nn.Module) -> Adapter:
    """The adapter of ``model``. Raises TypeError, naming the models that are known, where there is none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in ADAPTERS:
        raise TypeError(
            f"no adapter for {type(model).__name__} (model_type {model_type!r}); known model types: "
            + ", ".join(sorted(ADAPTERS))
        )
    adapter = ADAPTERS[model_type]
    adapter.check(model)
    return adapter
