"""What the tests of the drop-in share for every model: prompts, selectors, and the oracle, in which nothing is
dropped and keys are masked."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from qts_video.adapters import find_adapter

from qts_kernels import Selection

HIDDEN, VOCAB = 64, 512
IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503
IM_START, IM_END, USER, ASSISTANT, SYSTEM, NEWLINE, PAD = 504, 505, 506, 507, 508, 509, 0
TEXT = {
    "hidden_size": HIDDEN,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
}
"""The language model of every tiny model."""
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
NEEDS_TOKEN_TYPES = VERSION >= (5,)


@dataclass(frozen=True)
class Video:
    """t x rows x columns tokens after the merger."""

    t: int
    rows: int = 2
    columns: int = 3
    seconds: float = 1.0

    @property
    def tokens(self) -> int:
        return self.t * self.rows * self.columns


@dataclass(frozen=True)
class Image:
    rows: int = 2
    columns: int = 2

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


Part = list | Video | Image
"""Of a turn: text ids, a video or an image."""


def user(*parts: Part) -> list[Part]:
    """A user's turn, as the chat template writes it."""
    return [[IM_START, USER, NEWLINE], *parts, [IM_END, NEWLINE]]


def assistant(*text: int) -> list[Part]:
    return [[IM_START, ASSISTANT, NEWLINE, *text, IM_END, NEWLINE]]


SYSTEM_TURN: list[Part] = [[IM_START, SYSTEM, NEWLINE, 10, 11, IM_END, NEWLINE]]
ANSWER: list[Part] = [[IM_START, ASSISTANT, NEWLINE]]


def prompt(*turns: list[Part]) -> list[Part]:
    """A chat: the system's turn, ``turns``, and the start of the answer."""
    return [part for turn in (SYSTEM_TURN, *turns, ANSWER) for part in turn]


Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Family:
    """One model of a few thousand random parameters in float64, and prompts that it can be given."""

    name: str
    build_model: Callable[..., Any]
    """(attn="sdpa") -> the model."""
    inputs: Callable[..., Batch]
    """(*samples, side="left", seed=1) -> what the processor would return for them."""
    prompts: dict[str, list[list[Part]]]
    """"one": a sample with a video. "unequal": three, each with a video, of unequal lengths, the last with a second
    turn. "several": two with images and more than one video (as far as the model takes them). "images": two with
    images alone."""
    vision: str
    """Name of the vision tower in the model."""
    second_turn: bool = True
    """Whether generate() goes on from a cache with the new ids alone, from transformers 5 on."""
    repeats: bool = True
    """Whether generate() can repeat samples with videos, for beams or several sequences."""
    skips: dict[str, str] = field(default_factory=dict)
    """Tests that have no meaning for this model: a pattern of their names, and why."""


def pad(rows: list[list[int]], side: str) -> Batch:
    """``input_ids`` and ``attention_mask`` of ragged rows."""
    longest = max(map(len, rows))
    padded, mask = [], []
    for ids in rows:
        fill, one = [PAD] * (longest - len(ids)), [1] * len(ids)
        zero = [0] * len(fill)
        padded.append(fill + ids if side == "left" else ids + fill)
        mask.append(zero + one if side == "left" else one + zero)
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


def ready(model: Any, attn: str = "sdpa") -> Any:
    """The model in float64 and eval mode, its attention not flat: with the default initialisation, dropping a token
    changes little."""
    model = model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


class Keep:
    """A selector that keeps the tokens a function of (videos) says, and remembers every call."""

    name = "keep"
    needs_question = False

    def __init__(self, choose, needs_question: bool = False, tokens=None, tail: int = 0, scores: bool = False):
        self.choose, self.needs_question, self.reencode = choose, needs_question, tokens
        self.tail, self.scores, self.calls = tail, scores, []

    def select(self, videos):
        self.calls.append(videos)
        kept = self.choose(videos)
        flat = torch.cat(kept)
        self.kept = flat
        counts = torch.tensor([len(k) for k in kept])
        cu_seqlens = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        indices = torch.cat([flat, flat.new_full((self.tail,), -1)])
        tokens = None if self.reencode is None else self.reencode(videos.tokens[indices])  # -1 takes the last row: cut
        scores = torch.arange(len(videos.tokens)).float() if self.scores else None
        return Selection(indices=indices, cu_seqlens=cu_seqlens, tokens=tokens, scores=scores)


def every(step: int, first: int = 0):
    """Keep every ``step``-th token; the next video starts one later, so that counts differ."""

    def choose(videos):
        starts = videos.cu_seqlens.tolist()
        return [
            torch.arange(start + min(first + number % step, length - 1), start + length, step)
            for number, (start, length) in enumerate(zip(starts, videos.lengths, strict=False))
        ]

    return choose


def keep_all(videos):
    return list(torch.arange(len(videos.tokens)).split(videos.lengths))


