"""``qts eval`` as a person runs it, and ``qts data check``."""

import json

import pytest
import torch
from video.clips import write_clip

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.answer import answer, prepare
from qts_video.cli import main
from qts_video.data import VideoQADataset
from qts_video.evaluate.predict import Predictor
from qts_video.methods import Uniform

CHOICES = ["red", "blue", "green"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(embedded.save(tmp_path_factory.mktemp("checkpoint")))


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    write_clip(folder / "a.mp4", frames=36, rate=12, size=(84, 56))
    write_clip(folder / "b.mp4", frames=24, rate=12, size=(112, 84))
    return folder


def write(path, records):
    path.write_text("\n".join(record if isinstance(record, str) else json.dumps(record) for record in records))
    return path


@pytest.fixture
def vscq(videos, tmp_path):
    return write(
        tmp_path / "test.jsonl",
        [
            {"id": i, "video": "ab"[i % 2], "question": f"Which is {i}?", "options": CHOICES, "answer": "ABC"[i % 3]}
            for i in range(6)
        ],
    )


@pytest.fixture
def evaluate(checkpoint, videos, tmp_path, capsys):
    def run(file, *options, output="out"):
        command = ["eval", str(file), "--model", checkpoint, "--media-root", str(videos), "--max-new-tokens", "3"]
        status = main([*command, "--output", str(tmp_path / output), *options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def lines(folder):
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_multiple_choice(evaluate, vscq, tmp_path):
    status, out, _ = evaluate(vscq, "--method", "uniform", "--retention-ratio", "0.25", "--score", "logits")
    assert status == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    written = lines(tmp_path / "out")
    assert [line["number"] for line in written] == list(range(6))
    right = [line["answer"] == line["prediction"] for line in written]
    assert metrics["accuracy"] == sum(right) / 6
    assert (metrics["questions"], metrics["skipped"], metrics["unparsed"]) == (6, [], 0)
    assert metrics["retention_ratio"] == metrics["kept"] / metrics["tokens"] == pytest.approx(0.25, abs=0.05)
    for line in written:
        assert sum(line["probabilities"].values()) == pytest.approx(1)
        assert line["prediction"] == max(line["probabilities"], key=line["probabilities"].get)
    assert f"accuracy        {metrics['accuracy']:.4f}" in out
    for name in ("confusion.png", "curves.png"):
        assert (tmp_path / "out" / name).read_bytes()[:4] == b"\x89PNG"
        assert f"written         {tmp_path / 'out' / name}" in out


def test_answers_are_those_of_qts_ask(checkpoint, videos, vscq, evaluate, tmp_path):
    from qts_video.checkpoints import load_model

    assert evaluate(vscq, "--method", "uniform", "--max-tokens", "5")[0] == 0
    model, processor, _ = load_model(checkpoint)
    for sample, line in zip(VideoQADataset(vscq, media_root=videos), lines(tmp_path / "out"), strict=True):
        inputs = prepare(processor, sample.video, sample.prompt)
        expected = answer(model, processor, inputs, Uniform(max_tokens=5), max_new_tokens=3)
        assert (line["text"], line["kept"], line["tokens"]) == (expected.text, 5, expected.tokens)


def test_goes_on_where_it_was_stopped(evaluate, vscq, tmp_path):
    options = ("--method", "random", "--max-tokens", "4", "--seed", "3")
    assert evaluate(vscq, *options, output="whole")[0] == 0
    assert evaluate(vscq, *options)[0] == 0
    path = tmp_path / "out" / "predictions.jsonl"
    whole = path.read_bytes()
    assert whole == (tmp_path / "whole" / "predictions.jsonl").read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert evaluate(vscq, *options)[0] == 0
    assert path.read_bytes() == whole
    assert evaluate(vscq, *options, "--batch-size", "2", output="batches")[0] == 0
    status, _, err = evaluate(vscq, *options[:-1], "4")
    assert status == 2
    assert "holds predictions of other settings (seed was 3 and is 4): choose another folder" in err
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "mine").touch()
    assert "expected an empty folder or one of qts eval" in evaluate(vscq, *options, output="else")[2]
    vscq.write_text(vscq.read_text() + "\n" + vscq.read_text().splitlines()[0])
    assert "(file was '" in evaluate(vscq, *options)[2]


def test_skipped_records_are_listed(evaluate, videos, vscq, tmp_path):
    (videos / "broken.mp4").write_bytes(b"no video")
    records = vscq.read_text().splitlines()
    for name in ("gone", "broken.mp4"):
        records.append(json.dumps(json.loads(records[0]) | {"video": name}))
    write(vscq, [*records, "{"])
    status, out, err = evaluate(vscq, "--method", "none")
    assert status == 1
    skipped = json.loads((tmp_path / "out" / "metrics.json").read_text())["skipped"]
    assert {one["source"]: one["reason"][:12] for one in skipped} == {
        f"{vscq}:9": "expected a J",
        f"{vscq}:7": "no video gon",
        f"{vscq}:8": f"{vscq}:8: "[:12],
    }
    assert "skipped         3" in out
    assert "1 of 8 records have no video, and are left out" in err
    assert len(lines(tmp_path / "out")) == 6


def test_free_answers(evaluate, tmp_path):
    records = [{"video": "a", "question": "Which?", "answer": text} for text in ("red circle", "blue")]
    path = write(tmp_path / "test.jsonl", records)
    status, out, _ = evaluate(path, "--method", "none")
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert (status, metrics["questions"], metrics["retention_ratio"]) == (0, 2, 1)
    assert {"exact_match", "f1"} <= metrics.keys()
    assert "exact_match" in out
    assert not list((tmp_path / "out").glob("*.png"))
    assert "--score belongs to questions with choices" in evaluate(path, "--score", "logits", output="b")[2]


def test_usage(evaluate, vscq, tmp_path):
    status, _, err = evaluate(tmp_path / "none.jsonl", "--method", "none")
    assert (status, "No such file" in err) == (2, True)
    status, _, err = evaluate(vscq, "--method", "uniform", "--layer", "2")
    assert (status, "--layer belongs to --method flexselect" in err) == (2, True)
    assert "say --max-frames here" in evaluate(vscq, "--method", "none", "--dynamic-frames")[2]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", [name for name in embedded.MODEL_TYPES if name != "llava_next_video"])
def test_batches_of_every_family(family, videos, vscq):
    """A batch gives what its samples give alone."""
    model, processor = embedded.build(family)
    samples = list(VideoQADataset(vscq, media_root=videos, max_frames=4))[:3]
    for selector in (None, Uniform(max_tokens=6)):
        predictor = Predictor(model, processor, selector, max_new_tokens=2)
        together = predictor(samples)
        for sample, prediction in zip(samples, together, strict=True):
            (alone,) = predictor([sample])
            assert (prediction.text, prediction.kept) == (alone.text, alone.kept)
            assert prediction.probabilities == pytest.approx(alone.probabilities, rel=1e-3)
    assert not hasattr(model, "_qts_video_attachment")


def test_letters_that_begin_with_one_token(videos, vscq):
    model, processor = embedded.build("llava_next_video")
    predictor = Predictor(model, processor)
    with pytest.raises(ValueError, match="the letters' first tokens must differ, got "):
        predictor([VideoQADataset(vscq, media_root=videos)[0]])
    assert not hasattr(model, "_qts_video_attachment")


def test_newlines_and_times_of_llava_video(videos, vscq):
    model, processor = embedded.build("llava_onevision")
    model.config.mm_newline_position = "grid"
    sample = VideoQADataset(vscq, media_root=videos, max_frames=4)[0]
    (prediction,) = Predictor(model, processor, max_new_tokens=2)([sample])
    with torch.inference_mode():
        expected = answer(model, processor, prepare(processor, sample.video, sample.prompt, model), max_new_tokens=2)
    assert (prediction.text, prediction.tokens) == (expected.text, expected.tokens)
    assert prediction.tokens == 4 * (9 + 3)


def test_check(videos, tmp_path, capsys):
    records = [
        {"id": 7, "video": "a", "question": "Which one is it?", "options": CHOICES, "answer": letter}
        for letter in "AAB"
    ]
    path = write(tmp_path / "test.jsonl", records)
    command = ["data", "check", str(path), "--media-root", str(videos)]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "format    vscq",
        "questions 3, about 1 videos",
        "answers   A 2 (66.7%), B 1 (33.3%)",
        f"longest   question: 16 characters ({path}:1)",
        "repeated  ids: 1",
        f"  7: {path}:1, {path}:2, {path}:3",
        "bad       records: 0",
        "missing   videos: 0",
    ]
    (videos / "broken.mp4").write_bytes(b"no video")
    write(path, [*records, "[", records[0] | {"video": "gone"}, records[0] | {"video": "broken"}])
    assert main(command) == 1
    said = capsys.readouterr().out
    assert f"bad       records: 1\n  {path}:4: expected a JSON object" in said
    assert f"missing   videos: 1\n  {path}:5: gone\n" in said
    assert "broken    videos" not in said
    write(path, [*records, records[0] | {"video": "broken"}])
    assert main(command) == 0
    capsys.readouterr()
    assert main([*command, "--decode"]) == 1
    assert f"broken    videos: 1\n  {videos}/broken.mp4: not a video" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "none")]) == 2
    assert "No such file" in capsys.readouterr().err
