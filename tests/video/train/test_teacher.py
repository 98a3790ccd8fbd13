"""The teacher's scores: made in the step, or once and read from disk."""

import json
import shutil

import numpy as np
import pytest
import qts_video
import torch
from families import FAMILIES
from qts_video import embedded
from qts_video.data import Collator, Sample
from qts_video.flexselect.relevance import relevance_by_layer
from qts_video.methods import FlexSelect
from qts_video.train.lite_scores import SETTINGS, LiteCollator, ScoreFolder, dump_scores, sample_key
from qts_video.train.teacher import Teacher, fingerprint
from qts_video.video import Video
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_lite import Samples, build_student, collate, logged, make_trainer
from tiny import Keep, keep_all
from tiny_qwen import build_model


def film(number, frames=6):
    noise = np.random.default_rng(number).integers(0, 255, (frames, 3, 56, 84), np.uint8)
    seconds = [i / 2 for i in range(frames)]
    return Video(torch.from_numpy(noise), seconds, 2.0, list(range(frames)), frames, frames / 2, f"{number}", "test")


def make_sample(number, question="What moves?", frames=6):
    return Sample(film(number, frames), question, "a dog", id=f"sample {number}")


@pytest.fixture(scope="module")
def built():
    return embedded.build()


@pytest.fixture(scope="module")
def collator(built):
    return Collator(built[1], train=False)


@pytest.fixture(scope="module")
def samples():
    return [make_sample(0), make_sample(1, "Who?", 4), make_sample(2)]


@pytest.fixture(scope="module")
def dumped(built, collator, samples, tmp_path_factory):
    return dump_scores(built[0], collator, samples, tmp_path_factory.mktemp("scores") / "new", layer=1, progress=False)


class Relevance(Keep):
    """Notes the relevance of a forward that runs to its end."""

    def __init__(self, layer, **options):
        super().__init__(keep_all)
        self.layer, self.options = layer, options

    def select(self, videos):
        self.relevance = relevance_by_layer(videos, [self.layer], **self.options)[self.layer]
        return super().select(videos)


@pytest.mark.parametrize("name", ["one", "unequal", "several"])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_in_every_family(family, name):
    family = FAMILIES[family]
    model, batch = family.build_model(), family.inputs(*family.prompts[name])
    options = {"reduce": "mean", "frames_per_set": 3}
    with torch.no_grad():
        plain = model(**batch).logits
    teacher = Teacher(model, 1, **options)
    videos = teacher.prefill(batch | {"labels": batch["input_ids"], "seconds_per_step": [1.0]})
    scores = teacher.scores(videos)
    selector = Relevance(1, **options)
    with qts_video.attach(model, selector), torch.no_grad():
        model(**batch)
    assert torch.equal(scores, selector.relevance)
    assert not scores.requires_grad
    assert videos.context.vision is not None
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, plain)


def test_the_language_model_does_not_run_where_scores_are_given():
    model = build_model()
    model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("a layer ran"))
    videos = Teacher(model, 1).prefill(collate([Samples()[0]]))
    assert videos.lengths == [18]


def test_pixels_come_in_any_dtype():
    model, batch = build_model(), collate([Samples()[0]])
    teacher = Teacher(model, 1)
    found = teacher.scores(teacher.prefill(batch | {"pixel_values_videos": batch["pixel_values_videos"].float()}))
    torch.testing.assert_close(found, teacher.scores(teacher.prefill(batch)), rtol=1e-4, atol=1e-6)


