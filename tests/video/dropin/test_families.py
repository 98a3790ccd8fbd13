"""What the drop-in promises, held for every model. What is peculiar to one of them has a file of its own."""

import re

import pytest
import qts_video
import torch
from qts_video.methods import QTSplus, Random, Uniform
from tiny import HIDDEN, VERSION, Keep, Oracle, every, keep_all, keep_mask, placeholders, rows
from transformers import DynamicCache, StaticCache

GREEDY = {"max_new_tokens": 4, "do_sample": False}
POSITIONS = pytest.mark.parametrize("positions", ["original", "compact"])
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])


@pytest.fixture(autouse=True)
def skip_what_has_no_meaning(request, family):
    for pattern, reason in family.skips.items():
        if re.search(pattern, request.node.name):
            pytest.skip(reason)


def make_cache(model, kind):
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=model.config.get_text_config(), max_cache_len=160)


def state(model):
    """Everything that a hook, a replaced method or a swapped class would change."""
    return [
        (type(module), dict(module._forward_pre_hooks), dict(module._forward_hooks), set(module.__dict__))
        for module in model.modules()
    ]


@POSITIONS
@pytest.mark.parametrize("side", ["left", "right"])
@NAMES
def test_prefill_logits_equal_the_masked_full_sequence(family, model, name, side, positions):
    batch = family.inputs(*family.prompts[name], side=side)
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions) as handle, torch.no_grad():
        output = model(**batch)
    keep = keep_mask(model, batch, selector.kept)
    wanted = rows(Oracle(model, batch, keep, compact=positions == "compact").logits(), keep)
    columns = handle.last.columns
    for ours, theirs in zip(rows(output.logits, columns >= 0), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert output.logits.shape[1] == int(keep.sum(1).max()) < batch["input_ids"].shape[1]
    for row, mask in zip(columns, keep, strict=True):
        assert torch.equal(row[row >= 0], mask.nonzero().squeeze(1))
    assert output.past_key_values.get_seq_length() == output.logits.shape[1]
    report = handle.last
    assert report.kept == int(keep.sum()) - int(batch["attention_mask"].sum() - report.total)
    assert [video.kept - video.kept_newlines for video in report.videos] == [len(v.indices) for v in report.videos]


@POSITIONS
@NAMES
def test_generate_equals_the_masked_full_sequence_at_every_step(family, model, name, positions):
    batch = family.inputs(*family.prompts[name])
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions):
        output = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert len(selector.calls) == 1
    keep = keep_mask(model, batch, selector.kept)
    tokens, logits = Oracle(model, batch, keep, compact=positions == "compact").greedy(4)
    assert torch.equal(output.sequences[:, -4:], tokens)
    for ours, theirs in zip(output.logits, logits, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6)  # generate() keeps float32 logits
    assert output.past_key_values.get_seq_length() == int(keep.sum(1).max()) + 3


def test_dropping_changes_the_answer_at_all(family, model):
    """The oracle would prove nothing on a model that does not look at the video."""
    batch = family.inputs(*family.prompts["one"])
    with torch.no_grad():
        before = model(**batch).logits[:, -1]
        with qts_video.attach(model, Keep(every(2))):
            after = model(**batch).logits[:, -1]
    assert (before - after).abs().max() > 1e-3


@POSITIONS
def test_reencoded_rows_take_the_place_of_the_kept_ones(family, model, positions):
    batch = family.inputs(*family.prompts["several"])
    selector = Keep(every(2), tokens=lambda kept: 1 - 3 * kept, tail=3)
    with qts_video.attach(model, selector, positions=positions) as handle, torch.no_grad():
        output = model(**batch)
    keep = keep_mask(model, batch, selector.kept)
    replaced = 1 - 3 * selector.calls[0].tokens[selector.kept]
    oracle = Oracle(model, batch, keep, compact=positions == "compact", replaced=replaced)
    ours, theirs = rows(output.logits, handle.last.columns >= 0), rows(oracle.logits(), keep)
    for got, wanted in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)


def test_a_padded_tail_of_the_selection_is_cut(family, model):
    batch = family.inputs(*family.prompts["several"])
    with torch.no_grad():
        with qts_video.attach(model, Keep(every(2))):
            plain = model(**batch).logits
        with qts_video.attach(model, Keep(every(2), tail=5)):
            assert torch.equal(model(**batch).logits, plain)


