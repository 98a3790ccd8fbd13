"""Modules with parameters, on top of the ops."""

from qts_kernels.nn.budget import BudgetHead
from qts_kernels.nn.qtsplus import QTSplus
from qts_kernels.nn.reencoder import ReencodeLayer
from qts_kernels.nn.scoring import RelevanceLayer, ScoringLayer
from qts_kernels.nn.time_embedding import TimeEmbedding

__all__ = ["BudgetHead", "QTSplus", "ReencodeLayer", "RelevanceLayer", "ScoringLayer", "TimeEmbedding"]
