"""A training of a Lite selector for the tiny Qwen2.5-VL that takes a second."""

import torch
from qts_video.lite import LiteSelector
from qts_video.train.lite import LiteTrainer, LiteTrainingArguments
from qts_video.train.teacher import Teacher
from tiny import Image, Video, prompt, user
from tiny_qwen import build_model, inputs

SIZES = {"hidden_size": 32, "intermediate_size": 48, "layers": 3, "heads": 4, "kv_heads": 2}
LAYER = 2


class Samples(torch.utils.data.Dataset):
    """Videos of unequal lengths; every third sample has two, and an image."""

    def __init__(self, number=8):
        self.number = number

    def __len__(self):
        return self.number

    def __getitem__(self, index):
        return {"index": index}


def parts(index):
    if index % 3 == 2:
        return prompt(user(Video(2, 3, 2), [40 + index], Image(), Video(3), [30, 31 + index]))
    return prompt(user([50 + index], Video(3 + index % 2), [30 + index, 31, 32]))


def collate(samples):
    """Left-padded inputs, with the same pixels for a sample in whatever batch it is."""
    of_samples = [inputs(parts(sample["index"]), seed=sample["index"]) for sample in samples]
    batch = inputs(*(parts(sample["index"]) for sample in samples))
    for name in ("pixel_values_videos", "pixel_values"):
        if name in batch:
            batch[name] = torch.cat([of[name] for of in of_samples if name in of])
    return batch | {"labels": batch["input_ids"]}  # which nobody looks at


def build_student(model, **options):
    student = LiteSelector.build(model, **{**SIZES, **options})
    with torch.no_grad():  # with the default initialisation, attention is flat
        for name, parameter in student.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    return student


def make_trainer(folder, *, model=None, student=None, teacher=None, train=8, evaluate=0, collator=collate, **options):
    model = build_model() if model is None else model
    teacher = {"layer": LAYER} if teacher is None else teacher
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
    return LiteTrainer(
        build_student(model) if student is None else student,
        Teacher(model, **teacher),
        LiteTrainingArguments(**defaults | options),
        collator,
        train_dataset=Samples(train) if train else None,
        eval_dataset=Samples(evaluate) if evaluate else None,
    )


def logged(trainer, name="loss"):
    return [line[name] for line in trainer.state.log_history if name in line]
