"""The pictures say what the numbers say, and the command measures what it draws."""

import argparse
import random
import re

import numpy as np
import pytest
import torch
from video.html_reader import Reader

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

from PIL import Image
from qts_video.dropin.report import VideoReport
from qts_video.plot import needle
from qts_video.plot.heatmap import OPACITY, draw_heatmap, heatmap_page, laid_over, relative_scores, round_ticks
from qts_video.plot.layers import layer_ranges, resolve_layers
from qts_video.plot.page import Page, Table, check_output, write
from qts_video.plot.recall import best_layer, draw_recall, recall_at_k, recall_page
from qts_video.plot.sheet import PAPER, Sheet, theme
from qts_video.plot.timeline import MAX_BARS, draw_timeline, timeline, timeline_page
from qts_video.video import Video, VideoError


class TestRecall:
    @pytest.mark.parametrize(
        ("scores", "planted", "expected"),
        [
            ([0.1, 0.9, 0.8, 0.2], [1, 2], 1.0),
            ([0.1, 0.9, 0.8, 0.2], [2, 3], 0.5),
            ([0.1, 0.9, 0.8, 0.2], [0, 3], 0.0),
            ([0.5, 0.5, 0.5, 0.5], [0, 1], 1.0),  # of equal scores the earlier token comes first
            ([0.5, 0.5, 0.5, 0.5], [1, 2], 0.5),
            ([0.5, 0.5, 0.5, 0.5], [2, 3], 0.0),
            ([0.3, 0.9, 0.3, 0.3], [1, 2, 3], 2 / 3),
            ([1.0], [0], 1.0),
        ],
    )
    def test_by_hand(self, scores, planted, expected):
        assert recall_at_k(torch.tensor(scores), torch.tensor(planted)) == expected

    @pytest.mark.parametrize("planted", [[], [4], [-1], [0, 1, 2, 3, 3]])
    def test_no_needle(self, planted):
        with pytest.raises(ValueError, match="needle must be 1 to 4 indices of 4 tokens"):
            recall_at_k(torch.zeros(4), torch.tensor(planted, dtype=torch.int64))

    def test_best_layer_is_the_earliest_of_equal_means(self):
        assert best_layer({9: [0.5, 0.5], 4: [1.0, 0.0], 2: [0.4, 0.4]}) == 4
        assert best_layer({0: [0.0], 1: [0.0]}) == 0

    def test_table_and_line(self):
        recalls = {0: [0.25, 0.75], 3: [1.0, 0.5], 1: [0.0, 0.0]}
        page = recall_page(recalls, 4, 0.1, title="t")
        assert page.tables[0].rows == [
            ["0", "50.0 %", "25.0 %", "75.0 %"],
            ["1", "0.0 %", "0.0 %", "0.0 %"],
            ["3", "75.0 %", "50.0 %", "100.0 %"],
        ]
        assert page.tables[0].caption == "Recall@4 over 2 trials; chance is 10.0 %"
        axes = draw_recall(recalls, 4, 0.1).axes[0]
        lines = {line.get_label(): line for line in axes.lines}
        np.testing.assert_array_equal(lines["mean"].get_xdata(), [0, 1, 3])
        np.testing.assert_array_equal(lines["mean"].get_ydata(), [50, 0, 75])
        assert lines["chance, 10.0 %"].get_ydata()[0] == pytest.approx(10)
        assert [text.get_text() for text in axes.texts] == ["layer 3: 75.0 %"]


class TestLayers:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("all", [0, 1, 2, 3, 4, 5]),
            ("4", [4]),
            ("0, 4,1", [0, 1, 4]),
            ("1:3", [1, 2]),
            (":2", [0, 1]),
            ("4:", [4, 5]),
            ("2:4,3,0", [0, 2, 3]),
        ],
    )
    def test_names(self, text, expected):
        assert resolve_layers(layer_ranges(text), 6, default=2) == expected

    @pytest.mark.parametrize(("default", "expected"), [(1, [3]), (2, [1, 4]), (3, [1, 3, 5]), (6, list(range(6)))])
    def test_default_is_spread_over_the_depth(self, default, expected):
        assert resolve_layers(None, 6, default=default) == expected
        assert resolve_layers(None, 1, default=default) == [0]

    @pytest.mark.parametrize("text", ["", "a", "1,", "-1", "1:2:3", "1.5", "all,1"])
    def test_no_names(self, text):
        with pytest.raises(argparse.ArgumentTypeError, match="expected 'all', numbers"):
            layer_ranges(text)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("6", "layer 6: the model has layers 0 to 5"), ("2:7", "layer 6: the"), ("3:3", "layers 3:3 are none")],
    )
    def test_out_of_range(self, text, message):
        with pytest.raises(ValueError, match=message):
            resolve_layers(layer_ranges(text), 6, default=2)


