"""Samples become a batch of model inputs."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from qts_video.answer import prepare
from qts_video.data.sample import Sample

IGNORED = -100
"""Label of a token that is not learnt: what torch's cross entropy leaves out."""


class Collator:
    """A list of samples becomes the inputs of one model call: ``model(**collator(samples))``.

    Prompts are ``qts_video.answer.prepare``'s, so training sees what ``qts ask`` will: the same template, every frame,
    the frames' own times. The answer and what ends an assistant's turn in the processor's chat template (or its
    end-of-sequence token, where the template writes none) follow as the model would generate them.

    Args:
        processor: of Qwen2.5-VL, Qwen3-VL, LLaVA-OneVision, LLaVA-NeXT-Video or InternVL.
        max_length: most tokens of a sample, prompt and answer. A longer one raises; nothing is ever cut.
        train: True appends the answers, pads on the right and adds ``labels``. False is for ``generate``: prompts
            alone, padded on the left, without labels.
        seconds_per_step: add "seconds_per_step", a list with one float a video, in families whose inputs don't say
            when frames are (LLaVA's and InternVL's). It is for ``Handle.seconds_per_step``: take it out of the batch
            before the model is called.
        model: the model that the batches are for, where it may be a converted LLaVA-Video: ``prepare`` then writes the
            frames' times before the question, as it was trained with. Its newlines are ``newline_layout``'s business.

    Raises:
        ValueError: a chat template that does not open an answered turn as it opens one to be answered.
    """

    def __init__(
        self,
        processor: Any,
        *,
        max_length: int | None = None,
        train: bool = True,
        seconds_per_step: bool = False,
        model: Any = None,
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1, got {max_length}")
        self.processor = processor
        self.max_length = max_length
        self.train = train
        self.seconds_per_step = seconds_per_step
        # Its config alone, so that the workers of a DataLoader are not sent the weights.
        self._model = None if model is None else SimpleNamespace(config=model.config)
        if train:
            answer_turn(processor)

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        """The batch: ``input_ids``, ``attention_mask`` and, in training, ``labels`` (-100 everywhere but in the answer
        and its end), all [B, L] int64; pixels in float32; what else the model's family takes.

        Raises:
            ValueError: no samples, a sample longer than ``max_length``, or videos that the family can't take in one
                batch (LLaVA's: different numbers of frames).
            VideoError: frames of a shape that the processor refuses.
        """
        if not samples:
            raise ValueError("expected at least one sample, got none")
        examples = [self._example(sample) for sample in samples]
        names = [name for name in examples[0] if name != "seconds_per_step"]
        length = examples[0]["input_ids"].shape[1]
        of_tokens = {name for name in names if examples[0][name].shape == (1, length)}
        batch = {
            name: self._pad(name, [example[name][0] for example in examples])
            if name in of_tokens
            else _join(name, [example[name] for example in examples], samples)
            for name in names
        }
        seconds = [example["seconds_per_step"] for example in examples]
        if self.seconds_per_step and seconds[0] is not None:
            batch["seconds_per_step"] = seconds
        return batch

    def _example(self, sample: Sample) -> dict[str, Any]:
        """One sample, not padded."""
        prompt = prepare(self.processor, sample.video, sample.prompt, self._model)
        example = {name: torch.as_tensor(value) for name, value in prompt.items()}
        if self.train:
            length = example["input_ids"].shape
            try:
                answer = torch.tensor([answer_ids(self.processor, sample.answer)])
            except ValueError as error:
                raise ValueError(f"{sample.name}: {error}") from error
            appended = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
            for name, value in example.items():
                if value.shape == length:
                    example[name] = torch.cat([value, appended.get(name, torch.zeros_like(answer))], 1)
            example["labels"] = torch.cat([torch.full(length, IGNORED), answer], 1)
        tokens = example["input_ids"].shape[1]
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"{sample.name}: {tokens} tokens, of {len(sample.video.frames)} frames and the text, are more than "
                f"max_length {self.max_length}: use fewer or smaller frames"
            )
        example["seconds_per_step"] = prompt.seconds_per_step
        return example

    def _pad(self, name: str, rows: list[torch.Tensor]) -> torch.Tensor:
        """[B, L] of rows [l]."""
        fill = {"labels": IGNORED, "input_ids": _pad_token(self.processor.tokenizer)}.get(name, 0)
        side = "right" if self.train else "left"
        return pad_sequence(rows, batch_first=True, padding_value=fill, padding_side=side)


def _join(name: str, values: list[torch.Tensor], samples: Sequence[Sample]) -> torch.Tensor:
    """Values of videos, one behind the other."""
    if len({value.shape[1:] for value in values}) > 1:
        frames = ", ".join(f"{len(sample.video.frames)} ({sample.name})" for sample in samples)
        shapes = ", ".join(str(list(value.shape)) for value in values)
        raise ValueError(
            f"{name} must have one shape in a batch of this family, got {shapes}, of frames {frames}: batch videos "
            "of as many frames, or one at a time"
        )
    return torch.cat(values)


def answer_ids(processor: Any, answer: str) -> list[int]:
    """The tokens of ``answer`` and of the end of its turn, behind the prompt that opens it.

    Raises:
        ValueError: an empty answer, or one that merges with the last token of the prompt.
    """
    turn, before, end = answer_turn(processor)
    answer = answer.strip()
    if not answer:
        raise ValueError("the answer is empty")
    encode = processor.tokenizer.encode
    opening = encode(turn, add_special_tokens=False)
    whole = encode(turn + before + answer + end, add_special_tokens=False)
    if whole[: len(opening)] != opening:
        raise ValueError(f"the answer {answer!r} changes the tokens of the turn that it is put into")
    return whole[len(opening) :]


def answer_turn(processor: Any) -> tuple[str, str, str]:
    """How the chat template writes an answer: the prompt up to it, what stands between the two, and what ends the
    turn."""
    user = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "?"}]}
    reply = {"role": "assistant", "content": [{"type": "text", "text": "answer"}]}
    opening = processor.apply_chat_template([user], add_generation_prompt=True, tokenize=False)
    whole = processor.apply_chat_template([user, reply], add_generation_prompt=False, tokenize=False)
    if not whole.startswith(opening) or "answer" not in whole[len(opening) :]:
        raise ValueError(
            f"the chat template must open an answered turn as it opens one to be answered: expected {opening!r} and "
            f"the answer, got {whole!r}"
        )
    before, _, rest = whole[len(opening) :].partition("answer")
    tokenizer = processor.tokenizer
    special = {token: rest.find(token) for token in tokenizer.get_added_vocab() if token in rest}
    return opening, before, min(special, key=special.get) if special else tokenizer.eos_token


def _pad_token(tokenizer: Any) -> int:
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
