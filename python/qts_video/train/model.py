"""A model and its selector as one module, which is what a Trainer trains, wraps and moves."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qts_kernels import Selection
from qts_kernels.nn import QTSplus as SelectorModule
from qts_video.adapters import find_adapter
from qts_video.attach import attach
from qts_video.methods import QTSplus
from qts_video.methods.base import Videos
from qts_video.train.numbered import mix

MODEL, ADAPTER = "model", "adapter"
"""Folders, below the selector's, of a trained language model: with everything around it, or LoRA's matrices alone."""
_SELECTOR = "selector.selector."


class SelectingModel(nn.Module):
    """``model`` with ``selector`` attached. Its forward gives losses, not logits.

    The vision tower and what is not trained are frozen; the biases of the selector's key projections too, which have no
    gradient (``qts_kernels.nn.QTSplus.trained_parameters``). A selector in half precision goes to float32: steps of the
    published learning rate are lost in anything less.

    Args:
        model: one that ``attach`` takes. It is changed: parameters are frozen, LoRA goes into its layers.
        selector: with the predicted budget.
        stage: 1 trains the selector, 2 the language model too: decoder, embeddings and head.
        lora_rank: stage 2: instead of the language model train LoRA on the linear layers of its decoder.
        lora_alpha, lora_dropout: of LoRA.
        gate_noise: see ``qts_kernels.nn.QTSplus.forward``.
        tokenizer, positions: see ``attach``.

    Raises:
        ValueError: a selector with a fixed budget, which would not be trained. ImportError: LoRA without peft.
    """

    accepts_loss_kwargs = True

    def __init__(
        self,
        model: nn.Module,
        selector: QTSplus,
        *,
        stage: int = 1,
        lora_rank: int = 0,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        gate_noise: bool = True,
        tokenizer: Any | None = None,
        positions: str = "original",
    ) -> None:
        super().__init__()
        if selector.retention_ratio is not None or selector.max_tokens is not None:
            raise ValueError(
                "the budget is learnt: expected a selector with retention_ratio and max_tokens None, got "
                f"{selector.retention_ratio} and {selector.max_tokens}"
            )
        adapter = find_adapter(model)
        self.parts = adapter.parts(model)
        self.stage = stage
        model.requires_grad_(False)
        peft = None
        if lora_rank:
            peft = _add_lora(model, self.parts.decoder, lora_rank, lora_alpha or 2 * lora_rank, lora_dropout)
        elif stage == 2:
            self.parts.decoder.requires_grad_(True)
            (self.parts.generator or model).get_output_embeddings().requires_grad_(True)
        self.model, self.selector = model, selector
        object.__setattr__(self, "peft", peft)  # holds the model: no module of this one
        if next(selector.parameters()).dtype in (torch.bfloat16, torch.float16):
            selector.float()
        selector.requires_grad_(False)
        for _, parameter in selector.selector.trained_parameters():
            parameter.requires_grad_(True)
        self._recorder = _Recorder(selector, gate_noise)
        self.handle = attach(model, self._recorder, tokenizer=tokenizer, positions=positions)

    @property
    def config(self) -> Any:
        """The model's."""
        return self.model.config

    def train(self, mode: bool = True) -> "SelectingModel":
        super().train(mode)
        self.parts.vision.eval()  # it is not trained
        return self

    def gradient_checkpointing_enable(self, **options: Any) -> None:
        """The model's own."""
        self.model.gradient_checkpointing_enable(**options)

    def gradient_checkpointing_disable(self) -> None:
        self.model.gradient_checkpointing_disable()

    def forward(
        self,
        *,
        seeds: list[int] | None = None,
        seconds_per_step: list[float] | None = None,
        num_items_in_batch: Tensor | None = None,
        **inputs: Any,
    ) -> dict[str, Tensor]:
        """The cross entropy, and what was selected.

        Args:
            seeds: of the gate's noise, one a sample; None: from torch's generator.
            seconds_per_step: see ``Handle.seconds_per_step``.
            num_items_in_batch: by how many tokens the sum of the cross entropies is divided (None: those of this call).
            inputs: the model's, with ``labels``.

        Returns:
            loss, the cross entropy []; and of every video [V]: rho, n_expected = rho M (differentiable, both), kept and
            tokens (int64), share = one over the number of videos of its sample.

        Raises:
            ValueError: a batch without a video.
        """
        if seconds_per_step is not None:
            self.handle.seconds_per_step(seconds_per_step)
        self._recorder.start(seeds)
        output = self.model(**inputs, use_cache=False)
        selection, videos = self._recorder.stop()
        loss = output.loss
        if num_items_in_batch is not None:  # not every model's forward takes it
            loss = loss * (inputs["labels"][:, 1:] != -100).sum() / num_items_in_batch
        lengths = torch.tensor(videos.lengths, device=selection.rho.device)
        share = torch.tensor([1 / videos.sample.count(sample) for sample in videos.sample], device=lengths.device)
        return {
            "loss": loss,
            "rho": selection.rho,
            "n_expected": selection.rho * lengths,
            "kept": selection.n,
            "tokens": lengths,
            "share": share,
        }

    def save_pretrained(self, folder: str | Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write the selector into ``folder`` (``QTSplus.from_pretrained`` reads it) and what else was trained below it:
        ``model/`` by the model's own ``save_pretrained``, or ``adapter/`` by peft's.

        Args:
            folder: made where it is absent.
            state_dict: of this module, gathered, where its parameters are sharded.

        Raises:
            ValueError: a state dict that lacks the selector.
        """
        folder = Path(folder)
        state = self.state_dict() if state_dict is None else state_dict
        of_selector = dict(_below(_SELECTOR, state))
        if not of_selector:
            raise ValueError("the state dict holds no selector (ZeRO-3: set stage3_gather_16bit_weights_on_model_save)")
        with torch.device("meta"):
            module = SelectorModule(**self.selector.selector.config)
        module.load_state_dict(of_selector, assign=True)
        module.save_pretrained(folder)
        of_model = None if state_dict is None else dict(_below("model.", state))
        if self.peft is not None:
            if of_model is not None:
                of_model = {f"base_model.model.{name}": tensor for name, tensor in of_model.items()}
            self.peft.save_pretrained(folder / ADAPTER, state_dict=of_model)
        elif self.stage == 2:
            self.model.save_pretrained(folder / MODEL, state_dict=of_model)

    def load_pretrained(self, folder: str | Path) -> None:
        """Read what ``save_pretrained`` wrote into the modules that are here.

        Raises:
            FileNotFoundError, OSError: a part is missing. RuntimeError: tensors that don't fit.
        """
        folder = Path(folder)
        self.selector.selector.load_state_dict(SelectorModule.from_pretrained(folder).state_dict())
        if self.peft is not None:
            from peft import load_peft_weights, set_peft_model_state_dict

            set_peft_model_state_dict(self.peft, load_peft_weights(str(folder / ADAPTER), device="cpu"))
        elif self.stage == 2:
            # By the class itself: names in the files are not always those of the modules.
            widest = max((p.dtype for p in self.model.parameters()), key=lambda dtype: dtype.itemsize)
            loaded = type(self.model).from_pretrained(folder / MODEL, dtype=widest)
            self.model.load_state_dict(loaded.state_dict())


class _Recorder:
    """The selector as the model sees it: with seeds going in, and the selection coming out."""

    name, needs_question = "qtsplus", True

    def __init__(self, selector: QTSplus, noise: bool) -> None:
        self.selector, self.noise = selector, noise
        self.seeds: list[int] | None = None
        self.last: tuple[Selection, Videos] | None = None

    def start(self, seeds: list[int] | None) -> None:
        self.seeds, self.last = seeds, None

    def stop(self) -> tuple[Selection, Videos]:
        if self.last is None:
            raise ValueError("no sample of this batch holds a video: there is nothing to select from")
        last, self.seeds, self.last = self.last, None, None
        last[1].context = None
        return last

    def select(self, videos: Videos) -> Selection:
        seed = None
        if self.seeds is not None:
            numbers = [videos.sample[:video].count(sample) for video, sample in enumerate(videos.sample)]
            of_video = [mix(self.seeds[sample], number) for sample, number in zip(videos.sample, numbers, strict=True)]
            seed = torch.tensor(of_video, device=videos.tokens.device)
        selection = self.selector.select(videos, noise=self.noise, seed=seed)
        self.last = selection, videos
        return selection


def _add_lora(model: nn.Module, decoder: nn.Module, rank: int, alpha: float, dropout: float) -> Any:
    """peft's model around ``model``, in whose decoder every linear layer has LoRA from now on."""
    from peft import LoraConfig, get_peft_model

    within = set(decoder.modules())
    targets = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module in within]
    return get_peft_model(
        model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, bias="none")
    )


def _below(prefix: str, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name.removeprefix(prefix), tensor) for name, tensor in state.items() if name.startswith(prefix))
