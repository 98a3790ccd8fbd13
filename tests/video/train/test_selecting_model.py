"""The module that a Trainer trains, for every family of models."""

import pytest
import torch
from families import FAMILIES
from qts_video.methods import QTSplus
from qts_video.train.model import SelectingModel
from qts_video.train.numbered import Numbered, NumberedCollator, mix


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"stage": 2}, {"stage": 2, "lora_rank": 2}], ids=str)
def test_one_step_reaches_all_that_is_trained(name, options):
    """So that several processes need not search for parameters that got no gradient."""
    family = FAMILIES[name]
    model = family.build_model()
    selecting = SelectingModel(model, QTSplus.from_language_model(model, tau_s=0.05), **options).train()
    selecting.handle.question([30, 31])
    batch = family.inputs(*family.prompts["one"], side="right")
    labels = batch["input_ids"].masked_fill(batch["input_ids"] >= 500, -100)
    inputs = batch | {"labels": labels, "seeds": [7]}
    out = selecting(**inputs, num_items_in_batch=torch.tensor(5))
    (out["loss"] + out["n_expected"].sum()).backward()
    trained = {n: p.grad for n, p in selecting.named_parameters() if p.requires_grad}
    assert not [n for n, grad in trained.items() if grad is None or not grad.isfinite().all()]
    # lora_B starts at zero, and so stops the first step's gradient to lora_A
    assert not [n for n, grad in trained.items() if n.startswith("selector.") and not grad.any()]
    assert any(n.startswith("model.") for n in trained) == bool(options)
    tower = {id(p) for p in selecting.parts.vision.parameters()}
    assert not [n for n, p in selecting.named_parameters() if p.requires_grad and id(p) in tower]
    assert not selecting.parts.vision.training
    mean = selecting(**inputs)["loss"]
    torch.testing.assert_close(out["loss"], mean * (labels[:, 1:] != -100).sum() / 5)


def test_noise_of_a_video_is_that_of_its_sample_in_any_batch():
    family = FAMILIES["qwen2_5_vl"]
    model = family.build_model()
    selecting = SelectingModel(model, QTSplus.from_language_model(model, tau_s=0.05)).train()
    selecting.handle.question([30, 31])

    def kept(*prompts, seeds):
        batch = family.inputs(*prompts, side="right")
        out = selecting(**batch, labels=batch["input_ids"], seeds=seeds)
        return out["kept"].tolist(), out["share"].tolist()

    one, two = family.prompts["several"]  # with two videos, and with one
    counts, share = kept(one, two, seeds=[3, 4])
    assert share == [0.5, 0.5, 1.0]
    assert kept(one, seeds=[3])[0] == counts[:2]
    other = [kept(one, two, seeds=[seed, 4])[0] for seed in range(5, 12)]
    assert len({tuple(c[:2]) for c in other}) > 1
    assert len({c[2] for c in other}) == 1


def test_numbers_go_with_samples_and_epochs_reach_the_data_set():
    class Samples:
        epoch = None

        def __len__(self):
            return 3

        def __getitem__(self, number):
            return number * 10

        def set_epoch(self, epoch):
            self.epoch = epoch

    samples = Samples()
    numbered = Numbered(samples)
    numbered.set_epoch(4)
    assert samples.epoch == 4
    collator = NumberedCollator(lambda items: {"items": items})
    batch = collator([numbered[2], numbered[0]])
    assert batch["items"] == [20, 0]
    assert batch["sample_number"].tolist() == [2, 0]
    assert collator([5, 6]) == {"items": [5, 6]}
    seeds = {mix(a, b) for a in range(20) for b in range(20)}
    assert len(seeds) == 400
    assert all(0 <= seed < 2**62 for seed in seeds)
