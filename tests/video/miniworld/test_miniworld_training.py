"""Every stage of the training runs, on its smallest scale, and what it writes is read by what users call."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from qts_video.lite import LiteSelector
from qts_video.methods import QTSplus
from qts_video.miniworld import evaluate as evaluate_module
from qts_video.miniworld import report as report_module
from qts_video.miniworld.publish import publish
from qts_video.miniworld.train import SELECTORS, Recipe, train
from safetensors.torch import load_file
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

RECIPE = Recipe(
    processes=1,
    sight_steps=2,
    sight_batch=4,
    language_steps=2,
    language_batch=2,
    language_questions=2,
    selector_steps=4,
    selector_batch=2,
    lite_steps=2,
    lite_batch=2,
    variants=1,
    empty=20,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("miniworld")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "VALIDATED", 1)
        train(folder, RECIPE, lambda line: None)
    return folder


def test_every_part_is_written_and_read(folder):
    Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model")
    AutoProcessor.from_pretrained(folder / "model")
    for name in SELECTORS:
        QTSplus.from_pretrained(folder / name)
    LiteSelector.from_pretrained(folder / "lite")


def test_one_seed_gives_one_training(folder, tmp_path):
    """Bit for bit: the vision tower, the language model, the selectors, Lite."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate_module, "VALIDATED", 1)
        train(tmp_path, RECIPE, lambda line: None)
    for path in sorted(folder.rglob("model.safetensors")):
        first, again = load_file(path), load_file(tmp_path / path.relative_to(folder))
        assert set(first) == set(again)
        assert all(torch.equal(value, again[name]) for name, value in first.items()), path


def test_processes_cannot_share_a_gpu():
    with pytest.raises(ValueError, match="expected 1 process on cuda, got 2"):
        Recipe(device="cuda")


def test_what_is_there_is_not_trained_again_and_what_is_not_comes_out_the_same(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    first = QTSplus.from_pretrained(folder / "qtsplus").state_dict()
    for path in (folder / "qtsplus").iterdir():
        path.unlink()
    (folder / "qtsplus").rmdir()
    train(folder, RECIPE, lambda line: None)
    again = QTSplus.from_pretrained(folder / "qtsplus").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    assert {path for path in after if after[path] != before[path]} == {folder / "qtsplus" / "model.safetensors"}


def test_the_report_and_the_card(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(report_module, "SECONDS", (30,))
    monkeypatch.setattr(report_module, "RATIOS", (0.1,))
    monkeypatch.setattr(report_module, "RUNS", 2)
    monkeypatch.setattr(evaluate_module, "VALIDATED", 1)
    found = report_module.report(folder, 1, log=lambda line: None)
    table = report_module.markdown(found)
    for method in ("all tokens", "uniform", "random", "QTSplus without time", "FlexSelect-Lite", "QuoTA, relevance"):
        assert f"| {method} | " in table
    assert set(found["recall_by_layer"]) == {"0", "1", "2", "3"}
    figures = tmp_path / "figures.json"
    figures.write_text(report_module.to_json(found))
    publish(folder, figures, 3, tmp_path / "trained")
    card = (tmp_path / "trained" / "README.md").read_text()
    assert "(seed 3)" in card
    assert "QTSplus" in card
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path / "trained" / "model", dtype=torch.float32)
    exact = dict(report_module.load(folder)[0].named_parameters())
    for name, value in loaded.named_parameters():
        torch.testing.assert_close(value, exact[name], rtol=1e-3, atol=1e-6)
    LiteSelector.from_pretrained(tmp_path / "trained" / "lite")
