"""Every family on its real model and processor classes: the prompt, the question, the times, the counts, the answer."""

import json
import re
from dataclasses import dataclass

import pytest
import torch
from video.clips import write_clip

pytest.importorskip("transformers")

import transformers
from qts_video import attach, embedded
from qts_video.answer import answer, prepare
from qts_video.checkpoints import load_model
from qts_video.cli import main
from qts_video.methods import QTSplus, Uniform
from qts_video.methods.flexselect import FlexSelect
from qts_video.video import read_video

QUESTION = "Which colour is the shape that moves?"
LAYERS = 4


@dataclass(frozen=True)
class Expected:
    """Of six frames of 112 x 84 pixels, two a second."""

    prompt: str
    """With every run of n placeholders written as <n>."""
    placeholder: str
    grid: tuple[int, int, int]
    seconds: tuple[float, ...]
    seconds_from: str
    newlines: int = 0

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1] * self.grid[2] + self.newlines


FRAMES = tuple(i / 2 for i in range(6))
CHATML = "<|im_start|>user\n{}" + QUESTION + "<|im_end|>\n<|im_start|>assistant\n"
STEPS = "".join(f"<{t} seconds><|vision_start|><12><|vision_end|>" for t in ("0.2", "1.2", "2.2"))
SPACE = " "
if int(transformers.__version__.split(".")[0]) > 4:
    STEPS = f"<|vision_start|>{STEPS}<|vision_end|>"  # transformers 4 takes the template's own tags away
    SPACE = ""  # transformers 4 puts a space before every piece of Vicuna's text

FAMILIES = {
    "qwen2_5_vl": Expected(
        prompt="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        + CHATML.format("<|vision_start|><36><|vision_end|>"),
        placeholder="<|video_pad|>",
        grid=(3, 3, 4),
        seconds=(0, 1, 2),
        seconds_from="inputs",
    ),
    "qwen3_vl": Expected(
        prompt=CHATML.format(STEPS),
        placeholder="<|video_pad|>",
        grid=(3, 3, 4),
        seconds=(0.2, 1.2, 2.2),
        seconds_from="prompt",
    ),
    "llava_onevision": Expected(
        prompt=CHATML.format("<55>\n"),
        placeholder="<video>",
        grid=(6, 3, 3),
        seconds=FRAMES,
        seconds_from="given",
        newlines=1,
    ),
    "llava_next_video": Expected(
        prompt=f"<s> USER: <54>{SPACE}\n{QUESTION} ASSISTANT:",
        placeholder="<video>",
        grid=(6, 3, 3),
        seconds=FRAMES,
        seconds_from="given",
    ),
    "internvl": Expected(
        prompt=CHATML.format("".join(f"Frame{i}: <img><9></img>\n" for i in range(1, 7))),
        placeholder="<IMG_CONTEXT>",
        grid=(6, 3, 3),
        seconds=FRAMES,
        seconds_from="given",
    ),
}


class Remember(Uniform):
    """Uniform, but it wants the question, and remembers what it was given."""

    needs_question = True

    def select(self, videos):
        self.videos = videos
        return super().select(videos)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "a.mp4", frames=36, rate=12, size=(112, 84))