def test_the_model_is_frozen_and_checked():
    model = build_model().train()
    teacher = Teacher(model, 1)
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="every sample must have a video, and of 2 these have none: \\[1\\]"):
        teacher.prefill(FAMILIES["qwen2_5_vl"].inputs(*two_samples()))
    family = FAMILIES["qwen2_5_vl"]
    with pytest.raises(ValueError, match="and of 2 these have none: \\[0, 1\\]"):
        teacher.prefill(family.inputs(*family.prompts["images"]))
    with pytest.raises(ValueError, match="no reference layer is known"):
        Teacher(model)
    with pytest.raises(ValueError, match=r"expected a layer of 0 .. 2"):
        Teacher(model, 3)
    with pytest.raises(ValueError, match="reduce must be one of max, mean"):
        Teacher(model, 1, reduce="sum")
    with pytest.raises(ValueError, match="query must be one of prompt, question, got 'all'"):
        Teacher(model, 1, query="all")


def two_samples():
    prompts = FAMILIES["qwen2_5_vl"].prompts
    return [prompts["one"][0], prompts["images"][0]]


def test_fingerprints_tell_models_apart():
    model = build_model()
    first = fingerprint(model)
    assert fingerprint(build_model()) == first
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    assert fingerprint(model) != first
    assert fingerprint(build_model().float()) != first


def test_a_file_a_sample(built, collator, samples, dumped):
    names = {path.name for path in dumped.folder.iterdir()}
    assert names == {SETTINGS, *(f"{sample_key(sample)}.safetensors" for sample in samples)}
    teacher = Teacher(built[0], 1)
    for sample in samples:
        videos = teacher.prefill(collator([sample]))
        scores, grids = dumped.read(sample)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, teacher.scores(videos))
        assert grids == videos.grids
        with safe_open(dumped.path(sample), "pt") as file:
            assert file.metadata()["sample"] == sample.id
            assert json.loads(file.metadata()["settings"]) == dumped.settings
    assert dumped.settings["layer"] == 1
    assert dumped.settings["model"] == fingerprint(built[0])
    assert dumped.settings["reduce"] == "max"


def test_an_interrupted_dump_goes_on(built, collator, samples, dumped, tmp_path, monkeypatch):
    folder = tmp_path / "scores"
    shutil.copytree(dumped.folder, folder)
    scores = ScoreFolder(folder)
    scores.path(samples[0]).unlink()
    damaged = scores.path(samples[1])
    damaged.write_bytes(damaged.read_bytes()[:-3])
    (folder / ".half.safetensors.1").write_bytes(b"left by a process that was killed")
    untouched = scores.path(samples[2]).stat().st_mtime_ns
    made, plain = [], Teacher.scores
    monkeypatch.setattr(Teacher, "scores", lambda self, videos: made.append(1) or plain(self, videos))
    dump_scores(built[0], collator, samples, folder, layer=1)
    assert len(made) == 2
    assert scores.path(samples[2]).stat().st_mtime_ns == untouched
    for sample in samples:
        assert torch.equal(scores.read(sample)[0], dumped.read(sample)[0])


def test_a_write_that_fails_leaves_nothing(built, collator, samples, tmp_path, monkeypatch):
    def fails(self, target):
        raise OSError("no space left")

    folder = tmp_path / "scores"
    dump_scores(built[0], collator, [], folder, layer=1)
    monkeypatch.setattr("pathlib.Path.replace", fails)
    with pytest.raises(OSError, match="no space left"):
        dump_scores(built[0], collator, samples, folder, layer=1)
    assert [path.name for path in folder.iterdir()] == [SETTINGS]


def test_other_settings_are_refused(built, collator, samples, dumped):
    model, processor = built
    other = embedded.build(seed=1)[0]
    for arguments, options, message in (
        ((model, collator), {"layer": 0}, r"made with other settings: layer 1 \(expected 0\)"),
        ((model, collator), {"layer": 1, "reduce": "mean"}, r"settings: reduce max \(expected mean\)"),
        ((model, collator), {"layer": 1, "frames_per_set": 8}, r"frames_per_set 64 \(expected 8\)"),
        ((other, collator), {"layer": 1}, r"other settings: model [0-9a-f]{32} \(expected [0-9a-f]{32}\)"),
        ((model, lambda samples: collator(samples)), {"layer": 1}, r"processor [0-9a-f]{32} \(expected None\)"),
    ):
        with pytest.raises(ValueError, match=message):
            dump_scores(*arguments, samples, dumped.folder, **options)
    assert processor.chat_template


