"""A training of the tiny Qwen2.5-VL that takes a second: samples, their collator, and a trainer."""

import torch
from qts_video.methods import QTSplus
from qts_video.train.arguments import QTSplusArguments
from qts_video.train.qtsplus import QTSplusTrainer
from tiny import IM_END, Video, prompt, user
from tiny_qwen import build_model, inputs

QUESTION = [30, 31, 32]
TAU = 0.05  # scores are about 1/24


class Samples(torch.utils.data.Dataset):
    """Videos of unequal lengths, each with an answer of its own."""

    def __init__(self, number=8):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return {"steps": 3 + index % 3, "answer": [60 + index, 61 + index, IM_END][index % 2 :], "seed": index}


def collate(samples):
    """Right-padded inputs with labels, and the same pixels for a sample in whatever batch it is."""
    prompts = [
        [*prompt(user([40], Video(sample["steps"], seconds=1.5), QUESTION)), sample["answer"]] for sample in samples
    ]
    batch = inputs(*prompts, side="right")
    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100)
    for row, sample in enumerate(samples):
        end = int(batch["attention_mask"][row].sum())
        labels[row, end - len(sample["answer"]) : end] = ids[row, end - len(sample["answer"]) : end]
    pixels = [
        torch.randn(n, batch["pixel_values_videos"].shape[1], generator=torch.Generator().manual_seed(sample["seed"]))
        for n, sample in zip(batch["video_grid_thw"].prod(1).tolist(), samples, strict=True)
    ]
    return batch | {"labels": labels, "pixel_values_videos": torch.cat(pixels).to(batch["pixel_values_videos"])}


def make_trainer(folder, *, model=None, selector=None, train=True, evaluate=False, selecting=None, **options):
    model = build_model() if model is None else model
    if selector is None:
        selector = QTSplus.from_language_model(model, rho_min=0.3, rho_max=0.7, tau_s=TAU, n_max=512, **selecting or {})
    defaults = {
        "output_dir": str(folder),
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    trainer = QTSplusTrainer(
        model,
        selector,
        QTSplusArguments(**defaults | options),
        collate,
        Samples() if train else None,
        Samples(3) if evaluate else None,
    )
    trainer.handle.question(QUESTION)
    return trainer


def logged(trainer, *names):
    """What the steps logged, by name."""
    lines = [line for line in trainer.state.log_history if "loss" in line]
    return {name: [line[name] for line in lines] for name in names}


PARTS = ("loss", "cross_entropy", "budget_squared", "budget_linear", "budget_stability", "rho", "kept", "rho_mean")
