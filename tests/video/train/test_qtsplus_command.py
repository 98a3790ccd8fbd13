"""``qts train qtsplus`` from end to end, with the embedded model and two short films."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from qts_video import embedded
from qts_video.loading import CommandError
from qts_video.methods import QTSplus
from qts_video.train import command
from qts_video.train.parser import add_train
from video.clips import write_clip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    records = []
    for name, frames in (("a", 24), ("b", 48)):
        write_clip(folder / f"{name}.mp4", frames=frames, rate=12, size=(84, 56))
        records.append({"video": f"{name}.mp4", "question": "Which colour?", "answer": "red"})
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder / "questions.jsonl"


def parse(*words):
    parser = argparse.ArgumentParser()
    add_train(parser.add_subparsers(dest="command"))
    return parser.parse_args(["train", "qtsplus", *map(str, words)])


def train(data, output, *words, model="embedded:qwen2_5_vl"):
    fast = ("--cpu", "--max-steps", 2, "--learning-rate", 0.01, "--warmup", 0, "--max-frames", 4, "--logging-steps", 1)
    return command.run(parse(data, "--model", model, "--output", output, *fast, *words))


def test_a_selector_is_trained_and_goes_on(data, tmp_path, capsys):
    output = tmp_path / "stage1"
    words = ("--eval-data", data, "--eval-steps", 1, "--predictions", 1, "--save-steps", 1, "--tau-s", 0.02)
    assert train(data, output, *words) == 0
    out, err = capsys.readouterr()
    assert "step 1, sample 0: " in out
    assert "cross_entropy" in out
    assert "a new selector, made from the model's own layers" in err
    trained = QTSplus.from_pretrained(output).selector
    assert (trained.config["tau_s"], trained.config["n_max"]) == (0.02, 512)
    untrained = QTSplus.from_language_model(embedded.build()[0]).selector
    assert not torch.equal(trained.scoring_layers[0].q_proj.weight, untrained.scoring_layers[0].q_proj.weight)

    with pytest.raises(CommandError, match="holds a training already: go on with --resume"):
        train(data, output, *words)
    resumed = tmp_path / "resumed"
    assert train(data, resumed, *words, "--resume", output / "checkpoint-1") == 0
    for name, x in QTSplus.from_pretrained(resumed).selector.state_dict().items():
        assert torch.equal(x, trained.state_dict()[name]), name


@pytest.mark.slow
def test_stage_2_goes_on_from_a_selector(data, tmp_path):
    train(data, tmp_path / "stage1")
    words = ("--selector", tmp_path / "stage1", "--stage", 2)
    checkpoint = embedded.save(tmp_path / "checkpoint")
    train(data, tmp_path / "lora", *words, "--lora-rank", 2, model=checkpoint)
    assert (tmp_path / "lora" / "adapter" / "adapter_model.safetensors").is_file()
    train(data, tmp_path / "full", *words, "--gradient-checkpointing", "--dtype", "bfloat16", model=checkpoint)
    from qts_video.checkpoints import load_model

    model, processor, _ = load_model(tmp_path / "full" / "model")
    assert model.dtype == torch.float32
    assert processor.tokenizer is not None


@pytest.mark.slow
@pytest.mark.parametrize("family", [name for name in embedded.MODEL_TYPES if name != "qwen2_5_vl"])
def test_every_family(data, tmp_path, family):
    assert train(data, tmp_path, model=f"embedded:{family}") == 0
    assert float(QTSplus.from_pretrained(tmp_path).selector.rho_mean) > 0


def test_defaults_are_the_published_recipe():
    arguments = command._training(parse("x", "--model", "m", "--output", "o", "--cpu"), False, "original", False)
    assert arguments.learning_rate == 1e-6
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.num_train_epochs == 8
    assert arguments.get_warmup_steps(1000) == 10
    assert (arguments.lambda_squared, arguments.lambda_linear, arguments.lambda_stability) == (0.1, 0.17, 0.05)
    assert arguments.report_to == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lora-rank", 2), "--lora-rank belongs to --stage 2"),
        (("--selector", "x", "--scoring-layers", 2), "--scoring-layers is of a new selector"),
        (("--predictions", 2), "--predictions needs --eval-data"),
        (("--resume",), "--resume: no checkpoint in"),
        (("--resume", "/nowhere"), "--resume: no folder /nowhere"),
        (("--selector", "/nowhere"), "selector: "),
    ],
)
def test_what_cannot_work_is_refused(data, tmp_path, words, message):
    with pytest.raises(CommandError, match=message):
        train(data, tmp_path, *words)


def test_missing_data_is_refused(tmp_path):
    with pytest.raises(CommandError, match=r"[Nn]o such file"):
        train(tmp_path / "none.jsonl", tmp_path / "out")


def test_the_trained_embedded_selector_keeps_the_positions_that_it_was_trained_with(data, tmp_path, monkeypatch):
    from qts_video.train import command

    seen, make = [], command._training

    def watch(arguments, half, positions, evaluates):
        seen.append(positions)
        return make(arguments, half, positions, evaluates)

    monkeypatch.setattr(command, "_training", watch)
    assert train(data, tmp_path, model="embedded") == 0
    assert seen == ["original"]
