"""QuoTA: every frame gets tokens by its score, and its token grid is made as small as that (arXiv 2503.08689)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

import qts_kernels
from qts_kernels import Selection
from qts_video.methods.base import Videos, check_budget, resolve_budget
from qts_video.methods.budget import newline_spans
from qts_video.methods.uniform import packed_selection
from qts_video.quota import decouple as decoupling
from qts_video.quota.decouple import Decoupled
from qts_video.quota.frame_scores import FrameRelevance, GivenScores, ScoresFrames
from qts_video.quota.grids import climb, grid_cost, grid_ladder, grid_places, group_places, merged_cost
from qts_video.quota.sampler import BASE_FRAMES, EXTRA_FRAMES_PER_HOUR, number_of_frames, read_sampled
from qts_video.video import Video

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
    features of its vision tower behind its first layers, they are those of these places, not resized. A time step that
    keeps no token takes all that the prompt says of it away (``Selector.drops_empty_steps``).

    Args:
        scorer: an object with ``score(videos)`` -> [sum T] float32, one score a time step, not negative
            (``ScoresFrames``; ``FrameScorer`` is one); those scores themselves; or "relevance", for
            ``FrameRelevance``, which needs no second model.
        total_tokens: most tokens to keep of each *sample*, whose videos share them. None: no such bound. Where it and
            ``retention_ratio`` hold everything, nothing is scored and nothing changes.
        mode: how a grid is made smaller: "bilinear", "adaptive_avg" or "linspace" of ``qts_kernels.resize_frames``;
            "merge", ``qts_kernels.merge_tokens`` to any number of tokens, each at the place of the middle one of those
            that it was merged from; or "merge_separable", ``qts_kernels.merge_rows_columns``.
        power: of the scores, at least 0.
        base_frames, extra_frames_per_hour, max_frames: how many frames ``read`` takes of a film: see
            ``quota.sampler.number_of_frames``.
        decouple: where the scorer reads text (``FrameScorer``), have the attached model name the things that a frame
            must show (``quota.decouple``), each question of a batch once, all in one go; what was bound as
            ``Decoupled`` is taken as it is. ``attach`` must be given the processor. False scores by the question
            itself. Without effect where the scorer reads no text.
        include_newlines: whether newlines that a model puts behind rows, frames or videos count as tokens. In the mode
            "merge" rows are not known beforehand: a frame gets room for one newline a token, up to its rows, and what
            of that stays empty is reported as unused.
        retention_ratio: share of each sample's tokens to keep, in (0, 1].

    The release resizes LLaVA's frames from the grid before the model's own pooling, but merges behind that: see
    ``wants_unpooled`` and ``qts_video.newlines``.

    Raises:
        TypeError: ``scorer`` is none of these.
        ValueError: a bound or a number of frames that is out of its range, an unknown ``mode``, or a negative
            ``power``.
    """

    name = "quota"
    needs_grids = True
    drops_empty_steps = True

    def __init__(
        self,
        scorer: ScoresFrames | torch.Tensor | Sequence[float] | str,
        total_tokens: int | None = 12544,
        mode: str = "bilinear",
        power: float = 2,
        base_frames: int = BASE_FRAMES,
        extra_frames_per_hour: float = EXTRA_FRAMES_PER_HOUR,
        max_frames: int | None = None,
        decouple: bool = True,
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
        number_of_frames(0, base_frames, extra_frames_per_hour, max_frames)
        self.scorer = _as_scorer(scorer)
        self.total_tokens = total_tokens
        self.mode = mode
        self.power = power
        self.base_frames = base_frames
        self.extra_frames_per_hour = extra_frames_per_hour
        self.max_frames = max_frames
        self.decouple = decouple
        self.include_newlines = include_newlines
        self.retention_ratio = retention_ratio

    @property
    def needs_question(self) -> bool:
        """Whether the scorer needs ``videos.question``, or its text."""
        return getattr(self.scorer, "needs_question", False) or (self._reads_text and self._bound is None)

    @property
    def needs_vision(self) -> bool:
        """Whether the scorer needs ``videos.context.vision``."""
        return getattr(self.scorer, "needs_vision", False)

    @property
    def wants_unpooled(self) -> bool:
        """Whether frames are to come as they were before a model's own pooling, where a prompt can hold them so."""
        return self.mode != "merge"

    @property
    def _reads_text(self) -> bool:
        return getattr(self.scorer, "reads_text", False)

    @property
    def _bound(self) -> list[str | Decoupled] | None:
        """Questions that the scorer was given ahead, one a video."""
        return getattr(self.scorer, "questions", None)

    def check_tokenizer(self, tokenizer: Any | None) -> None:
        """Raise ValueError where questions are to be decoupled, and the model can't be asked by ``tokenizer``."""
        if self._reads_text and self.decouple and getattr(tokenizer, "chat_template", None) is None:
            got = "none" if tokenizer is None else f"{type(tokenizer).__name__}, which has no chat template"
            raise ValueError(
                "QuoTA asks the model what a frame must show, in its chat template: give attach(..., "
                f"tokenizer=processor), or score frames by the question itself with decouple=False (got {got})"
            )

    def read(self, source: str | Path, **options: Any) -> Video:
        """A film as ``base_frames``, and ``extra_frames_per_hour`` for each hour that it lasts, at most ``max_frames``.

        Args:
            source: see ``qts_video.video.read_video``.
            options: its other arguments, without ``min_frames`` and ``max_frames``.

        Raises:
            VideoError, ValueError: see ``read_video``.
        """
        numbers = {"base_frames": self.base_frames, "extra_frames_per_hour": self.extra_frames_per_hour}
        return read_sampled(source, **numbers, max_frames=self.max_frames, **options)

    def select(self, videos: Videos) -> Selection:
        """See ``Selector.select``. Waits for the scores once, as the sizes of all that follows hang on them; where rows
        have newlines, the mode "merge" waits once more, for those that stay.

        ``scores`` [sum M] float32 are those of the tokens' time steps; None where everything was kept unscored.
        ``extras`` hold, on the CPU, each step's share of the budget [sum T] int64, its grid [sum T, 2] int64 (after
        "merge" its tokens, in one row), and what no step could use, one number a sample, [S] int64. ``notes`` say by
        what text frames were scored, and what of the budget no step could use.

        Raises:
            ValueError: the videos are no whole grids (tokens were taken out of them), the scores are not one finite
                number, not negative, a time step, or the scorer reads text and there is none.
        """
        if any(length != math.prod(grid) for length, grid in zip(videos.lengths, videos.grids, strict=True)):
            raise ValueError("QuoTA resizes whole frames, and tokens were taken out of these: put it first in a Chain")
        frames = _frames(videos, self.include_newlines, self.mode == "merge")
        budgets = self._budgets(frames)
        if all(budget == of.whole for budget, of in zip(budgets, frames, strict=True)):
            return _everything(videos, frames)
        scores, notes = self._scores(videos)
        shares, sizes, unused = _assign(scores, self.power, frames, budgets)
        every = torch.cat([of.grids for of in frames])
        counts = [int(part.prod(1).sum()) for part in sizes.split([grid[0] for grid in videos.grids])]
        if bool((sizes.prod(1) == every.prod(1)).all()):
            indices, tokens = torch.arange(sum(videos.lengths)), None
        else:
            indices, tokens = _compress(videos, sizes, self.mode)
        if self.mode == "merge" and self.include_newlines:
            unused = unused + _spare_newlines(videos, frames, sizes, indices)
        selection = packed_selection(indices, counts, videos.tokens.device)
        selection.tokens = tokens
        selection.scores = scores.float().repeat_interleave(every.prod(1)).to(videos.tokens.device)
        selection.extras = (shares, sizes, unused)
        selection.notes = (*notes, *_unused_notes(videos, unused.tolist(), budgets, frames))
        return selection

    def _budgets(self, frames: "list[_Frames]") -> list[int]:
        """Tokens to give to the frames of each sample."""
        budgets = []
        for of in frames:
            budget = resolve_budget(of.whole + of.paid, self.retention_ratio, self.total_tokens) - of.paid
            budgets.append(max(budget, min(costs[1] for costs in of.costs)))
        return budgets

    def _scores(self, videos: Videos) -> tuple[torch.Tensor, list[str]]:
        """[sum T] float64 on the CPU, and what they were made by, in words."""
        questions, notes = None, []
        if self._reads_text:
            if hasattr(self.scorer, "check"):
                self.scorer.check(videos)
            questions = self._questions(videos)
            notes = _question_notes(questions)
        scores = self.scorer.score(videos) if questions is None else self.scorer.score(videos, questions)
        steps = sum(grid[0] for grid in videos.grids)
        if not isinstance(scores, torch.Tensor) or tuple(scores.shape) != (steps,):
            got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
            raise ValueError(f"scores must be a tensor of one number for each of {steps} time steps, got {got}")
        scores = scores.detach().cpu().double()
        if not bool((scores.isfinite() & (scores >= 0)).all()):
            raise ValueError(f"scores of time steps must be finite and not negative, got {scores.tolist()}")
        return scores, notes

    def _questions(self, videos: Videos) -> list[str | Decoupled]:
        """What frames are scored by, one a video."""
        context, questions = videos.context, self._bound
        processor = getattr(context, "tokenizer", None)
        tokenizer = getattr(processor, "tokenizer", processor)
        if questions is None and tokenizer is None:
            raise ValueError(
                "the frame scorer reads the question as text: give attach(..., tokenizer=processor), or "
                "scorer.bind(frames, question)"
            )
        if questions is None:
            ids = [of_video.tolist() for of_video in videos.question_ids]
            questions = [tokenizer.decode(of_video, skip_special_tokens=True).strip() for of_video in ids]
        if not self.decouple:
            return questions
        texts = list(dict.fromkeys(question for question in questions if isinstance(question, str)))
        if not texts:
            return questions
        self.check_tokenizer(processor)
        made = dict(zip(texts, decoupling.decouple(context.model, processor, texts), strict=True))
        return [made[question] if isinstance(question, str) else question for question in questions]

    def __repr__(self) -> str:
        options = (
            "total_tokens",
            "mode",
            "power",
            "base_frames",
            "extra_frames_per_hour",
            "max_frames",
            "decouple",
            "include_newlines",
            "retention_ratio",
        )
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


def _spare_newlines(videos: Videos, frames: list[_Frames], sizes: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[S] int64 on the CPU: newlines of rows that merged tokens had room for, and touch too few rows to keep. Waits for
    the places of the tokens where a video has such newlines, else for nothing."""
    spare, kinds = [], map(_newline_kind, videos.grids, newline_spans(videos))
    if "row" not in kinds:
        return torch.zeros(len(frames), dtype=torch.int64)
    indices, starts = indices.cpu(), [0, *accumulate(videos.lengths)]
    of_step = sizes.prod(1).split([grid[0] for grid in videos.grids])
    for video, (_, rows, columns) in enumerate(videos.grids):
        spare.append(0)
        if _newline_kind(videos.grids[video], newline_spans(videos)[video]) == "row":
            inside = indices[(indices >= starts[video]) & (indices < starts[video + 1])]
            touched = len(((inside - starts[video]) // columns).unique())
            spare[-1] = int(of_step[video].clamp(max=rows).sum()) - touched
    of_sample = dict.fromkeys(videos.sample, 0)
    for sample, of_video in zip(videos.sample, spare, strict=True):
        of_sample[sample] += of_video
    return torch.tensor(list(of_sample.values()))


def _question_notes(questions: list[str | Decoupled]) -> list[str]:
    """What frames are scored by, a sentence for each that differs."""
    said = [str(q) if isinstance(q, Decoupled) else "frames are scored by the question itself" for q in questions]
    if len(set(said)) == 1:
        return said[:1]
    videos = {text: [str(video) for video, other in enumerate(said) if other == text] for text in said}
    return [f"{text} (video {', '.join(of)})" for text, of in videos.items()]


def _unused_notes(videos: Videos, unused: list[int], budgets: list[int], frames: list[_Frames]) -> list[str]:
    """What no frame could use of the budget, a sentence for each sample that has some left."""
    samples, notes = list(dict.fromkeys(videos.sample)), []
    for sample, left, budget, of in zip(samples, unused, budgets, frames, strict=True):
        if left:
            of_sample = f" of sample {sample}" if len(samples) > 1 else ""
            notes.append(f"no frame can use {left} of the {budget + of.paid} tokens of the budget{of_sample}")
    return notes


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
