"""QTSplus written down from its paper, one sample at a time, nothing fused: what the module is compared with."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from qts_kernels.nn import QTSplus

EPS = 1e-6


@dataclass
class Answer:
    scores: Tensor
    rho: Tensor
    entropy: Tensor
    n: int
    indices: Tensor
    tokens: Tensor


def make_selector(d_model=48, num_heads=6, num_kv_heads=2, *, seed=0, time_scale=0.1, **options) -> QTSplus:
    """A selector with random norms and a time embedding that is not zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = QTSplus(d_model, num_heads, num_kv_heads, **options).eval()
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "norm" in name:
                    parameter.copy_(0.5 + torch.rand_like(parameter))
                if "time_embedding" in name:
                    parameter.normal_(std=time_scale)
    return module


def select_one(module: QTSplus, x: Tensor, question: Tensor, seconds: Tensor | None = None, indices=None) -> Answer:
    """x [M, D], question [L, D], seconds [M]; every step in the dtype of x, scores in fp32 or better.
    ``indices``: those to re-encode instead of the selected ones."""
    state = dict(module.named_parameters())
    heads = module.config["num_heads"]
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32

    def get(name: str) -> Tensor:
        return state[name].detach().to(x.dtype)

    def norm(y: Tensor, name: str) -> Tensor:
        y = y.to(wide)
        y = y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt()
        return y.to(x.dtype) * get(f"{name}.weight")

    def linear(y: Tensor, name: str) -> Tensor:
        return F.linear(y, get(f"{name}.weight"), get(f"{name}.bias") if f"{name}.bias" in state else None)

    def split(y: Tensor) -> Tensor:
        y = y.view(len(y), -1, x.shape[1] // heads).transpose(0, 1)
        return y.repeat_interleave(heads // y.shape[0], 0)

    def attention(q: Tensor, kv: Tensor, name: str) -> Tensor:
        query, key = split(linear(norm(q, f"{name}.q_norm"), f"{name}.q_proj")), norm(kv, f"{name}.kv_norm")
        logits = query @ split(linear(key, f"{name}.k_proj")).mT / math.sqrt(x.shape[1] // heads)
        weights = logits.to(wide).softmax(-1)
        if f"{name}.o_proj.weight" not in state:
            return weights
        out = weights.to(x.dtype) @ split(linear(key, f"{name}.v_proj"))
        q = q + linear(out.transpose(0, 1).flatten(1), f"{name}.o_proj")
        hidden = F.gelu(linear(norm(q, f"{name}.ffn_norm"), f"{name}.ffn.net.0"))
        return q + linear(hidden, f"{name}.ffn.net.2")

    q = question
    for i in range(len(module.scoring_layers) - 1):
        q = attention(q, x, f"scoring_layers.{i}")
    scores = attention(q, x, f"scoring_layers.{len(module.scoring_layers) - 1}").amax((0, 1))

    p = scores / scores.sum()
    entropy = -(p * p.log()).sum()
    log_m = torch.tensor([math.log(len(x))], dtype=wide, device=x.device)
    features = torch.cat([question.to(wide).mean(0), log_m, scores.max()[None], entropy[None]])
    hidden = F.gelu(F.linear(features, get("budget.mlp.0.weight").to(wide), get("budget.mlp.0.bias").to(wide)))
    logit = F.linear(hidden, get("budget.mlp.2.weight").to(wide), get("budget.mlp.2.bias").to(wide))[0]
    low, high = module.config["rho_min"], module.config["rho_max"]
    rho = low + (high - low) * torch.sigmoid(logit)
    n = min(max(1, math.ceil(rho * len(x))), module.config["n_max"], len(x))

    if indices is None:
        indices = scores.argsort(descending=True, stable=True)[:n].sort().values
    z = x[indices]
    if seconds is not None and "time_embedding.proj.weight" in state:
        periods = module.time_embedding.periods
        ratio = (4 * 3600 / 0.5) ** (torch.arange(periods, dtype=torch.float64) / (periods - 1))
        phase = 2 * math.pi * seconds[indices].double()[:, None] / (0.5 * ratio.to(x.device))
        z = z + F.linear(torch.cat([phase.sin(), phase.cos()], 1).to(x.dtype), get("time_embedding.proj.weight"))
    for i in range(len(module.reencode_layers)):
        z = attention(z, z, f"reencode_layers.{i}.core")
    return Answer(scores, rho, entropy, n, indices, z)
