"""Training of Lite selectors: what learns, what stays, what is saved, and what it does not depend on."""

import copy
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import qts_video
import torch
from families import FAMILIES
from qts_video.lite import LiteSelector
from qts_video.lite.config import FAMILIES as FITTING
from qts_video.methods import FlexSelect
from qts_video.train.lite import LiteTrainer, LiteTrainingArguments
from qts_video.train.ranking import l1_loss, rank_loss, spearman
from qts_video.train.teacher import Teacher
from small_lite import LAYER, SIZES, Samples, build_student, collate, logged, make_trainer
from tiny_qwen import build_model


@pytest.fixture(scope="module")
def model():
    return build_model()


def weights(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def batch_of(*indices):
    batch = collate([Samples()[index] for index in indices])
    return {name: value for name, value in batch.items() if name != "labels"}


def scores_in_use(model, selector, batch, **options):
    """What FlexSelect scores with, by its own way."""
    with qts_video.attach(model, FlexSelect(max_tokens=4, selector=selector, **options)) as handle, torch.no_grad():
        model(**batch)
    return torch.cat([video.scores for video in handle.last.videos])


@pytest.mark.parametrize("name", [name for name in FAMILIES if name.split()[0] in FITTING])
def test_every_parameter_gets_a_gradient_in_every_family(name):
    family = FAMILIES[name]
    model = family.build_model()
    student = build_student(model).train()
    teacher = Teacher(model, 1)
    for prompts in ("unequal", "several"):
        videos = teacher.prefill(family.inputs(*family.prompts[prompts]))
        scores = student(videos)
        losses = rank_loss(scores.log(), teacher.scores(videos), videos.cu_seqlens)
        assert losses.shape == (len(videos.lengths),)
        losses.sum().backward()
    dead = [name for name, p in student.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not dead
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("options", [{}, {"reduce": "mean", "query": "prompt", "frames_per_set": 2}])
def test_the_student_scores_as_in_use(model, options):
    student, batch = build_student(model), batch_of(0, 2, 3)
    videos = Teacher(model, LAYER).prefill(batch)
    scores = student(videos, **options)
    assert scores.requires_grad
    torch.testing.assert_close(scores.detach().float(), scores_in_use(model, student, batch, **options))


def test_gradient_checkpointing_changes_nothing(model):
    videos = Teacher(model, LAYER).prefill(batch_of(0, 2))
    grads = []
    for kwargs in (None, {"use_reentrant": False}):
        student = build_student(model).train()
        if kwargs:
            student.gradient_checkpointing_enable(kwargs)
        student(videos).log().square().sum().backward()
        grads.append({name: p.grad for name, p in student.named_parameters()})
    assert same(*grads)


def test_the_student_learns_and_the_model_stays(model, tmp_path):
    before = weights(model)
    trainer = make_trainer(tmp_path, model=model, max_steps=30, train=4, evaluate=4, learning_rate=3e-3)
    first = trainer.evaluate()
    trainer.train()
    last = trainer.evaluate()
    assert last["eval_spearman"] > first["eval_spearman"] + 0.3
    assert last["eval_recall_at_0.25"] >= first["eval_recall_at_0.25"]
    assert last["eval_loss"] < first["eval_loss"] - 0.3
    assert same(weights(model), before)
    assert not model.training
    mine = {id(p) for p in trainer.model.parameters()}
    groups = trainer.optimizer.param_groups
    assert {id(p) for group in groups for p in group["params"]} == mine


@pytest.mark.parametrize("loss", ["rank", "l1", "both"])
def test_the_loss_is_the_mean_over_samples(model, tmp_path, loss):
    student = build_student(model)
    trainer = make_trainer(tmp_path, model=model, student=student, loss=loss, temperature=0.3)
    found = trainer.compute_loss(trainer.model, batch_of(0, 2, 3)).item()
    of_samples = []
    for index in (0, 2, 3):
        videos = trainer.teacher.prefill(batch_of(index))
        x, t = (s.detach().log() for s in (student(videos), trainer.teacher.scores(videos)))
        losses = 0
        if loss != "l1":
            losses = losses + rank_loss(x, t, videos.cu_seqlens)
        if loss != "rank":
            losses = losses + l1_loss(x, t, videos.cu_seqlens)
        of_samples.append(losses.mean().item())
    assert found == pytest.approx(sum(of_samples) / 3, rel=1e-9)


def test_metrics_of_an_evaluation(model, tmp_path):
    student = build_student(model)
    trainer = make_trainer(tmp_path, model=model, student=student, evaluate=5, recall_at=(0.5,))
    found = trainer.evaluate()
    of_samples, recalls = [], []
    for index in range(5):
        videos = trainer.teacher.prefill(batch_of(index))
        x, t = student(videos).detach(), trainer.teacher.scores(videos)
        of_samples.append(spearman(x, t, videos.cu_seqlens).mean())
        of_videos = []
        for a, b in zip(x.split(videos.lengths), t.split(videos.lengths), strict=True):
            count = -(-len(a) // 2)
            best = {*a.topk(count).indices.tolist()} & {*b.topk(count).indices.tolist()}
            of_videos.append(len(best) / count)
        recalls.append(sum(of_videos) / len(of_videos))
    assert found["eval_spearman"] == pytest.approx(torch.stack(of_samples).mean().item())
    assert found["eval_recall_at_0.5"] == pytest.approx(sum(recalls) / 5)


def test_four_steps_are_two_and_two(model, tmp_path):
    whole = make_trainer(tmp_path, model=model, save_strategy="steps", save_steps=2)
    whole.train()
    again = make_trainer(tmp_path, model=model)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.state.global_step == 4
    assert same(weights(again.model), weights(whole.model))
    assert not same(weights(again.model), weights(build_student(model)))
    loaded = LiteSelector.from_pretrained(tmp_path / "checkpoint-4")
    assert same(weights(loaded), weights(whole.model))
    assert {path.name for path in (tmp_path / "checkpoint-4").iterdir()} >= {"config.json", "model.safetensors"}
    selector = FlexSelect.lite(tmp_path / "checkpoint-4", max_tokens=4).selector
    assert torch.equal(scores_in_use(model, selector, batch_of(0)), scores_in_use(model, whole.student, batch_of(0)))
    with pytest.raises(FileNotFoundError, match=r"is no checkpoint: it has no model.safetensors"):
        again._load_from_checkpoint(str(tmp_path))


def test_accumulation_is_a_larger_batch(model, tmp_path):
    large = make_trainer(tmp_path, model=model, max_steps=2, per_device_train_batch_size=4)
    small = make_trainer(
        tmp_path, model=model, max_steps=2, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    for trainer in (large, small):
        trainer.train()
    assert logged(small) == pytest.approx(logged(large), rel=1e-6)
    for name, tensor in large.model.state_dict().items():
        torch.testing.assert_close(small.model.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)


def test_bfloat16_beside_float32_weights_and_a_report(tmp_path):
    model = build_model().bfloat16()
    student = build_student(model).float()
    trainer = make_trainer(
        tmp_path, model=model, student=student, bf16=True, report_to="tensorboard", max_steps=2, save_strategy="no"
    )
    trainer.train()
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(loss == loss for loss in logged(trainer))
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_two_processes_are_one(model, tmp_path):
    """The same batches of four samples: of a process, and of two with gloo."""
    alone = make_trainer(tmp_path / "one", model=model, per_device_train_batch_size=4, max_steps=2)
    alone.train()
    alone.save_model()
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    processes = []
    for rank in range(2):
        environment = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        command = [sys.executable, str(Path(__file__).with_name("lite_process.py")), str(tmp_path / "two")]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    outputs = [process.communicate(timeout=200)[0].decode() for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    one, two = (LiteSelector.from_pretrained(tmp_path / name) for name in ("one", "two"))
    start = weights(build_student(model))
    assert not same(weights(one), start)
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(two.state_dict()[name], tensor, rtol=1e-7, atol=1e-9)
    report = json.loads((tmp_path / "two" / "report.json").read_text())
    assert report["losses"] == pytest.approx(logged(alone), rel=1e-6)
    alone.eval_dataset = Samples(5)
    wanted = alone.evaluate()
    for name in ("eval_spearman", "eval_recall_at_0.1"):
        assert report[name] == pytest.approx(wanted[name])


def test_published_recipe():
    args = LiteTrainingArguments("x")
    assert (args.learning_rate, args.num_train_epochs, args.report_to, args.loss) == (1e-5, 1, [], "rank")


def test_bad_arguments(model, tmp_path):
    student, teacher = build_student(model), Teacher(model, LAYER)
    args = LiteTrainingArguments(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="args must be LiteTrainingArguments, got dict"):
        LiteTrainer(student, teacher, {}, collate)
    with pytest.raises(TypeError, match="data_collator is missing"):
        LiteTrainer(student, teacher, args)
    with pytest.raises(ValueError, match=r"must be trained in float32, got torch.bfloat16"):
        LiteTrainer(copy.deepcopy(student).bfloat16(), teacher, args, collate)
    with pytest.raises(ValueError, match="of the qwen family, and LlavaOnevisionForConditionalGeneration of the llava"):
        LiteTrainer(student, Teacher(FAMILIES["llava_onevision"].build_model(), 1), args, collate)
    for options, message in (
        ({"loss": "l2"}, "loss must be one of l1, rank, both, got 'l2'"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"recall_at": (0.5, 2)}, r"recall_at must be shares in \(0, 1\], got \(0.5, 2\)"),
    ):
        with pytest.raises(ValueError, match=message):
            LiteTrainingArguments(str(tmp_path), **options)
    assert SIZES["layers"] == len(student.decoder.layers)
