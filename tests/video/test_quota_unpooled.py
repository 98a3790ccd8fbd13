"""``answer`` and ``qts ask`` with QuoTA in a LLaVA-Video: frames come as they were before the model's pooling."""

import json

import pytest
import torch
from clips import write_clip
from qts_video import embedded
from qts_video.answer import answer, default_positions, prepare, prompt_length
from qts_video.cli import main
from qts_video.methods import Chain, QuoTA, Uniform
from qts_video.video import read_video

FRAMES, SIDE, POOLED = 6, 6, 3
QUESTION = "Which colour is the shape that moves?"
NEWLINES = {"grid": lambda side: FRAMES * side, "frame": lambda side: FRAMES, "one_token": lambda side: 1}
POSITIONS = pytest.mark.parametrize("position", ["grid", "frame", "one_token", None])


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
def video(film):
    return read_video(film, fps=2)


@pytest.fixture(scope="module")
def built():
    """The weights are larger than usual, so that answers depend on the video."""
    model, processor = embedded.build("llava_onevision")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
    return model, processor


def price(position, side):
    return FRAMES * side * side + NEWLINES[position or "one_token"](side)


@POSITIONS
def test_equal_scores_and_the_pooled_budget_give_the_models_own_answer(built, video, position):
    model, processor = built
    model.config.mm_newline_position = position
    inputs = prepare(processor, video, QUESTION)
    plain = answer(model, processor, inputs, max_new_tokens=6)
    quota = QuoTA([1.0] * FRAMES, total_tokens=price(position, POOLED))
    result = answer(model, processor, inputs, quota, max_new_tokens=6)
    assert plain.tokens == result.kept == price(position, POOLED)
    assert result.tokens == price(position, SIDE)
    assert result.report.positions == "compact"
    assert result.report.videos[0].grid == (FRAMES, SIDE, SIDE)
    assert result.text == plain.text
    other = answer(model, processor, inputs, QuoTA([1.0] * FRAMES, total_tokens=20), max_new_tokens=6)
    assert other.text != plain.text
    assert prompt_length(model, inputs, quota) == result.prompt_tokens
    assert prompt_length(model, inputs, None) == plain.prompt_tokens
    assert not {"get_video_features", "apply_pooling"} & set(model.model.__dict__)


@POSITIONS
def test_merging_and_other_methods_have_the_pooled_grid(built, video, position):
    model, processor = built
    model.config.mm_newline_position = position
    inputs = prepare(processor, video, QUESTION)
    for selector in (QuoTA([1.0] * FRAMES, total_tokens=20, mode="merge"), Uniform(max_tokens=20), Chain([Uniform()])):
        result = answer(model, processor, inputs, selector, max_new_tokens=1)
        assert result.tokens == price(position, POOLED)
        assert result.report.positions == "original"
        assert result.report.videos[0].grid == (FRAMES, POOLED, POOLED)


def test_positions_where_nobody_says(built):
    model, quota, trained = built[0], QuoTA([1.0]), Uniform()
    assert default_positions(model, quota) == default_positions(model, Chain([quota])) == "compact"
    assert default_positions(model, trained, trained) == "compact"
    assert default_positions(model, None, None) == default_positions(model, trained) == "original"
    assert default_positions(embedded.build("internvl")[0], quota) == "original"


def test_positions_that_are_said_are_kept(built, video):
    model, processor = built
    model.config.mm_newline_position = "grid"
    inputs = prepare(processor, video, QUESTION)
    result = answer(model, processor, inputs, QuoTA([1.0] * FRAMES, 60), positions="original", max_new_tokens=1)
    assert (result.report.positions, result.tokens) == ("original", price("grid", SIDE))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A converted LLaVA-Video made for 240 tokens: more than the pooled prompt has, less than the unpooled one."""
    folder = embedded.save(tmp_path_factory.mktemp("llava"), model_type="llava_onevision")
    config = json.loads((folder / "config.json").read_text())
    config["mm_newline_position"] = "grid"
    config["text_config"]["max_position_embeddings"] = 240
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def ask(film, checkpoint, capsys):
    def run(*options, questions=(QUESTION,)):
        start = ["ask", film, *questions, "--model", checkpoint, "--max-new-tokens", "2", "--json"]
        assert main([*start, *options]) == 0
        out, err = capsys.readouterr()
        return [json.loads(line) for line in out.splitlines()], err

    return run


QUOTA = ("--method", "quota", "--scorer", "relevance")


@pytest.mark.parametrize("mode", ["bilinear", "adaptive_avg", "linspace", "merge_separable"])
def test_ask(ask, mode):
    (first, second), err = ask(*QUOTA, "--max-tokens", "60", "--mode", mode, questions=(QUESTION, "Where is it?"))
    for said in (first, second):
        assert said["grid"] == [FRAMES, SIDE, SIDE]
        assert said["positions"] == "compact"
        assert said["tokens"] == price("grid", SIDE)
        assert 54 < said["kept"] <= 60
    assert first["kept_tokens"]["score"] != second["kept_tokens"]["score"]
    assert "was made for" not in err


def test_ask_to_merge(ask):
    (said,), _ = ask(*QUOTA, "--max-tokens", "60", "--mode", "merge")
    assert (said["grid"], said["positions"]) == ([FRAMES, POOLED, POOLED], "original")
    assert said["tokens"] == price("grid", POOLED)


def test_the_length_that_is_warned_of_is_what_takes_positions(ask):
    text = ask("--method", "none")[0][0]["prompt_tokens"] - price("grid", POOLED)
    whole = f"{text + price('grid', SIDE)} tokens and the model was made for 240"
    assert "was made for" not in ask("--method", "none")[1]
    assert "was made for" not in ask(*QUOTA, "--max-tokens", "60")[1]
    assert whole in ask(*QUOTA, "--max-tokens", "60", "--positions", "original")[1]
    assert whole in ask(*QUOTA)[1]  # the published budget keeps everything


def test_a_picture_of_what_was_kept(ask, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "kept.png"
    ask(*QUOTA, "--max-tokens", "60", "--save-overlay", str(picture))
    assert picture.stat().st_size > 0
