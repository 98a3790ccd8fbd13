"""QTSplus attached to a Qwen2.5-VL."""

import pytest
import torch
from qts_video import attach
from qts_video.methods import QTSplus
from tiny import Video, prompt, user
from tiny_qwen import inputs

QUESTION = torch.arange(20, 25)


def prompts(model):
    return inputs(
        prompt(user(Video(6, seconds=2.0), [20, 21, 22])), prompt(user([30], Video(3), Video(4), [31, 32])), side="left"
    )


@pytest.fixture
def selector(model):
    selector = QTSplus.from_language_model(model, scoring_layers=1, reencode_layers=2, rho_min=0.3, rho_max=0.6)
    torch.nn.init.normal_(selector.selector.time_embedding.proj.weight, std=0.1)
    return selector


def test_forward_and_generate(model, selector):
    batch = prompts(model)
    with attach(model, selector) as handle, torch.no_grad():
        handle.question(QUESTION)
        logits = model(**batch).logits
        report = handle.last
        assert logits.isfinite().all()
        assert 0 < report.kept < report.total
        for video in report.videos:
            assert video.kept == len(video.indices)
            assert video.scores.shape == (video.total,)
            assert torch.equal(video.indices.sort().values, video.indices)
        assert report.videos[0].seconds.max() > 2
        generated = model.generate(**batch, max_new_tokens=3, do_sample=False)
        assert generated.shape[1] == batch["input_ids"].shape[1] + 3
    with torch.no_grad():
        plain = model(**batch).logits
    assert plain.shape[1] > logits.shape[1]


def test_what_the_decoder_sees_is_reencoded(model, selector):
    """Budget 1.0 keeps every row, so the only difference to the plain model is the re-encoder."""
    batch = prompts(model)
    with torch.no_grad():
        plain = model(**batch).logits
        with attach(model, QTSplus(selector.selector, retention_ratio=1.0)) as handle:
            handle.question(QUESTION)
            changed = model(**batch).logits
            assert handle.last.kept == handle.last.total
    assert changed.shape == plain.shape
    assert not torch.allclose(changed, plain, atol=1e-3)


def test_gradients_reach_the_reencoder_and_the_model(model, selector):
    batch = prompts(model)
    selector.train()
    with attach(model, selector) as handle:
        handle.question(QUESTION)
        model(**batch, labels=batch["input_ids"]).loss.backward()
    reached = {name for name, p in selector.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {n for n, _ in selector.named_parameters() if "reencode_layers" in n} <= reached
    assert "selector.time_embedding.proj.weight" in reached
    assert model.get_input_embeddings().weight.grad is not None
    model.zero_grad(set_to_none=True)
