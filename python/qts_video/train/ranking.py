"""Losses and metrics of a scorer that learns to order tokens as a teacher does. None of them looks at the scale of
scores."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

TEMPERATURE = 0.5
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def rank_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    temperature: float = TEMPERATURE,
) -> torch.Tensor:
    """1 - Spearman's correlation of each segment, exactly; its gradient is that of soft ranks.

    With R the student's ranks, T the teacher's (ties share their mean rank) and m the mean rank:

        loss = 1 - <R - m, T - m> / <T - m, T - m>

    Ranks have no gradient. In the backward pass R is taken as ``soft_ranks`` of the standardised student,
    (x - mean) / std, and the loss as |R' - T|^2 / (2 |T - m|^2), R' the mean of R over the teacher's ties, which is
    the same number where nothing is tied. So the loss and its gradient are 0 where, and only where, the student keeps
    every strict preference of the teacher, whatever its scale or shape; tied tokens are given no preference. A
    constant student costs 1, the opposite order 2 (where nothing is tied).

    Sorting aside, time and memory are linear in the number of tokens. Computed in float64.

    Args:
        student: [N] floating point, differentiable. Of attention weights, give the logarithms: they spread evenly.
        teacher: [N] floating point.
        cu_seqlens: [S+1] integers, the borders of the segments, 0 first and N last. None: one segment.
        temperature: width of the soft ranks, in standard deviations of the student's scores. The gradient sees pairs
            of tokens whose scores differ by a few of it; the value does not depend on it.

    Returns:
        [S], float32 (float64 from a float64 student). 0 for segments without a preference: empty, of one token, or
        with a constant teacher.

    Raises:
        ValueError: other shapes or borders, NaN in the teacher, or a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    return _each(student, teacher, cu_seqlens, lambda x, t: _rank_loss(x, t, temperature))


