"""QTSplus: score the vision tokens against the question, predict a budget, keep the best, re-encode them with time."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qts_kernels._checks import check_cu_seqlens, check_same, check_shape, check_tensor
from qts_kernels.nn.budget import BudgetHead
from qts_kernels.nn.gate import Gate, keep_logits, logistic_noise, segment_seeds, straight_through
from qts_kernels.nn.layers import EPS
from qts_kernels.nn.packing import Packed, join, pack
from qts_kernels.nn.reencoder import ReencodeLayer
from qts_kernels.nn.scoring import RelevanceLayer, ScoringLayer
from qts_kernels.nn.serialization import adapt_released_state, load_module, save_module
from qts_kernels.nn.time_embedding import TimeEmbedding
from qts_kernels.ops.gather_tokens.api import gather_tokens
from qts_kernels.ops.reencode.api import add_rms_norm, gather_add_rms_norm
from qts_kernels.ops.rms_scale.api import rms_scale
from qts_kernels.ops.topn.api import topn
from qts_kernels.selection import Selection


class QTSplus(nn.Module):
    """The query-aware token selector of QTSplus (arXiv 2511.11910), with absolute time in the re-encoder.

    ``load_state_dict`` takes a released selector's state dict as it is: what is dead in its last scoring layer is
    dropped, and a time embedding that is absent starts at zero, which leaves the outputs as they were.

    In eval mode the Top-n of the predicted budget is kept. In training mode a token is kept with the probability
    p_i = sigmoid((r_i - t) / tau_s), where t makes them sum to rho M; gradients go straight through to the p_i of kept
    tokens, by their rows and the attention of the first re-encoder layer, and of dropped ones, by that attention and by
    t; without a re-encoder layer dropped ones have t alone. Later re-encoder layers know the kept tokens alone.
    ``rho_mean`` is the running mean of rho that training measures rho against: ``update_rho_mean``.

    Args:
        d_model: D, width of the vision tokens and of the question's embeddings.
        num_heads, num_kv_heads: attention heads, and key heads (None: as many); D a multiple of num_heads.
        tau_s: temperature of the training gate, in units of the scores, which are softmax weights: of M tokens the mean
            is near 1/M, so that a tau_s far above it makes all p_i nearly rho. Inference does not use it.
        n_max: most tokens to keep of a segment under the predicted budget, or by the training gate.
        rho_min, rho_max: range of the predicted retention ratio.
        scoring_layers: at least 1. Only the last one scores; earlier ones let the question read the vision tokens.
        reencode_layers: 0 returns the kept rows as they are.
        time_embedding: whether the re-encoder has one.

    Raises:
        ValueError: on heads, layers or ranges that do not fit.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        tau_s: float = 0.1,
        n_max: int = 2560,
        rho_min: float = 0.05,
        rho_max: float = 0.5,
        scoring_layers: int = 1,
        reencode_layers: int = 1,
        time_embedding: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or d_model < 1 or d_model % num_heads:
            raise ValueError(f"d_model must be a positive multiple of num_heads, got {d_model} and {num_heads}")
        if num_kv_heads < 1 or num_heads % num_kv_heads:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
        if scoring_layers < 1 or reencode_layers < 0:
            raise ValueError(
                f"expected scoring_layers >= 1 and reencode_layers >= 0, got {scoring_layers}, {reencode_layers}"
            )
        if not 0 < rho_min <= rho_max <= 1:
            raise ValueError(f"expected 0 < rho_min <= rho_max <= 1, got {rho_min} and {rho_max}")
        if n_max < 1 or not tau_s > 0:
            raise ValueError(f"expected n_max >= 1 and tau_s > 0, got {n_max} and {tau_s}")
        self.config = {
            "d_model": d_model,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "tau_s": tau_s,
            "n_max": n_max,
            "rho_min": rho_min,
            "rho_max": rho_max,
            "scoring_layers": scoring_layers,
            "reencode_layers": reencode_layers,
            "time_embedding": time_embedding,
        }
        self.d_model, self.tau_s = d_model, tau_s
        heads = (d_model, num_heads, num_kv_heads)
        self.scoring_layers = nn.ModuleList(
            [*(ScoringLayer(*heads) for _ in range(scoring_layers - 1)), RelevanceLayer(*heads)]
        )
        self.budget = BudgetHead(d_model, n_max, rho_min, rho_max)
        self.reencode_layers = nn.ModuleList(ReencodeLayer(*heads) for _ in range(reencode_layers))
        self.time_embedding = TimeEmbedding(d_model) if time_embedding and reencode_layers else None
        self.register_buffer("rho_mean", torch.zeros(()))  # 0: none yet; rho is above 0
        self.register_load_state_dict_pre_hook(adapt_released_state)

    def forward(
        self,
        vision_tokens: Tensor,
        question: Tensor,
        *,
        timestamps: Tensor | None = None,
        question_mask: Tensor | None = None,
        vision_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_question: Tensor | None = None,
        n: int | Tensor | None = None,
        max_n: int | Tensor | None = None,
        noise: bool = True,
        seed: int | Tensor | None = None,
    ) -> Selection:
        """Select tokens of each segment by the question about it.

        Args:
            vision_tokens: [B, M, D], or [sum M, D] with ``cu_seqlens``; dtype and device of the parameters (under
                autocast the dtype is free).
            question: [B, L, D], or [sum L, D] with ``cu_seqlens_question``: embedding rows of the question's text.
            timestamps: [B, M] or [sum M], seconds, floating. Used by the time embedding where there is one.
            question_mask, vision_mask: bool [B, L] and [B, M], True where there is a token, in any arrangement. What
                they hide is never selected and influences nothing. Dense input only.
            cu_seqlens, cu_seqlens_question: int32 [S+1] offsets of packed input, both or neither.
            n: tokens to keep of each segment instead of the predicted budget: an int, or an int tensor [S] on the
                device.
            max_n: an upper bound of the number to keep, whoever decides it; as ``n``. An int keeps results small on a
                GPU.
            noise: training mode: false keeps the Top-n of the budget, as in eval mode, and so does a given ``n``; the
                gradients are those of the gate all the same.
            seed: training mode: of the noise, an int, or an int64 tensor [S] with one for each segment, whose noise
                then depends on nothing else. None: from torch's generator.

        Returns:
            Selection: tokens [N, D] re-encoded, indices [N] rows of the packed B*M (or sum M) axis, cu_seqlens [S+1],
            scores [B, M] or [sum M] in fp32 (0 where masked), rho [S] as predicted, n [S] as kept, entropy [S]; in
            training mode n_expected [S].
            On a CPU N is sum n. On a GPU, where knowing sum n would synchronise, N is a bound of it and the rest is
            padding: index -1 and zeros.

            A segment without vision tokens keeps nothing. A segment without question scores 0 everywhere, and keeps
            its first tokens.

        Raises:
            ValueError, TypeError: on shapes, dtypes, devices, masks or budgets that do not fit.
        """
        self._check(vision_tokens, question, timestamps, question_mask, vision_mask, cu_seqlens, cu_seqlens_question)
        if vision_mask is not None and torch.is_grad_enabled():
            # Hidden rows get a zero gradient, and 0 * NaN would carry theirs into the gradient of a weight.
            vision_tokens = vision_tokens.masked_fill(~vision_mask[..., None], 0)
        vision = pack(vision_tokens, vision_mask, cu_seqlens)
        text = pack(question, question_mask, cu_seqlens_question)
        segments = vision.cu_seqlens.shape[0] - 1
        cu_text, cu_vision, hidden = join(text, vision)

        rows = text.pack(text.rows)
        if question_mask is not None:
            rows = rows.masked_fill(torch.arange(len(rows), device=rows.device)[:, None] >= text.cu_seqlens[-1], 0)
        key_scale = vision.pack(rms_scale(vision.rows, EPS))
        for layer in self.scoring_layers[:-1]:
            rows = layer(rows, vision, key_scale, cu_text, cu_vision)
        scores = self.scoring_layers[-1](rows, vision, key_scale, cu_text, cu_vision)
        rho, predicted, entropy = self.budget(text.pack(text.rows), scores, text.cu_seqlens, vision.cu_seqlens)

        ranking, sampled, logits = scores.detach(), None, None
        if self.training:
            logits = keep_logits(scores, F.pad(rho, (0, hidden), value=0.5), self.tau_s, cu_vision)
            if n is None and noise:
                seeds = F.pad(segment_seeds(seed, segments, scores.device), (0, hidden))
                ranking = logits.detach() + logistic_noise(seeds, cu_vision, scores.shape[0])
                sampled = _count_above_zero(ranking, vision.cu_seqlens)

        wanted, bound, total = self._resolve_budget(n, max_n, predicted, sampled, vision)
        places, cu_kept = topn(ranking.float(), F.pad(wanted, (0, hidden)), cu_seqlens=cu_vision, max_n=bound)
        places, cu_kept = places[:total], cu_kept[: segments + 1]
        if places.device.type == "cpu" and not torch.compiler.is_compiling():
            places, bound = places[: int(cu_kept[-1])], int(cu_kept.diff().max())
        indices = vision.rows_at(places)
        gate = Gate(straight_through(logits, places), vision) if self.training else None
        return Selection(
            tokens=self.reencode(vision.rows, indices, cu_kept, bound, timestamps, gate),
            indices=indices,
            cu_seqlens=cu_kept,
            scores=vision.unpack(scores).view(vision_tokens.shape[:-1]),
            rho=rho,
            n=cu_kept.diff().long(),
            entropy=entropy,
            n_expected=rho * vision.cu_seqlens.diff() if self.training else None,
        )

    def reencode(
        self,
        tokens: Tensor,
        indices: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        timestamps: Tensor | None = None,
        gate: Gate | None = None,
    ) -> Tensor:
        """The rows ``indices`` of ``tokens``, re-encoded with each other within each segment.

        Args:
            tokens: [M, D]. indices: int64 [N], -1 in padding. cu_seqlens: int32 [S+1] offsets in indices.
            max_seqlen: at least the longest segment.
            timestamps: M values, seconds, or None.
            gate: of training: scales the rows, and takes part in the first layer's attention.

        Returns:
            [N, D], zeros in padding. Differentiable in tokens, the parameters and the gate.
        """
        rows, places = tokens, indices
        if gate is not None:
            kept = gather_tokens(gate.vision.unpack(gate.value), indices).to(tokens.dtype)
            rows = gather_tokens(tokens, indices) * kept[:, None]
            places = torch.arange(len(indices), device=indices.device).where(indices >= 0, -1)
        if not len(self.reencode_layers):
            return gather_tokens(tokens, indices) if gate is None else rows
        time = None
        if timestamps is not None and self.time_embedding is not None:
            time = self.time_embedding(gather_tokens(timestamps.flatten(), indices)).to(tokens.dtype)
        residual, normed = gather_add_rms_norm(rows, places, time, None, EPS)
        normed_all = None if gate is None else self._normed(gate.vision, timestamps)
        update, residual = self.reencode_layers[0](residual, normed, cu_seqlens, max_seqlen, gate, normed_all)
        for layer in self.reencode_layers[1:]:
            residual, normed = add_rms_norm(update, residual, None, EPS)
            update, residual = layer(residual, normed, cu_seqlens, max_seqlen)
        return (residual + update).masked_fill((indices < 0)[:, None], 0)

    @torch.no_grad()
    def _normed(self, vision: Packed, timestamps: Tensor | None) -> Tensor:
        """[T, D] in packed order: what the first re-encoder layer would read, were every token kept."""
        rows = vision.pack(vision.rows)
        if timestamps is not None and self.time_embedding is not None:
            rows = rows + self.time_embedding(vision.pack(timestamps.flatten())).to(rows.dtype)
        return rows * rms_scale(rows, EPS).to(rows.dtype)[:, None]

    def trained_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters that training can change, by name: all but the biases of the key projections. Those add the
        same to all logits of a query and leave the softmax; what gradient they get is rounding."""
        return ((name, p) for name, p in self.named_parameters() if not name.endswith("k_proj.bias"))

    @torch.no_grad()
    def update_rho_mean(self, total: Tensor, count: Tensor | int, momentum: float = 0.99) -> None:
        """Move ``rho_mean`` towards the mean rho of a step: ``momentum`` of the old, the rest of the new; the first one
        as it is. Summed over all ranks of the default process group, where there is one, in one all_reduce.

        Args:
            total: sum of the step's rho. count: how many they are.

        Raises:
            RuntimeError: in eval mode, where the mean must not move.
        """
        if not self.training:
            raise RuntimeError("rho_mean moves in training mode alone")
        sums = torch.stack([total.float(), torch.as_tensor(count).to(total.device, torch.float32)])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(sums)
        mean = (sums[0] / sums[1]).to(self.rho_mean.dtype)
        moved = momentum * self.rho_mean + (1 - momentum) * mean
        self.rho_mean.copy_(torch.where(self.rho_mean == 0, mean, moved))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` into ``folder``, which is made where it is absent."""
        save_module(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "QTSplus":
        """Read what ``save_pretrained`` wrote, in eval mode and in the dtype it was saved in.

        Raises:
            FileNotFoundError: config.json or model.safetensors is absent. ValueError: they are of something else.
        """
        return load_module(cls, folder)

    def _resolve_budget(
        self, n, max_n, predicted: Tensor, sampled: Tensor | None, vision: Packed
    ) -> tuple[Tensor, int, int]:
        """The tokens to keep of each segment [S], and bounds known on the host: of one segment, and of all together.
        ``sampled`` [S]: how many the training gate keeps."""
        segments = predicted.shape[0]
        bound = vision.max_seqlen
        total = vision.rows.shape[0]
        if sampled is not None:
            n = sampled.clamp(1, self.budget.n_max)
            bound = min(bound, self.budget.n_max)
        elif n is None:
            n = predicted
            # ceil(rho M) is at most rho_max M + 1, for one segment and, summed up, for all.
            share = self.budget.rho_max
            total = min(total, int(share * total) + segments)
            bound = min(bound, self.budget.n_max, int(share * bound) + 1)
        elif not isinstance(n, Tensor):
            bound = min(bound, n)
        wanted = _counts("n", n, predicted)
        if max_n is not None:
            wanted = torch.minimum(wanted, _counts("max_n", max_n, predicted))
            bound = bound if isinstance(max_n, Tensor) else min(bound, max_n)
        return wanted, bound, min(total, segments * bound)

    def _check(self, vision_tokens, question, timestamps, question_mask, vision_mask, cu_vision, cu_text) -> None:
        packed = cu_vision is not None or cu_text is not None
        for name, x, cu, mask, size in (
            ("vision_tokens", vision_tokens, cu_vision, vision_mask, "M"),
            ("question", question, cu_text, question_mask, "L"),
        ):
            layout = f"[sum {size}, D]" if packed else f"[B, {size}, D]"
            check_tensor(name, x, 2 if packed else 3, layout)
            if x.shape[-1] != self.d_model:
                raise ValueError(f"{name} must have shape {layout} with D = {self.d_model}, got {list(x.shape)}")
            self._check_parameters_match(name, x)
            suffix = "" if name == "vision_tokens" else "_question"
            if packed and cu is None:
                raise ValueError(f"packed input needs cu_seqlens and cu_seqlens_question, got no cu_seqlens{suffix}")
            if packed:
                check_cu_seqlens(f"cu_seqlens{suffix}", cu, name, x)
            mask_name = "vision_mask" if name == "vision_tokens" else "question_mask"
            if packed and mask is not None:
                raise ValueError(f"packed input takes no {mask_name}: leave the hidden rows out")
            if mask is not None:
                check_tensor(mask_name, mask, 2, f"[B, {size}]", (torch.bool,))
                check_shape(mask_name, mask, x.shape[:2], f"[B, {size}]")
                check_same(mask_name, mask, name, x, dtype=False)
        check_same("question", question, "vision_tokens", vision_tokens, dtype=False)
        batch = (cu_vision.shape[0] - 1, cu_text.shape[0] - 1) if packed else (len(vision_tokens), len(question))
        if batch[0] != batch[1] or batch[0] == 0:
            raise ValueError(
                f"vision_tokens and question must have the same batch, at least 1, got {batch[0]} and {batch[1]}"
            )
        if timestamps is not None:
            check_tensor("timestamps", timestamps, vision_tokens.ndim - 1, "[sum M]" if packed else "[B, M]")
            check_shape("timestamps", timestamps, vision_tokens.shape[:-1], "[sum M]" if packed else "[B, M]")
            check_same("timestamps", timestamps, "vision_tokens", vision_tokens, dtype=False)

    def _check_parameters_match(self, name: str, x: Tensor) -> None:
        weight = self.scoring_layers[-1].k_proj.weight
        if x.device != weight.device:
            raise ValueError(f"{name} must be on the device of the parameters, {weight.device}, got {x.device}")
        if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
            raise TypeError(f"{name} must have the dtype of the parameters, {weight.dtype}, got {x.dtype}")


def _count_above_zero(x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """int64 [S]: how many of ``x`` [M] are above 0 in each segment."""
    running = F.pad((x > 0).long().cumsum(0), (1, 0))[cu_seqlens.long()]
    return running.diff()


def _counts(name: str, n: int | Tensor, like: Tensor) -> Tensor:
    """int64 [S] on the device of ``like``, from an int or a tensor of counts."""
    if not isinstance(n, Tensor):
        if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
            raise TypeError(f"{name} must be an int or an int tensor [S], got {type(n).__name__}")
        if n < 0:
            raise ValueError(f"{name} must not be negative, got {n}")
        return torch.full_like(like, n)
    check_tensor(name, n, 1, "[S]", (torch.int64, torch.int32))
    check_shape(name, n, like.shape, "[S]")
    check_same(name, n, "vision_tokens", like, dtype=False)
    return n.long()
