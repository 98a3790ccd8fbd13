"""What ``attach`` returns: the way to a selector that is in a model."""

import math
from collections.abc import Sequence
from numbers import Real

from qts_video.dropin.attachment import Attachment
from qts_video.dropin.question import GivenQuestion, read_question
from qts_video.dropin.report import Report


class Handle:
    """A selector attached to a model. As a context manager, it takes the selector out at the end, also after
    an error."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment

    def remove(self) -> None:
        """Take the selector out: the model is what it was before. Does nothing the second time.

        A key-value cache that was shortened keeps counting on the selector: don't go on with it.
        """
        self._attachment.remove()

    def question(self, question: GivenQuestion | None) -> "Handle":
        """Say what the question is, for every prefill from now on; None goes back to finding it in the
        prompt.

        Args:
            question: text (needs ``attach(..., tokenizer=...)``), or its token ids, for every sample; or a
                list with one of them a sample.

        Raises:
            ValueError: text without a tokenizer, or an empty question.
            TypeError: neither text nor integers.
        """
        tokenizer = self._attachment.tokenizer
        self._attachment.questions.given = None if question is None else read_question(question, tokenizer)
        return self

    def seconds_per_step(self, seconds: float | Sequence[float] | None) -> "Handle":
        """Say how long a step of the videos' temporal grids lasts, for every prefill from now on; None goes back to
        what the prompt or the inputs say.

        For models whose inputs don't say it. It sets the seconds that methods and reports are given, never the
        positions in the model.

        Args:
            seconds: of a step of every video; or a list with one value a video of the prefill, in the order of the
                placeholders.

        Raises:
            ValueError: no value, or one that is not positive and finite.
            TypeError: neither a number nor a list of them.
        """
        self._attachment.given_seconds = None if seconds is None else _read_seconds(seconds)
        return self

    @property
    def last(self) -> Report:
        """The report of the last prefill that held a video.

        Raises RuntimeError where there was none yet.
        """
        report = self._attachment.report
        if report is None:
            raise RuntimeError(
                f"{self._attachment.selector.name} has not selected anything yet: no prompt with a video has gone "
                "through the model"
            )
        return report

    @property
    def attached(self) -> bool:
        """Whether the selector is in the model."""
        return self._attachment.attached

    def __enter__(self) -> "Handle":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "attached to" if self.attached else "removed from"
        return f"<{self._attachment.selector.name} {state} {type(self._attachment.model).__name__}>"


def _read_seconds(seconds: float | Sequence[float]) -> list[float]:
    values = [seconds] if isinstance(seconds, Real) else seconds
    if not isinstance(values, Sequence) or not all(isinstance(value, Real) for value in values):
        raise TypeError(f"seconds per step are a number, or a list with one a video; got {seconds!r}")
    if not values or not all(0 < value < math.inf for value in values):
        raise ValueError(f"seconds per step must be positive and finite, got {seconds!r}")
    return [float(value) for value in values]
