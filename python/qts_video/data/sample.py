"""A question about a video, and its answer."""

from dataclasses import dataclass

from qts_video.video import Video

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

INSTRUCTION = "Answer with the option's letter from the given choices directly."
"""Written below the choices: what LLaVA-Video and the evaluations that followed it ask with."""


@dataclass(frozen=True)
class Sample:
    """A question about a video, and its answer."""

    video: Video
    question: str
    """Without the choices."""
    answer: str
    """Text; with choices, the letter of the right one."""
    id: str = ""
    choices: tuple[str, ...] = ()
    """The texts of A, B, ...; empty where the answer is free."""
    source: str = ""
    """Where the record is: file:line."""

    @property
    def prompt(self) -> str:
        """What the model is asked: the question, and below it the choices, if there are any."""
        return with_choices(self.question, self.choices)

    @property
    def name(self) -> str:
        """What messages call it."""
        return " ".join(part for part in (self.source, self.id and f"(id {self.id})") if part) or self.video.source


def with_choices(question: str, choices: tuple[str, ...]) -> str:
    """``question`` alone, or with a line for every choice ("A. text") and the instruction to answer by letter."""
    if not choices:
        return question
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
    return "\n".join([question, *lines, INSTRUCTION])
