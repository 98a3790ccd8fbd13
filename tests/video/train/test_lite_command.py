"""``qts train flexselect-lite``, from its options to a selector that ``--lite`` reads."""

import argparse
import json

import numpy as np
import pytest
from PIL import Image
from qts_video.cli import main
from qts_video.lite import LiteSelector
from qts_video.loading import CommandError
from qts_video.train import lite_command
from qts_video.train.lite_parser import add_lite
from qts_video.train.lite_scores import ScoreFolder

SMALL = ["--model", "embedded", "--layer", "1", "--hidden-size", "64", "--layers", "2", "--device", "cpu"]


def parse(*arguments):
    parser = argparse.ArgumentParser(prog="qts train")
    add_lite(parser.add_subparsers(required=True))
    return parser.parse_args(["flexselect-lite", *map(str, arguments)])


def train(*arguments):
    return lite_command.run(parse(*arguments))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three questions about two films, which are folders of images."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(("first", "second")):
        (folder / name).mkdir()
        noise = np.random.default_rng(number).integers(0, 255, (6, 56, 84, 3), np.uint8)
        for index, frame in enumerate(noise):
            Image.fromarray(frame).save(folder / name / f"{index}.png")
    records = [
        {"video": "first", "question": "What moves?", "answer": "a dog"},
        {"video": "second", "question": "Who?", "answer": "nobody"},
        {"video": "first", "question": "When does it end?", "answer": "soon"},
    ]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_from_data_to_a_selector_in_use(data, tmp_path, capsys):
    lite, scores = tmp_path / "lite", tmp_path / "scores"
    options = ["--output", lite, *SMALL, "--teacher-scores", scores, "--eval-data", data, "--save-steps", 2]
    assert train(data, *options, "--epochs", 2, "--learning-rate", 1e-3) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"{lite}: rank loss, 6 steps"
    assert [line.split()[0] for line in printed[1:]] == ["loss", "recall_at_0.1", "recall_at_0.25", "spearman"]
    assert ScoreFolder(scores).settings["layer"] == 1
    assert len(list(scores.glob("*.safetensors"))) == 3
    config = LiteSelector.from_pretrained(lite).config
    assert (config.hidden_size, config.layers, config.heads, config.kv_heads) == (64, 2, 1, 1)

    asked = ["ask", str(data.parent / "first"), "What moves?", "--model", "embedded", "--method", "flexselect"]
    assert main([*asked, "--lite", str(lite), "--retention-ratio", "0.5", "--device", "cpu"]) == 0

    further = tmp_path / "further"
    options = ["--model", "embedded", "--layer", 1, "--device", "cpu", "--output", further, "--lite", lite]
    assert train(data, *options, "--max-steps", 1, "--loss", "both", "--gradient-checkpointing") == 0
    assert LiteSelector.from_pretrained(further).config == config


def test_going_on_gives_the_same_selector(data, tmp_path):
    whole = [data, "--output", tmp_path, *SMALL, "--learning-rate", 1e-3, "--save-steps", 2]
    assert train(*whole) == 0
    first = (tmp_path / "model.safetensors").read_bytes()
    assert (tmp_path / "checkpoint-2").is_dir()
    (tmp_path / "model.safetensors").unlink()
    for path in (tmp_path / "checkpoint-3").glob("*"):
        path.unlink()
    (tmp_path / "checkpoint-3").rmdir()
    assert train(*whole, "--resume") == 0
    assert (tmp_path / "model.safetensors").read_bytes() == first


def test_defaults_are_published_and_fit():
    arguments = parse("data.jsonl", "--model", "m", "--output", "o")
    assert (arguments.learning_rate, arguments.epochs, arguments.max_frames, arguments.loss) == (1e-5, 1, 64, "rank")
    assert (arguments.hidden_size, arguments.layers, arguments.layer) == (None, None, None)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--device", "cuda:1"], "--device must be cpu or cuda .*, got cuda:1"),
        (["--lite", "x", "--layers", "2"], "--lite has its size"),
        (["--resume"], "--resume: .* has no checkpoint"),
        (["--layer", "99"], "flexselect-lite: expected a layer of 0 .."),
        ([], "flexselect-lite: no reference layer is known"),
        (["--layer", "1", "--hidden-size", "900"], "flexselect-lite: expected heads that split the width 900"),
        (["--language-model", "x", "--hidden-size", "64"], "--language-model has its size"),
        (["--layer", "1", "--lite", "/nowhere"], "^/nowhere: "),
        (["--layer", "1", "--language-model", "/nowhere"], "^/nowhere: "),
    ],
)
def test_what_cannot_be_is_said(data, tmp_path, options, message):
    with pytest.raises(CommandError, match=message):
        train(data, "--model", "embedded", "--device", "cpu", "--output", tmp_path / "lite", *options)


def test_bad_data_is_said(data, tmp_path):
    with pytest.raises(CommandError, match=r"absent\.jsonl"):
        train(tmp_path / "absent.jsonl", "--output", tmp_path, *SMALL)


def test_scores_of_another_layer_are_refused(data, tmp_path):
    options = [data, "--output", tmp_path / "lite", *SMALL, "--teacher-scores", tmp_path / "scores"]
    assert train(*options, "--max-steps", 1) == 0
    with pytest.raises(CommandError, match=r"made with other settings: layer 1 \(expected 0\)"):
        train(*options, "--layer", 0)
