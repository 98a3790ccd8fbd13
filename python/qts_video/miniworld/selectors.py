"""Train a QTSplus selector for the model of the world: on films from the bank, through the frozen language model."""

from typing import Any

import numpy as np
import torch
from torch.nn import functional

from qts_video.methods.base import resolve_budget
from qts_video.train.losses import budget_losses

from .forward import answer_states
from .memory import TOKENS_A_STEP, remember
from .packing import PREFIX, Packer
from .questions import Question
from .sight import Bank
from .world import CELLS, Scene

BUDGET_WEIGHTS = (0.1, 0.17, 0.05)
"""Of rho's losses: the published recipe's."""


def selection_loss(
    model: Any,
    selector: Any,
    packer: Packer,
    bank: Bank,
    scenes: list[Scene],
    questions: list[Question],
    retention_ratio: float,
    *,
    compact: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of a batch, one question a film, and which answers were right [B] bool.

    Args:
        selector: a ``qts_kernels.nn.QTSplus`` in training mode.
        scenes: films of one length.
        retention_ratio: share of the tokens that the selector keeps.
        compact: kept tokens get consecutive positions.
    """
    device = model.device
    samples, total = len(scenes), scenes[0].seconds * TOKENS_A_STEP
    rows = [remember(bank, scene, total, scene.random(purpose=2), 1.0) for scene in scenes]
    tokens = torch.cat([row.tokens for row in rows]).to(device).float()
    words = [packer.encode(question.text) for question in questions]
    seconds = torch.arange(scenes[0].seconds).repeat_interleave(TOKENS_A_STEP).float()
    keep = resolve_budget(total, retention_ratio, None)
    selection = selector(
        tokens,
        model.get_input_embeddings()(torch.tensor([one for ids in words for one in ids], device=device)).detach(),
        timestamps=seconds.repeat(samples).to(device),
        cu_seqlens=torch.arange(samples + 1, dtype=torch.int32, device=device) * total,
        cu_seqlens_question=torch.tensor(np.cumsum([0, *map(len, words)]), dtype=torch.int32, device=device),
        n=keep,
    )
    place = (selection.indices % total).view(samples, keep)
    ends = [keep if compact else max(scene.seconds, CELLS) for scene in scenes]
    behind = np.full((samples, 1), compact)
    batch = packer.pack_text(ends, keep, [[question] for question in questions], behind).to(device)
    cell = place % TOKENS_A_STEP
    positions = torch.stack([place // TOKENS_A_STEP, cell // CELLS, cell % CELLS])
    if compact:
        positions = torch.arange(keep, device=device).expand(3, samples, -1)
    batch.positions[:, :, PREFIX : PREFIX + keep] = positions + PREFIX
    states = answer_states(model, batch, selection.tokens.view(samples, keep, -1))
    logits = functional.linear(states[:, 0, 0].float(), model.lm_head.weight)
    answers = batch.answers[:, 0]
    costs = budget_losses(
        selection.rho, selection.n_expected, selector.config["n_max"], selector.rho_mean, BUDGET_WEIGHTS
    )
    loss = functional.cross_entropy(logits, answers) + costs.total().mean()
    return loss, logits.argmax(-1) == answers
