"""One question about one video, with or without selection: what ``qts ask`` and ``qts demo`` run."""

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from transformers import BatchFeature
from transformers.video_utils import VideoMetadata

from .adapters import find_adapter
from .adapters.llava_onevision import LlavaOnevision
from .attach import attach
from .cache import VideoCache
from .dropin.report import Report
from .dropin.time_list import write_time_sentence
from .measure import Measurement, measure
from .methods import Uniform
from .newlines import newline_layout
from .video import Video, VideoError


@dataclass
class Answer:
    text: str
    tokens: int
    """Video tokens before selection."""
    prompt_tokens: int
    """Tokens of the whole prompt before selection: text, markers and video."""
    generated_tokens: int
    measurement: Measurement
    report: Report | None
    """What was kept and why. None: nothing was selected."""

    @property
    def kept(self) -> int:
        """Video tokens that the language model read."""
        return self.tokens if self.report is None else self.report.kept

    @property
    def timings(self) -> dict[str, float]:
        """Seconds: "vision", "selection", "prefill" (the language model reads the prompt) and "total"."""
        selection = 0.0 if self.report is None else self.report.timings["selection"]
        took = self.measurement
        return {"vision": took.vision, "selection": selection, "prefill": took.prefill, "total": took.total}


def seen_frames(processor: Any, frames: torch.Tensor) -> torch.Tensor:
    """What the model sees of ``frames`` [F, 3, H, W], for pictures: the centre square, where its processor cuts it
    out (LLaVA-NeXT-Video), else all of it."""
    if not getattr(processor.video_processor, "do_center_crop", False):
        return frames
    height, width = frames.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return frames[..., top : top + side, left : left + side]


class Prompt(BatchFeature):
    """The model's inputs, and what they can't carry."""

    seconds_per_step: float | None = None
    """Between two steps of the video's temporal grid, for ``Handle.seconds_per_step``. None: the inputs say it."""


def prepare(processor: Any, video: Video, question: str, model: Any = None) -> Prompt:
    """The model's inputs for ``question`` about ``video``, on the CPU. Every frame is used.

    Where ``model`` is a converted LLaVA-Video (by ``config.mm_newline_position``), the sentence with the frames' times
    that it was trained with stands before the question.

    Raises:
        VideoError: frames of a shape that the processor refuses.
    """
    if model is not None and _newlines_of(model) in ("grid", "frame"):
        question = f"{write_time_sentence(video.duration, video.seconds)}\n{question}"
    content = [{"type": "video"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    times = _times(processor, video)
    try:
        inputs = processor(text=[text], videos=[video.frames], do_sample_frames=False, return_tensors="pt", **times)
    except ValueError as error:
        raise VideoError(f"{video.source}: {error}") from error
    prompt = Prompt(inputs)
    prompt.seconds_per_step = None if times else 1 / video.sampled_fps  # one step, one frame
    return prompt


def _times(processor: Any, video: Video) -> dict[str, Any]:
    """How ``processor`` is told when the frames are; empty where it takes no notice, as LLaVA's and InternVL's."""
    metadata = video.metadata()
    kind = type(processor).__name__
    if kind == "Qwen2_5_VLProcessor":
        # fps is what transformers 4 reads; newer versions take the rate from the metadata.
        return {"video_metadata": [VideoMetadata(**metadata)], "fps": video.sampled_fps}
    if kind == "Qwen3VLProcessor":
        # It writes frames_indices / fps into the prompt: at one frame a second, an index is a time.
        return {"video_metadata": [VideoMetadata(**metadata | {"fps": 1.0, "frames_indices": list(video.seconds)})]}
    return {}


def _newlines_of(model: Any) -> str | None:
    """Where a LLaVA-Video was trained with newlines; transformers' LLaVA-OneVision takes no notice of it."""
    return getattr(model.config, "mm_newline_position", None)


def runs_unpooled(model: Any, selector: Any) -> bool:
    """Whether ``answer`` gives ``selector`` the frames' tokens before ``model``'s own pooling: it wants them (QuoTA),
    and the model is one that can be made to write them (LLaVA-OneVision, and so LLaVA-Video)."""
    return getattr(selector, "wants_unpooled", False) and model.config.model_type == LlavaOnevision.model_type


def default_positions(model: Any, selector: Any, trained: Any = None) -> str:
    """The positions of ``attach`` for ``selector`` where nobody says: for ``trained``, the selector that came with the
    model, its ``positions``, or else "compact", which whole QTSplus checkpoints were trained with; "compact" for
    unpooled frames, which have more places than a context; else "original"."""
    if selector is not None and selector is trained:
        return getattr(trained, "positions", "compact")
    return "compact" if runs_unpooled(model, selector) else "original"


def prompt_length(model: Any, inputs: Prompt, selector: Any) -> int:
    """Tokens of the prompt, placeholders of the videos included, that ``answer`` gives to ``model``."""
    with ExitStack() as stack:
        return lay_out(stack, model, inputs, selector)["input_ids"].shape[1]


def lay_out(stack: ExitStack, model: Any, inputs: Prompt, selector: Any) -> Prompt:
    """``inputs`` with the newlines that a LLaVA-Video was trained with and the grids that ``selector`` wants, which
    the model writes until ``stack`` is left: neither its class nor its processor knows of them."""
    position, unpooled = _newlines_of(model), runs_unpooled(model, selector)
    if not unpooled and position not in ("grid", "frame"):
        return inputs
    layout = stack.enter_context(newline_layout(model, position or "one_token", pooled=not unpooled))
    return Prompt(layout.prepare(inputs))


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    inputs: Prompt,
    selector: Any = None,
    *,
    positions: str | None = None,
    max_new_tokens: int = 128,
    cache: VideoCache | None = None,
    vision_chunk_frames: int | None = None,
) -> Answer:
    """Greedy answer to ``prepare``'s inputs, measured. ``selector`` None runs the model as it is; ``positions`` None
    are ``default_positions``; ``cache`` keeps encoded videos for further questions; ``vision_chunk_frames`` as in
    ``attach``."""
    seconds = inputs.seconds_per_step
    positions = default_positions(model, selector) if positions is None else positions
    with ExitStack() as stack:
        inputs = lay_out(stack, model, inputs, selector).to(model.device)
        # Pixels alone in the model's dtype: a time that is rounded is another time.
        pixels = {name: value.to(model.dtype) for name, value in inputs.items() if name.startswith("pixel_values")}
        prompt = inputs["input_ids"].shape[1]
        tokens = int((inputs["input_ids"] == find_adapter(model).video_token_id(model)).sum())
        handle = None
        if selector is not None or cache is not None or vision_chunk_frames is not None:
            attached = Uniform() if selector is None else selector  # without bounds it keeps everything, bit for bit
            handle = attach(
                model,
                attached,
                tokenizer=processor,
                positions=positions,
                cache=cache,
                vision_chunk_frames=vision_chunk_frames,
            )
            stack.enter_context(handle).seconds_per_step(seconds)
        with measure(model) as took:
            output = model.generate(**{**inputs, **pixels}, max_new_tokens=max_new_tokens, do_sample=False)
        report = None if selector is None else handle.last
    # A generate() that gives embeddings to the language model's has no ids of the prompt to return.
    generated = output[0] if find_adapter(model).parts(model).generator is not None else output[0, prompt:]
    return Answer(
        text=processor.tokenizer.decode(generated, skip_special_tokens=True).strip(),
        tokens=tokens,
        prompt_tokens=prompt,
        generated_tokens=len(generated),
        measurement=took,
        report=report,
    )
