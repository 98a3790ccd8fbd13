"""``--vision-chunk-frames``: reaches the vision tower in every command that asks a model, and changes no answer."""

import json

import pytest
from clips import write_clip
from qts_video import embedded
from qts_video.answer import answer, prepare
from qts_video.cli import main
from qts_video.methods import Uniform
from qts_video.video import read_video

STEPS = 3  # of two frames each
QUESTION = "What moves?"


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return str(write_clip(tmp_path_factory.mktemp("film") / "a.mp4", frames=36, rate=12, size=(112, 84)))


@pytest.fixture
def steps(monkeypatch):
    """Steps of the token grid in every call of a vision tower."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

    seen, forward = [], Tower.forward

    def record(self, *args, **kwargs):
        seen.append(int(kwargs["grid_thw"][:, 0].sum()))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(Tower, "forward", record)
    return seen


@pytest.mark.parametrize("method", ["uniform", "none"])
def test_ask(film, steps, capsys, method):
    """Two questions: the second finds what the first encoded in chunks."""
    said = []
    for options in ([], ["--vision-chunk-frames", "2"], ["--vision-chunk-frames", "5"]):
        command = ["ask", film, QUESTION, "How many?", "--model", "embedded", "--method", method, "--json"]
        assert main([*command, "--max-new-tokens", "3", *options]) == 0
        said.append([json.loads(line)["answer"] for line in capsys.readouterr().out.splitlines()])
    assert steps == [STEPS, 1, 1, 1, 2, 1]
    assert said[0] == said[1] == said[2]


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "some"])
def test_a_wrong_number_is_an_error(film, capsys, wrong):
    with pytest.raises(SystemExit) as exit:
        main(["ask", film, QUESTION, "--model", "embedded", "--vision-chunk-frames", wrong])
    assert exit.value.code == 2
    assert "--vision-chunk-frames" in capsys.readouterr().err


@pytest.mark.parametrize(
    "picture", [["heatmap", "--layers", "1"], ["timeline", "--method", "uniform"], ["recall", "--trials", "1"]]
)
def test_plot(film, steps, capsys, tmp_path, picture):
    name, *options = picture
    what = [film] if name == "recall" else [film, QUESTION]
    command = ["plot", name, *what, "--model", "embedded", *options, "--output", str(tmp_path / "a.png")]
    assert main([*command, "--vision-chunk-frames", "2"]) == 0, capsys.readouterr().err
    assert steps == [1] * STEPS


def test_eval_goes_on_with_another_number(film, steps, capsys, tmp_path):
    """Results of a run that ran out of memory are not lost."""
    file = tmp_path / "questions.jsonl"
    file.write_text(json.dumps({"video": film, "question": "Red?", "options": ["yes", "no"], "answer": "A"}))
    command = ["eval", str(file), "--model", "embedded", "--method", "uniform", "--output", str(tmp_path / "out")]
    assert main([*command, "--vision-chunk-frames", "2"]) == 0, capsys.readouterr().err
    assert steps == [1] * STEPS
    assert main(command) == 0, capsys.readouterr().err


def test_answer_of_a_model_as_it_is(film, steps):
    """And with a selector."""
    video = read_video(film, fps=2)
    model, processor = embedded.build()
    inputs = prepare(processor, video, QUESTION)
    texts = [
        answer(model, processor, inputs, selector, max_new_tokens=3, vision_chunk_frames=frames).text
        for selector in (None, Uniform(0.5))
        for frames in (None, 2)
    ]
    assert texts[0] == texts[1]
    assert texts[2] == texts[3]
    assert steps == [STEPS, *[1] * STEPS] * 2
