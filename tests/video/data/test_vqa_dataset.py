"""The dataset: what it leaves out and says so, what it reads, and that workers read the same."""

import json
import pickle

import pytest
import torch
from torch.utils.data import DataLoader
from video.clips import write_clip

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.data import Collator, RecordError, VideoQADataset
from qts_video.video import VideoError


@pytest.fixture
def folder(tmp_path):
    write_clip(tmp_path / "a.mp4", frames=36, rate=12, size=(84, 56))
    write_clip(tmp_path / "b.mp4", frames=12, rate=12, size=(84, 56))
    return tmp_path


def write(folder, *records, name="train.jsonl"):
    path = folder / name
    path.write_text("\n".join(json.dumps(record) for record in records))
    return path


def vqa(video, answer="red", **more):
    return {"video": video, "question": "Which colour?", "answer": answer} | more


def test_samples(folder):
    path = write(folder, vqa("a", id="x", options=["red", "blue"]), vqa("b.mp4", "B", options=["red", "blue"]))
    dataset = VideoQADataset(path, fps=2, max_frames=4)
    assert (len(dataset), dataset.formats) == (2, ["vscq"])
    first, second = dataset
    assert (first.id, first.answer, first.choices, first.source) == ("x", "A", ("red", "blue"), f"{path}:1")
    assert first.name == f"{path}:1 (id x)"
    assert first.prompt.startswith("Which colour?\nA. red\nB. blue\nAnswer with")
    assert (len(first.video.frames), len(second.video.frames)) == (4, 4)
    assert first.video.source == str(folder / "a.mp4")


def test_missing_media_are_counted_and_listed(folder):
    path = write(folder, vqa("a"), vqa("gone.mp4"), vqa("b"), vqa("also/gone"))
    with pytest.warns(UserWarning, match="2 of 4 records have no video, and are left out") as caught:
        dataset = VideoQADataset(path)
    assert f"{path}:2: gone.mp4\n{path}:4: also/gone" in str(caught[0].message)
    assert [record.media for record in dataset.missing] == ["gone.mp4", "also/gone"]
    assert [sample.source for sample in dataset] == [f"{path}:1", f"{path}:3"]
    with pytest.raises(RecordError, match="4 of 4 records have no video"):
        VideoQADataset(path, media_root=folder / "elsewhere")


def test_bad_records(folder):
    path = write(folder, vqa("a"), {"video": "a"}, vqa("b"))
    with pytest.raises(RecordError, match=r"train.jsonl:2: expected a record with"):
        VideoQADataset(path)
    with pytest.warns(UserWarning, match=r"1 bad records are left out:\n.*train.jsonl:2: expected"):
        dataset = VideoQADataset(path, on_bad="skip")
    assert (len(dataset), len(dataset.bad)) == (2, 1)
    with pytest.raises(RecordError, match=r"no record can be used"):
        VideoQADataset(write(folder, {"video": "a"}), on_bad="skip")


def test_several_files(folder):
    first, second = write(folder, vqa("a")), write(folder, vqa("b", "A", options=["x", "y"]), name="more.jsonl")
    dataset = VideoQADataset([first, second], media_root=folder)
    assert (dataset.formats, len(dataset)) == (["vqa", "vscq"], 2)


def test_random_sampling_by_epoch_and_in_workers(folder):
    path = write(folder, vqa("a"), vqa("a"))
    dataset = VideoQADataset(path, sampling="random", seed=3)
    # Spawned: a worker that is forked from a process that has run models may wait for a lock that nobody holds.
    loader = DataLoader(
        dataset, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context="spawn"
    )

    def frames(samples):
        return [sample.video.frame_indices for sample in samples]

    seen = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        seen.append(frames(dataset))
        assert frames(loader) == seen[-1]
    assert seen[0] != seen[1]
    assert seen[0][0] != seen[0][1]
    dataset.set_epoch(0)
    assert frames(VideoQADataset(path, sampling="random", seed=3)) == seen[0]
    assert frames(VideoQADataset(path, sampling="random", seed=4)) != seen[0]
    again = pickle.loads(pickle.dumps(dataset))
    assert (again.epoch, frames(again)) == (0, seen[0])


def test_batches(folder):
    dataset = VideoQADataset(write(folder, vqa("a"), vqa("b"), vqa("a")), max_frames=4)
    loader = DataLoader(dataset, batch_size=2, collate_fn=Collator(embedded.build_processor()))
    sizes = [batch["labels"].shape[0] for batch in loader]
    assert sizes == [2, 1]


def test_a_video_that_does_not_decode_is_named_with_its_record(folder):
    (folder / "c.mp4").write_bytes(b"no video")
    dataset = VideoQADataset(write(folder, vqa("a"), vqa("c.mp4")))
    with pytest.raises(VideoError, match=r"train.jsonl:2: .*c.mp4: not a video"):
        dataset[1]


def test_arguments(folder):
    path = write(folder, vqa("a"))
    with pytest.raises(ValueError, match="sampling must be one of uniform, random, middle, got 'first'"):
        VideoQADataset(path, sampling="first")
    with pytest.raises(IndexError):
        VideoQADataset(path)[1]
    assert torch.equal(VideoQADataset(path)[0].video.frames, VideoQADataset(path, sampling="uniform")[0].video.frames)