def placeholders(model: Any, batch: Batch) -> torch.Tensor:
    """[B, L] bool: the tokens of videos that a selector chooses from, in the order of the packed video axis."""
    adapter = find_adapter(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    layout = adapter.locate(model, ids, mask.bool(), batch, None)
    found = torch.zeros(ids.numel(), dtype=torch.bool)
    found[layout.rows] = True
    return found.view(ids.shape)


def keep_mask(model: Any, batch: Batch, kept: torch.Tensor, drop_steps: bool = False) -> torch.Tensor:
    """[B, L] bool: text, images, and of the video tokens those whose number is in ``kept``, with their newlines; where
    ``drop_steps``, without the tags around time steps that keep none."""
    adapter = find_adapter(model)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    layout = adapter.locate(model, ids, mask.bool(), batch, None)
    keep = mask.flatten() == 1
    keep[layout.rows] = False
    keep[layout.rows[kept]] = True
    first_token = first_newline = 0
    for length, span in zip(layout.lengths, layout.newline_spans, strict=True):
        if span == 0:
            first_token += length
            continue
        for start in range(0, length, span):
            tokens = set(range(first_token + start, first_token + start + span))
            keep[layout.newline_rows[first_newline]] = bool(tokens & set(kept.tolist())) or span == length
            first_newline += 1
        first_token += length
    keep = keep.view(ids.shape)
    return _without_empty_steps(layout, keep) if drop_steps else keep


def _without_empty_steps(layout: Any, keep: torch.Tensor) -> torch.Tensor:
    tokens, newlines = torch.zeros_like(keep), torch.zeros_like(keep)
    tokens.view(-1)[layout.rows], newlines.view(-1)[layout.newline_rows] = True, True
    for sample, spans in zip(layout.sample, layout.frame_spans, strict=True):
        first_stays = None
        for number, (start, stop) in enumerate(spans.tolist()):
            stays = bool((keep & tokens)[sample, start:stop].any())
            if not stays:
                keep[sample, start:stop] &= newlines[sample, start:stop]
            elif first_stays is None:
                first_stays = number
        if first_stays:  # InternVL: a line break stands between frames, as the first token of the later one
            ids, start = layout.input_ids[sample], int(spans[first_stays, 0])
            keep[sample, start] &= int(ids[start]) != NEWLINE or int(ids[spans[0, 0]]) == NEWLINE
    return keep


@dataclass
class Oracle:
    """The unpatched model's decoder over the full sequence, with the keys of dropped tokens masked."""

    model: Any
    batch: Batch
    keep: torch.Tensor
    """[B, L] bool"""
    compact: bool = False
    replaced: torch.Tensor | None = None
    """[N, D] rows in place of the kept video tokens."""
    extras: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        captured = {}

        def capture(module, args, kwargs):
            captured.update(kwargs)

        self.adapter = find_adapter(self.model)
        self.decoder = self.adapter.parts(self.model).decoder
        hook = self.decoder.register_forward_pre_hook(capture, with_kwargs=True)
        with torch.no_grad():
            self.model(**self.batch)
        hook.remove()
        self.embeds = captured["inputs_embeds"].clone()
        batch, length = self.embeds.shape[:2]
        positions = captured.get("position_ids")
        if positions is None:
            positions = torch.arange(length).unsqueeze(0)
        self.positions = positions[-3:] if positions.ndim == 3 else positions.expand(batch, -1).unsqueeze(0)
        self.next = self.positions.masked_fill(self.batch["attention_mask"][None] == 0, -1).amax((0, 2)) + 1
        self.extras = {k: captured[k] for k in ("visual_pos_masks", "deepstack_visual_embeds") if k in captured}
        if self.replaced is not None:
            self.embeds[self.keep & placeholders(self.model, self.batch)] = self.replaced
        if self.compact:
            padded = self.batch["attention_mask"][None] == 0
            first = self.positions.masked_fill(padded, self.positions.max()).amin((0, 2)).unsqueeze(1)
            rank = first + self.keep.cumsum(1) - 1
            self.positions = rank.clamp(min=0).expand(len(self.positions), -1, -1)
            self.next = rank[:, -1] + 1

    def logits(self) -> torch.Tensor:
        """[B, L, V]; rows of dropped tokens are meaningless."""
        return self._run(self.embeds, self.positions, self.keep)

    def _run(self, embeds, positions, keep):
        extras = dict(self.extras)
        if extras.get("visual_pos_masks") is not None:
            later = embeds.shape[1] - extras["visual_pos_masks"].shape[1]
            extras["visual_pos_masks"] = torch.nn.functional.pad(extras["visual_pos_masks"], (0, later))
        hidden = self.decoder(
            inputs_embeds=embeds,
            position_ids=positions if self.adapter.rope_axes > 1 else positions[0],
            attention_mask=keep.long(),
            use_cache=False,
            **extras,
        )[0]
        return self.model.get_output_embeddings()(hidden)

    @torch.no_grad()
    def greedy(self, steps: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Generated ids [B, steps] and the logits [B, V] of each step. Every prompt must end in the last
        column."""
        embeds, positions, keep = self.embeds, self.positions, self.keep
        tokens, logits = [], []
        for step in range(steps):
            logits.append(self._run(embeds, positions, keep)[:, -1])
            tokens.append(logits[-1].argmax(-1))
            new = self.model.get_input_embeddings()(tokens[-1])[:, None]
            embeds = torch.cat([embeds, new], 1)
            positions = torch.cat([positions, (self.next + step).view(1, -1, 1).expand(len(positions), -1, 1)], 2)
            keep = torch.cat([keep, torch.ones(len(keep), 1, dtype=torch.bool)], 1)
        return torch.stack(tokens, 1), logits


def rows(logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The rows of ``logits`` [B, L, V] where ``mask`` [B, L] holds, one tensor a sample."""
    return [sample[row.bool()] for sample, row in zip(logits, mask, strict=True)]
