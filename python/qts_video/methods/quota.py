"""QuoTA: every frame gets tokens by its score, and its token grid is made as small as that (arXiv 2503.08689)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

import qts_kernels
from qts_kernels import Selection
from qts_video.methods.base import Videos, check_budget, resolve_budget
from qts_video.methods.budget import newline_spans
from qts_video.methods.uniform import packed_selection
from qts_video.quota.frame_scores import FrameRelevance, GivenScores, ScoresFrames
from qts_video.quota.grids import climb, grid_cost, grid_ladder, grid_places, group_places, merged_cost

MODES = ("bilinear", "adaptive_avg", "linspace", "merge", "merge_separable")


class QuoTA:
    """Compress each time step to a number of tokens in proportion to a power of its score.

    A sample's budget N is shared among the F time steps of its videos with the weights w_i = s_i^power, exactly, by
    largest remainder (``qts_kernels.allocate_tokens``); none gets more than it has. Each step's grid becomes the
    largest of ``grid_ladder`` that its share pays for, and what this leaves is handed on until no step can use it. So
    the kept tokens (and, where they count, their newlines) are N, short of it by less than the price of one more row or
    column. Where all scores are zero, all steps weigh the same. A sample keeps at least one token.

    Token (i, j) of a grid (a, b) takes the place of token (floor((i + 1/2) h / a), floor((j + 1/2) w / b)) of the frame
    (h, w), so that rotary rows and columns stay spread over the frame, and its time is what it was. Where Qwen3-VL adds
    features of its vision tower behind its first layers, they are those of these places, not resized.

    Args:
        scorer: an object with ``score(videos)`` -> [sum T] float32, one score a time step, not negative; those scores
            themselves; or "relevance", for ``FrameRelevance``, which needs no second model.
        total_tokens: most tokens to keep of each *sample*, whose videos share them. None: no such bound. Where it and
            ``retention_ratio`` hold everything, nothing is scored and nothing changes.
        mode: how a grid is made smaller: "bilinear", "adaptive_avg" or "linspace" of ``qts_kernels.resize_frames``;
            "merge", ``qts_kernels.merge_tokens`` to any number of tokens, each at the place of the middle one of those
            that it was merged from; or "merge_separable", ``qts_kernels.merge_rows_columns``.
        power: of the scores, at least 0.
        include_newlines: whether newlines that a model puts behind rows, frames or videos count as tokens. In the mode
            "merge" rows are not known beforehand: one newline is counted for every token, up to the rows of the frame.
        retention_ratio: share of each sample's tokens to keep, in (0, 1].

    The release resizes LLaVA's frames from the grid before the model's own pooling, but merges behind that: see
    ``wants_unpooled`` and ``qts_video.newlines``.

    Raises:
        TypeError: ``scorer`` is none of these.
        ValueError: a bound that is out of its range, an unknown ``mode``, or a negative ``power``.
    """

    name = "quota"
    needs_grids = True

    def __init__(
        self,
        scorer: ScoresFrames | torch.Tensor | Sequence[float] | str,
        total_tokens: int | None = 12544,
        mode: str = "bilinear",
        power: float = 2,
        include_newlines: bool = True,
        retention_ratio: float | None = None,
    ) -> None:
        check_budget(retention_ratio, None)
        if total_tokens is not None and total_tokens < 1:
            raise ValueError(f"total_tokens must be at least 1, got {total_tokens}")
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        if not 0 <= power < math.inf:
            raise ValueError(f"power must be finite and at least 0, got {power}")
        self.scorer = _as_scorer(scorer)
        self.total_tokens = total_tokens
        self.mode = mode
        self.power = power
        self.include_newlines = include_newlines
        self.retention_ratio = retention_ratio

    @property
    def needs_question(self) -> bool:
        """Whether the scorer needs ``videos.question``."""
        return getattr(self.scorer, "needs_question", False)

    @property
    def needs_vision(self) -> bool:
        """Whether the scorer needs ``videos.context.vision``."""
        return getattr(self.scorer, "needs_vision", False)

    @property
    def wants_unpooled(self) -> bool:
        """Whether frames are to come as they were before a model's own pooling, where a prompt can hold them so."""
        return self.mode != "merge"

    def select(self, videos: Videos) -> Selection:
        """See ``Selector.select``. Waits for the scores once, as the sizes of all that follows hang on them.

        ``scores`` [sum M] float32 are those of the tokens' time steps; None where everything was kept unscored.
        ``extras`` hold, on the CPU, each step's share of the budget [sum T] int64, its grid [sum T, 2] int64 (after
        "merge" its tokens, in one row), and what no step could use, one number a sample, [S] int64.

        Raises:
            ValueError: the videos are no whole grids (tokens were taken out of them), or the scores are not one finite
                number, not negative, a time step.
        """
        if any(length != math.prod(grid) for length, grid in zip(videos.lengths, videos.grids, strict=True)):
            raise ValueError("QuoTA resizes whole frames, and tokens were taken out of these: put it first in a Chain")
        frames = _frames(videos, self.include_newlines, self.mode == "merge")
        budgets = self._budgets(frames)
        if all(budget == of.whole for budget, of in zip(budgets, frames, strict=True)):
            return _everything(videos, frames)
        scores = self._scores(videos)
        shares, sizes, unused = _assign(scores, self.power, frames, budgets)
        every = torch.cat([of.grids for of in frames])
        counts = [int(part.prod(1).sum()) for part in sizes.split([grid[0] for grid in videos.grids])]
        if bool((sizes.prod(1) == every.prod(1)).all()):
            indices, tokens = torch.arange(sum(videos.lengths)), None
        else:
            indices, tokens = _compress(videos, sizes, self.mode)
        selection = packed_selection(indices, counts, videos.tokens.device)
        selection.tokens = tokens
        selection.scores = scores.float().repeat_interleave(every.prod(1)).to(videos.tokens.device)
        selection.extras = (shares, sizes, unused)
        return selection

    def _budgets(self, frames: "list[_Frames]") -> list[int]:
        """Tokens to give to the frames of each sample."""
        budgets = []
        for of in frames:
            budget = resolve_budget(of.whole + of.paid, self.retention_ratio, self.total_tokens) - of.paid
            budgets.append(max(budget, min(costs[1] for costs in of.costs)))
        return budgets

    def _scores(self, videos: Videos) -> torch.Tensor:
        """[sum T] float64 on the CPU."""
        scores, steps = self.scorer.score(videos), sum(grid[0] for grid in videos.grids)
        if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (steps,):
            got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ValueError(f"scores must be a tensor of one number for each of {steps} time steps, got {got}")
        scores = scores.detach().cpu().double()
        if not bool((scores.isfinite() & (scores >= 0)).all()):
            raise ValueError(f"scores of time steps must be finite and not negative, got {scores.tolist()}")
        return scores

    def __repr__(self) -> str:
        options = ("total_tokens", "mode", "power", "include_newlines", "retention_ratio")
        given = ", ".join(f"{name}={getattr(self, name)!r}" for name in options)
        return f"QuoTA({type(self.scorer).__name__}, {given})"