def test_reencoded_rows_of_a_kept_whole_video_count(family, model):
    batch = family.inputs(*family.prompts["one"])
    selector = Keep(keep_all, tokens=lambda kept: kept + 1)
    with qts_video.attach(model, selector), torch.no_grad():
        output = model(**batch)
    oracle = Oracle(model, batch, keep_mask(model, batch, selector.kept), replaced=selector.calls[0].tokens + 1)
    torch.testing.assert_close(output.logits, oracle.logits(), rtol=0, atol=1e-10)


@NAMES
def test_keeping_everything_is_bit_identical(family, model, name):
    batch = family.inputs(*family.prompts[name])
    options = GREEDY | {"return_dict_in_generate": True, "output_logits": True}
    with torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(**batch, **options)
        selector = Keep(keep_all)
        handle = qts_video.attach(model, selector)
        for attached in (True, False):
            assert torch.equal(model(**batch).logits, logits)
            again = model.generate(**batch, **options)
            assert torch.equal(again.sequences, generated.sequences)
            assert all(map(torch.equal, again.logits, generated.logits))
            if attached:
                assert len(selector.calls) == 2
                assert handle.last.kept == handle.last.total
                handle.remove()
        assert len(selector.calls) == 2


def test_keeping_everything_through_the_gather_is_bit_identical(family, model):
    """Re-encoded rows that equal the old ones go the long way: everything is gathered, and comes out the same."""
    batch = family.inputs(*family.prompts["several"])
    with torch.no_grad():
        logits = model(**batch).logits
        with qts_video.attach(model, Keep(keep_all, tokens=lambda kept: kept)):
            gathered = model(**batch).logits
    for ours, theirs, valid in zip(gathered, logits, batch["attention_mask"].bool(), strict=True):
        assert torch.equal(ours[valid], theirs[valid])


@POSITIONS
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("masked", [True, False])
def test_decoding_by_hand_with_forward(family, model, positions, cache, masked):
    if (5,) < VERSION < (5, 13) and cache == "static" and not masked:
        pytest.skip("these versions make no positions for a static cache without a mask, with or without selection")
    batch = family.inputs(*family.prompts["several"])
    selector, past = Keep(every(2)), make_cache(model, cache)
    with qts_video.attach(model, selector, positions=positions), torch.no_grad():
        output = model(**batch, past_key_values=past)
        tokens, mask = [output.logits[:, -1].argmax(-1)], batch["attention_mask"]
        for _ in range(3):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = model(input_ids=tokens[-1][:, None], past_key_values=past, attention_mask=mask if masked else None)
            tokens.append(output.logits[:, -1].argmax(-1))
    keep = keep_mask(model, batch, selector.kept)
    wanted, _ = Oracle(model, batch, keep, compact=positions == "compact").greedy(4)
    assert torch.equal(torch.stack(tokens, 1), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
    ],
    ids=["static", "no cache", "beams", "beam sequences"],
)
@POSITIONS
def test_other_ways_to_generate(family, model, options, positions):
    """Against the tokens of the kept columns alone, in beam search too: there, by what another selection of the same
    columns gives, sample by sample."""
    if "num_beams" in options and not family.repeats:
        pytest.skip("this transformers version can't repeat this model's videos, with or without selection")
    batch = family.inputs(*family.prompts["several"])
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions):
        ours = model.generate(**batch, **GREEDY, **options)
    assert len(selector.calls) == (4 if options.get("use_cache") is False else 1)
    keep = keep_mask(model, batch, selector.kept)
    if "num_beams" not in options:
        wanted, _ = Oracle(model, batch, keep, compact=positions == "compact").greedy(4)
        assert torch.equal(ours[:, -4:], wanted)
        return
    with qts_video.attach(model, Keep(every(2)), positions=positions):
        uncached = model.generate(**batch, **GREEDY, **options, use_cache=False)
    assert torch.equal(ours, uncached)


def test_several_sequences_of_a_sample_select_once(family, model):
    if not family.repeats:
        pytest.skip("this transformers version can't repeat this model's videos, with or without selection")
    batch = family.inputs(*family.prompts["several"])
    selector = Keep(every(2))
    with qts_video.attach(model, selector) as handle:
        torch.manual_seed(3)
        ours = model.generate(**batch, max_new_tokens=3, do_sample=True, num_return_sequences=2)
    assert len(selector.calls) == 1
    assert 2 * len(handle.last.columns) == 2 * len(batch["input_ids"]) == len(ours)
    assert {video.sample for video in handle.last.videos} == {0, 1}