def l1_loss(student: torch.Tensor, teacher: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Mean of |x - t| over each segment, x and t the scores of student and teacher standardised: (x - mean) / std.

    Arguments, result and errors are those of ``rank_loss``. Unlike there, the shape of the teacher's scores counts.
    """
    return _each(student, teacher, cu_seqlens, lambda x, t: (standardise(x) - standardise(t)).abs().mean())


def soft_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, ascending, smoothed by the Laplace distribution: of scores [N], [N] in their dtype.

        rank_i = sum over j != i of F(x_i - x_j),    F(d) = exp(d) / 2 for d < 0, else 1 - exp(-d) / 2

    In sorted order the sums over the smaller and over the larger scores are running sums, so no pair is looked at.
    Once differentiable: a score's rank rises with it and lowers those of its neighbours.
    """
    ordered, order = scores.sort(stable=True)
    below = (ordered.logcumsumexp(0) - ordered).exp()  # sum over j <= i of exp(x_j - x_i)
    above = ((-ordered).flip(0).logcumsumexp(0).flip(0) + ordered).exp()
    counted = torch.arange(len(scores), dtype=scores.dtype, device=scores.device)
    ranks = counted + (above - below) / 2
    return torch.empty_like(ranks).scatter(0, order, ranks)


def mean_ranks(scores: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, ascending, of scores [N]: [N] float64. Ties share the mean of their ranks."""
    return _ranks_and_ties(scores)[0]


def standardise(scores: torch.Tensor) -> torch.Tensor:
    """(x - mean) / std of scores [N], N at least 1; where all are the same, x - mean. Differentiable."""
    centred = scores - scores.mean()
    # The square of a very small or large number is 0 or inf, so the largest is made 1 first.
    largest = centred.detach().abs().amax()
    constant = largest <= scores.detach().abs().amax() * torch.finfo(scores.dtype).eps
    scaled = centred / torch.where(constant, 1, largest)
    variance = scaled.square().mean()
    return torch.where(constant, centred, scaled) / torch.where(constant, 1, variance).sqrt()


def spearman(student: torch.Tensor, teacher: torch.Tensor, cu_seqlens: torch.Tensor | None = None) -> torch.Tensor:
    """Spearman's rank correlation of each segment, ties at their mean rank: [S] float64. NaN where one of both is
    constant. Arguments and errors are those of ``rank_loss``."""
    segments = _segments(student, teacher, cu_seqlens)
    found = []
    for x, t in segments:
        a, b = (mean_ranks(scores) - (len(scores) - 1) / 2 for scores in (x, t))
        found.append((a * b).sum() / (a.norm() * b.norm()))
    return torch.stack(found) if found else student.new_zeros(0, dtype=torch.float64)


def recall(
    student: torch.Tensor, teacher: torch.Tensor, counts: Sequence[int], cu_seqlens: torch.Tensor | None = None
) -> torch.Tensor:
    """Recall@K of each segment: the share of the teacher's ``counts[s]`` best tokens that are among the student's:
    [S] float64, NaN where the count is 0. Of equal scores the first are the better ones.

    Other arguments and errors are those of ``rank_loss``; ValueError too for a count that a segment does not have.
    """
    segments = _segments(student, teacher, cu_seqlens)
    if len(counts) != len(segments):
        raise ValueError(f"expected a count for each of {len(segments)} segments, got {len(counts)}")
    found = []
    for (x, t), count in zip(segments, counts, strict=True):
        if not 0 <= count <= len(x):
            raise ValueError(f"expected a count of 0 .. {len(x)}, the tokens of the segment, got {count}")
        best = [scores.sort(descending=True, stable=True).indices[:count] for scores in (x, t)]
        found.append(torch.isin(*best).double().mean())
    return torch.stack(found) if found else student.new_zeros(0, dtype=torch.float64)


def _rank_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    wanted, tie = _ranks_and_ties(teacher)
    with torch.no_grad():
        ranks = mean_ranks(student)
        centre = (len(student) - 1) / 2
        norm = (wanted - centre).square().sum()
        value = 1 - ((ranks - centre) * (wanted - centre)).sum() / norm
        summed = torch.zeros_like(ranks).index_add(0, tie, ranks)
        error = (summed / tie.bincount(minlength=len(tie)).clamp(min=1))[tie] - wanted
    surrogate = (error * soft_ranks(standardise(student) / temperature)).sum() / norm
    return value + (surrogate - surrogate.detach())


def _ranks_and_ties(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean ranks [N] float64, and of each score the number of its tie [N] int64."""
    _, tie, sizes = scores.detach().unique(return_inverse=True, return_counts=True)
    ranks = sizes.cumsum(0).double() - (sizes + 1) / 2
    return ranks[tie], tie


def _each(student: torch.Tensor, teacher: torch.Tensor, cu_seqlens: torch.Tensor | None, loss: Loss) -> torch.Tensor:
    """``loss`` of every segment; 0, with a gradient of 0, where the teacher has no preference."""
    losses = []
    for x, t in _segments(student, teacher, cu_seqlens):
        if bool(t.isnan().any()):
            raise ValueError("the teacher's scores hold NaN")
        if len(t) == 0 or bool(t.amin() == t.amax()):
            losses.append((x * 0).sum())
        else:
            losses.append(loss(x.double(), t.double()))
    dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
    return torch.stack(losses).to(dtype) if losses else student.new_zeros(0, dtype=dtype)


def _segments(
    student: torch.Tensor, teacher: torch.Tensor, cu_seqlens: torch.Tensor | None
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The scores of both, segment by segment."""
    for name, scores in (("student", student), ("teacher", teacher)):
        if scores.ndim != 1 or not scores.is_floating_point():
            raise ValueError(f"{name} must be [N] floating point, got {list(scores.shape)} {scores.dtype}")
    if len(student) != len(teacher):
        raise ValueError(
            f"expected a score of the teacher for each of the student's {len(student)}, got {len(teacher)}"
        )
    borders = [0, len(student)] if cu_seqlens is None else cu_seqlens.tolist()
    if not borders or borders[0] != 0 or borders[-1] != len(student) or sorted(borders) != borders:
        raise ValueError(f"cu_seqlens must rise from 0 to {len(student)}, got {borders}")
    lengths = [stop - start for start, stop in pairwise(borders)]
    teacher = teacher.detach().to(student.device)
    return list(zip(student.split(lengths), teacher.split(lengths), strict=True))
