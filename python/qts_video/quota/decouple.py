"""QuoTA's decoupling of a question: which things must a frame show? The model that will answer says it, from the text
alone, in three steps (arXiv 2503.08689)."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qts_video.quota.objects import parse_objects
from qts_video.quota.undisturbed import undisturbed

_NEEDED = """\
Here is a question about a video: {question}
To answer it, is there an object, a person, an animal or another visible thing that one must find in the video? \
Answer with Yes or No."""
_WHICH = """\
Here is a question about a video: {question}
Which things must one find in the video to answer it? Write their names as a list, like ["red car", "dog"], and \
nothing else."""
_PHYSICAL = """\
Here is a list: {objects}
Copy it without what is no physical thing that a camera can see, such as actions, feelings, times, numbers and \
opinions. Write the list, like ["red car", "dog"], or [] if nothing is left, and nothing else."""


@dataclass(frozen=True)
class Decoupled:
    """A question, and the things that a frame must show to help answer it."""

    objects: tuple[str, ...]
    """Empty: frames are judged by the question itself."""
    question: str
    fell_back: str | None
    """Why there are no objects; None where there are."""
    raw: tuple[str, ...]
    """What the model wrote, of each step that was taken."""

    def __str__(self) -> str:
        if self.fell_back is None:
            return f"frames are scored by {', '.join(self.objects)}"
        return f"frames are scored by the question itself: {self.fell_back}"


def decouple(model: nn.Module, processor: Any, questions: Sequence[str], max_new_tokens: int = 128) -> list[Decoupled]:
    """Ask ``model`` which things its video must show to answer each question: is there any, which, and which of them
    are physical. Greedy; all questions that have come as far take a step together.

    May run while a selector is attached, and inside its ``select``: the model's hooks and positions are left alone.

    Args:
        model: a language model, alone or with vision.
        processor: its processor or tokenizer, with a chat template.
        questions: text, one a sample.
        max_new_tokens: most tokens of each answer.

    Returns:
        One for each question, in order. Where the model says that there is nothing to find, or what it writes can't be
        read as a list, ``fell_back`` says so.

    Raises:
        TypeError: ``questions`` is one text.
        ValueError: a question without text, or no chat template.
    """
    if isinstance(questions, str):
        raise TypeError("questions must be a list of texts, one a sample; got one text")
    for number, question in enumerate(questions):
        if not question.strip():
            raise ValueError(f"question {number} is empty")
    if getattr(processor, "chat_template", "its own") is None:
        raise ValueError(f"{type(processor).__name__} has no chat template, which is how the model is asked")
    thoughts = [_Thought(question) for question in questions]
    for template, read in ((_NEEDED, _read_need), (_WHICH, _read_things), (_PHYSICAL, _read_physical)):
        going_on = [thought for thought in thoughts if thought.fell_back is None]
        prompts = [template.format(question=t.question, objects=json.dumps(t.objects)) for t in going_on]
        answers = _ask(model, processor, prompts, max_new_tokens) if prompts else []
        for thought, answer in zip(going_on, answers, strict=True):
            thought.raw.append(answer)
            read(thought, answer)
    return [Decoupled(() if t.fell_back else tuple(t.objects), t.question, t.fell_back, tuple(t.raw)) for t in thoughts]


@dataclass
class _Thought:
    question: str
    objects: list[str] = field(default_factory=list)
    fell_back: str | None = None
    raw: list[str] = field(default_factory=list)


def _read_need(thought: _Thought, answer: str) -> None:
    word = re.search(r"\b(yes|no)\b", answer, re.IGNORECASE)
    if word is None:
        thought.fell_back = "asked whether there is an object to find, the model said neither yes nor no"
    elif word[0].lower() == "no":
        thought.fell_back = "the model says that there is no object to find"


def _read_things(thought: _Thought, answer: str) -> None:
    thought.objects = parse_objects(answer)
    if not thought.objects:
        thought.fell_back = "the model named no object"


def _read_physical(thought: _Thought, answer: str) -> None:
    thought.objects = parse_objects(answer)
    if not thought.objects:
        thought.fell_back = "the model found no physical thing among the objects"


@torch.no_grad()
def _ask(model: nn.Module, processor: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The model's greedy answers, one a prompt."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [_in_template(processor, prompt) for prompt in prompts]
    bos = getattr(tokenizer, "bos_token", None)
    inputs = tokenizer(
        texts,
        padding=len(texts) > 1,
        padding_side="left",
        add_special_tokens=not (bos and texts[0].startswith(bos)),
        return_tensors="pt",
    ).to(model.device)
    with undisturbed(model):
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
    prompt = inputs["input_ids"]
    if torch.equal(output[:, : prompt.shape[1]], prompt):  # one that is given embeddings returns the new ids alone
        output = output[:, prompt.shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]


def _in_template(processor: Any, prompt: str) -> str:
    """A user's turn and the start of the answer."""
    multimodal = hasattr(processor, "tokenizer")
    content = [{"type": "text", "text": prompt}] if multimodal else prompt
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
