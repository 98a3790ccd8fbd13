"""The command as a person meets it: what it prints where, and how it says no."""

import json
import subprocess
import sys

import pytest
from video.clips import write_clip, write_sound

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.cli import build_parser, main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(embedded.save(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("film") / "a.mp4", frames=36, rate=12, size=(112, 84)))


@pytest.fixture
def ask(checkpoint, film, capsys):
    def run(*options: str, video: str = film, questions=("What moves?",), model: str = checkpoint):
        status = main(["ask", video, *questions, "--model", model, "--max-new-tokens", "3", *options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_answer_on_stdout_and_the_rest_on_stderr(ask):
    status, out, err = ask("--method", "none")
    assert status == 0
    assert out.count("\n") == 1
    assert "36 of 36 video tokens (100.0%), method none" in err
    assert "prefill" in err
    assert "selection" not in err


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        (["--method", "uniform", "--retention-ratio", "0.25"], 9),
        (["--method", "random", "--max-tokens", "7"], 7),
        (["--method", "uniform", "--max-tokens", "5", "--positions", "compact"], 5),
    ],
)
def test_json(ask, options, kept):
    status, out, _ = ask("--json", *options)
    said = json.loads(out)
    assert status == 0
    assert (said["tokens"], said["kept"]) == (36, kept)
    assert said["retention_ratio"] == kept / 36
    assert said["grid"] == [3, 3, 4]
    assert set(said["timings"]) == {"vision", "selection", "prefill", "total"}
    assert said["frames"]["seconds"] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5], abs=1e-3)
    tokens = said["kept_tokens"]
    assert len(tokens["index"]) == kept
    for index, frame, row, column, seconds in zip(
        *(tokens[key] for key in ("index", "frame", "row", "column", "seconds")), strict=True
    ):
        assert index == (frame * 3 + row) * 4 + column
        assert seconds == pytest.approx(frame * 1.0)


@pytest.fixture(scope="module")
def selector(checkpoint, tmp_path_factory):
    from qts_video.checkpoints import load_model
    from qts_video.methods import QTSplus

    folder = tmp_path_factory.mktemp("selector")
    QTSplus.from_language_model(load_model(checkpoint)[0], seed=3).save_pretrained(folder)
    return str(folder)


def test_qtsplus_from_the_language_model(ask):
    status, out, err = ask("--json", "--selector", "language-model", "--retention-ratio", "0.25")
    said = json.loads(out)
    assert (status, said["method"], said["kept"]) == (0, "qtsplus", 9)
    assert len(said["kept_tokens"]["score"]) == 9
    assert said["timings"]["selection"] > 0
    assert "untrained" in err


def test_qtsplus_with_its_own_budget(ask, selector):
    said = json.loads(ask("--json", "--selector", selector)[1])
    assert 0.05 * 36 <= said["kept"] <= 0.5 * 36 + 1
    assert said["positions"] == "original"


def test_selector_of_a_whole_checkpoint_reads_compact_positions(ask, selector, monkeypatch):
    from qts_video import loading as module
    from qts_video.methods import QTSplus

    load_model = module.load_model

    def with_selector(*arguments, **options):
        model, processor, _ = load_model(*arguments, **options)
        return model, processor, QTSplus.from_pretrained(selector)

    monkeypatch.setattr(module, "load_model", with_selector)
    said = json.loads(ask("--json", "--max-tokens", "6")[1])
    assert (said["positions"], said["kept"]) == ("compact", 6)
    assert json.loads(ask("--json", "--positions", "original")[1])["positions"] == "original"
    assert json.loads(ask("--json", "--method", "none")[1])["positions"] == "original"
    assert json.loads(ask("--json", "--selector", selector)[1])["positions"] == "original"


def test_json_without_selection(ask):
    said = json.loads(ask("--json", "--method", "none")[1])
    assert said["kept"] == said["tokens"] == 36
    assert said["kept_tokens"] is None


