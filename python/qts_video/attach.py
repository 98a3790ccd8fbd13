"""Put a selector into a model, and take it out again."""

from typing import Any, Literal

from torch import nn

from qts_video.adapters import find_adapter
from qts_video.cache import VideoCache
from qts_video.dropin.attachment import ATTRIBUTE, Attachment
from qts_video.dropin.chunks import check_chunk_frames
from qts_video.dropin.handle import Handle
from qts_video.dropin.prefill import Prefill
from qts_video.dropin.versions import check_version
from qts_video.methods.base import Selector

__all__ = ["Handle", "Prefill", "attach"]


def attach(
    model: nn.Module,
    selector: Selector,
    *,
    tokenizer: Any | None = None,
    positions: Literal["original", "compact"] = "original",
    cache: VideoCache | None = None,
    vision_chunk_frames: int | None = None,
) -> Handle:
    """Let ``selector`` choose which video tokens the language model of ``model`` sees.

    From here on, whenever a prompt with videos goes through ``model`` (its forward, loss, or ``generate``),
    the selector is run once, after the vision tower and before the first decoder layer, and only the video
    tokens it kept go on; text and images always do. Outputs have the shortened length:
    ``handle.last.columns`` says which column of ``input_ids`` each column of the logits belongs to. Prompts
    without a video are untouched. Works by hooks: no forward is replaced.

    Args:
        model: one whose ``config.model_type`` is in ``qts_video.adapters.ADAPTERS``.
        selector: a selection method, e.g. ``qts_video.methods.Uniform(retention_ratio=0.25)``. One with
            parameters must be on the model's device and in its dtype; they do not become part of the model.
        tokenizer: the model's tokenizer or processor, by which a selector's question is found in the prompt:
            the text of its last user turn. Not needed where the model has the official vocabulary, the
            selector needs no question, or the question is given with ``handle.question(...)``. InternVL needs it to
            tell frames from images for sure: see ``qts_video.adapters.numbered_frames``.
        positions: "original": kept tokens keep the rotary positions that they had. "compact": every sample's
            tokens get consecutive positions (what the released QTSplus models were trained with).
        cache: where encoded videos are kept, so that further questions about a video run neither the vision tower
            nor its projector. It outlives the handle: give it again to ask with another selector. With gradients
            enabled, a vision tower that has trainable parameters raises in the call.
        vision_chunk_frames: the vision tower, its projector and its pooling encode at most so many frames of the
            call's videos at a time, so that a long video does not run out of memory there; None: all at once. Frames
            are the film's: Qwen's towers take ``temporal_patch_size`` (2) of them a step, and at least one step at a
            time. InternVL's images are tiles like its frames; those of other models are not cut. Towers attend within
            a frame or step, so the features are the same but for how the products of matrices of other heights are
            rounded: docs/models.md. With gradients enabled the activations are kept all the same.

    Returns:
        A handle: a context manager, with ``.remove()``, ``.question(...)``, ``.seconds_per_step(...)`` and ``.last``,
        the report of the last selection.

    Raises:
        RuntimeError: the transformers version is unknown, or the model has a selector already.
        TypeError: the model is not one that is known, ``selector`` is none, ``cache`` is no VideoCache, or
            ``vision_chunk_frames`` no whole number.
        ValueError: another ``positions``, the tokenizer lacks the model's chat markers, the cache belongs to
            another model, or ``vision_chunk_frames`` is below 1.
    """
    import transformers

    check_version(transformers.__version__)
    adapter = find_adapter(model)
    if isinstance(selector, type) or not isinstance(selector, Selector):
        raise TypeError(
            f"a selector has a name, needs_question and select(videos); got {type(selector).__name__} {selector!r}"
        )
    if positions not in ("original", "compact"):
        raise ValueError(f'positions must be "original" or "compact", got {positions!r}')
    if hasattr(model, ATTRIBUTE):
        raise RuntimeError(
            f"{getattr(model, ATTRIBUTE).selector.name} is attached to this model already: remove it first"
        )
    if vision_chunk_frames is not None:
        check_chunk_frames(vision_chunk_frames)
    if cache is not None:
        if not isinstance(cache, VideoCache):
            raise TypeError(f"cache must be a VideoCache, got {type(cache).__name__}")
        cache.bind(model)
    check_tokenizer = getattr(selector, "check_tokenizer", None)
    if check_tokenizer is not None:
        check_tokenizer(tokenizer)
    compact = positions == "compact"
    return Handle(Attachment(model, selector, adapter, tokenizer, compact, cache, vision_chunk_frames))