class TestHeatmap:
    def test_scores_are_multiples_of_their_layers_mean(self):
        relative = relative_scores({5: torch.tensor([1.0, 3.0]), 2: torch.tensor([4e-6, 4e-6])}, (2, 1, 1))
        assert list(relative) == [2, 5]
        np.testing.assert_allclose(relative[5].ravel(), [0.5, 1.5], rtol=1e-12)
        np.testing.assert_allclose(relative[2].ravel(), [1, 1], rtol=1e-12)

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([1.0], "layer 3 has 1 scores"),
            ([0.0, 0.0], "layer 3: relevance must be"),
            ([1.0, -1.0], "layer 3: relevance must be"),
            ([1.0, float("nan")], "layer 3: relevance must be"),
        ],
    )
    def test_no_scores(self, scores, message):
        with pytest.raises(ValueError, match=message):
            relative_scores({3: torch.tensor(scores)}, (1, 1, 2))

    def test_colour_lies_over_its_own_block(self):
        picture = np.random.default_rng(0).integers(0, 255, (31, 50, 3)).astype(np.uint8)
        heat = np.random.default_rng(1).random((3, 5, 3))
        mixed = laid_over(picture, heat)
        for y, x in ((0, 0), (30, 49), (11, 9), (15, 10)):
            grey = picture[y, x] @ [0.299, 0.587, 0.114] / 255
            expected = OPACITY * heat[y * 3 // 31, x * 5 // 50] + (1 - OPACITY) * grey
            np.testing.assert_allclose(mixed[y, x], expected, rtol=1e-12)

    def test_the_hottest_token_has_the_hottest_colour_in_its_layer_and_step(self):
        from matplotlib import colormaps

        scores = torch.ones(2, 2, 4)
        scores[1, 0, 3] = 9
        white = torch.full((4, 3, 20, 40), 255, dtype=torch.uint8)
        relative = relative_scores({0: torch.ones(16), 7: scores.flatten()}, (2, 2, 4))
        figure = draw_heatmap(white, torch.tensor([0.0, 1.0]), relative)
        *panels, _ = figure.axes  # the last one is the scale
        assert [axes.get_ylabel() for axes in panels] == ["frame", "layer 0", "layer 7", "", "", ""]
        assert [axes.get_xlabel() for axes in panels] == ["0.0 s", "", "0.0 s", "1.0 s", "", "1.0 s"]
        hot = OPACITY * np.array(colormaps["viridis"](1.0)[:3]) + (1 - OPACITY)
        for number in (1, 2, 4, 5):
            near = np.isclose(panels[number].images[0].get_array(), hot, atol=1e-6).all(axis=2)
            expected = np.zeros((20, 40), bool)
            expected[:10, 30:] = number == 5
            np.testing.assert_array_equal(near, expected)

    @pytest.mark.parametrize(
        ("least", "most", "expected"),
        [
            (0.9, 1.35, [0.9, 1.0, 1.1, 1.2, 1.3]),
            (0.001, 10, [0.001, 0.01, 0.1, 1, 10]),
            (0.3, 7, [0.5, 1, 2, 5]),
        ],
    )
    def test_ticks(self, least, most, expected):
        assert round_ticks(least, most) == pytest.approx(expected)

    @pytest.mark.parametrize(("grid", "frames"), [((1, 2, 2), 1), ((3, 7, 4), 5), ((30, 2, 3), 60)])
    @pytest.mark.parametrize("layers", [1, 3])
    def test_every_shape(self, grid, frames, layers):
        steps, rows, columns = grid
        scores = {layer: torch.rand(steps * rows * columns) for layer in range(layers)}
        scores[0] = torch.ones(steps * rows * columns)
        pictures = torch.randint(0, 255, (frames, 3, 28 * rows, 28 * columns), dtype=torch.uint8)
        page = heatmap_page(pictures, torch.arange(steps) * 0.5, scores, grid, title="a " * 200, max_panels=4)
        figure = page.draw(page.title, page.subtitle)
        figure.canvas.draw()
        assert len(figure.axes) == min(4, steps) * (layers + 1) + 1
        assert [row[0] for row in page.tables[0].rows] == [f"{step * 0.5:.1f} s" for step in range(steps)]


def report(indices, grid=(4, 1, 3), step=0.5, scores=None, **newlines) -> VideoReport:
    steps, rows, columns = grid
    indices = torch.tensor(indices, dtype=torch.int64)
    frame = indices // (rows * columns)
    return VideoReport(
        sample=0,
        grid=grid,
        indices=indices,
        frame=frame,
        row=indices // columns % rows,
        column=indices % columns,
        seconds=frame * step,
        frame_seconds=torch.arange(steps) * step,
        scores=scores,
        **newlines,
    )


class TestTimeline:
    def test_tokens_a_second(self):
        scores = torch.tensor([0, 0, 0.1, 0, 0.3, 0, 0.2, 0, 0, 0.7, 0.8, 0.9])
        one = timeline("x", report([0, 1, 2, 6, 11], scores=scores))
        assert one.width == 0.5
        np.testing.assert_array_equal(one.starts, [0, 0.5, 1, 1.5])
        np.testing.assert_array_equal(one.counts, [3, 0, 1, 1])
        np.testing.assert_array_equal(one.rates, [6, 0, 2, 2])
        np.testing.assert_allclose(one.relevance, [0.1, 0.3, 0.2, 0.9], rtol=1e-6)
        assert one.heading == "x: 5 of 12 video tokens (41.7%)"
        page = timeline_page([one, timeline("y", report([0]))], title="t")
        assert page.tables[0].header == ["from", "x: kept tokens", "x: largest relevance", "y: kept tokens"]
        assert page.tables[0].rows[2] == ("1.0 s", "1", "0.2", "0")

    def test_newlines_count(self):
        assert timeline("x", report([0], newlines=4, kept_newlines=1)).heading.startswith("x: 2 of 16 ")

    def test_a_long_question_is_cut(self):
        heading = timeline("uniform, “" + "why " * 60 + "”", report([0])).heading
        assert heading.startswith("uniform, “why why")
        assert heading.endswith(" …: 1 of 12 video tokens (8.3%)")
        assert len(heading) < 140

    def test_a_long_video_has_steps_in_common_bars(self):
        steps = 2 * MAX_BARS + 1
        scores = torch.arange(steps * 2.0)
        one = timeline("x", report([0, 3, 4, 2 * steps - 1], (steps, 1, 2), scores=scores))
        assert len(one.starts) == MAX_BARS * 2 // 3 + 1
        assert one.width == 1.5
        assert one.counts[:3].tolist() == [3, 0, 0]
        assert one.counts[-1] == 1
        assert one.relevance[0] == 5

    def test_drawn(self):
        scores = torch.rand(12)
        rows = [timeline("x", report([0, 1, 5], scores=scores)), timeline("y", report([3]))]
        first, second, curve = _by_kind(draw_timeline(rows))
        assert [bar.get_height() for bar in first.patches] == [4, 2, 0, 0]
        assert [bar.get_height() for bar in second.patches] == [0, 2, 0, 0]
        assert first.get_ylim() == second.get_ylim()
        np.testing.assert_allclose(curve.lines[0].get_ydata(), scores.view(4, 3).amax(1), rtol=1e-6)

    def test_one_step_and_nothing_kept(self):
        one = timeline("x", report([], (1, 1, 3)))
        assert one.counts.tolist() == [0]
        draw_timeline([one]).canvas.draw()


def _by_kind(figure) -> list:
    """Axes with bars, then those with lines."""
    return sorted(figure.axes, key=lambda axes: not axes.patches)


class TestPage:
    @pytest.fixture
    def page(self):
        table = Table("<caption>", ("time", "a & b"), [("0.0 s", "0.123"), ("1.0 s", "45,678")])
        return Page("<i>title</i>", "line\n& line", lambda t, s: Sheet(2.0, t, s).figure, 'It "shows" nothing', [table])

    def test_png(self, page, tmp_path):
        path = write(tmp_path / "new" / "a.png", page)
        with Image.open(path) as image:
            assert image.format == "PNG"
            assert image.width == 1500
            assert 200 < image.height < 350

    def test_html_is_one_file_that_holds_the_numbers(self, page, tmp_path):
        text = write(tmp_path / "a.HTML", page).read_text()
        said = Reader(text)
        assert said.cells == ["time", "a & b", "0.0 s", "0.123", "1.0 s", "45,678"]
        assert len(said.wanted) == 2
        assert all(want.startswith("data:image/png;base64,") for want in said.wanted)
        assert said.scripts == 0
        assert "url(" not in text
        assert "<i>" not in text
        assert said.images[0]["alt"] == 'It "shows" nothing'
        assert list(tmp_path.iterdir()) == [tmp_path / "a.HTML"]

    def test_html_has_a_light_and_a_dark_picture(self, page, tmp_path):
        import base64
        import io

        dark, light = Reader(write(tmp_path / "a.html", page).read_text()).wanted
        for data, colours in ((light, "light"), (dark, "dark")):
            with Image.open(io.BytesIO(base64.b64decode(data.split(",")[1]))) as image:
                assert "#{:02x}{:02x}{:02x}".format(*image.convert("RGB").getpixel((0, 0))) == PAPER[colours]

    @pytest.mark.parametrize("name", ["a.jpg", "a", "png", "a.png.txt"])
    def test_other_suffixes(self, name, tmp_path, page):
        with pytest.raises(ValueError, match=r"expected a name that ends in \.png or \.html"):
            check_output(name)
        with pytest.raises(ValueError, match="expected a name"):
            write(tmp_path / name, page)
        assert list(tmp_path.iterdir()) == []

    def test_the_users_own_figures_keep_their_colours(self):
        import matplotlib

        before = dict(matplotlib.rcParams)
        with theme("dark"):
            assert matplotlib.rcParams["figure.facecolor"] == PAPER["dark"]
        assert dict(matplotlib.rcParams) == before


def video(count=6, **options) -> Video:
    values = {
        "frames": torch.zeros(count, 3, 20, 40, dtype=torch.uint8),
        "seconds": [0.5 * i for i in range(count)],
        "sampled_fps": 2.0,
        "frame_indices": list(range(count)),
        "total_frames": count,
        "duration": 0.5 * count,
        "source": "a.mp4",
        "backend": "test",
    }
    return Video(**values | options)


class TestNeedle:
    def test_planted_in_every_frame_of_its_step_and_nowhere_else(self):
        before = video(5)
        after = needle.plant(before, torch.full((3, 20, 40), 7, dtype=torch.uint8), 1, 2)
        assert after.frames.flatten(1).amax(1).tolist() == [0, 0, 7, 7, 0]
        assert before.frames.max() == 0
        last = needle.plant(before, torch.full((3, 20, 40), 7, dtype=torch.uint8), 2, 2)
        assert last.frames.flatten(1).amax(1).tolist() == [0, 0, 0, 0, 7]

    @pytest.mark.parametrize(
        ("seconds", "per_step", "expected"), [(0, 1, 0), (0.49, 1, 0), (0.5, 1, 1), (1.2, 2, 1), (2.9, 1, 5)]
    )
    def test_step_at(self, seconds, per_step, expected):
        assert needle.step_at(video(), seconds, per_step) == expected

    def test_step_behind_the_end(self):
        with pytest.raises(ValueError, match=r"--at 3: a.mp4 has 3.0 seconds"):
            needle.step_at(video(), 3, 1)

    def test_made_ones_fill_the_frame_in_the_colour_asked_for(self):
        seen = set()
        for seed in range(40):
            picture, question = needle.make_needle(56, 84, random.Random(seed))
            assert picture.shape == (3, 56, 84)
            shape = re.fullmatch(r"Which colour is the (\w+)\?", question)[1]
            pixels, counts = picture.flatten(1).T.unique(dim=0, return_counts=True)
            colours = [tuple(pixel) for pixel in pixels.tolist()]
            [colour] = set(colours) & set(needle.COLOURS.values())
            [paper] = set(colours) & set(needle.PAPERS)
            assert counts.sum() == counts[colours.index(colour)] + counts[colours.index(paper)]
            assert counts[colours.index(colour)] > 0.15 * 56 * 84
            seen.add((shape, colour))
        assert {shape for shape, _ in seen} == set(needle.SHAPES)
        assert {colour for _, colour in seen} == set(needle.COLOURS.values())
        first, again = (needle.make_needle(28, 28, random.Random(3)) for _ in range(2))
        assert torch.equal(first[0], again[0])
        assert first[1] == again[1]

    def test_read_ones_keep_their_shape(self, tmp_path):
        Image.new("RGB", (10, 10), (9, 99, 199)).save(tmp_path / "a.png")
        picture = needle.read_needle(tmp_path / "a.png", 20, 40)
        assert picture.shape == (3, 20, 40)
        assert picture[:, :, 10:30].flatten(1).unique(dim=1).T.tolist() == [[9, 99, 199]]
        assert picture[:, :, :10].max() == picture[:, :, 30:].max() == 0

    def test_no_picture(self, tmp_path):
        with pytest.raises(VideoError, match=r"needle .*b\.png: no such file"):
            needle.read_needle(tmp_path / "b.png", 20, 40)
        (tmp_path / "c.png").write_text("text")
        with pytest.raises(VideoError, match=r"needle .*c\.png: not a picture"):
            needle.read_needle(tmp_path / "c.png", 20, 40)