def test_flexselect(ask):
    options = ("--json", "--method", "flexselect", "--layer", "2", "--max-tokens", "7")
    status, out, err = ask(*options)
    said = json.loads(out)
    assert (status, said["method"], said["kept"]) == (0, "flexselect", 7)
    assert len(said["kept_tokens"]["score"]) == 7
    assert err.startswith("qts: training-free FlexSelect on 3 frames")
    mean = json.loads(ask(*options, "--reduce", "mean")[1])["kept_tokens"]["score"]
    question = json.loads(ask(*options, "--reduce", "mean", "--query", "question")[1])["kept_tokens"]["score"]
    sets = json.loads(ask(*options, "--frames-per-set", "2")[1])["kept_tokens"]
    assert len({tuple(scores) for scores in (said["kept_tokens"]["score"], mean, question, sets["score"])}) == 4
    in_first_set = sum(frame != 1 for frame in sets["frame"])  # steps 0 and 2; step 1 is the other set
    assert (in_first_set, len(sets["frame"])) == (5, 7)


def test_flexselect_lite(ask, checkpoint, tmp_path):
    from qts_video.checkpoints import load_model
    from qts_video.lite import LiteSelector

    model = load_model(checkpoint)[0]
    lite = LiteSelector.build(model, hidden_size=64, intermediate_size=64, layers=2, heads=2, kv_heads=1)
    lite.save_pretrained(tmp_path / "lite")
    options = ("--json", "--method", "flexselect", "--lite", str(tmp_path / "lite"), "--retention-ratio", "0.25")
    status, out, _ = ask(*options)
    assert (status, json.loads(out)["kept"]) == (0, 9)


def test_several_questions(ask):
    questions = ("What moves?", "Where is it?", "What moves?")
    status, out, err = ask("--json", "--method", "uniform", "--max-tokens", "5", questions=questions)
    said = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert [one["question"] for one in said] == list(questions)
    assert said[0]["answer"] == said[2]["answer"]
    assert said[0]["kept_tokens"] == said[2]["kept_tokens"]
    assert err == ""
    status, out, err = ask("--method", "none", questions=questions[:2])
    alone = [ask("--method", "none", questions=[question])[1] for question in questions[:2]]
    assert out == f"What moves?\n{alone[0]}\nWhere is it?\n{alone[1]}\n"
    assert (err.count("video   "), err.count("tokens  ")) == (1, 2)


@pytest.mark.parametrize("method", ["uniform", "none"])
def test_several_questions_encode_the_video_once(ask, method):
    alone = json.loads(ask("--json", "--method", method, questions=["Where is it?"])[1])
    out = ask("--json", "--method", method, questions=("What moves?", "Where is it?"))[1]
    first, second = (json.loads(line) for line in out.splitlines())
    assert first["timings"]["vision"] > 0
    assert second["timings"]["vision"] == 0
    assert alone["timings"]["vision"] > 0
    assert {**second, "timings": 0, "peak_memory_bytes": 0} == {**alone, "timings": 0, "peak_memory_bytes": 0}


def test_embedded_model(ask):
    status, out, err = ask("--json", "--max-tokens", "5", model="embedded")
    said = json.loads(out)
    assert (status, said["model"], said["tokens"], said["kept"]) == (0, "embedded", 60, 5)
    assert (said["method"], said["positions"]) == ("qtsplus", "original")
    assert err == "the embedded model knows the films of qts_video.miniworld and their questions, nothing else\n"
    status, out, err = ask("--json", "--method", "uniform", "--max-tokens", "5", model="embedded:qwen2_5_vl")
    said = json.loads(out)
    assert (status, said["model"], said["tokens"], said["kept"]) == (0, "embedded:qwen2_5_vl", 36, 5)
    assert err == "the embedded model has random weights: what it selects and answers means nothing\n"
    status, out, _ = ask("--json", "--method", "none", model="embedded:qwen3_vl")
    assert (status, json.loads(out)["model"]) == (0, "embedded:qwen3_vl")


def test_positions_and_fps_reach_the_model(ask):
    assert json.loads(ask("--json", "--method", "uniform", "--positions", "compact")[1])["positions"] == "compact"
    said = json.loads(ask("--json", "--method", "none", "--fps", "4")[1])
    assert said["tokens"] == 72
    assert said["frames"]["sampled_fps"] == 4
    assert json.loads(ask("--json", "--method", "none", "--max-frames", "2")[1])["tokens"] == 12
    assert json.loads(ask("--json", "--method", "none", "--max-pixels", str(84 * 84))[1])["tokens"] == 3 * 2 * 3


def test_a_prompt_longer_than_the_context_is_said(capsys):
    from types import SimpleNamespace

    from qts_video.ask import _warn_of_length

    text = SimpleNamespace(max_position_embeddings=4096)
    model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
    _warn_of_length(model, 4096)
    assert capsys.readouterr().err == ""
    _warn_of_length(model, 100_352)
    assert "100,352 tokens and the model was made for 4,096: use fewer --max-frames" in capsys.readouterr().err