def test_other_folders_are_refused(built, collator, samples, dumped, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty, and no folder of scores: it has no settings\.json"):
        dump_scores(built[0], collator, samples, tmp_path, layer=1)
    with pytest.raises(FileNotFoundError, match=r"no settings\.json; make a folder of scores with dump_scores"):
        ScoreFolder(tmp_path)


def test_bad_files_are_named(samples, dumped, tmp_path):
    folder = tmp_path / "scores"
    shutil.copytree(dumped.folder, folder)
    scores, sample = ScoreFolder(folder), samples[0]
    path = scores.path(sample)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    good = load_file(path)["scores"]
    for tensor in (good[:-1], good.double(), good * torch.nan):
        save_file({"scores": tensor}, path, metadata)
        with pytest.raises(ValueError, match=f"expected {len(good)} finite float32 scores, got"):
            scores.read(sample)
        assert not scores.has(sample)
    save_file({"scores": good}, path, metadata | {"settings": json.dumps(scores.settings | {"layer": 0})})
    with pytest.raises(ValueError, match=r"made with .*'layer': 0.*, and settings.json says"):
        scores.read(sample)
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="damaged"):
        scores.read(sample)
    with pytest.raises(FileNotFoundError, match=r"has no scores of \(id sample 9\): run dump_scores"):
        scores.read(make_sample(9))


def test_keys_are_of_what_scores_depend_on(samples):
    sample, other = make_sample(0), film(0)
    other.seconds[1] += 0.25
    assert sample_key(sample) == sample_key(samples[0])
    assert sample_key(Sample(film(0), "What moves?", "a cat", id="renamed")) == sample_key(sample)
    variants = [make_sample(0, "Who?"), make_sample(1), make_sample(0, frames=5), Sample(other, "What moves?", "")]
    assert len({sample_key(variant) for variant in (sample, *variants)}) == 5


def test_training_from_disk_is_training_online(built, collator, samples, dumped, tmp_path):
    model = built[0]
    options = {"model": model, "teacher": {"layer": 1}, "max_steps": 2, "per_device_train_batch_size": 3}
    online, offline = (
        make_trainer(tmp_path, student=build_student(model), collator=kind, **options)
        for kind in (collator, LiteCollator(collator, dumped))
    )
    for trainer in (online, offline):
        trainer.train_dataset = samples
    offline.teacher.scores = lambda videos: pytest.fail("scored again")
    for trainer in (online, offline):
        trainer.train()
    assert logged(online) == logged(offline)
    with pytest.raises(ValueError, match=r"other settings: layer 1 \(expected 0\)"):
        make_trainer(tmp_path, model=model, teacher={"layer": 0}, collator=LiteCollator(collator, dumped))


def test_scores_that_do_not_fit_the_prompt(built, collator, samples, dumped, tmp_path):
    trainer = make_trainer(tmp_path, model=built[0], teacher={"layer": 1}, collator=LiteCollator(collator, dumped))
    batch = LiteCollator(collator, dumped)(samples[:1])
    with pytest.raises(ValueError, match=r"scores are of videos of grids \[\(3, 2, 2\)\], and the prompt has"):
        trainer.compute_loss(trainer.model, batch | {"teacher_grids": torch.tensor([[3, 2, 2]])})


def test_the_teacher_scores_as_flexselect(built, collator, samples, dumped):
    model = built[0]
    with (
        qts_video.attach(model, FlexSelect(layer=1, max_tokens=4)) as handle,
        torch.no_grad(),
        pytest.warns(UserWarning, match="training-free"),
    ):
        model(**collator(samples[:1]))
    assert torch.equal(handle.last.videos[0].scores, dumped.read(samples[0])[0])
