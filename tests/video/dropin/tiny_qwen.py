"""A Qwen2.5-VL of a few thousand random parameters in float64, prompts for it, and the oracle: nothing
dropped, keys masked."""

from dataclasses import dataclass

import torch
import transformers
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from qts_kernels import Selection

HIDDEN, VOCAB = 64, 512
IMAGE, VIDEO, VISION_START, VISION_END = 500, 501, 502, 503
IM_START, IM_END, USER, ASSISTANT, SYSTEM, NEWLINE, PAD = 504, 505, 506, 507, 508, 509, 0
MERGE, PATCH = 2, 14
NEEDS_TOKEN_TYPES = int(transformers.__version__.split(".")[0]) >= 5


def build_model(attn: str = "sdpa", **text_options) -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": HIDDEN,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 4096,
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "pad_token_id": PAD,
    } | text_options
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": HIDDEN,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
        "tokens_per_second": 2,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=VISION_START,
        vision_end_token_id=VISION_END,
    )
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(config).double().eval()
    # Spread the random weights: with the default initialisation attention is flat, and dropping a token
    # changes little.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    model.set_attn_implementation(attn)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


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


def inputs(*samples: list[Part], side: str = "left", seed: int = 1) -> dict[str, torch.Tensor]:
    """What the processor would return for ``samples``, padded on ``side``."""
    generator = torch.Generator().manual_seed(seed)
    rows, pixels, grids = [], {Video: [], Image: []}, {Video: [], Image: []}
    seconds = []
    for sample in samples:
        ids = []
        for part in sample:
            if isinstance(part, list):
                ids += part
                continue
            kind = type(part)
            t = part.t if kind is Video else 1
            grid = (t, part.rows * MERGE, part.columns * MERGE)
            grids[kind].append(grid)
            patches = grid[0] * grid[1] * grid[2]
            pixels[kind].append(torch.randn(patches, 3 * 2 * PATCH * PATCH, generator=generator, dtype=torch.float64))
            if kind is Video:
                seconds.append(part.seconds)
            ids += [VISION_START, *[VIDEO if kind is Video else IMAGE] * part.tokens, VISION_END]
        rows.append(ids)
    longest = max(map(len, rows))
    padded, mask = [], []
    for ids in rows:
        pad, one = [PAD] * (longest - len(ids)), [1] * len(ids)
        zero = [0] * len(pad)
        padded.append(pad + ids if side == "left" else ids + pad)
        mask.append(zero + one if side == "left" else one + zero)
    batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
    for kind, suffix, grid_name in (
        (Video, "pixel_values_videos", "video_grid_thw"),
        (Image, "pixel_values", "image_grid_thw"),
    ):
        if pixels[kind]:
            batch[suffix] = torch.cat(pixels[kind])
            batch[grid_name] = torch.tensor(grids[kind])
    if seconds:
        batch["second_per_grid_ts"] = torch.tensor(seconds)
    if NEEDS_TOKEN_TYPES:
        ids = batch["input_ids"]
        batch["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    return batch


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


@dataclass
class Oracle:
    """The unpatched model's decoder over the full sequence, with the keys of dropped tokens masked."""

    model: Qwen2_5_VLForConditionalGeneration
    batch: dict[str, torch.Tensor]
    keep: torch.Tensor
    """[B, L] bool"""
    compact: bool = False
    replaced: torch.Tensor | None = None
    """[N, D] rows in place of the kept video tokens."""

    def __post_init__(self):
        captured = {}
        decoder = self.model.model.language_model

        def capture(module, args, kwargs):
            captured.update(kwargs)

        hook = decoder.register_forward_pre_hook(capture, with_kwargs=True)
        with torch.no_grad():
            self.model(**self.batch)
        hook.remove()
        self.positions = captured["position_ids"][-3:]
        self.embeds = captured["inputs_embeds"].clone()
        self.next = self.positions.masked_fill(self.batch["attention_mask"][None] == 0, -1).amax((0, 2)) + 1
        if self.replaced is not None:
            self.embeds[self.keep & (self.batch["input_ids"] == VIDEO)] = self.replaced
        if self.compact:
            rank = self.keep.cumsum(1) - 1
            self.positions = rank.clamp(min=0).expand(3, -1, -1)
            self.next = rank[:, -1] + 1

    def logits(self) -> torch.Tensor:
        """[B, L, V]; rows of dropped tokens are meaningless."""
        return self._run(self.embeds, self.positions, self.keep)

    def _run(self, embeds, positions, keep):
        hidden = self.model.model.language_model(
            inputs_embeds=embeds, position_ids=positions, attention_mask=keep.long(), use_cache=False
        )[0]
        return self.model.lm_head(hidden)

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
            positions = torch.cat([positions, (self.next + step).view(1, -1, 1).expand(3, -1, 1)], 2)
            keep = torch.cat([keep, torch.ones(len(keep), 1, dtype=torch.bool)], 1)
        return torch.stack(tokens, 1), logits


def keep_mask(batch: dict[str, torch.Tensor], kept: torch.Tensor) -> torch.Tensor:
    """[B, L] bool: text, images, and of the video placeholders, in order, those whose number is in
    ``kept``."""
    video = (batch["input_ids"] == VIDEO).flatten()
    keep = (batch["attention_mask"].flatten() == 1) & ~video
    keep[video.nonzero().squeeze(1)[kept]] = True
    return keep.view(batch["input_ids"].shape)


def rows(logits: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """The rows of ``logits`` [B, L, V] where ``mask`` [B, L] holds, one tensor a sample."""
    return [sample[row.bool()] for sample, row in zip(logits, mask, strict=True)]
