"""QTSplus: a trained selector with a budget of its own (arXiv 2511.11910)."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qts_kernels import Selection
from qts_kernels.nn import QTSplus as SelectorModule
from qts_kernels.nn.serialization import model_type
from qts_video import released
from qts_video.adapters.internlm2 import is_fused, split_wqkv
from qts_video.methods.base import Videos, check_budget, resolve_budget
from qts_video.weights import Checkpoint


class QTSplus(nn.Module):
    """Scores every vision token against the question, keeps the best, and re-encodes them with their time.

    Budgets count tokens alone, as the method was trained: newline tokens, where a model has them, come on top, one for
    each row or frame that keeps a token.

    Args:
        selector: the module with the parameters, on the model's device. In another dtype than the model's it computes
            in its own, and its tokens come back in the model's.
        retention_ratio: share of each video's tokens to keep, in (0, 1]. None: the predicted budget.
        max_tokens: most tokens to keep of each video; with the predicted budget too.

    Raises:
        ValueError: retention_ratio outside (0, 1], or max_tokens below 1.
    """

    name = "qtsplus"
    needs_question = True

    def __init__(
        self, selector: SelectorModule, retention_ratio: float | None = None, max_tokens: int | None = None
    ) -> None:
        super().__init__()
        check_budget(retention_ratio, max_tokens)
        self.selector = selector
        self.training = selector.training
        self.retention_ratio = retention_ratio
        self.max_tokens = max_tokens

    @classmethod
    def from_pretrained(
        cls, path_or_id: str | Path, retention_ratio: float | None = None, max_tokens: int | None = None
    ) -> "QTSplus":
        """A trained selector, in eval mode, on the CPU and in the dtype it was saved in.

        Args:
            path_or_id: what ``save_pretrained`` wrote; or a released selector, alone or inside a whole QTSplus
                checkpoint (of which nothing else is read); a folder, or an id on the hub.

        Raises:
            FileNotFoundError: there is none, or a file of it is missing.
            ValueError: it holds no selector. RuntimeError: its tensors don't fit its config.json.
        """
        checkpoint = Checkpoint(path_or_id)
        if checkpoint.config.get("model_type") == model_type(SelectorModule):
            checkpoint.names()  # from the hub, fetches the weights
            module = SelectorModule.from_pretrained(checkpoint.folder)
        else:
            module = released.load_selector(checkpoint)
        return cls(module, retention_ratio, max_tokens)

    @classmethod
    def from_language_model(
        cls,
        model: nn.Module,
        *,
        scoring_layers: int = 1,
        reencode_layers: int = 1,
        retention_ratio: float | None = None,
        max_tokens: int | None = None,
        seed: int = 0,
        **options: Any,
    ) -> "QTSplus":
        """An untrained selector made from the layers of ``model``, as the paper starts its training.

        Attention and norms of every scoring layer come from the last layer of the language model, those of re-encoder
        layer i from its layer i; feed-forwards and the budget head are random.

        Args:
            model: a transformers model with a decoder of Qwen2's layout (``get_decoder().layers[i].self_attn``) or of
                InternLM2's (``.attention`` with ``wqkv``).
            seed: of what is random.
            options: of ``qts_kernels.nn.QTSplus``.

        Returns:
            A selector in the dtype and on the device of the language model, in eval mode.

        Raises:
            TypeError: the decoder is of another layout. ValueError: its heads do not split its width evenly, or it
            has fewer layers than ``reencode_layers``.
        """
        decoder = getattr(model, "language_model", model).get_decoder()  # InternVLChatModel has none of its own
        config, layers = decoder.config, getattr(decoder, "layers", ())
        if not len(layers) or not (is_fused(layers[0]) or hasattr(layers[0], "input_layernorm")):
            raise TypeError(
                "expected a decoder with layers[i].self_attn and .input_layernorm, or InternLM2's, got "
                + type(decoder).__name__
            )
        width, heads = config.hidden_size, config.num_attention_heads
        weight = _projections(layers[-1])["q_proj"][0]
        if len(weight) != width:
            raise ValueError(
                f"expected {heads} heads that split the width {width} evenly, got query projections of width "
                f"{len(weight)}"
            )
        if reencode_layers > len(layers):
            raise ValueError(f"expected at most {len(layers)} reencode_layers, as the model has, got {reencode_layers}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = SelectorModule(
                width,
                heads,
                config.num_key_value_heads,
                scoring_layers=scoring_layers,
                reencode_layers=reencode_layers,
                **options,
            )
        for layer in module.scoring_layers:
            _copy_attention(layers[-1], layer)
        for source, layer in zip(layers, module.reencode_layers, strict=False):
            _copy_attention(source, layer.core)
        return cls(module.to(weight.device, weight.dtype).eval(), retention_ratio, max_tokens)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors`` (the budget overrides are not part of a selector)."""
        self.selector.save_pretrained(folder)

    def select(self, videos: Videos, *, noise: bool = True, seed: int | torch.Tensor | None = None) -> Selection:
        """See ``Selector.select``. The tokens are re-encoded; scores, rho and entropy are there.

        ``noise`` and ``seed``, in training mode: see ``qts_kernels.nn.QTSplus.forward``, a segment a video.

        Raises:
            ValueError: no question, or parameters of another width or device than the tokens'.
        """
        tokens, question = videos.tokens, videos.question
        if question is None or videos.cu_seqlens_question is None:
            raise ValueError("QTSplus scores tokens against the question, and videos.question is None")
        width = self.selector.d_model
        if tokens.shape[1] != width:
            raise ValueError(f"this selector is for a model of width {width}, got tokens of width {tokens.shape[1]}")
        parameter = self.selector.scoring_layers[-1].k_proj.weight
        if parameter.device != tokens.device:
            raise ValueError(f"the selector is on {parameter.device}, the model on {tokens.device}: move it there")
        selection = self.selector(
            tokens.to(parameter.dtype),
            question.to(parameter.dtype),
            timestamps=videos.timestamps,
            cu_seqlens=videos.cu_seqlens,
            cu_seqlens_question=videos.cu_seqlens_question,
            noise=noise,
            seed=seed,
            **self._budget(videos),
        )
        selection.tokens = selection.tokens.to(tokens.dtype)
        return selection

    def _budget(self, videos: Videos) -> dict[str, Any]:
        if self.retention_ratio is None:
            return {"max_n": self.max_tokens}
        counts = [resolve_budget(length, self.retention_ratio, self.max_tokens) for length in videos.lengths]
        # max_n, because on a GPU the module can't see the largest count of a tensor without a synchronisation.
        return {"n": torch.tensor(counts).to(videos.tokens.device), "max_n": max(counts)}

    def extra_repr(self) -> str:
        return f"retention_ratio={self.retention_ratio}, max_tokens={self.max_tokens}"


