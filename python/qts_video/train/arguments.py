"""What a training of QTSplus is told, on top of transformers' own arguments."""

from dataclasses import dataclass, field
from typing import Literal

import transformers


@dataclass
class QTSplusArguments(transformers.TrainingArguments):
    """``TrainingArguments`` with the recipe of QTSplus (arXiv 2511.11910) as defaults: learning rate 1e-6, cosine with
    a warm-up of 1 % of the steps, 8 epochs.

    Raises:
        ValueError: a stage other than 1 and 2, LoRA in stage 1, or a number out of its range.
    """

    stage: int = field(
        default=1, metadata={"help": "1 trains the selector; 2 the language model with it, in full or by LoRA"}
    )
    lora_rank: int = field(
        default=0, metadata={"help": "Stage 2: rank of the language model's LoRA; 0 trains it whole"}
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Scale of LoRA times its rank (None: twice the rank)"}
    )
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout in front of LoRA"})
    tau_s: float | None = field(
        default=None, metadata={"help": "Temperature of the gate in units of the scores (None: the selector's own)"}
    )
    n_max: int | None = field(
        default=None,
        metadata={"help": "Most tokens kept of a video, and the unit of the budget losses (None: the selector's)"},
    )
    gate_noise: bool = field(
        default=True, metadata={"help": "Draw which tokens are kept; false keeps the best of the budget"}
    )
    lambda_squared: float = field(default=0.1, metadata={"help": "Weight of (rho M / n_max)^2"})
    lambda_linear: float = field(default=0.17, metadata={"help": "Weight of rho M / n_max"})
    lambda_stability: float = field(default=0.05, metadata={"help": "Weight of (rho - running mean)^2"})
    rho_momentum: float = field(default=0.99, metadata={"help": "Of the running mean of rho, a step"})
    positions: Literal["original", "compact"] = field(
        default="original", metadata={"help": "Rotary positions of kept tokens: see qts_video.attach"}
    )
    predictions: int = field(default=0, metadata={"help": "Samples of the evaluation set answered at every evaluation"})
    prediction_tokens: int = field(default=32, metadata={"help": "Longest of these answers, in tokens"})
    warmup_share: float = field(
        default=0.01, metadata={"help": "Share of the steps that warm up, where warmup_steps is not given"}
    )

    learning_rate: float = field(default=1e-6, metadata={"help": "The peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The schedule of the learning rate"})
    num_train_epochs: float = field(default=8.0, metadata={"help": "Epochs"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Samples a device and forward"})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Samples a device and forward"})
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of the log"})
    report_to: str | list[str] | None = field(
        default="none", metadata={"help": "Where the log goes besides the screen"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Must stay false: samples are no columns"})
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Must stay true: logits are as ragged as the kept tokens"}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every step reaches every parameter: none need be searched for"}
    )
    label_names: list[str] | None = field(
        default_factory=lambda: ["labels"], metadata={"help": "Inputs that are labels"}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stage not in (1, 2):
            raise ValueError(f"stage must be 1 or 2, got {self.stage}")
        if self.lora_rank < 0 or (self.lora_rank and self.stage == 1):
            raise ValueError(
                f"lora_rank must be at least 0, and 0 in stage 1, got {self.lora_rank} in stage {self.stage}"
            )
        for name in ("tau_s", "n_max"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name in ("lambda_squared", "lambda_linear", "lambda_stability", "predictions"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        for name in ("rho_momentum", "warmup_share", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.remove_unused_columns or not self.prediction_loss_only:
            raise ValueError("expected remove_unused_columns=False and prediction_loss_only=True")

    def get_warmup_steps(self, num_training_steps: int) -> int:
        if self.warmup_steps:
            return super().get_warmup_steps(num_training_steps)
        return -int(-num_training_steps * self.warmup_share // 1)
