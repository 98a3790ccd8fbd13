"""Attention of a whole model in float64, written out and remembered: the reference of early exit and relevance."""

from contextlib import contextmanager

import torch
from transformers import AttentionInterface

NAME = "tests_exact"


class Exact:
    """Weights [B, H, L, L] of every layer, of the last forward."""

    def __init__(self):
        self.weights, self.valid = {}, None

    def __call__(self, module, query, key, value, attention_mask, scaling, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        logits = torch.einsum("bhld,bhmd->bhlm", query, key) * scaling
        length = query.shape[2]
        seen = torch.ones(length, length, dtype=torch.bool).tril()
        if self.valid is not None:
            seen = seen & (self.valid[:, None, None] | torch.eye(length, dtype=torch.bool))
        weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
        self.weights[module.layer_idx] = weights
        return torch.einsum("bhlm,bhmd->blhd", weights, value), weights


@contextmanager
def exact_attention(decoder, valid=None):
    """In this context, ``decoder`` attends by ``Exact``. ``valid``: [B, L] bool, where nothing is padded."""
    exact = Exact()
    exact.valid = valid
    AttentionInterface.register(NAME, exact)
    configs = {id(config): config for config in (layer.self_attn.config for layer in decoder.layers)}
    configs[id(decoder.config)] = decoder.config
    before = {number: config._attn_implementation for number, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = NAME
    try:
        yield exact
    finally:
        for number, config in configs.items():
            config._attn_implementation = before[number]