@torch.no_grad()
def _copy_attention(source: nn.Module, layer: nn.Module) -> None:
    """Attention and norms of a language model's layer into those of ``layer`` that exist there."""
    for name, (weight, bias) in _projections(source).items():
        if not hasattr(layer, name):
            continue
        into = getattr(layer, name)
        into.weight.copy_(weight)
        if into.bias is not None:
            into.bias.copy_(bias) if bias is not None else into.bias.zero_()
    before_attention = source.attention_norm if is_fused(source) else source.input_layernorm
    for name in ("q_norm", "kv_norm"):
        getattr(layer, name).weight.copy_(before_attention.weight)
    if hasattr(layer, "ffn_norm"):
        layer.ffn_norm.weight.copy_((source.ffn_norm if is_fused(source) else source.post_attention_layernorm).weight)


def _projections(source: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Weight and bias of the four projections of a language model's layer."""
    names = ("q_proj", "k_proj", "v_proj")
    if not is_fused(source):
        projections = {name: getattr(source.self_attn, name) for name in (*names, "o_proj")}
        return {name: (projection.weight, projection.bias) for name, projection in projections.items()}
    attention = source.attention
    weights = split_wqkv(attention, attention.wqkv.weight, dim=0)
    bias = attention.wqkv.bias
    biases = (None,) * 3 if bias is None else split_wqkv(attention, bias)
    split = dict(zip(names, zip(weights, biases, strict=True), strict=True))
    return {**split, "o_proj": (attention.wo.weight, attention.wo.bias)}
