"""``qts plot`` end to end: what it prints, draws and refuses."""

import re

import pytest
import torch
from video.clips import write_clip
from video.html_reader import Reader

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from PIL import Image
from qts_video.cli import main
from qts_video.video import read_video


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("film") / "a.mp4", frames=36, rate=12, size=(112, 84)))


@pytest.fixture(scope="module")
def embedded_model():
    from qts_video import embedded

    return embedded.build()


@pytest.fixture
def plot(embedded_model, monkeypatch, capsys, tmp_path):
    """``qts plot ARGUMENTS --model embedded:qwen2_5_vl --output FILE``; the model is built once."""
    from qts_video import embedded

    monkeypatch.setattr(embedded, "build", lambda *_: embedded_model)

    def run(*arguments: str, output: str = "a.png"):
        path = tmp_path / output
        status = main(["plot", *arguments, "--model", "embedded:qwen2_5_vl", "--output", str(path)])
        out, err = capsys.readouterr()
        return status, out, err, path

    return run


class TestCommand:
    def test_heatmap(self, plot, film):
        status, out, err, path = plot("heatmap", film, "What moves?", "--layers", "0,2:", "--frames", "2")
        assert status == 0
        assert out == f"picture {path}\n"
        assert "means nothing" in err
        with Image.open(path) as image:
            assert image.width == 1500

    def test_heatmap_shows_flexselects_scores(self, plot, film, embedded_model):
        """Every cell of the table, against what the method itself reports."""
        from qts_video.answer import answer, prepare
        from qts_video.methods import FlexSelect

        _, _, _, path = plot("heatmap", film, "What moves?", "--layers", "1,3", "--reduce", "mean", output="a.html")
        cells = Reader(path.read_text()).cells
        assert cells[:3] == ["time", "layer 1", "layer 3"]
        model, processor = embedded_model
        inputs = prepare(processor, read_video(film, fps=2), "What moves?")
        for column, layer in ((1, 1), (2, 3)):
            with pytest.warns(UserWarning, match="costs more than it saves"):
                result = answer(model, processor, inputs, FlexSelect(layer, 4, reduce="mean"), max_new_tokens=1)
            scores = result.report.videos[0].scores.double().view(3, 12)
            expected = [f"{value:.3g}" for value in (scores / scores.mean()).amax(1).tolist()]
            assert [cells[3 * (1 + step) + column] for step in range(3)] == expected

    def test_timeline(self, plot, film):
        status, out, _, path = plot(
            *("timeline", film, "What moves?", "Where?", "--method", "uniform,flexselect", "--layer", "2"),
            *("--max-tokens", "5"),
            output="a.html",
        )
        assert status == 0
        assert out.splitlines() == [
            "uniform, “What moves?”: 5 of 36 video tokens (13.9%)",
            "flexselect, “What moves?”: 5 of 36 video tokens (13.9%)",
            "uniform, “Where?”: 5 of 36 video tokens (13.9%)",
            "flexselect, “Where?”: 5 of 36 video tokens (13.9%)",
            f"picture {path}",
        ]
        cells = Reader(path.read_text()).cells
        rows = [cells[start : start + 7] for start in range(7, len(cells), 7)]
        assert [row[0] for row in rows] == ["0.0 s", "1.0 s", "2.0 s"]
        for column in (1, 2, 4, 5):
            assert sum(int(row[column]) for row in rows) == 5

    def test_recall_of_a_layer_that_knows(self, plot, monkeypatch):
        """Scores that are large where a frame is unlike the others find the needle, wherever it is; zeros find the
        tokens that come first."""

        def unlike(videos, layers, **options):
            assert options == {"reduce": "mean"}
            steps = videos.tokens.view(videos.grids[0][0], -1)
            strange = (steps - steps.median(0).values).square().mean(1)
            found = strange.repeat_interleave(len(videos.tokens) // len(steps))
            return {layer: found if layer in (1, 3) else torch.zeros_like(found) for layer in layers}

        monkeypatch.setattr("qts_video.flexselect.relevance.relevance_by_layer", unlike)
        status, out, _, path = plot(
            *("recall", "--fps", "1", "--max-pixels", str(84 * 140), "--trials", "3", "--seed", "2", "--reduce", "mean")
        )
        assert status == 0
        lines = out.splitlines()
        assert lines[0] == "Recall@10 over 3 trials; chance is 16.7 %"
        table = {line.split()[0]: re.findall(r"[\d.]+ %", line) for line in lines[2:6]}
        assert table["1"] == table["3"] == ["100.0 %"] * 3
        assert table["0"] == table["2"]
        assert table["0"][0] in ("0.0 %", "33.3 %")
        assert lines[6:] == [
            "best layer: 1",
            "use it: qts ask VIDEO QUESTION --model embedded:qwen2_5_vl --method flexselect --layer 1 --reduce mean",
            f"picture {path}",
        ]

    def test_recall_in_a_film_of_ones_own(self, plot, film, tmp_path):
        Image.new("RGB", (50, 50), (200, 10, 90)).save(tmp_path / "needle.png")
        options = ("--needle", str(tmp_path / "needle.png"), "--question", "Which colour?")
        status, out, _, path = plot("recall", film, *options, "--at", "1.2", "--layers", "0,3", output="a.html")
        assert status == 0
        assert "Recall@12 over 1 trial; chance is 33.3 %" in out
        assert len(Reader(path.read_text()).cells) == 4 * 3
        _, again, _, _ = plot("recall", film, *options, "--at", "1.9", "--layers", "0,3", output="a.html")
        assert again == out  # the same step of the grid

    def test_seeds(self, plot, film):
        first, second, other = (
            plot("recall", film, "--trials", "1", "--seed", seed, "--max-frames", "4")[1] for seed in ("5", "5", "6")
        )
        assert first == second
        assert first != other

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["heatmap", "FILM", "What?", "--layers", "1,4"], ["--layers", "layer 4", "layers 0 to 3"]),
            (["heatmap", "FILM", "What?", "--frames", "17"], ["--frames", "16"]),
            (["heatmap", "none.mp4", "What?"], ["none.mp4", "no such file"]),
            (["timeline", "FILM", "What?"], ["holds no selector"]),
            (["timeline", "FILM", "What?", "--method", "flexselect", "--layer", "2"], ["--max-tokens N"]),
            (
                ["timeline", "FILM", "What?", "--method", "flexselect", "--layer", "4", "--max-tokens", "9"],
                ["layer of 0 .. 3", "got 4"],
            ),
            (["timeline", "FILM", "What?", "--method", "uniform", "--layer", "1"], ["--layer", "flexselect"]),
            (["recall", "FILM", "--needle", "a.png"], ["--needle", "--question"]),
            (["recall", "FILM", "--needle", "none.png", "--question", "What?"], ["none.png", "no such file"]),
            (["recall", "FILM", "--at", "3.5"], ["--at 3.5", "3.0 seconds"]),
            (
                ["recall", "FILM", "--needle", "a.png", "--question", "What?", "--at", "1", "--trials", "2"],
                ["--trials", "same one"],
            ),
        ],
    )
    def test_no(self, plot, film, arguments, words):
        status, out, err, path = plot(*[film if word == "FILM" else word for word in arguments])
        said = err.splitlines()[-1]
        assert (status, out) == (2, "")
        assert said.startswith("qts: ")
        assert all(word in said for word in words)
        assert not path.exists()

    @pytest.mark.parametrize("picture", [["heatmap", "none.mp4", "What?"], ["timeline", "none.mp4", "?"], ["recall"]])
    def test_a_wrong_suffix_is_told_before_the_work(self, plot, picture):
        status, _, err, _ = plot(*picture, output="a.jpg")
        assert status == 2
        assert err.startswith("qts: output ")
        assert err.count("\n") == 1

    @pytest.mark.parametrize(
        "arguments",
        [
            ["heatmap", "a.mp4", "?", "--layers", "x"],
            ["timeline", "a.mp4", "?", "--method", "none"],
            ["timeline", "a.mp4", "?", "--method", "uniform,uniform"],
            ["recall", "--at", "-1"],
            ["recall", "--trials", "0"],
        ],
    )
    def test_options(self, plot, arguments, capsys):
        with pytest.raises(SystemExit) as stopped:
            plot(*arguments)
        assert stopped.value.code == 2
        assert arguments[-2] in capsys.readouterr().err
