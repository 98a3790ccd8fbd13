"""Selection methods: one file each, one ``Selector`` protocol."""

from qts_video.methods.base import Selector, Videos
from qts_video.methods.qtsplus import QTSplus
from qts_video.methods.random import Random
from qts_video.methods.uniform import Uniform

__all__ = ["QTSplus", "Random", "Selector", "Uniform", "Videos"]
