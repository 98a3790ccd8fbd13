"""What a released FlexSelect-Lite checkpoint (yunzhuyunzhu/flexselect_*) is called inside.

Each is a small model of its family: LLaVA-Video's, Qwen2.5-VL's or InternVL's own class, vision tower and head
included. Of its tensors only those of the language model and of the projector are read.
"""

from typing import Any

import torch

from qts_video.lite.config import DEAD, LiteConfig
from qts_video.weights import Checkpoint

_EMBEDDINGS = {"embed_tokens.": "decoder.embed_tokens.", "layers.": "decoder.layers.", "norm.": None}


def _decoder_at(*roots: str) -> dict[str, str | None]:
    return {root + name: place for root in roots for name, place in _EMBEDDINGS.items()}


# Of each family, what names begin with, and with what here; None: not read. The longest beginning counts.
_PLACES: dict[str, dict[str, str | None]] = {
    "llava": {
        **_decoder_at("model."),
        "model.mm_projector.": "projector.",
        "model.image_newline": "image_newline",
        "model.vision_tower.": None,
        "model.vision_resampler.": None,
        "lm_head.": None,
    },
    "qwen": {
        **_decoder_at("model.", "model.language_model."),
        "merger.": "projector.",
        "visual.merger.": "projector.",
        "model.visual.merger.": "projector.",
        "visual.": None,
        "model.visual.": None,
        "lm_head.": None,
    },
    "internvl": {
        **_decoder_at("language_model.model."),
        "mlp1.": "projector.",
        "vision_model.": None,
        "language_model.lm_head.": None,
    },
}
_TELLTALES = {"llava": "mm_projector.0.weight", "qwen": "merger.ln_q.weight", "internvl": "mlp1.0.weight"}
_TEXT_ENTRIES = {
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "num_hidden_layers": "layers",
    "num_attention_heads": "heads",
    "num_key_value_heads": "kv_heads",
    "rms_norm_eps": "rms_norm_eps",
    "max_position_embeddings": "max_position_embeddings",
}
# Entries of config.json that change the arithmetic, with the values that the arithmetic here has.
_EXPECTED = {"hidden_act": "silu", "use_sliding_window": False, "mm_spatial_pool_mode": "bilinear"}
# "dynamic" changes frequencies beyond max_position_embeddings alone, which no set of 64 frames reaches.
_ROPE_TYPES = ("default", "mrope", "dynamic")


def read(checkpoint: Checkpoint) -> tuple[LiteConfig, dict[str, torch.Tensor]]:
    """The config and the state dict of a ``LiteSelector`` from a released checkpoint.

    Raises:
        ValueError: it is none, a tensor has no place, or its config.json lacks an entry or has another value than
            the arithmetic here. FileNotFoundError: a file is missing.
    """
    names = list(checkpoint.names())
    families = [f for f, tail in _TELLTALES.items() if any(name.endswith(tail) for name in names)]
    if len(families) != 1:
        raise ValueError(
            f"{checkpoint.name} (model_type {checkpoint.config.get('model_type')!r}) holds no Lite selector: expected "
            f"one tensor of {', '.join(_TELLTALES.values())}"
        )
    text = checkpoint.config.get("text_config") or checkpoint.config.get("llm_config") or checkpoint.config
    options = read_text_entries(checkpoint, text)
    places = _map_names(checkpoint.name, names, families[0], dead_layer=text["num_hidden_layers"] - 1)
    tensors = checkpoint.tensors(tuple(places))
    state = {ours: tensors[name] for name, ours in places.items()}
    return _read_config(checkpoint, text, options, families[0], state), state


def read_text_entries(checkpoint: Checkpoint, text: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``LiteConfig`` that ``text``, the language model's part of config.json, settles.

    Raises ValueError where an entry is missing, or has another value than the arithmetic here.
    """
    missing = [entry for entry in _TEXT_ENTRIES if entry not in text]
    if missing:
        raise ValueError(f"{checkpoint.name}: config.json lacks {', '.join(missing)}")
    rope = _rope(text)
    found = checkpoint.config | text
    wrong = [f"{k} {found[k]!r}" for k, value in _EXPECTED.items() if found.get(k, value) not in (value, None)]
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type not in _ROPE_TYPES:
        wrong.append(f"rope type {rope_type!r}")
    if wrong:
        raise ValueError(f"{checkpoint.name}: config.json asks for {', '.join(wrong)}, which is not supported")
    theta = rope.get("rope_theta", text.get("rope_theta"))
    if theta is None:
        raise ValueError(f"{checkpoint.name}: config.json lacks rope_theta")
    return {ours: text[entry] for entry, ours in _TEXT_ENTRIES.items()} | {"rope_theta": theta}


def _rope(text: dict[str, Any]) -> dict[str, Any]:
    return text.get("rope_parameters") or text.get("rope_scaling") or {}


def _map_names(checkpoint: str, names: list[str], family: str, dead_layer: int) -> dict[str, str]:
    """Of each tensor that is read, its name here. Raises ValueError for names without a place, or with the same."""
    mapped, unknown = {}, []
    for name in names:
        before = max((p for p in _PLACES[family] if name.startswith(p)), key=len, default=None)
        place = None if before is None else _PLACES[family][before]
        if before is None:
            unknown.append(name)
        elif place is not None:
            mapped[name] = place + name.removeprefix(before)
    if unknown:
        raise ValueError(
            f"{checkpoint}: no place in a Lite selector of the {family} family for {', '.join(sorted(unknown)[:5])}"
        )
    dead = tuple(f"decoder.layers.{dead_layer}.{part}." for part in DEAD)
    mapped = {
        name: ours for name, ours in mapped.items() if not ours.startswith(dead) and "rotary_emb.inv_freq" not in ours
    }
    if len(set(mapped.values())) != len(mapped):
        twice = sorted(name for name, ours in mapped.items() if list(mapped.values()).count(ours) > 1)
        raise ValueError(f"{checkpoint}: these tensors have the same place: {', '.join(twice[:6])}")
    return mapped


def _read_config(
    checkpoint: Checkpoint,
    text: dict[str, Any],
    options: dict[str, Any],
    family: str,
    state: dict[str, torch.Tensor],
) -> LiteConfig:
    rope = _rope(text)
    try:
        options["vocab_size"] = len(state["decoder.embed_tokens.weight"])
        if family == "qwen":
            if "mrope_section" not in rope:
                raise ValueError(f"{checkpoint.name}: config.json lacks mrope_section")
            size = len(state["projector.ln_q.weight"])
            merge = round((state["projector.mlp.0.weight"].shape[1] // size) ** 0.5)
            options |= {"vision_size": size, "merge": merge, "mrope_section": tuple(rope["mrope_section"])}
        else:
            options["vision_size"] = state["projector.0.weight"].shape[-1]
    except KeyError as error:
        raise ValueError(f"{checkpoint.name} lacks {error.args[0]}") from error
    return LiteConfig(family=family, **options)