@pytest.mark.skipif(VERSION < (5,), reason="on 4.57 generate() slices the new ids by the cache's length")
@POSITIONS
def test_a_second_turn_with_the_new_ids_alone(family, model, positions):
    if not family.second_turn:
        pytest.skip("this model's generate() does not go on from a cache")
    batch = family.inputs(*family.prompts["one"])
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions):
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        answer = first.sequences[:, -4:]
        new = torch.cat([answer[:, -1:], torch.tensor([[35, 36, 37]])], 1)
        full = torch.cat([batch["input_ids"], answer, new[:, 1:]], 1)
        second = model.generate(
            input_ids=new, attention_mask=torch.ones_like(full), past_key_values=first.past_key_values, **GREEDY
        )
        with pytest.raises(ValueError, match="do not continue it"):
            model.generate(
                input_ids=full, attention_mask=torch.ones_like(full), past_key_values=first.past_key_values, **GREEDY
            )
    whole = batch | {"input_ids": full, "attention_mask": torch.ones_like(full)}
    if "mm_token_type_ids" in whole:
        types = whole["mm_token_type_ids"]
        whole["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, full.shape[1] - types.shape[1]))
    keep = keep_mask(model, whole, selector.kept)
    wanted, _ = Oracle(model, whole, keep, compact=positions == "compact").greedy(4)
    assert torch.equal(second[:, -4:], wanted)
    assert len(selector.calls) == 1


def test_prompts_without_a_video_are_untouched(family, model):
    text = {
        "input_ids": torch.tensor([[0, 30, 31], [32, 33, 34]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1] * 3]),
    }
    images = family.inputs(*family.prompts["images"])
    selector = Keep(every(2))
    for batch in (text, images):
        for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}):
            options = GREEDY | options | {"return_dict_in_generate": True, "output_logits": True}
            plain = model.generate(**batch, **options)
            with qts_video.attach(model, selector) as handle:
                ours = model.generate(**batch, **options)
            assert torch.equal(ours.sequences, plain.sequences)
            assert all(map(torch.equal, ours.logits, plain.logits))
    assert selector.calls == []
    with pytest.raises(RuntimeError, match="not selected anything yet"):
        _ = handle.last


def test_removal_undoes_everything(family, model):
    batch = family.inputs(*family.prompts["one"])
    with torch.no_grad():
        logits, before = model(**batch).logits, state(model)
        with qts_video.attach(model, Keep(every(2))):
            assert model(**batch).logits.shape[1] < logits.shape[1]
        assert state(model) == before
        assert torch.equal(model(**batch).logits, logits)


def test_attach_finds_the_adapter_by_the_model_type(family, model):
    from qts_video.adapters import ADAPTERS

    assert ADAPTERS[model.config.model_type].model_type == model.config.model_type == family.name.split()[0]
    with pytest.raises(TypeError, match="expected a"):
        qts_video.attach(model.model, Uniform(0.5))


def test_the_loss_is_that_of_the_kept_columns(family, model):
    batch, selector = family.inputs(*family.prompts["several"]), Keep(every(2))
    ids = batch["input_ids"]
    labels = ids.masked_fill((batch["attention_mask"] == 0) | (ids >= 500), -100)
    with qts_video.attach(model, selector), torch.no_grad():
        loss = model(**batch, labels=labels).loss
    keep = keep_mask(model, batch, selector.kept)
    with torch.no_grad():
        logits = Oracle(model, batch, keep).logits()
    total, count = 0, 0
    for sample in range(len(keep)):
        columns = keep[sample].nonzero().squeeze(1)
        following = labels[sample, columns[1:]]
        total += torch.nn.functional.cross_entropy(logits[sample, columns[:-1]].float(), following, reduction="sum")
        count += int((following != -100).sum())
    torch.testing.assert_close(loss, total / count, rtol=1e-6, atol=0)


