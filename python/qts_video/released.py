"""What a released QTSplus checkpoint is called inside: its selector, its language model and its vision tower.

Such a checkpoint (AlpachinoNLP/QTSplus-3B, -3B-FT, -7B) is a language model's: the text config lies flat in its
``config.json``, beside ``qts_plus_*`` entries; the vision tower and the selector are parts of ``model``.
"""

from typing import Any

import torch

from qts_kernels.nn import QTSplus
from qts_video.weights import Checkpoint

MODEL_TYPE = "qts_plus_qwen2_5_vl_causal_lm"

# Where the selector's names begin: in a whole checkpoint, and in what people cut out of one.
_SELECTOR_PREFIXES = ("model.qts_plus.selector.", "qts_plus.selector.", "selector.", "")
_OPTIONS = {
    "tau_s": "qts_plus_tau_s",
    "n_max": "qts_plus_nmax",
    "rho_min": "qts_plus_rho_min",
    "rho_max": "qts_plus_rho_max",
}
# Entries of config.json that are not the language model's.
_NOT_TEXT = {
    "architectures",
    "auto_map",
    "dtype",
    "embedding_dim",
    "enable_qts_plus",
    "model_type",
    "pretrain_vision_model",
    "project_text_if_needed",
    "torch_dtype",
    "transformers_version",
    "tune_mm_mlp_adapter",
    "vision_config",
    "vision_embed_size",
    "vision_tower",
    "vision_tower_embed_size",
}
_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
# The one vision tower of Qwen2.5-VL, whatever the size of its language model.
_OFFICIAL_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
    "window_size": 112,
    "tokens_per_second": 2,
}


def is_released(config: dict[str, Any]) -> bool:
    """Whether ``config`` is that of a QTSplus checkpoint over a Qwen2.5-VL."""
    return config.get("model_type") == MODEL_TYPE


def load_selector(checkpoint: Checkpoint) -> QTSplus:
    """The selector of a whole checkpoint, or of a folder with its tensors alone; eval mode, the dtype it was saved in.

    Raises:
        ValueError: no selector's tensors in it, or its config.json lacks the number of attention heads.
        RuntimeError: the tensors are not those of the selector that config.json describes.
    """
    names = checkpoint.names()
    prefix = next((p for p in _SELECTOR_PREFIXES if f"{p}scoring_layers.0.q_norm.weight" in names), None)
    if prefix is None:
        raise ValueError(
            f"{checkpoint.name} (model_type {checkpoint.config.get('model_type')!r}) holds no QTSplus selector: "
            f"no tensor is named {_SELECTOR_PREFIXES[0]}scoring_layers.*"
        )
    parts = ("scoring_layers.", "budget.", "reencode_layers.", "time_embedding.")
    tensors = checkpoint.tensors(tuple(prefix + part for part in parts))
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    module = QTSplus(**selector_options(checkpoint, state))
    module.load_state_dict(state, assign=True)
    # A time embedding that the release does not have starts in float32.
    return module.to(state["scoring_layers.0.q_norm.weight"].dtype).eval()


def selector_options(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of ``qts_kernels.nn.QTSplus`` for a selector's ``state``."""
    config = checkpoint.config | checkpoint.config.get("text_config", {})
    if "num_attention_heads" not in config:
        raise ValueError(f"{checkpoint.name}: config.json lacks num_attention_heads, which the tensors don't show")
    d_model = state["scoring_layers.0.q_norm.weight"].shape[0]
    head_dim = d_model // config["num_attention_heads"]
    return {
        "d_model": d_model,
        "num_heads": config["num_attention_heads"],
        "num_kv_heads": state["scoring_layers.0.k_proj.weight"].shape[0] // head_dim,
        "scoring_layers": _count(state, "scoring_layers."),
        "reencode_layers": _count(state, "reencode_layers."),
        **{option: config[name] for option, name in _OPTIONS.items() if name in config},
    }


def model_config(checkpoint: Checkpoint, tokenizer: Any, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of ``Qwen2_5_VLConfig`` for a whole checkpoint, whose mapped ``state`` is given."""
    config = checkpoint.config
    text = config.get("text_config") or {
        name: value
        for name, value in config.items()
        if name not in _NOT_TEXT | _TOKENS.keys() and not name.startswith(("qts_plus_", "lambda_", "_"))
    }
    head = state.get("lm_head.weight")
    tied = head is None or (
        bool(config.get("tie_word_embeddings")) and torch.equal(head, state["model.language_model.embed_tokens.weight"])
    )
    ids = {name: config.get(name) or tokenizer.convert_tokens_to_ids(token) for name, token in _TOKENS.items()}
    return {
        "text_config": text | {"tie_word_embeddings": tied},
        "vision_config": vision_config(checkpoint, state),
        "tie_word_embeddings": tied,
        **ids,
    }


def vision_config(checkpoint: Checkpoint, state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The arguments of ``Qwen2_5_VLVisionConfig``: as config.json has them, else Qwen2.5-VL's own.

    Raises:
        ValueError: config.json has none, and the tensors are of another tower.
    """
    given = checkpoint.config.get("vision_config")
    if given:
        return given
    hidden = state["model.visual.patch_embed.proj.weight"].shape[0]
    depth = _count(state, "model.visual.blocks.")
    if (hidden, depth) != (_OFFICIAL_VISION["hidden_size"], _OFFICIAL_VISION["depth"]):
        raise ValueError(
            f"{checkpoint.name}: config.json has no vision_config, and a vision tower of {depth} blocks of width "
            f"{hidden} is not Qwen2.5-VL's own (32 of 1280)"
        )
    return _OFFICIAL_VISION | {"out_hidden_size": state["model.visual.merger.mlp.2.weight"].shape[0]}


def map_state(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A whole checkpoint's tensors by their names in ``Qwen2_5_VLForConditionalGeneration``, without the selector's.

    A name that has no place there stays as it is, for the strict check of loading to refuse.
    """
    places = {
        "model.vision_tower.": "model.visual.",
        "model.embed_tokens.": "model.language_model.embed_tokens.",
        "model.layers.": "model.language_model.layers.",
        "model.norm.": "model.language_model.norm.",
    }
    mapped = {}
    for name, tensor in tensors.items():
        if name.startswith(_SELECTOR_PREFIXES[0]):
            continue
        before = next((p for p in places if name.startswith(p)), "")
        mapped[places.get(before, "") + name.removeprefix(before)] = tensor
    return mapped


def _count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """How many modules of a list ``state`` holds."""
    return len({name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)})
