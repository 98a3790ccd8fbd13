"""The shape of a Lite selector, and what shape fits a given model."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

FAMILIES = {
    "llava_onevision": "llava",
    "qwen2_5_vl": "qwen",
    "qwen3_vl": "qwen",
    "internvl": "internvl",
    "internvl_chat": "internvl",
}
"""Of each ``config.model_type`` of a big model, the family of the Lite selectors that fit it."""
DEAD = ("self_attn.v_proj", "self_attn.o_proj", "mlp", "post_attention_layernorm")
"""Of the last layer, what does not reach the scores."""


@dataclass(frozen=True)
class LiteConfig:
    """A small language model of Qwen2's layout and the projector in front of it.

    Raises:
        ValueError: an unknown family or norm, heads that do not fit, or M-RoPE sections that a head does not have.
    """

    family: str
    """"llava", "qwen" or "internvl": which projector, and what it is fed."""
    vision_size: int
    """Width of the vision features that come in: of a patch (llava, qwen), or of the patches of one token side by
    side (internvl)."""
    hidden_size: int = 896
    intermediate_size: int = 4864
    layers: int = 24
    """All but the last run; of the last, only what makes queries and keys exists."""
    heads: int = 14
    kv_heads: int = 2
    vocab_size: int = 151936
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    mrope_section: tuple[int, ...] | None = None
    """Frequencies of a head that turn with time, height and width; of the qwen family, and of no other."""
    merge: int | None = None
    """Patches along a side of one token; of the qwen family, and of no other."""
    norm: str = "rms_norm"
    """Of the qwen family's merger: "rms_norm" (Qwen2.5-VL) or "layer_norm" (Qwen3-VL)."""

    def __post_init__(self) -> None:
        families = sorted(set(FAMILIES.values()))
        if self.family not in families:
            raise ValueError(f"expected a family of {', '.join(families)}, got {self.family!r}")
        if self.norm not in ("rms_norm", "layer_norm"):
            raise ValueError(f'expected the norm "rms_norm" or "layer_norm", got {self.norm!r}')
        if self.hidden_size % (2 * self.heads) or self.heads % self.kv_heads:
            raise ValueError(
                f"expected heads that split the width {self.hidden_size} into even parts, and key heads that share "
                f"them evenly, got {self.heads} heads and {self.kv_heads} key heads"
            )
        if (self.family == "qwen") != (self.mrope_section is not None) or (self.family == "qwen") != bool(self.merge):
            raise ValueError(
                f"expected mrope_section and merge for the qwen family alone, got {self.mrope_section} and "
                f"{self.merge} for {self.family}"
            )
        if self.mrope_section is not None:
            object.__setattr__(self, "mrope_section", tuple(self.mrope_section))  # JSON gives a list
            frequencies = self.hidden_size // self.heads // 2
            if len(self.mrope_section) != 3 or sum(self.mrope_section) != frequencies:
                raise ValueError(
                    f"expected 3 mrope_section entries that sum to the {frequencies} frequencies of a head, got "
                    f"{list(self.mrope_section)}"
                )

    @property
    def feature_shape(self) -> tuple[int | None, int]:
        """What follows the first axis of the vision features; None where any length does."""
        return (self.merge**2 if self.merge else None), self.vision_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def family_of(model: nn.Module) -> str:
    """The family of ``model``. Raises TypeError, naming what is known, where there is none."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type not in FAMILIES:
        raise TypeError(
            f"no Lite selector fits a {type(model).__name__} (model_type {model_type!r}); known model types: "
            + ", ".join(sorted(FAMILIES))
        )
    return FAMILIES[model_type]


def fit_config(model: nn.Module, **sizes: Any) -> LiteConfig:
    """The config of a selector for ``model``: its family, its vision features, its vocabulary.

    Args:
        model: a transformers model that a selector can be attached to.
        sizes: fields of ``LiteConfig`` that the model does not settle. For the qwen family ``mrope_section`` is by
            default in the proportions of the released selectors, (8, 12, 12) of 32 frequencies.
    """
    family, config = family_of(model), model.config
    vision = config.vision_config
    options = {"family": family, "vocab_size": model.get_input_embeddings().num_embeddings, **sizes}
    if family == "qwen":
        heads = sizes.get("heads", LiteConfig.heads)
        frequencies = sizes.get("hidden_size", LiteConfig.hidden_size) // heads // 2
        side = frequencies * 3 // 8
        options |= {
            "vision_size": vision.hidden_size,
            "merge": vision.spatial_merge_size,
            "norm": "layer_norm" if config.model_type == "qwen3_vl" else "rms_norm",
            "mrope_section": sizes.get("mrope_section", (frequencies - 2 * side, side, side)),
        }
    elif config.model_type == "internvl_chat":
        options["vision_size"] = model.mlp1[0].normalized_shape[0]
    elif family == "internvl":
        options["vision_size"] = vision.hidden_size * round(1 / config.downsample_ratio) ** 2
    else:
        layers = config.vision_feature_layer
        options["vision_size"] = vision.hidden_size * (1 if isinstance(layers, int) else len(layers))
    return LiteConfig(**options)
