"""One question about one video, with or without selection: what ``qts ask`` and ``qts demo`` run."""

from dataclasses import dataclass
from typing import Any

import torch

from .adapters import find_adapter
from .attach import attach
from .dropin.report import Report
from .measure import Measurement, measure
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


def prepare(processor: Any, video: Video, question: str) -> dict[str, torch.Tensor]:
    """The model's inputs for ``question`` about ``video``, on the CPU.

    Raises:
        VideoError: frames of a shape that the processor refuses.
    """
    content = [{"type": "video"}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    from transformers.video_utils import VideoMetadata

    try:
        # fps is what transformers 4 reads; newer versions take the rate from the metadata.
        return processor(
            text=[text],
            videos=[video.frames],
            video_metadata=[VideoMetadata(**video.metadata())],
            fps=video.sampled_fps,
            do_sample_frames=False,
            return_tensors="pt",
        )
    except ValueError as error:
        raise VideoError(f"{video.source}: {error}") from error


@torch.inference_mode()
def answer(
    model: Any,
    processor: Any,
    inputs: dict[str, torch.Tensor],
    selector: Any = None,
    *,
    positions: str = "original",
    max_new_tokens: int = 128,
) -> Answer:
    """Greedy answer to ``prepare``'s inputs, measured. ``selector`` None runs the model as it is."""
    inputs = inputs.to(model.device)
    prompt = inputs["input_ids"].shape[1]
    tokens = int((inputs["input_ids"] == find_adapter(model).video_token_id(model)).sum())
    handle = None
    if selector is not None:
        handle = attach(model, selector, tokenizer=processor.tokenizer, positions=positions)
    try:
        with measure(model) as took:
            output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        report = None if handle is None else handle.last
    finally:
        if handle is not None:
            handle.remove()
    generated = output[0, prompt:]
    return Answer(
        text=processor.tokenizer.decode(generated, skip_special_tokens=True).strip(),
        tokens=tokens,
        prompt_tokens=prompt,
        generated_tokens=len(generated),
        measurement=took,
        report=report,
    )
