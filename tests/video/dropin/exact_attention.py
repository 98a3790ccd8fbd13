"""Attention of a whole model in float64, written out and remembered: the reference of early exit and relevance."""

import sys
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
    if hasattr(decoder.layers[0], "self_attn"):
        swap = _by_interface(decoder, exact)
    else:
        swap = _in_internlm2(decoder, exact)
    with swap:
        yield exact


@contextmanager
def _by_interface(decoder, exact):
    AttentionInterface.register(NAME, exact)
    configs = [decoder.config, *(layer.self_attn.config for layer in decoder.layers)]
    before = decoder.config._attn_implementation
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config in configs:
            config._attn_implementation = before


@contextmanager
def _in_internlm2(decoder, exact):
    code = sys.modules[type(decoder.layers[0].attention).__module__]
    attend, running = code.scaled_dot_product_attention, []
    hooks = [
        layer.attention.register_forward_pre_hook(lambda module, args: running.append(module))
        for layer in decoder.layers
    ]

    def replaced(query, key, value, mask, enable_gqa):
        output, _ = exact(running[-1], query, key, value, mask, running[-1].head_dim ** -0.5)
        return output.transpose(1, 2)

    code.scaled_dot_product_attention = replaced
    try:
        yield
    finally:
        code.scaled_dot_product_attention = attend
        for hook in hooks:
            hook.remove()
