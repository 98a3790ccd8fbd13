"""What the scoring layers and the re-encoder share: a language model's layer, by the released names."""

from torch import Tensor, nn
from torch.nn import functional as F

from qts_kernels.ops.reencode.api import bias_gelu

EPS = 1e-6
"""Of every RMSNorm, as in the release."""


class FeedForward(nn.Module):
    """W2 gelu(W1 x + b1) + b2, width 4 D, GELU in its exact form. [N, D] -> [N, D]."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x: Tensor) -> Tensor:
        up, _, down = self.net
        hidden = F.linear(x, up.weight)
        return down(bias_gelu(hidden, up.bias.to(hidden.dtype)))


class AttentionBlock(nn.Module):
    """Attention and feed-forward with their pre-norms; the owner decides what attends to what."""

    def __init__(self, d_model: int, num_heads: int, num_kv_heads: int) -> None:
        super().__init__()
        self.head_dim = d_model // num_heads
        self.q_norm = nn.RMSNorm(d_model, EPS)
        self.kv_norm = nn.RMSNorm(d_model, EPS)
        self.ffn_norm = nn.RMSNorm(d_model, EPS)
        self.q_proj = nn.Linear(d_model, d_model)
        self.k_proj = nn.Linear(d_model, num_kv_heads * self.head_dim)
        self.v_proj = nn.Linear(d_model, num_kv_heads * self.head_dim)
        self.o_proj = nn.Linear(d_model, d_model, bias=False)
        self.ffn = FeedForward(d_model)

    def split_heads(self, x: Tensor) -> Tensor:
        """[N, heads * Dh] -> [N, heads, Dh]"""
        return x.unflatten(-1, (-1, self.head_dim))


def fold_norm(norm: nn.RMSNorm, projection: nn.Linear) -> Tensor:
    """The weight W' with W' (x / rms) = W RMSNorm(x): the norm's weight folded into the projection.

    Folded anew on every call: a cache could serve weights that have changed since, and folding costs little next to the
    GEMM that follows (one pass over the weight).
    """
    return projection.weight * norm.weight
