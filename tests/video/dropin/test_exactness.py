"""Dropping tokens equals masking their keys in the full sequence: logits of kept rows, and every decode
step."""

import pytest
import qts_video
import torch
from tiny_qwen import Image, Keep, Oracle, Video, assistant, every, inputs, keep_all, keep_mask, prompt, rows, user

ONE = [prompt(user(Video(4), [30, 31, 32]))]
UNEQUAL = [
    prompt(user([40], Video(4), [30, 31, 32])),
    prompt(user(Video(2, 3, 2), [33])),
    prompt(user(Video(3, 2, 2), [34, 35]), assistant(50, 51), user([36, 37])),
]
SEVERAL = [
    prompt(user(Image(), Video(3), [30], Video(2, 2, 2), [31, 32])),
    prompt(user([33], Video(4, 2, 2), Image(2, 3), [34])),
]
PROMPTS = {"one": ONE, "unequal": UNEQUAL, "several": SEVERAL}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PROMPTS)
def test_prefill_logits_equal_the_masked_full_sequence(model, name, side, positions):
    batch = inputs(*PROMPTS[name], side=side)
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions) as handle, torch.no_grad():
        output = model(**batch)
    keep = keep_mask(batch, selector.kept)
    wanted = rows(Oracle(model, batch, keep, compact=positions == "compact").logits(), keep)
    columns = handle.last.columns
    got = rows(output.logits, columns >= 0)
    for ours, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert output.logits.shape[1] == int(keep.sum(1).max()) < batch["input_ids"].shape[1]
    for row, mask in zip(columns, keep, strict=True):
        assert torch.equal(row[row >= 0], mask.nonzero().squeeze(1))
    assert output.past_key_values.get_seq_length() == output.logits.shape[1]


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("name", PROMPTS)
def test_generate_equals_the_masked_full_sequence_at_every_step(model, name, positions):
    batch = inputs(*PROMPTS[name])
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions):
        output = model.generate(
            **batch, max_new_tokens=4, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert len(selector.calls) == 1
    keep = keep_mask(batch, selector.kept)
    tokens, logits = Oracle(model, batch, keep, compact=positions == "compact").greedy(4)
    assert torch.equal(output.sequences[:, -4:], tokens)
    for ours, theirs in zip(output.logits, logits, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)  # generate() keeps float32 logits
    # The prompt's kept columns, and the new tokens but the last.
    assert output.past_key_values.get_seq_length() == int(keep.sum(1).max()) + 3


def test_dropping_changes_the_answer_at_all(model):
    """The oracle would prove nothing on a model that does not look at the video."""
    batch = inputs(*ONE)
    with torch.no_grad():
        before = model(**batch).logits[:, -1]
        with qts_video.attach(model, Keep(every(2))):
            after = model(**batch).logits[:, -1]
    assert (before - after).abs().max() > 1e-3


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_reencoded_rows_take_the_place_of_the_kept_ones(model, positions):
    batch = inputs(*SEVERAL)
    selector = Keep(every(2), tokens=lambda kept: 1 - 3 * kept, tail=3)
    with qts_video.attach(model, selector, positions=positions), torch.no_grad():
        output = model(**batch)
    keep = keep_mask(batch, selector.kept)
    replaced = 1 - 3 * selector.calls[0].tokens[selector.kept]
    oracle = Oracle(model, batch, keep, compact=positions == "compact", replaced=replaced)
    for ours, theirs in zip(rows(output.logits, _mask(output, keep)), rows(oracle.logits(), keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_reencoded_rows_of_a_kept_whole_video_count(model):
    batch = inputs(*ONE)
    selector = Keep(keep_all, tokens=lambda kept: kept + 1)
    with qts_video.attach(model, selector), torch.no_grad():
        output = model(**batch)
    keep = keep_mask(batch, selector.kept)
    oracle = Oracle(model, batch, keep, replaced=selector.calls[0].tokens + 1)
    torch.testing.assert_close(output.logits, oracle.logits(), rtol=0, atol=1e-10)


def test_a_padded_tail_of_the_selection_is_cut(model):
    batch = inputs(*SEVERAL)
    with torch.no_grad():
        with qts_video.attach(model, Keep(every(2))):
            plain = model(**batch).logits
        with qts_video.attach(model, Keep(every(2), tail=5)) as handle:
            assert torch.equal(model(**batch).logits, plain)
            assert sum(len(video.indices) for video in handle.last.videos) == handle.last.kept


@pytest.mark.parametrize("name", PROMPTS)
def test_keeping_everything_is_bit_identical(model, name):
    batch = inputs(*PROMPTS[name])
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(**batch, **options)
        selector = Keep(keep_all)
        for context in (qts_video.attach(model, selector), None):  # attached, then removed again
            assert torch.equal(model(**batch).logits, logits)
            again = model.generate(**batch, **options)
            assert torch.equal(again.sequences, generated.sequences)
            assert all(map(torch.equal, again.logits, generated.logits))
            if context is not None:
                assert len(selector.calls) == 2
                context.remove()
        assert len(selector.calls) == 2


def test_keeping_everything_through_the_gather_is_bit_identical(model):
    """Re-encoded rows that equal the old ones go the long way: everything is gathered, and comes out the
    same."""
    batch = inputs(*UNEQUAL)
    with torch.no_grad():
        logits = model(**batch).logits
        with qts_video.attach(model, Keep(keep_all, tokens=lambda kept: kept)):
            gathered = model(**batch).logits
    for ours, theirs, valid in zip(gathered, logits, batch["attention_mask"].bool(), strict=True):
        assert torch.equal(ours[valid], theirs[valid])


def _mask(output, keep):
    """[B, K] bool: the valid columns of left-padded output."""
    length = output.logits.shape[1]
    return torch.arange(length) >= length - keep.sum(1, keepdim=True)
