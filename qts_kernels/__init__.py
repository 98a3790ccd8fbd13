"""Query-aware vision-token selection for video LLMs: fast, exact ops and modules."""

from qts_kernels.selection import Selection

__all__ = ["Selection"]