@dataclass(frozen=True)
class _Frames:
    """The time steps of a sample's videos, and what they may become."""

    grids: torch.Tensor
    """[F, 2] int64: rows and columns of each."""
    ladders: list[list[tuple[int, int]]]
    """Of each, the sizes it may have, from (0, 0) to its own."""
    costs: list[list[int]]
    """Of each, what these take of the budget."""
    paid: int
    """Newlines that stay whatever is kept, and count."""

    @property
    def whole(self) -> int:
        """What all frames take as they are."""
        return sum(costs[-1] for costs in self.costs)


def _frames(videos: Videos, with_newlines: bool, any_count: bool) -> list[_Frames]:
    """Of each sample that has a video, in order."""
    samples: dict[int, list[int]] = {}
    for video, sample in enumerate(videos.sample):
        samples.setdefault(sample, []).append(video)
    spans = newline_spans(videos)
    found = []
    for members in samples.values():
        grids, ladders, costs, paid = [], [], [], 0
        for video in members:
            steps, rows, columns = videos.grids[video]
            kind = _newline_kind(videos.grids[video], spans[video]) if with_newlines else "none"
            paid += kind == "video"
            kind = "none" if kind == "video" else kind
            if any_count:
                ladder = [(min(n, 1), n) for n in range(rows * columns + 1)]
                cost = [merged_cost(n, rows, kind) for _, n in ladder]
            else:
                ladder = grid_ladder(rows, columns)
                cost = [grid_cost(size, kind) for size in ladder]
            grids += [(rows, columns)] * steps
            ladders += [ladder] * steps
            costs += [cost] * steps
        found.append(_Frames(torch.tensor(grids), ladders, costs, paid))
    return found


