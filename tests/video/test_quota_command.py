"""``qts ask --method quota``."""

import json

import pytest
import torch
from clips import write_clip
from qts_video import embedded
from qts_video.cli import main


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("film") / "a.mp4", frames=36, rate=12, size=(112, 84)))


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return str(embedded.save(tmp_path_factory.mktemp("scorer"), seed=1))


@pytest.fixture
def ask(film, capsys):
    def run(*options, questions=("What moves?",), model="embedded:qwen2_5_vl"):
        start = ["ask", film, *questions, "--model", model, "--method", "quota", "--max-new-tokens", "2", "--json"]
        status = main([*start, *options])
        out, err = capsys.readouterr()
        return status, [json.loads(line) for line in out.splitlines()], err

    return run


def steps_kept(said):
    return [said["kept_tokens"]["frame"].count(step) for step in range(said["grid"][0])]


def test_frames_are_scored_by_another_model_once(ask, scorer, tmp_path):
    options = ("--max-tokens", "20", "--scorer", scorer, "--score-cache", str(tmp_path / "scores"))
    questions = ("What moves?", "Where is it?")
    status, said, err = ask(*options, questions=questions)
    assert status == 0
    assert [one["kept"] <= 20 for one in said] == [True, True]
    assert [one["notes"][0].startswith("frames are scored by the question itself") for one in said] == [True, True]
    assert "frames are scored" not in err  # the one that goes to people is the summary, and --json has none
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()}
    assert len(files) == 2
    assert ask(*options, questions=questions)[1][0]["kept_tokens"] == said[0]["kept_tokens"]
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "scores").iterdir()} == files


def test_scores_decide_how_many_tokens_a_frame_keeps(ask, monkeypatch):
    from qts_video.quota.frame_scorer import FrameScorer

    monkeypatch.setattr(
        FrameScorer, "scores_for", lambda self, frames, question: torch.linspace(1, 0, len(frames)).square()
    )
    said = ask("--max-tokens", "16", "--scorer", "model")[1][0]
    kept = steps_kept(said)
    assert kept[0] > kept[-1]
    assert sum(kept) == said["kept"] <= 16
    merged = ask("--max-tokens", "16", "--scorer", "model", "--mode", "merge")[1][0]
    assert merged["kept"] == 16


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_the_model_itself_scores(ask, family):
    status, said, _ = ask("--scorer", "model", "--retention-ratio", "0.5", model=f"embedded:{family}")
    assert status == 0
    assert 0.3 * said[0]["tokens"] < said[0]["kept"] <= (said[0]["tokens"] + 1) // 2
    assert len(said[0]["kept_tokens"]["score"]) == len(said[0]["kept_tokens"]["index"])


def test_relevance_needs_no_scorer(ask):
    status, said, _ = ask("--scorer", "relevance", "--retention-ratio", "0.5")
    assert status == 0
    assert said[0]["kept"] <= 18
    assert not any("frames are scored" in note for note in said[0]["notes"])


def test_the_published_budget_keeps_a_short_film_whole(ask):
    assert ask("--scorer", "relevance")[1][0]["kept"] == 36


def test_dynamic_frames(ask):
    said = ask("--scorer", "relevance", "--dynamic-frames")[1][0]
    assert len(said["frames"]["seconds"]) == 36  # all the film has
    assert len(ask("--scorer", "relevance", "--dynamic-frames", "--max-frames", "8")[1][0]["frames"]["seconds"]) == 8


@pytest.mark.parametrize(
    "options, message",
    [
        (["--scorer", "./absent"], "qts: scorer ./absent: ./absent: no such folder"),
        (["--scorer", "relevance", "--score-cache", "x"], "qts: --score-cache keeps the scores of a model"),
        (["--layer", "2"], "qts: --layer belongs to --method flexselect, got quota"),
    ],
)
def test_options_that_cannot_be_used(ask, options, message):
    status, said, err = ask(*options)
    assert (status, said) == (2, [])
    assert message in err


def test_the_scorer_belongs_to_quota(film, capsys):
    assert main(["ask", film, "What?", "--model", "embedded:qwen2_5_vl", "--method", "uniform", "--mode", "merge"]) == 2
    assert "--mode belongs to --method quota, got uniform" in capsys.readouterr().err


def test_a_timeline_of_two_questions(film, tmp_path):
    model = ["--model", "embedded:qwen2_5_vl"]
    command = ["plot", "timeline", film, "What?", "Where?", *model, "--method", "quota,uniform"]
    output = tmp_path / "timeline.png"
    assert main([*command, "--scorer", "model", "--max-tokens", "12", "--output", str(output)]) == 0
    assert output.stat().st_size > 0
