"""QuoTA's frame scorer: a small vision-language model says of each frame whether it helps (arXiv 2503.08689)."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qts_video.methods.base import Videos
from qts_video.quota.decouple import Decoupled
from qts_video.quota.score_cache import ScoreCache, model_fingerprint, score_key
from qts_video.quota.undisturbed import undisturbed
from qts_video.video import Limits
from qts_video.weights import Checkpoint

DEFAULT = "Qwen/Qwen2-VL-2B-Instruct"
FRAME_PIXELS = 256 * 28 * 28

_SHOWS = """\
This is a frame of a video. Is at least one of these to be seen in it: {objects}?
A. Yes.
B. No.
Give the letter alone."""
_HELPS = """\
This is a frame of a video. Is anything to be seen in it that helps to answer this: {question}
A. Yes.
B. No.
Give the letter alone."""

Frames = torch.Tensor | Sequence[torch.Tensor]
Question = str | Decoupled


class FrameScorer:
    """Scores of frames by an image-text model: P(A) / (P(A) + P(B)) of the first token of its answer, where A says
    that the frame shows one of the question's objects, or, without objects, something that helps to answer it.

    Used by ``QuoTA(scorer)``, which asks for scores while the model reads its prompt, when the pictures are gone: give
    them ahead with ``bind``; the question is the prompt's. ``scores_for`` scores frames without any of that. The model
    may be the one that answers.

    Args:
        model: any Hugging Face image-text model that generates, in eval mode. It decides device and dtype.
        processor: its processor, with a chat template.
        batch_size: frames in one forward.
        max_pixels: larger frames are shrunk to this many pixels, aspect ratio kept, before the processor has its way
            with them. None leaves them.
        cache_dir: a folder where scores are kept, by the frames' pixels, the prompt, the model and these settings
            (``batch_size`` apart), so that another run scores nothing. None keeps none.

    Raises:
        ValueError: a number out of range, a model in training mode, a processor without images or chat template, or
            one in whose vocabulary "A" and "B" are no single tokens.
    """

    reads_text = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        batch_size: int = 64,
        max_pixels: int | None = FRAME_PIXELS,
        cache_dir: str | Path | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_pixels", max_pixels)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if model.training:
            raise ValueError("the scorer must be in eval mode: call model.eval()")
        for part in ("image_processor", "tokenizer", "chat_template"):
            if getattr(processor, part, None) is None:
                raise ValueError(f"a frame scorer needs a processor of images and text; this one has no {part}")
        self.model = model
        self.processor = processor
        self.batch_size = batch_size
        self.max_pixels = max_pixels
        self.cache = None if cache_dir is None else ScoreCache(cache_dir)
        self.yes_ids, self.no_ids = answer_ids(processor.tokenizer)
        self.questions: list[Question] | None = None
        """Those that were bound, of each video; None: the prompt's."""
        self._frames: list[Frames] | None = None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path = DEFAULT,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> "FrameScorer":
        """The scorer of a checkpoint, in a folder or on the hub.

        Args:
            path_or_id: as in transformers.
            device: None leaves the model on the CPU.
            dtype: None keeps that of the checkpoint.
            options: the other arguments of ``FrameScorer``.

        Raises:
            FileNotFoundError: no such folder or model.
            OSError: a file of it is missing.
            ValueError: no image-text model, or see ``FrameScorer``.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        Checkpoint(path_or_id)  # says what is not there
        folder = Path(path_or_id).expanduser()
        name = str(folder) if folder.is_dir() else str(path_or_id)
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype or "auto")
        model = model if device is None else model.to(device)
        return cls(model.eval(), AutoProcessor.from_pretrained(name), **options)

    def bind(self, frames: Sequence[Frames], questions: Question | Sequence[Question] | None = None) -> "FrameScorer":
        """Say what the videos of the next prompt look like. Serves one ``score``: bind again for every prompt, or
        another video would be cut by this one's scores.

        Args:
            frames: of each video of the prompt, in the order of the placeholders, the frames that its processor was
                given: see ``scores_for``.
            questions: to ask of the frames in place of the prompt's: text, or what ``decouple`` made of it; one for all
                videos, or one a video.

        Raises:
            TypeError: ``frames`` is one tensor instead of one a video.
            ValueError: as many questions as videos were expected, or see ``scores_for``.
        """
        if isinstance(frames, torch.Tensor):
            raise TypeError("frames must be a list with the frames of each video, got one tensor")
        if questions is not None:
            questions = [questions] * len(frames) if isinstance(questions, Question) else list(questions)
            if len(questions) != len(frames):
                raise ValueError(
                    f"expected one question, or one for each of {len(frames)} videos, got {len(questions)}"
                )
            for question in questions:
                frame_prompt(question)
        for of_video in frames:
            _check_frames(of_video)
        self._frames, self.questions = list(frames), questions
        return self

    def check(self, videos: Videos) -> list[Frames]:
        """The frames that were bound, of each of ``videos``.

        Raises:
            RuntimeError: nothing was bound since the last ``score``.
            ValueError: other videos were bound than these: their number, or their frames.
        """
        if self._frames is None:
            raise RuntimeError("the frame scorer has no pictures: call scorer.bind(frames) before every prompt")
        frames = self._frames
        if len(frames) != len(videos.grids):
            raise ValueError(f"the frames of {len(frames)} videos were bound, and the prompt has {len(videos.grids)}")
        for number, (of_video, (steps, _, _)) in enumerate(zip(frames, videos.grids, strict=True)):
            if math.ceil(len(of_video) / max(1, _frames_per_step(len(of_video), steps))) != steps:
                raise ValueError(
                    f"{len(of_video)} frames were bound for video {number}, which has {steps} time steps: bind the "
                    "frames that its processor was given"
                )
        return frames

    def score(self, videos: Videos, questions: Sequence[Question] | None = None) -> torch.Tensor:
        """[sum T] float32 on the CPU, in [0, 1]: of each time step of each video, the best score of its frames (a step
        of Qwen's models is two frames; what is seen in one is in the step).

        Args:
            videos: of the prompt that was bound.
            questions: one a video; None: those that were bound.

        Raises:
            RuntimeError, ValueError: see ``check``; or there is no question.
        """
        frames = self.check(videos)
        questions = self.questions if questions is None else questions
        if questions is None:
            raise ValueError("the frame scorer has no question: give it to score() or to bind()")
        scores = []
        for of_video, question, (steps, _, _) in zip(frames, questions, videos.grids, strict=True):
            of_frame = self.scores_for(of_video, question)
            per_step = _frames_per_step(len(of_frame), steps)
            padded = nn.functional.pad(of_frame, (0, steps * per_step - len(of_frame)))
            scores.append(padded.view(steps, per_step).amax(1))
        self._frames = self.questions = None
        return torch.cat(scores)

    def scores_for(self, frames: Frames, question: Question) -> torch.Tensor:
        """[F] float32 on the CPU, in [0, 1]: how much each frame helps with ``question``.

        Args:
            frames: [F, 3, H, W], or F pictures [3, H, W] of any sizes; uint8, or floating point in 0..255, which is
                rounded.
            question: text, or what ``decouple`` made of it.

        Raises:
            TypeError: frames of another dtype.
            ValueError: no frames, frames of another shape, or an empty question.
        """
        prompt = frame_prompt(question)
        _check_frames(frames)
        pictures = [_as_bytes(frame) for frame in frames]
        if self.cache is None:
            return self._run(pictures, prompt)
        key = score_key(self._settings(prompt), pictures)
        scores = self.cache.get(key, len(pictures))
        if scores is None:
            scores = self._run(pictures, prompt)
            self.cache.put(key, scores, {"prompt": prompt, "model": getattr(self.model.config, "_name_or_path", "")})
        return scores

    def _settings(self, prompt: str) -> dict[str, Any]:
        """Besides the pictures, all that scores depend on."""
        import transformers

        images = self.processor.image_processor
        return {
            "prompt": self._in_template(prompt),
            "model": model_fingerprint(self.model),
            "images": [type(images).__name__, images.to_json_string()],
            "answers": [self.yes_ids, self.no_ids],
            "max_pixels": self.max_pixels,
            "transformers": transformers.__version__,
        }

    @torch.no_grad()
    def _run(self, pictures: list[torch.Tensor], prompt: str) -> torch.Tensor:
        text = self._in_template(prompt)
        scores = []
        for first in range(0, len(pictures), self.batch_size):
            batch = [_shrink(picture, self.max_pixels) for picture in pictures[first : first + self.batch_size]]
            inputs = self.processor(
                text=[text] * len(batch),
                images=[[picture] for picture in batch],
                padding=len(batch) > 1,
                padding_side="left",
                return_tensors="pt",
            ).to(self.model.device)
            pixels = {k: v.to(self.model.dtype) for k, v in inputs.items() if k.startswith("pixel_values")}
            # generate() knows each model's positions under left padding, and computes the last logits alone.
            with undisturbed(self.model):
                output = self.model.generate(
                    **{**inputs, **pixels},
                    max_new_tokens=1,
                    do_sample=False,
                    num_beams=1,
                    output_logits=True,
                    return_dict_in_generate=True,
                )
            logits = output.logits[0].float()
            yes, no = logits[:, self.yes_ids].logsumexp(1), logits[:, self.no_ids].logsumexp(1)
            scores.append((yes - no).sigmoid())
        return torch.cat([of_batch.cpu() for of_batch in scores])

    def _in_template(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)


def frame_prompt(question: Question) -> str:
    """What the scorer is asked of every frame. Raises ValueError where the question is empty."""
    if isinstance(question, Decoupled):
        if question.objects:
            return _SHOWS.format(objects="; ".join(question.objects))
        question = question.question
    if not question.strip():
        raise ValueError("the question is empty")
    return _HELPS.format(question=question)


def answer_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The ids that answer A, and those that answer B: of the letter as text, as text behind a space, and as an entry of
    the vocabulary, each spelling in which both letters are one token. Probabilities of an answer's ids are added.

    Raises ValueError where there is none.
    """

    spellings: list[Callable[[str], list[int | None]]] = [
        lambda letter: tokenizer.encode(letter, add_special_tokens=False),
        lambda letter: tokenizer.encode(f" {letter}", add_special_tokens=False),
        lambda letter: [tokenizer.convert_tokens_to_ids(letter)],
    ]
    unknown = {None, tokenizer.unk_token_id}
    pairs = [(spell("A"), spell("B")) for spell in spellings]
    pairs = [(yes[0], no[0]) for yes, no in pairs if len(yes) == len(no) == 1 and not {*yes, *no} & unknown]
    if not pairs:
        raise ValueError("the scorer's tokenizer has no single tokens for the answers A and B")
    return sorted({yes for yes, _ in pairs}), sorted({no for _, no in pairs})


def _frames_per_step(frames: int, steps: int) -> int:
    return math.ceil(frames / steps)


def _check_frames(frames: Frames) -> None:
    if len(frames) == 0:
        raise ValueError("there are no frames")
    for frame in frames:
        if frame.ndim != 3 or len(frame) != 3:
            raise ValueError(f"a frame must be [3, H, W], got {list(frame.shape)}")
        if frame.dtype != torch.uint8 and not frame.is_floating_point():
            raise TypeError(f"frames must be uint8, or floating point in 0..255; got {frame.dtype}")


def _as_bytes(frame: torch.Tensor) -> torch.Tensor:
    """[3, H, W] uint8 on the CPU."""
    frame = frame if frame.dtype == torch.uint8 else frame.round().clamp(0, 255).to(torch.uint8)
    return frame.cpu()


def _shrink(picture: torch.Tensor, max_pixels: int | None) -> torch.Tensor:
    """``picture`` [3, H, W] uint8 within the bound."""
    size = Limits(max_pixels).fit(*picture.shape[1:], num_frames=1)
    if size == tuple(picture.shape[1:]):
        return picture
    larger = picture.unsqueeze(0).float()
    smaller = nn.functional.interpolate(larger, size, mode="bicubic", antialias=True, align_corners=False)
    return smaller.squeeze(0).round().clamp(0, 255).to(torch.uint8)