@pytest.fixture(scope="module")
def video(clip):
    return read_video(clip, fps=2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """(name, model, processor). The random weights are larger than usual, so that answers depend on the video."""
    model, processor = embedded.build(request.param)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("proj.weight"):
                parameter.mul_(6)
    return request.param, model, processor


@pytest.fixture
def inputs(family, video):
    return prepare(family[2], video, QUESTION)


def test_the_prompt(family, inputs):
    expected, tokenizer = FAMILIES[family[0]], family[2].tokenizer
    text = tokenizer.decode(inputs["input_ids"][0])
    token = expected.placeholder
    runs = re.sub(f"(?:{re.escape(token)})+", lambda run: f"<{run[0].count(token)}>", text)
    assert runs == expected.prompt
    assert inputs.seconds_per_step == (0.5 if expected.seconds_from == "given" else None)


def test_times_of_uneven_frames(video):
    """Qwen3-VL's labels are the frames' own times, wherever the frames stand in the file."""
    video = type(video)(**vars(video) | {"seconds": [0.0, 0.1, 3.0, 3.4, 7.0], "frames": video.frames[:5]})
    processor = embedded.build_processor("qwen3_vl")
    inputs = prepare(processor, video, QUESTION)
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert re.findall(r"<([\d.]+) seconds>", text) == ["0.1", "3.2", "7.0"]
    assert video.seconds == [0.0, 0.1, 3.0, 3.4, 7.0]


def test_the_question_and_the_report(family, inputs):
    name, model, processor = family
    expected, selector = FAMILIES[name], Remember(max_tokens=7)
    result = answer(model, processor, inputs, selector, max_new_tokens=1)
    assert processor.tokenizer.decode(selector.videos.question_ids[0]) == QUESTION
    report = result.report
    (of_video,) = report.videos
    assert of_video.grid == expected.grid
    assert of_video.newlines == expected.newlines
    assert of_video.frame_seconds.tolist() == pytest.approx(expected.seconds)
    assert report.seconds_from == expected.seconds_from
    assert selector.videos.timestamps.tolist() == pytest.approx(
        [s for s in expected.seconds for _ in range(expected.grid[1] * expected.grid[2])]
    )
    assert len(of_video.indices) == 7 - expected.newlines
    assert (result.tokens, report.total, result.kept) == (expected.tokens, expected.tokens, 7)
    assert of_video.seconds.tolist() == pytest.approx([expected.seconds[step] for step in of_video.frame])


@pytest.mark.filterwarnings("ignore:training-free FlexSelect:UserWarning")
@pytest.mark.parametrize("method", ["uniform", "qtsplus", "flexselect"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_kept_counts(family, inputs, method, positions):
    name, model, processor = family
    selector = {
        "uniform": lambda: Uniform(max_tokens=10),
        "qtsplus": lambda: QTSplus.from_language_model(model, max_tokens=10),
        "flexselect": lambda: FlexSelect(layer=LAYERS // 2, max_tokens=10, frames_per_set=4),
    }[method]()
    result = answer(model, processor, inputs, selector, positions=positions, max_new_tokens=3)
    newlines = FAMILIES[name].newlines
    candidates = 10 if method == "qtsplus" else 10 - newlines  # QTSplus's budget does not count them
    assert len(result.report.videos[0].indices) == candidates
    assert result.kept == candidates + newlines
    assert result.report.positions == positions
    assert 1 <= result.generated_tokens <= 3
    assert not hasattr(model, "_qts_video_attachment")


def test_everything_kept_changes_nothing(family, inputs):
    _, model, processor = family
    plain = answer(model, processor, inputs, max_new_tokens=6)
    kept = answer(model, processor, inputs, Uniform(retention_ratio=1.0), max_new_tokens=6)
    fewer = answer(model, processor, inputs, Uniform(max_tokens=2), max_new_tokens=6)
    assert (kept.text, kept.kept) == (plain.text, plain.tokens)
    assert fewer.prompt_tokens == plain.prompt_tokens
    with torch.no_grad():
        expected = model(**inputs).logits
        with attach(model, Uniform(retention_ratio=1.0), tokenizer=processor):
            assert torch.equal(model(**inputs).logits, expected)
        with attach(model, Uniform(max_tokens=2), tokenizer=processor):
            assert not torch.allclose(model(**inputs).logits[:, -1], expected[:, -1])


def test_bfloat16(family, video):
    """Pixels come as float32: they are brought to the model's dtype."""
    name, _, _ = family
    model, processor = embedded.build(name)
    inputs = prepare(processor, video, QUESTION)
    result = answer(model.bfloat16(), processor, inputs, Uniform(max_tokens=5), max_new_tokens=1)
    assert result.kept == 5


@pytest.mark.parametrize("position, newlines", [("grid", 18), ("frame", 6), ("one_token", 1), (None, 1)])
def test_newlines_of_llava_video(video, position, newlines):
    """A converted LLaVA-Video says in its config where its newlines are."""
    model, processor = embedded.build("llava_onevision")
    model.config.mm_newline_position = position
    inputs = prepare(processor, video, QUESTION)
    plain = answer(model, processor, inputs, max_new_tokens=2)
    kept = answer(model, processor, inputs, Uniform(retention_ratio=1.0), max_new_tokens=2)
    fewer = answer(model, processor, inputs, Uniform(max_tokens=8), max_new_tokens=2)
    assert (plain.tokens, kept.kept, kept.text) == (54 + newlines, 54 + newlines, plain.text)
    (of_video,) = fewer.report.videos
    assert of_video.newlines == newlines
    assert of_video.kept_newlines == len(set((of_video.indices // (54 // newlines)).tolist()))
    assert (fewer.kept, len(of_video.indices)) == (8, 8 - of_video.kept_newlines)
    assert of_video.frame_seconds.tolist() == pytest.approx(FRAMES)


@pytest.fixture(scope="module")
def folder(family, tmp_path_factory):
    return str(embedded.save(tmp_path_factory.mktemp(family[0]), model_type=family[0]))


def test_saved_and_loaded(family, folder, video):
    name, _, _ = family
    built, processor = embedded.build(name)
    model, loaded, selector = load_model(folder)
    assert selector is None
    assert type(model) is type(built)
    assert type(loaded) is type(processor)
    assert not model.training
    inputs, again = prepare(processor, video, QUESTION), prepare(loaded, video, QUESTION)
    assert set(inputs) == set(again)
    assert all(torch.equal(torch.as_tensor(inputs[k]), torch.as_tensor(again[k])) for k in inputs)
    with torch.no_grad():
        assert torch.equal(model(**again).logits, built(**inputs).logits)
    before = answer(built, processor, inputs, Uniform(max_tokens=5), max_new_tokens=4)
    after = answer(model, loaded, again, Uniform(max_tokens=5), max_new_tokens=4)
    assert (after.text, after.kept) == (before.text, before.kept)


def test_ask(family, folder, clip, capsys):
    name, _, _ = family
    expected = FAMILIES[name]
    command = ["ask", str(clip), QUESTION, "--model", folder, "--method", "uniform", "--max-tokens", "6"]
    assert main([*command, "--max-new-tokens", "2", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["tokens"], said["kept"]) == (expected.tokens, 6)
    assert tuple(said["grid"]) == expected.grid
    kept = said["kept_tokens"]
    assert kept["seconds"] == pytest.approx([expected.seconds[frame] for frame in kept["frame"]], abs=1e-3)
