"""The weights that the package carries: selection keeps what an answer rests on, and the answer."""

import json

import pytest
import torch

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.cli import main
from qts_video.methods import FlexSelect, Uniform
from qts_video.miniworld.evaluate import ALL_TOKENS, accuracy, as_video, ask, films, one_of_each
from qts_video.miniworld.film import write_film
from qts_video.miniworld.world import sample_scene

RATIO, LAYER = 0.1, 1


@pytest.fixture(scope="module")
def trained():
    return embedded.load()


@pytest.fixture(scope="module")
def slice_of_the_report(trained):
    """12 films of half a minute that no training and no report saw."""
    model, processor, qtsplus = trained
    qtsplus.retention_ratio = RATIO
    selectors = {
        "all": ALL_TOKENS,
        "uniform": Uniform(retention_ratio=RATIO),
        "qtsplus": qtsplus,
        "flexselect": FlexSelect(layer=LAYER, retention_ratio=RATIO),
        "lite": FlexSelect.lite(embedded.TRAINED / "lite", retention_ratio=RATIO, dtype=torch.float32),
    }
    return accuracy(list(ask(model, processor, films("validation", 1000, 12, (30, 30)), selectors)))


def test_all_tokens_answer(slice_of_the_report):
    assert slice_of_the_report["all"]["questions"] >= 45
    assert slice_of_the_report["all"]["all"] > 0.9


@pytest.mark.parametrize(("method", "lost"), [("qtsplus", 0.05), ("flexselect", 0.12), ("lite", 0.15)])
def test_a_tenth_of_the_tokens_finds_the_needle_and_keeps_the_answer(slice_of_the_report, method, lost):
    figures = slice_of_the_report
    assert figures[method]["found"] > figures["uniform"]["found"] + 0.4
    assert figures[method]["all"] > figures["uniform"]["all"] + 0.2
    assert figures[method]["all"] > figures["all"]["all"] - lost


def test_a_film_in_a_file_is_answered_with_the_trained_selector(tmp_path, capsys):
    scene = sample_scene("validation", 2000, 30)
    film = str(write_film(tmp_path / "film.mp4", scene))
    questions = one_of_each(scene)
    options = ["--model", "embedded", "--retention-ratio", "0.1", "--json"]
    assert main(["ask", film, *(question.text for question in questions), *options]) == 0
    out, err = capsys.readouterr()
    said = [json.loads(line) for line in out.splitlines()]
    assert {(one["method"], one["kept"], one["positions"]) for one in said} == {("qtsplus", 48, "original")}
    right = [one["answer"] == question.answer for one, question in zip(said, questions, strict=True)]
    assert sum(right) >= len(right) - 1, [(one["question"], one["answer"]) for one in said]
    assert "knows the films of qts_video.miniworld" in err


def test_it_loads_in_float32_and_is_small(trained):
    model, _, selector = trained
    assert {p.dtype for part in (model, selector) for p in part.parameters()} == {torch.float32}
    assert not model.training
    assert not selector.training
    files = [path for path in embedded.TRAINED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    assert {path.name for path in files} >= {"README.md", "model.safetensors", "tokenizer.json"}


def test_a_film_in_memory_is_the_film_of_the_file(tmp_path):
    """H.264 changes pixels by little; frames and their times are the same."""
    from qts_video.video import read_video

    scene = sample_scene("validation", 2001, 8)
    read, made = read_video(write_film(tmp_path / "film.mp4", scene), fps=2.0), as_video(scene)
    assert read.seconds == pytest.approx(made.seconds)
    assert (read.frames.float() - made.frames.float()).abs().mean() < 12
