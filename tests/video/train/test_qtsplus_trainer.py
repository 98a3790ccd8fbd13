"""QTSplusTrainer: what is trained, logged, saved, resumed, and the same on two processes as on one."""

import json

import pytest
import torch
from qts_video.methods import QTSplus
from qts_video.train.arguments import QTSplusArguments
from qts_video.train.model import SelectingModel
from qts_video.train.qtsplus import QTSplusTrainer
from small_training import PARTS, Samples, collate, logged, make_trainer
from tiny_qwen import build_model


def state_of(module):
    return {name: x.clone() for name, x in module.state_dict().items()}


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    "selecting",
    [
        {"scoring_layers": 1, "reencode_layers": 0},
        {"scoring_layers": 1, "reencode_layers": 1},
        {"scoring_layers": 2, "reencode_layers": 2},
    ],
    ids=str,
)
def test_stage_1_trains_every_parameter_of_the_selector_and_no_other(tmp_path, selecting):
    trainer = make_trainer(tmp_path, selecting=selecting, max_steps=1, warmup_share=0.0)
    before = state_of(trainer.selecting)
    gradients = {}
    trainer.create_optimizer()
    for name, parameter in trainer.selecting.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: gradients.update({name: p.grad.clone()}))
    trainer.train()
    wanted = {name for name, p in trainer.selecting.named_parameters() if p.requires_grad}
    assert set(gradients) == wanted
    assert all(g.isfinite().all() and g.any() for g in gradients.values())
    moved = changed(before, state_of(trainer.selecting))
    assert moved == wanted | {"selector.selector.rho_mean"}
    frozen = set(dict(trainer.selecting.named_parameters())) - wanted
    assert {name for name in frozen if not name.startswith("model.")} == {
        name for name in before if name.startswith("selector.") and name.endswith("k_proj.bias")
    }


def test_the_loss_goes_down(tmp_path):
    trainer = make_trainer(tmp_path, stage=2, max_steps=12, learning_rate=3e-3, per_device_train_batch_size=4)
    trainer.train()
    losses = logged(trainer, "cross_entropy")["cross_entropy"]
    assert max(losses[-3:]) < 0.9 * min(losses[:3])


def test_every_part_of_the_loss_is_logged_and_they_sum_to_it(tmp_path):
    trainer = make_trainer(tmp_path, lambda_squared=1.0, lambda_linear=2.0, lambda_stability=3.0, n_max=20)
    trainer.train()
    log = logged(trainer, *PARTS, "tokens")
    names = ("cross_entropy", "budget_squared", "budget_linear", "budget_stability")
    for loss, *parts in zip(log["loss"], *(log[name] for name in names), strict=True):
        assert loss == pytest.approx(sum(parts), rel=1e-5)
    assert log["budget_stability"][0] == 0
    assert min(log["budget_stability"][1:]) > 0
    # the first step's videos are known: what it logged is rho M / n_max of theirs
    assert log["budget_linear"][0] == pytest.approx(2 * log["rho"][0] * log["tokens"][0] / 20, rel=0.02)
    assert all(1 <= kept <= 20 for kept in log["kept"])
    trainer = make_trainer(tmp_path, gate_noise=False, n_max=3)
    trainer.train()
    assert logged(trainer, "kept")["kept"] == [3, 3, 3, 3]
    assert trainer.selecting.selector.selector.config["n_max"] == 3