def test_gradients_reach_the_vision_tower(family, model):
    batch = family.inputs(*family.prompts["one"])
    with qts_video.attach(model, Keep(every(2))):
        model(**batch, labels=batch["input_ids"]).loss.backward()
    gradients = [p.grad for p in model.get_submodule(family.vision).parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    assert sum(float(gradient.abs().sum()) for gradient in gradients) > 0


@pytest.mark.parametrize("make", [lambda m: Uniform(0.3), lambda m: Random(max_tokens=5), QTSplus.from_language_model])
def test_methods(family, model, make):
    """Exact where the method is; every method keeps what it says it keeps, and the answer is that of those columns."""
    batch = family.inputs(*family.prompts["several"])
    selector = make(model)
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        handle.question([30, 31])
        logits = model(**batch).logits
    report = handle.last
    assert 0 < report.kept < report.total
    assert logits.shape[1] == report.columns.shape[1]
    if selector.name != "qtsplus":
        starts = torch.tensor([0] + [v.grid[0] * v.grid[1] * v.grid[2] for v in report.videos]).cumsum(0)[:-1]
        kept = torch.cat([v.indices + s for v, s in zip(report.videos, starts, strict=True)])
        keep = keep_mask(model, batch, kept)
        wanted = Oracle(model, batch, keep).logits()
        for ours, theirs in zip(rows(logits, report.columns >= 0), rows(wanted, keep), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_reports_place_every_token(family, model):
    batch = family.inputs(*family.prompts["several"])
    with qts_video.attach(model, Keep(every(2), scores=True)) as handle, torch.no_grad():
        model(**batch)
    ids, length = batch["input_ids"], batch["input_ids"].shape[1]
    where = placeholders(model, batch).flatten().nonzero().squeeze(1)
    start = 0
    for video in handle.last.videos:
        frames, height, width = video.grid
        assert video.total == frames * height * width + video.newlines
        assert torch.equal(video.frame * height * width + video.row * width + video.column, video.indices)
        assert len(video.frame_seconds) == frames
        assert torch.equal(video.scores, torch.arange(start, start + frames * height * width).float())
        columns = where[start + video.indices]
        assert set((columns // length).tolist()) == {video.sample}
        assert set(handle.last.columns[video.sample].tolist()) >= set((columns % length).tolist())
        start += frames * height * width
    assert start == len(where)
    assert ids.numel() > start


def test_a_selector_may_take_prompts_apart(family, model):
    """``Prefill.take`` and ``frame_spans``: the prompt without its middle frame is a prompt of this model."""
    batch = family.inputs(*family.prompts["one"])
    seen = {}

    class Takes(Keep):
        def select(self, videos):
            context, (span,) = videos.context, videos.context.layout.frame_spans
            frames = videos.grids[0][0]
            assert len(span) == frames
            assert torch.equal(span[1:, 0], span[:-1, 1])
            columns = torch.arange(batch["input_ids"].shape[1])[None]
            whole = context.take(torch.zeros(1, dtype=torch.int64), columns)
            for name, value in whole.items():
                given = context.decoder_inputs[name]
                if isinstance(value, torch.Tensor):
                    assert torch.equal(value, given)
                else:
                    assert all(map(torch.equal, value, given))
            cut = torch.cat([columns[:, : int(span[1, 0])], columns[:, int(span[1, 1]) :]], 1)
            seen["inputs"], seen["cut"] = context.take(torch.zeros(1, dtype=torch.int64), cut), cut[0]
            seen["hidden"] = context.decoder(**seen["inputs"], use_cache=False).last_hidden_state
            return super().select(videos)

    with qts_video.attach(model, Takes(every(2))), torch.no_grad():
        model(**batch)
    area = int(seen["hidden"].shape[1])
    assert area < batch["input_ids"].shape[1]
    ids = batch["input_ids"][0]
    gone = sorted(set(range(len(ids))) - set(seen["cut"].tolist()))
    tokens = placeholders(model, batch)[0]
    frames = find_frames(model, batch)
    assert int(tokens[gone].sum()) == int(tokens.sum()) // frames
    assert seen["hidden"].shape[2] == HIDDEN


def find_frames(model, batch):
    from qts_video.adapters import find_adapter

    layout = find_adapter(model).locate(model, batch["input_ids"], batch["attention_mask"].bool(), batch, None)
    return layout.grids[0][0]


def test_lower_precision(family):
    model = family.build_model().to(torch.bfloat16)
    selector = Keep(every(2), tokens=lambda kept: kept)
    batch = family.inputs(*family.prompts["several"])
    with qts_video.attach(model, selector):
        ours = model.generate(**batch, **GREEDY, return_dict_in_generate=True, output_logits=True)
    assert selector.calls[0].tokens.dtype == torch.bfloat16
    assert torch.isfinite(ours.logits[0]).all()
