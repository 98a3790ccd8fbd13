"""A batch of samples goes through the model: answers, the letters' probabilities, and what was kept."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from qts_video.adapters import find_adapter
from qts_video.answer import Prompt, lay_out
from qts_video.attach import attach
from qts_video.cache import VideoCache
from qts_video.data import Collator, Sample
from qts_video.evaluate.letters import letter_ids, letter_probabilities
from qts_video.methods import Uniform
from qts_video.quota.frame_scorer import FrameScorer


@dataclass(frozen=True)
class Prediction:
    text: str
    """The greedy answer."""
    probabilities: tuple[float, ...]
    """Of every letter, by the first token's logits; empty without choices."""
    tokens: int
    """Video tokens before selection."""
    kept: int


class Predictor:
    """Greedy answers of ``model`` to batches of samples, with ``selector`` (None: as it is).

    Args:
        model, processor: of any family that has an adapter.
        selector: a selection method.
        positions: as in ``attach``.
        max_new_tokens: longest answer.
        cache: keeps encoded videos for further questions about them.
        vision_chunk_frames: as in ``attach``.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        selector: Any = None,
        *,
        positions: str = "original",
        max_new_tokens: int = 16,
        cache: VideoCache | None = None,
        vision_chunk_frames: int | None = None,
    ) -> None:
        self.model, self.processor, self.selector = model, processor, selector
        self.max_new_tokens = max_new_tokens
        self._attach = {"positions": positions, "cache": cache, "vision_chunk_frames": vision_chunk_frames}
        self._collator = Collator(processor, train=False, seconds_per_step=True, model=model)
        self._letters: list[int] = []

    @torch.inference_mode()
    def __call__(self, samples: Sequence[Sample]) -> list[Prediction]:
        """One prediction a sample. Raises VideoError or ValueError where they can't be one batch."""
        batch = self._collator(samples)
        seconds = batch.pop("seconds_per_step", None)
        if isinstance(scorer := getattr(self.selector, "scorer", None), FrameScorer):
            scorer.bind([sample.video.frames for sample in samples])
        with ExitStack() as stack:
            inputs = lay_out(stack, self.model, Prompt(batch), self.selector).to(self.model.device)
            pixels = {name: x.to(self.model.dtype) for name, x in inputs.items() if name.startswith("pixel_values")}
            # Without bounds Uniform keeps everything, bit for bit; it is there for the cache and for the counts.
            selector = Uniform() if self.selector is None else self.selector
            handle = attach(self.model, selector, tokenizer=self.processor, **self._attach)
            stack.enter_context(handle).seconds_per_step(seconds)
            output = self.model.generate(
                **{**inputs, **pixels},
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
                output_logits=True,
            )
            videos = handle.last.videos
        # A generate() that gives embeddings to the language model's has no ids of the prompt to return.
        whole = find_adapter(self.model).parts(self.model).generator is not None
        texts = output.sequences if whole else output.sequences[:, inputs["input_ids"].shape[1] :]
        return [
            Prediction(
                text=self.processor.tokenizer.decode(ids, skip_special_tokens=True).strip(),
                probabilities=self._probabilities(sample, logits),
                tokens=video.total,
                kept=video.kept,
            )
            for sample, ids, logits, video in zip(samples, texts, output.logits[0], videos, strict=True)
        ]

    def _probabilities(self, sample: Sample, logits: torch.Tensor) -> tuple[float, ...]:
        if not sample.choices:
            return ()
        if len(self._letters) < len(sample.choices):
            self._letters = letter_ids(self.processor, len(sample.choices))
        return tuple(letter_probabilities(logits, self._letters[: len(sample.choices)]))
