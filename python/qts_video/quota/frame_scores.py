"""Scores of frames: what QuoTA's weights are made of."""

from itertools import accumulate
from typing import Protocol, runtime_checkable

import torch

import qts_kernels
from qts_video.methods.base import Videos


@runtime_checkable
class ScoresFrames(Protocol):
    """Scores the time steps of videos. One that sets ``needs_question`` or ``needs_vision`` finds them in ``videos``,
    as a ``Selector`` does.

    One that sets ``reads_text = True`` is called ``score(videos, questions)``, with the question of each video as text
    or ``Decoupled``: that of the prompt, or, where the scorer has a list ``questions`` that is not None, those. Its
    ``check(videos)``, where it has that, raises what is wrong before any question is worked on.
    """

    def score(self, videos: Videos) -> torch.Tensor:
        """[sum T] float32, one score a time step, video after video: not negative, and comparable within a sample."""
        ...


class GivenScores:
    """The scores that were given.

    Args:
        scores: [sum T], one a time step, of all videos of every prefill.
    """

    def __init__(self, scores: torch.Tensor | list[float]) -> None:
        self.scores = torch.as_tensor(scores, dtype=torch.float32).detach()

    def score(self, videos: Videos) -> torch.Tensor:
        """See ``ScoresFrames.score``."""
        return self.scores


class FrameRelevance:
    """Scores without a second model: how near the best token of a time step is to the question, both as the model's
    language model is given them.

    Vision tokens and the question's embedding rows are scaled to an RMS of 1 and compared as one attention head of the
    model's width D: r_m = max_l softmax_m(<q_l, k_m> / sqrt(D)), over all video tokens of a sample. A time step scores
    the largest r_m of its tokens, as what is asked for may be in a corner of the frame.
    """

    needs_question = True

    @torch.no_grad()
    def score(self, videos: Videos) -> torch.Tensor:
        """See ``ScoresFrames.score``.

        Raises:
            ValueError: ``videos`` hold no question.
        """
        if videos.question is None:
            raise ValueError('scorer="relevance" compares frames with the question, and videos.question is None')
        device = videos.tokens.device
        # The videos of a sample share one softmax, and each holds a copy of the question.
        of_video = videos.question.split([len(ids) for ids in videos.question_ids])
        firsts = [video for video, sample in enumerate(videos.sample) if sample not in videos.sample[:video]]
        questions = [of_video[video] for video in firsts]
        starts = [0, *accumulate(videos.lengths)]
        query, key = torch.cat(questions), videos.tokens
        query = query * qts_kernels.rms_scale(query).unsqueeze(1).to(query.dtype)
        scores = qts_kernels.relevance(
            query.unsqueeze(1),
            key.unsqueeze(1),
            key_scale=qts_kernels.rms_scale(key),
            cu_seqlens_q=_int32([0, *accumulate(map(len, questions))], device),
            cu_seqlens_k=_int32([*(starts[video] for video in firsts), starts[-1]], device),
        )
        areas = torch.tensor([rows * columns for steps, rows, columns in videos.grids for _ in range(steps)])
        step = torch.arange(len(areas)).repeat_interleave(areas).to(device)
        return scores.new_zeros(len(areas)).scatter_reduce(0, step, scores, "amax").float()


def _int32(offsets: list[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(offsets, dtype=torch.int32).to(device)
