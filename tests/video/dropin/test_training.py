"""Loss and gradients with tokens dropped."""

import pytest
import qts_video
import torch
from tiny import HIDDEN, Image, Keep, Oracle, Video, every, keep_all, keep_mask, prompt, user
from tiny_qwen import build_model, inputs

from qts_kernels import Selection

SAMPLES = [
    prompt(user([40], Video(4), [30, 31, 32])),
    prompt(user(Image(), Video(2, 3, 2), [41], Video(3, 1, 2), [33])),
]


def labelled(side="left"):
    batch = inputs(*SAMPLES, side=side)
    ids = batch["input_ids"]
    return batch | {"labels": ids.masked_fill((batch["attention_mask"] == 0) | (ids >= 500), -100)}


def oracle_loss(model, batch, keep, items=None):
    """Cross entropy of the kept columns' next kept label, from the full sequence with masked keys."""
    inner = {k: v for k, v in batch.items() if k != "labels"}
    logits = Oracle(model, inner, keep).logits()
    losses, count = 0, 0
    for sample in range(len(keep)):
        columns = keep[sample].nonzero().squeeze(1)
        labels = batch["labels"][sample, columns[1:]]
        losses = losses + torch.nn.functional.cross_entropy(
            logits[sample, columns[:-1]].float(), labels, ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    return losses / (count if items is None else items)


@pytest.mark.parametrize("items", [None, 17, torch.tensor(17)])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_is_that_of_the_kept_columns(model, side, items):
    batch, selector = labelled(side), Keep(every(2))
    options = {} if items is None else {"num_items_in_batch": items}
    with qts_video.attach(model, selector), torch.no_grad():
        output = model(**batch, **options)
        as_tuple = model(**batch, **options, return_dict=False)
    with torch.no_grad():
        wanted = oracle_loss(model, batch, keep_mask(model, batch, selector.kept), items)
    torch.testing.assert_close(output.loss, wanted, rtol=1e-6, atol=0)
    assert output["loss"] is output.loss  # what Trainer reads
    assert output[0] is output.loss
    assert torch.equal(as_tuple[0], output.loss)
    assert torch.equal(as_tuple[1], output.logits)
    assert output.logits.shape[1] < batch["labels"].shape[1]


def test_keeping_everything_and_text_alone_leave_the_loss_bit_identical(model):
    batch = labelled()
    text = inputs(prompt(user([30, 31])))
    text["labels"] = text["input_ids"]
    with torch.no_grad():
        wanted = [model(**batch), model(**text), model(**batch, num_items_in_batch=7)]
        with qts_video.attach(model, Keep(keep_all)):
            ours = [model(**batch), model(**text), model(**batch, num_items_in_batch=7)]
    for got, plain in zip(ours, wanted, strict=True):
        assert torch.equal(got.loss, plain.loss)
        assert torch.equal(got.logits, plain.logits)
        assert list(got.keys()) == list(plain.keys())


class Learned(torch.nn.Module):
    """A selector with parameters, which re-encodes what it keeps."""

    name, needs_question = "learned", True

    def __init__(self, choose):
        super().__init__()
        self.choose = choose
        self.mix = torch.nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64)

    def select(self, videos):
        kept = self.choose(videos)
        cu_seqlens = torch.tensor([0, *[len(k) for k in kept]]).cumsum(0).to(torch.int32)
        self.kept = torch.cat(kept)
        bias = videos.question.mean(0)
        return Selection(self.kept, cu_seqlens, tokens=self.mix(videos.tokens[self.kept]) + bias)


@pytest.fixture(scope="module")
def trained():
    """A model of its own: gradients are left in it."""
    return build_model()


def gradients(*modules):
    found = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
    for module in modules:
        module.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_the_model_the_vision_tower_and_the_selector(trained, checkpointing):
    batch, selector = labelled(), Learned(every(2))
    trained.train()
    if checkpointing:
        trained.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with qts_video.attach(trained, selector) as handle:
        handle.question([30, 31])
        trained(**batch).loss.backward()
    trained.gradient_checkpointing_disable()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in selector.parameters())
    assert trained.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0
    ours = gradients(trained, selector)

    # The same loss by the oracle, its embeddings made differentiable by running the whole model once more.
    captured = {}
    hook = trained.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    inner = {k: v for k, v in batch.items() if k != "labels"}
    trained(**inner)
    hook.remove()
    video = batch["input_ids"] == 501
    embeds = captured["inputs_embeds"]
    question = trained.get_input_embeddings()(torch.tensor([30, 31])).repeat(3, 1).mean(0)
    replaced = selector.mix(embeds[video][selector.kept]) + question
    keep = keep_mask(trained, batch, selector.kept)
    embeds = embeds.masked_scatter((keep & video)[..., None].expand_as(embeds), replaced)
    hidden = trained.model.language_model(
        inputs_embeds=embeds, position_ids=captured["position_ids"], attention_mask=keep.long(), use_cache=False
    )[0]
    logits, losses, count = trained.lm_head(hidden), 0, 0
    for sample in range(2):
        columns = keep[sample].nonzero().squeeze(1)
        labels = batch["labels"][sample, columns[1:]]
        losses = losses + torch.nn.functional.cross_entropy(
            logits[sample, columns[:-1]].float(), labels, ignore_index=-100, reduction="sum"
        )
        count += int((labels != -100).sum())
    (losses / count).backward()
    theirs = gradients(trained, selector)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


def test_shift_labels_are_refused(model):
    batch = labelled()
    with qts_video.attach(model, Keep(every(2))), pytest.raises(ValueError, match="shift_labels"):
        model(**batch, shift_labels=batch["labels"])