def _newline_kind(grid: tuple[int, int, int], span: int) -> str:
    """What the tokens that share a newline are: see ``Videos.newline_spans``."""
    steps, rows, columns = grid
    # Where two are the same, the wider one is meant: the newline of a whole video always stays.
    return {0: "none", columns: "row", rows * columns: "frame", steps * rows * columns: "video"}[span]


def _assign(
    scores: torch.Tensor, power: float, frames: list[_Frames], budgets: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Shares [sum T], sizes [sum T, 2] and what is left of each sample's budget [S]; int64 on the CPU."""
    lengths = [len(of.costs) for of in frames]
    # Scaled by the largest of the sample, which no power takes out of float64's range.
    parts = [(part / part.max().clamp(min=torch.finfo(part.dtype).tiny)) ** power for part in scores.split(lengths)]
    shares = qts_kernels.allocate_tokens(
        torch.cat(parts),
        torch.tensor(budgets),
        cu_seqlens=torch.tensor([0, *accumulate(lengths)], dtype=torch.int32),
        cap=torch.tensor([costs[-1] for of in frames for costs in of.costs]),
    )
    sizes, unused = [], []
    for of, weights, share in zip(frames, parts, shares.split(lengths), strict=True):
        steps, left = climb(share.tolist(), of.costs, (weights == 0).tolist())
        sizes += [ladder[step] for ladder, step in zip(of.ladders, steps, strict=True)]
        unused.append(left)
    return shares, torch.tensor(sizes), torch.tensor(unused)


def _compress(videos: Videos, sizes: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the packed axis [N] int64 and the tokens [N, D] that take their places; one launch for each frame size
    that there is."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for video, (_, rows, columns) in enumerate(videos.grids):
        shapes.setdefault((rows, columns), []).append(video)
    width = videos.tokens.shape[1]
    if len(shapes) == 1:
        return _compress_equal(videos.tokens.view(-1, *next(iter(shapes)), width), sizes, mode)
    starts = [0, *accumulate(videos.lengths)]
    of_video = sizes.split([grid[0] for grid in videos.grids])
    indices: list[Any] = [None] * len(videos.lengths)
    tokens: list[Any] = [None] * len(videos.lengths)
    for shape, members in shapes.items():
        frames = torch.cat([videos.tokens[starts[video] : starts[video + 1]] for video in members])
        of_shape = torch.cat([of_video[video] for video in members])
        places, made = _compress_equal(frames.view(-1, *shape, width), of_shape, mode)
        counts = [int(of_video[video].prod(1).sum()) for video in members]
        before = 0
        for video, place, part in zip(members, places.split(counts), made.split(counts), strict=True):
            indices[video], tokens[video] = place - before + starts[video], part
            before += videos.lengths[video]
    return torch.cat(indices), torch.cat(tokens)


def _compress_equal(frames: torch.Tensor, sizes: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The same for frames [F, h, w, D] of one size, rows on their own packed axis."""
    if mode == "merge":
        merged = qts_kernels.merge_tokens(frames.flatten(1, 2), sizes.prod(1), with_rows=True)
        tokens, rows = merged[0], merged[-1]
        places, order = group_places(rows, len(tokens), frames.shape[2]).sort()
        return places, tokens.index_select(0, order)
    if mode == "merge_separable":
        tokens = qts_kernels.merge_rows_columns(frames, sizes)[0]
    else:
        tokens, _ = qts_kernels.resize_frames(frames, sizes, mode)
    return grid_places(sizes, torch.tensor([frames.shape[1:3]]).expand(len(sizes), -1)), tokens


def _everything(videos: Videos, frames: list[_Frames]) -> Selection:
    selection = packed_selection(torch.arange(sum(videos.lengths)), videos.lengths, videos.tokens.device)
    shares = torch.tensor([costs[-1] for of in frames for costs in of.costs])
    sizes = torch.tensor([ladder[-1] for of in frames for ladder in of.ladders])
    selection.extras = (shares, sizes, torch.zeros(len(frames), dtype=torch.int64))
    return selection


def _as_scorer(scorer: Any) -> ScoresFrames:
    if isinstance(scorer, str):
        if scorer != "relevance":
            raise ValueError(f'a scorer given by name must be "relevance", got {scorer!r}')
        return FrameRelevance()
    if isinstance(scorer, ScoresFrames) and not isinstance(scorer, type):
        return scorer
    if isinstance(scorer, (torch.Tensor, list, tuple)):
        return GivenScores(scorer)
    raise TypeError(
        f'scorer must be an object with score(videos), the scores themselves, or "relevance", got {scorer!r}'
    )
