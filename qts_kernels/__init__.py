"""Query-aware vision-token selection for video LLMs: fast, exact ops and modules."""

from qts_kernels import nn
from qts_kernels._version import __version__
from qts_kernels.ops.allocate_tokens.api import allocate_tokens
from qts_kernels.ops.gather_tokens.api import gather_tokens
from qts_kernels.ops.merge_tokens.api import merge_rows_columns, merge_step, merge_tokens
from qts_kernels.ops.reencode.api import add_rms_norm, bias_gelu, gather_add_rms_norm
from qts_kernels.ops.relevance.api import relevance
from qts_kernels.ops.resize_frames.api import resize_frames
from qts_kernels.ops.rms_scale.api import rms_scale
from qts_kernels.ops.soft_threshold.api import soft_threshold
from qts_kernels.ops.topn.api import topn
from qts_kernels.ops.topn_gather.api import topn_gather
from qts_kernels.selection import Selection

__all__ = [
    "Selection",
    "__version__",
    "add_rms_norm",
    "allocate_tokens",
    "bias_gelu",
    "gather_add_rms_norm",
    "gather_tokens",
    "merge_rows_columns",
    "merge_step",
    "merge_tokens",
    "nn",
    "relevance",
    "resize_frames",
    "rms_scale",
    "soft_threshold",
    "topn",
    "topn_gather",
]