def test_remote_code_is_run_only_where_it_is_trusted(ask, monkeypatch):
    from qts_video import loading as module

    given, load_model = [], module.load_model

    def remember(*arguments, trust_remote_code, **options):
        given.append(trust_remote_code)
        return load_model(*arguments, **options)

    monkeypatch.setattr(module, "load_model", remember)
    for option in ((), ("--trust-remote-code",)):
        assert ask("--method", "none", *option)[0] == 0
    assert given == [False, True]


def test_overlay(ask, tmp_path):
    status, _, err = ask("--method", "uniform", "--max-tokens", "4", "--save-overlay", str(tmp_path / "kept.png"))
    assert status == 0
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert "kept.png" in err


def test_folder_of_frames(ask, tmp_path):
    from PIL import Image

    for number in range(4):
        Image.new("RGB", (112, 84)).save(tmp_path / f"{number}.png")
    said = json.loads(ask("--json", "--method", "none", video=str(tmp_path))[1])
    assert said["tokens"] == 2 * 12


class TestNo:
    """One line on stderr, nothing on stdout, status 2."""

    def refuses(self, result, *words: str):
        status, out, err = result
        assert status == 2
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("qts: ")
        assert all(word in err for word in words)

    def test_missing_video(self, ask, tmp_path):
        self.refuses(ask(video=str(tmp_path / "none.mp4")), "none.mp4", "no such file")

    def test_sound_alone(self, ask, tmp_path):
        self.refuses(ask(video=str(write_sound(tmp_path / "a.m4a"))), "a.m4a", "no video")

    def test_not_a_video(self, ask, tmp_path):
        (tmp_path / "a.mp4").write_text("text")
        self.refuses(ask("--json", video=str(tmp_path / "a.mp4")), "a.mp4", "not a video")

    def test_missing_model_folder(self, ask, tmp_path):
        self.refuses(ask(model=str(tmp_path / "none")), "none", "no such folder")

    def test_folder_that_is_no_model(self, ask, tmp_path):
        self.refuses(ask("--method", "none", model=str(tmp_path)), "model", str(tmp_path))

    def test_model_of_another_kind(self, ask, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "bert"}')
        self.refuses(ask("--method", "none", model=str(tmp_path)), "bert", "qwen2_5_vl")

    def test_unknown_model_on_the_hub(self, ask, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        self.refuses(ask("--method", "none", model="nobody/no-such-model"), "nobody/no-such-model")

    def test_no_selector(self, ask):
        self.refuses(ask("--method", "qtsplus"), "holds no selector", "--selector")

    def test_missing_selector(self, ask, tmp_path):
        self.refuses(ask("--selector", str(tmp_path / "none")), "selector", "none")

    def test_model_that_is_no_selector(self, ask, checkpoint):
        self.refuses(ask("--selector", checkpoint), "selector", checkpoint)

    def test_missing_lite(self, ask, tmp_path):
        options = ("--method", "flexselect", "--max-tokens", "4", "--lite")
        self.refuses(ask(*options, str(tmp_path / "none")), "lite", "none")

    def test_nothing_is_published_for_the_model(self, ask):
        self.refuses(ask("--method", "flexselect", "--max-tokens", "4"), "4 layers of width 256", "--layer N")
        self.refuses(ask("--method", "flexselect", "--layer", "1"), "4 layers of width 256", "--max-tokens N")

    def test_no_such_layer(self, ask):
        options = ("--method", "flexselect", "--max-tokens", "4", "--layer", "4")
        self.refuses(ask(*options), "layer of 0 .. 3", "got 4")

    @pytest.mark.parametrize(
        "options", [("--layer", "1"), ("--reduce", "max"), ("--query", "prompt"), ("--frames-per-set", "9")]
    )
    def test_options_of_another_method(self, ask, options):
        self.refuses(ask("--method", "uniform", *options, video="never-read.mp4"), options[0], "flexselect")

    def test_selector_of_another_method(self, ask):
        self.refuses(ask("--method", "uniform", "--selector", "language-model"), "--selector", "qtsplus")

    def test_layer_beside_lite(self, ask):
        self.refuses(ask("--method", "flexselect", "--layer", "1", "--lite", "a"), "--lite", "--layer")

    def test_overlay_of_several_questions(self, ask):
        options = ("--method", "uniform", "--save-overlay", "a.png")
        self.refuses(ask(*options, questions=("What?", "Where?")), "--save-overlay", "qts plot timeline")

    def test_unknown_embedded_family(self, ask):
        self.refuses(ask("--method", "none", model="embedded:bert"), "embedded:bert", "qwen3_vl")

    def test_device(self, ask):
        self.refuses(ask("--method", "none", "--device", "nonsense"), "nonsense")

    def test_overlay_of_nothing(self, ask, tmp_path):
        self.refuses(ask("--method", "none", "--save-overlay", str(tmp_path / "a.png")), "--save-overlay")

    def test_frames_that_the_processor_refuses(self, ask, tmp_path):
        from PIL import Image

        Image.new("RGB", (6000, 4)).save(tmp_path / "0.png")
        self.refuses(ask("--method", "none", video=str(tmp_path)), str(tmp_path), "aspect ratio")

    @pytest.mark.parametrize(
        "options",
        [
            ["--retention-ratio", "0"],
            ["--retention-ratio", "1.5"],
            ["--max-tokens", "0"],
            ["--retention-ratio", "0.5", "--max-tokens", "5"],
            ["--method", "magic"],
            ["--fps", "0"],
            ["--fps", "nan"],
            ["--dtype", "int8"],
            ["--positions", "other"],
            ["--layer", "-1"],
            ["--reduce", "min"],
            ["--query", "all"],
            ["--frames-per-set", "0"],
        ],
    )
    def test_options(self, ask, options, capsys):
        with pytest.raises(SystemExit) as stopped:
            ask(*options)
        assert stopped.value.code == 2
        assert options[0] in capsys.readouterr().err

    def test_no_command(self, capsys):
        with pytest.raises(SystemExit) as stopped:
            main([])
        assert stopped.value.code == 2


def test_demo(tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "out")]) == 0
    out, _ = capsys.readouterr()
    picture = tmp_path / "out" / "selection.png"
    assert str(picture) in out
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "out" / "film.mp4").stat().st_size > 1000
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line[:7] in ("none   ", "uniform", "qtsplus")}
    assert rows["none"][1] == rows["none"][2] == rows["uniform"][1]
    total = int(rows["none"][1].replace(",", ""))
    assert total > 900
    for name in ("uniform", "qtsplus"):
        assert int(rows[name][2].replace(",", "")) == -(-total // 10)
    right = next(line for line in out.splitlines() if line.startswith("right"))
    questions, none, uniform, qtsplus = map(int, right.split()[1:])
    assert none == questions
    assert qtsplus >= questions - 1
    assert uniform <= qtsplus


def test_missing_packages_are_named():
    arguments = ["ask", "a.mp4", "What?", "--model", "m"]
    code = (
        f"import sys; sys.modules['transformers'] = None; from qts_video.cli import main; sys.exit(main({arguments}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr == "qts: transformers is not installed: pip install 'qts_kernels[video]'\n"


def test_a_missing_matplotlib_is_told_before_the_work(ask, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, err = ask("--method", "uniform", "--save-overlay", "a.png", video="never-read.mp4")
    assert status == 2
    assert err == "qts: matplotlib is not installed: pip install 'qts_kernels[video]'\n"


def test_help_names_every_option_and_needs_no_models():
    code = (
        "import sys, qts_video.cli as c\n"
        "for command in (['ask'], ['plot'], ['plot', 'heatmap'], ['plot', 'timeline'], ['plot', 'recall']):\n"
        "    try: c.main([*command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'transformers', 'av', 'matplotlib', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for option in ("--method", "--retention-ratio", "--max-tokens", "--selector", "--fps", "--json", "--save-overlay"):
        assert option in done.stdout
    for option in ("--layer", "--reduce", "--query", "--frames-per-set", "--lite", "--layers", "--needle", "--trials"):
        assert option in done.stdout


@pytest.mark.parametrize("command", [["ask"], ["demo"], ["plot", "heatmap"], ["plot", "timeline"], ["plot", "recall"]])
def test_every_option_has_help(command):
    parser = build_parser()
    for name in command:
        parser = next(a for a in parser._actions if isinstance(a.choices, dict)).choices[name]
    assert all(action.help for action in parser._actions)
