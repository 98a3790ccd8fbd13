"""The Lite selector: a small language model, with a projector of its own, that scores vision tokens for a big one."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from qts_kernels._version import __version__
from qts_video.lite import released
from qts_video.lite.config import DEAD, LiteConfig, family_of, fit_config
from qts_video.lite.projector import build_projector
from qts_video.methods.base import Videos
from qts_video.weights import CONFIG, SINGLE, Checkpoint

if TYPE_CHECKING:
    from qts_video.dropin.layout import Layout
    from qts_video.flexselect.relevance import Scorer

MODEL_TYPE = "qts_video.LiteSelector"
# Models that share a tokenizer pad their embeddings differently: Qwen2's 151,646 tokens to 151,936 or 152,064.
VOCABULARY_PADDING = 1024


class LiteSelector(nn.Module):
    """FlexSelect-Lite (arXiv 2506.00993): the vision tower's features of a big model, projected into a small one.

    The small model reads the prompt's token ids with its own embeddings and the videos through its own projector.
    All its layers but the last run; the last layer's queries and keys are the scores. What comes behind them (values,
    output projection and feed-forward of the last layer, the final norm) is dead, and does not exist here, nor does
    the head. Of a prompt for Qwen or LLaVA it does not see images: only what encodes videos is recorded.

    Args:
        config: the shape.
        attn_implementation: of transformers, for the layers that run.
    """

    def __init__(self, config: LiteConfig, attn_implementation: str = "sdpa") -> None:
        super().__init__()
        self.config = config
        self.decoder = _build_decoder(config, attn_implementation)
        self.projector = build_projector(config)
        self.image_newline = None
        if config.family == "llava":
            self.image_newline = nn.Parameter(torch.randn(config.hidden_size) * config.hidden_size**-0.5)

    @classmethod
    def build(cls, model: nn.Module, *, seed: int = 0, **sizes: Any) -> "LiteSelector":
        """An untrained selector for ``model``: fits its vision features and its vocabulary, random otherwise.

        Args:
            model: a transformers model that a selector can be attached to.
            seed: of the random weights.
            sizes: other fields of ``LiteConfig`` than the model settles, e.g. ``hidden_size``, ``layers``, ``heads``.

        Returns:
            A selector on the device and in the dtype of ``model``, in eval mode.

        Raises:
            TypeError: no Lite selector fits such a model.
        """
        config = fit_config(model, **sizes)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = cls(config)
        weight = model.get_input_embeddings().weight
        return module.to(weight.device, weight.dtype).eval()

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, *, attn_implementation: str = "sdpa") -> "LiteSelector":
        """A trained selector, in eval mode, on the CPU and in the dtype it was saved in.

        Args:
            path_or_id: what ``save_pretrained`` wrote, or a released FlexSelect-Lite checkpoint (its vision tower
                and its head are not read); a folder, or an id on the hub.
            attn_implementation: of transformers, for the layers that run.

        Raises:
            FileNotFoundError: there is none, or a file of it is missing.
            ValueError: it is of another kind, its config.json lacks an entry, or a tensor is missing or has no place.
            RuntimeError: a tensor's shape is not what config.json says.
        """
        from accelerate import init_empty_weights

        checkpoint = Checkpoint(path_or_id)
        if checkpoint.config.get("model_type") == MODEL_TYPE:
            described = ("model_type", "qts_kernels_version")
            config = LiteConfig(**{k: v for k, v in checkpoint.config.items() if k not in described})
            state = checkpoint.tensors()
        else:
            config, state = released.read(checkpoint)
        with init_empty_weights(include_buffers=False):
            module = cls(config, attn_implementation)
        check_names(checkpoint.name, set(module.state_dict()), set(state))
        module.load_state_dict(state, assign=True)
        return module.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``model.safetensors``."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        described = {"model_type": MODEL_TYPE, "qts_kernels_version": __version__, **self.config.to_dict()}
        (folder / CONFIG).write_text(json.dumps(described, indent=2) + "\n")
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, folder / SINGLE, metadata={"format": "pt"})

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.embed_tokens.weight.dtype

    def scorer(self, videos: Videos) -> "Scorer":
        """What scores ``videos`` in the place of the big model's layers: see ``qts_video.flexselect.relevance``.

        Args:
            videos: with the prefill as ``context``, whose ``vision`` is the input of the big model's projector.

        Raises:
            TypeError, ValueError: the selector does not fit the model or the prompt: see ``check_fits`` and ``embed``.
        """
        from qts_video.flexselect.relevance import Scorer, prompt_positions

        context = videos.context
        self.check_fits(context.model)
        if context.vision is None:
            raise ValueError(
                "a Lite selector reads the vision tower's features, and videos.context.vision is None: a method that "
                "uses one must have needs_vision = True"
            )
        images = self._image_token_id(context)
        embeds = self.embed(context.input_ids, context.layout, context.vision, images)
        batch, length, width = embeds.shape

        def make_inputs(sample: torch.Tensor, columns: torch.Tensor) -> dict[str, Any]:
            rows = sample.unsqueeze(1) * length + columns.clamp(min=0)
            taken = embeds.reshape(batch * length, width).index_select(0, rows.flatten())
            return {
                "inputs_embeds": taken.view(*columns.shape, width),
                "position_ids": prompt_positions(context, sample, columns),
            }

        return Scorer(self.decoder, self.config.layers - 1, make_inputs, self.image_columns(context.layout, images))

    def forward(
        self,
        videos: Videos,
        *,
        frames_per_set: int = 64,
        reduce: str = "max",
        query: str = "prompt",
        set_batch_size: int | None = 1,
    ) -> torch.Tensor:
        """What ``FlexSelect`` scores the tokens of ``videos`` with, for training: [sum M] float32 (float64 from a
        float64 selector). Differentiable in every parameter.

        Args:
            videos: as for ``scorer``.
            frames_per_set, reduce, query, set_batch_size: of ``FlexSelect``.

        Raises:
            TypeError, ValueError: as ``scorer``; a video without text behind it, or not the question.
        """
        from qts_video.flexselect.relevance import query_columns, score_sets
        from qts_video.flexselect.sets import split_frames

        scorer, layout = self.scorer(videos), videos.context.layout
        sets = split_frames(layout, frames_per_set, scorer.left_out)
        text = query_columns(videos.context, query)
        tokens = sum(videos.lengths)
        return score_sets(
            scorer, [scorer.layer], sets, text, tokens, self.device, reduce=reduce, batch_size=set_batch_size
        )[scorer.layer]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Compute the layers that run once more in the backward pass, in place of keeping what they held; in training
        mode. The arguments are those of transformers' models."""
        self.decoder.gradient_checkpointing_enable(*args, **kwargs)
        self.decoder.layers[-1].gradient_checkpointing = False  # its forward pass is left in the middle

    def gradient_checkpointing_disable(self) -> None:
        self.decoder.gradient_checkpointing_disable()

    def check_fits(self, model: nn.Module) -> None:
        """Raise unless this selector is for models like ``model``: TypeError where none fits such a model, ValueError
        for another family or another tokenizer's vocabulary."""
        family = family_of(model)
        if family != self.config.family:
            raise ValueError(
                f"this Lite selector is of the {self.config.family} family, and {type(model).__name__} of the "
                f"{family} family"
            )
        theirs, ours = model.get_input_embeddings().num_embeddings, self.config.vocab_size
        if abs(theirs - ours) > VOCABULARY_PADDING:
            raise ValueError(
                f"this Lite selector has a vocabulary of {ours} tokens, and {type(model).__name__} one of {theirs}: "
                "it reads the model's token ids, so both must share a tokenizer"
            )

    def embed(
        self, input_ids: torch.Tensor, layout: "Layout", vision: torch.Tensor, image_token_id: int
    ) -> torch.Tensor:
        """The prompt as the small model sees it: [B, L, hidden_size].

        Args:
            input_ids: [B, L] int64 of the big model, whose vocabulary is this one's.
            layout: where the videos are.
            vision: the input of the big model's projector. Qwen: [sum M, merge^2, Dv], video after video. LLaVA:
                [sum frames, h*w, Dv], before the pooling. InternVL: [tiles, tokens, 4*Dv], images' tiles among them.
            image_token_id: the placeholder of the big model's images (for InternVL, of its videos too).

        The columns of ``image_columns`` are not filled: nobody recorded what belongs there.

        Raises:
            ValueError: features of another model's shape or number, of another device or dtype than the selector's,
                or token ids that the vocabulary does not have.
        """
        self._check(layout, vision, image_token_id)
        ids = input_ids.clamp(max=self.config.vocab_size - 1)  # placeholders may lie outside: they are overwritten
        embeds = self.decoder.embed_tokens(ids).flatten(0, 1)
        if self.config.family == "internvl":
            rows = ((layout.input_ids == image_token_id) & layout.valid).flatten().nonzero().squeeze(1)
        else:
            rows = layout.rows
        tokens = self.projector(vision)
        if len(tokens) != len(rows):
            raise ValueError(
                f"the prompt has {len(rows)} vision placeholders, but the vision features {list(vision.shape)} make "
                f"{len(tokens)} tokens"
            )
        embeds = embeds.index_copy(0, rows.to(embeds.device), tokens.to(embeds.dtype))  # autocast: of another
        if len(layout.newline_rows):
            newlines = self.image_newline.expand(len(layout.newline_rows), -1)
            embeds = embeds.index_copy(0, layout.newline_rows.to(embeds.device), newlines)
        return embeds.view(*input_ids.shape, -1)

    def image_columns(self, layout: "Layout", image_token_id: int) -> torch.Tensor:
        """[B, L] bool on the CPU: placeholders of images whose features are not among the recorded ones, and which
        the small model's prompt must leave out. None of InternVL's, where all tiles are recorded."""
        if self.config.family == "internvl":
            return torch.zeros_like(layout.valid)
        return layout.input_ids == image_token_id

    def _image_token_id(self, context: Any) -> int:
        if self.config.family == "internvl":  # its videos are images
            return context.adapter.video_token_id(context.model)
        return context.model.config.image_token_id

    def _check(self, layout: "Layout", vision: torch.Tensor, image_token_id: int) -> None:
        patches, width = self.config.feature_shape
        if vision.ndim != 3 or vision.shape[2] != width or patches not in (None, vision.shape[1]):
            expected = f"[*, {'*' if patches is None else patches}, {width}]"
            raise ValueError(
                f"this {self.config.family} Lite selector takes vision features {expected} (its vision_size is "
                f"{width}, its merge {self.config.merge}), and the model gives {list(vision.shape)}"
            )
        if (vision.device, vision.dtype) != (self.device, self.dtype):
            raise ValueError(
                f"the Lite selector is {self.dtype} on {self.device}, the model's vision features are {vision.dtype} "
                f"on {vision.device}: move it there with .to(), or by FlexSelect.lite(..., device=, dtype=)"
            )
        text = layout.valid & (layout.input_ids != image_token_id)
        text.view(-1)[torch.cat([layout.rows, layout.newline_rows])] = False
        largest = int(layout.input_ids[text].max()) if bool(text.any()) else 0
        if largest >= self.config.vocab_size:
            raise ValueError(
                f"the prompt holds token id {largest}, and the Lite selector's vocabulary ends at "
                f"{self.config.vocab_size}: it reads the big model's token ids, so both must share a tokenizer"
            )

    def _apply(self, fn: Any, recurse: bool = True) -> "LiteSelector":
        # Rotary frequencies stay float32 whatever the weights become: in bfloat16, far positions would turn wrong.
        rotary = self.decoder.rotary_emb
        exact = {name: getattr(rotary, name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, frequencies in exact.items():
            setattr(rotary, name, frequencies.to(rotary.inv_freq.device))
        return self


def _build_decoder(config: LiteConfig, attn_implementation: str) -> nn.Module:
    options = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "attn_implementation": attn_implementation,
        "use_cache": False,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if config.family == "qwen":
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

        decoder_class, config_class = Qwen2_5_VLTextModel, Qwen2_5_VLTextConfig
        rope = {"rope_type": "default", "mrope_section": list(config.mrope_section)}
    else:
        from transformers import Qwen2Config, Qwen2Model

        decoder_class, config_class = Qwen2Model, Qwen2Config
        rope = {"rope_type": "default"}
    text = config_class(**options, rope_theta=config.rope_theta, rope_scaling=rope)
    decoder = decoder_class(text)
    for name in (f"layers.{config.layers - 1}.{part}" for part in DEAD):
        parent, _, child = name.rpartition(".")
        setattr(decoder.get_submodule(parent), child, None)
    decoder.norm = None
    return decoder


def check_names(name: str, expected: set[str], found: set[str]) -> None:
    """Raise ValueError unless the tensors found are those expected."""
    wrong = {"lacks": sorted(expected - found), "has, without a place for them,": sorted(found - expected)}
    parts = [f"{verb} {', '.join(names[:5])}{' ...' * (len(names) > 5)}" for verb, names in wrong.items() if names]
    if parts:
        raise ValueError(f"{name} " + "; ".join(parts))