def test_accumulation_is_a_larger_batch(tmp_path):
    whole = make_trainer(tmp_path, per_device_train_batch_size=4)
    whole.train()
    parts = make_trainer(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    parts.train()
    for name, values in logged(whole, *PARTS).items():
        assert logged(parts, name)[name] == pytest.approx(values, rel=1e-5), name


@pytest.mark.parametrize("options", [{}, {"stage": 2}, {"stage": 2, "lora_rank": 2, "lora_dropout": 0.1}], ids=str)
def test_a_resumed_training_goes_on_bit_for_bit(tmp_path, options):
    saving = {"save_strategy": "steps", "save_steps": 2, **options}
    whole = make_trainer(tmp_path / "whole", **saving)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert logged(resumed, *PARTS) == logged(whole, *PARTS)
    assert not changed(state_of(whole.selecting), state_of(resumed.selecting))
    a, b = whole.optimizer.state_dict()["state"], resumed.optimizer.state_dict()["state"]
    assert all(torch.equal(a[i]["exp_avg_sq"], b[i]["exp_avg_sq"]) for i in a)


def test_noise_depends_on_the_seed_and_the_step(tmp_path):
    kept = [logged_kept(tmp_path, seed=seed, learning_rate=0.0) for seed in (1, 1, 2)]
    assert kept[0] == kept[1]
    assert kept[0] != kept[2]
    one_sample = make_trainer(tmp_path, learning_rate=0.0, per_device_train_batch_size=8, max_steps=8)
    one_sample.train()
    assert len(set(logged(one_sample, "kept")["kept"])) > 1  # the same samples every step, other noise


def logged_kept(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return logged(trainer, "kept")["kept"]


def test_a_checkpoint_is_a_selector(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    trainer.save_model()
    loaded = QTSplus.from_pretrained(tmp_path)
    assert not loaded.training
    assert not changed(state_of(loaded.selector), state_of(trainer.selecting.selector.selector))
    assert float(loaded.selector.rho_mean) > 0.3
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_stage_2_trains_and_saves_the_language_model(tmp_path, tied):
    model = build_model(tie_word_embeddings=True) if tied else build_model()
    model.config.tie_word_embeddings = tied
    model.tie_weights()
    trainer = make_trainer(tmp_path, model=model, stage=2, max_steps=2, warmup_share=0.0)
    before = state_of(trainer.selecting)
    trainer.train()
    moved = changed(before, state_of(trainer.selecting))
    assert not {name for name in moved if "visual" in name}
    # but the rows of the embedding and biases of keys, all of the language model moves
    still = {name for name in before if ".language_model." in name} - moved
    assert all(name.endswith(("k_proj.bias", "inv_freq")) for name in still), still
    trainer.save_model()
    loaded = type(model).from_pretrained(tmp_path / "model", dtype=torch.float64)
    assert not changed(state_of(model), state_of(loaded))
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    fresh = make_trainer(
        tmp_path / "other", model=build_model(**{"tie_word_embeddings": True} if tied else {}), stage=2
    )
    fresh.selecting.load_pretrained(tmp_path)
    assert not changed(state_of(trainer.selecting), state_of(fresh.selecting))


def test_lora_trains_its_matrices_and_loads_by_peft(tmp_path):
    from peft import PeftModel

    trainer = make_trainer(tmp_path, stage=2, lora_rank=2, max_steps=3, warmup_share=0.0)
    before = state_of(trainer.selecting)
    trainer.train()
    moved = {name for name in changed(before, state_of(trainer.selecting)) if name.startswith("model.")}
    assert moved
    assert all("lora_" in name and ".language_model." in name for name in moved)
    trainer.save_model()
    loaded = PeftModel.from_pretrained(build_model(), tmp_path / "adapter")
    batch = {name: x for name, x in collate([Samples()[0]]).items() if name != "labels"}
    trainer.handle.remove()
    with torch.no_grad():
        want, got = trainer.selecting.model.eval()(**batch).logits, loaded.eval()(**batch).logits
        plain = build_model()(**batch).logits
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, plain)


def test_predictions_are_made_at_every_evaluation(tmp_path, capsys):
    trainer = make_trainer(
        tmp_path, evaluate=True, predictions=2, prediction_tokens=3, eval_strategy="steps", eval_steps=2
    )
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample"]) for line in lines] == [(2, 0), (2, 1), (4, 0), (4, 1)]
    assert [line["answer"] for line in lines[:2]] == [[60, 61, 505], [62, 505]]
    batch = collate([Samples()[0]])
    start = int((batch["labels"][0] != -100).nonzero()[0])
    prompt = {n: x[:, :start] if x.shape == batch["labels"].shape else x for n, x in batch.items() if n != "labels"}
    trainer.selecting.eval()
    answer = trainer.selecting.model.generate(**prompt, do_sample=False, max_new_tokens=3)[0, start:]
    assert lines[2]["prediction"] == answer.tolist()
    assert "step 4, sample 0: " in capsys.readouterr().out


def test_evaluation_is_inference_and_moves_nothing(tmp_path):
    trainer = make_trainer(tmp_path, evaluate=True)
    trainer.train()
    before = state_of(trainer.selecting)
    first, again = trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]
    assert first == again
    assert not changed(before, state_of(trainer.selecting))
    trainer.selecting.eval()
    with torch.no_grad():
        losses = [float(trainer.selecting(**collate([Samples()[i]]))["loss"]) for i in range(3)]
    assert first == pytest.approx(sum(losses) / 3, rel=1e-6)


def test_the_best_checkpoint_comes_back(tmp_path):
    trainer = make_trainer(
        tmp_path,
        evaluate=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.5,
        load_best_model_at_end=True,
        greater_is_better=True,  # the worst one, which here is not the last
    )
    trainer.train()
    best = QTSplus.from_pretrained(trainer.state.best_model_checkpoint).selector
    assert not changed(state_of(best), state_of(trainer.selecting.selector.selector))
    assert trainer.state.best_model_checkpoint != str(tmp_path / "checkpoint-4")


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(tmp_path, reentrant):
    plain = make_trainer(tmp_path)
    plain.train()
    saving = make_trainer(
        tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    saving.train()
    for name, values in logged(plain, *PARTS).items():
        assert logged(saving, name)[name] == pytest.approx(values, rel=1e-6), name


def test_a_half_precision_model_has_a_float32_selector(tmp_path):
    model = build_model().to(torch.bfloat16)
    trainer = make_trainer(tmp_path, model=model, bf16=True, learning_rate=1e-5)
    assert {p.dtype for p in trainer.selecting.selector.parameters()} == {torch.float32}
    before = state_of(trainer.selecting.selector)
    trainer.train()
    moved = changed(before, state_of(trainer.selecting.selector))
    assert {name for name in before if not name.endswith("k_proj.bias")} == moved
    trainer.save_model()
    assert {p.dtype for p in QTSplus.from_pretrained(tmp_path).parameters()} == {torch.float32}


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="stage must be 1 or 2, got 3"):
        QTSplusArguments(output_dir=str(tmp_path), stage=3)
    with pytest.raises(ValueError, match="lora_rank must be at least 0, and 0 in stage 1, got 4 in stage 1"):
        QTSplusArguments(output_dir=str(tmp_path), lora_rank=4)
    with pytest.raises(ValueError, match="tau_s must be above 0, got 0"):
        QTSplusArguments(output_dir=str(tmp_path), tau_s=0.0)
    with pytest.raises(ValueError, match="lambda_linear must be at least 0, got -1"):
        QTSplusArguments(output_dir=str(tmp_path), lambda_linear=-1.0)
    with pytest.raises(ValueError, match=r"rho_momentum must be in \[0, 1\), got 1"):
        QTSplusArguments(output_dir=str(tmp_path), rho_momentum=1.0)
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        QTSplusArguments(output_dir=str(tmp_path), remove_unused_columns=True)
    model = build_model()
    with pytest.raises(ValueError, match="the budget is learnt"):
        SelectingModel(model, QTSplus.from_language_model(model, max_tokens=3))
    args = QTSplusArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="expected a data set with a length"):
        QTSplusTrainer(model, QTSplus.from_language_model(model), args, collate, iter([]))


def test_a_batch_without_a_video_is_refused():
    model = build_model()
    selecting = SelectingModel(model, QTSplus.from_language_model(model))
    ids = torch.tensor([[504, 505, 509, 30, 31]])
    with pytest.raises(ValueError, match="no sample of this batch holds a video"):
        selecting(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids)
