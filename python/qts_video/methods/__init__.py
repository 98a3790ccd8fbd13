"""Selection methods: one file each, one ``Selector`` protocol."""

from typing import TYPE_CHECKING

from qts_video.methods.base import Selector, Videos
from qts_video.methods.chain import Chain
from qts_video.methods.flexselect import FlexSelect
from qts_video.methods.quota import QuoTA
from qts_video.methods.random import Random
from qts_video.methods.uniform import Uniform

if TYPE_CHECKING:
    from qts_video.methods.qtsplus import QTSplus

__all__ = ["Chain", "FlexSelect", "QTSplus", "QuoTA", "Random", "Selector", "Uniform", "Videos"]


def __getattr__(name: str) -> object:
    # On first use: its module loads torch's compiler and Triton, for which `qts --help` must not wait.
    if name == "QTSplus":
        from qts_video.methods.qtsplus import QTSplus

        return QTSplus
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
