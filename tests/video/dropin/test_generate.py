"""generate() in all its modes, and caches of every kind."""

import pytest
import qts_video
import torch
import transformers
from qts_video.methods import Uniform
from tiny import ANSWER, Image, Keep, Oracle, Video, every, keep_all, keep_mask, prompt, user
from tiny_qwen import inputs
from transformers import DynamicCache, StaticCache

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
V5 = VERSION >= (5,)
SAMPLES = [
    prompt(user([40], Video(4), [30, 31, 32])),
    prompt(user(Image(), Video(2, 3, 2), [41], Video(3, 1, 2), [33])),
]
GREEDY = {"max_new_tokens": 4, "do_sample": False}


def masked_generate(model, batch, keep, compact=False, replaced=None, **options):
    """generate() of the unpatched model in any decoding strategy, the dropped columns masked out of every step."""
    oracle = Oracle(model, batch, keep, compact=compact, replaced=replaced)
    times = max(options.get("num_beams", 1), options.get("num_return_sequences", 1))
    positions = oracle.positions.repeat_interleave(times, 1)
    following, keep = oracle.next.repeat_interleave(times), keep.repeat_interleave(times, 0)

    def mask_keys(module, args, kwargs):
        fed, length = kwargs["inputs_embeds"].shape[1], positions.shape[2]
        past = 0 if fed == length else kwargs["past_key_values"].get_seq_length()
        if past == 0:
            kwargs["inputs_embeds"] = oracle.embeds.repeat_interleave(times, 0)
        later = past + fed - length
        where = torch.cat([positions, (following.unsqueeze(1) + torch.arange(later)).expand(3, -1, -1)], 2)
        kwargs["position_ids"] = where[:, :, past : past + fed]
        kwargs["attention_mask"] = torch.cat([keep, keep.new_ones(len(keep), later)], 1).long()
        return args, kwargs

    hook = model.model.language_model.register_forward_pre_hook(mask_keys, with_kwargs=True)
    try:
        return model.generate(**batch, **options)
    finally:
        hook.remove()


MODES = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "beam sequences": {"num_beams": 4, "num_return_sequences": 2},
    "sequences": {"num_return_sequences": 3, "do_sample": True},
    "sampling": {"do_sample": True, "temperature": 0.7, "top_k": 20},
}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("reencoded", [False, True])
def test_every_mode_equals_the_masked_full_sequence(model, mode, positions, reencoded):
    batch, options = inputs(*SAMPLES), GREEDY | MODES[mode]
    reencode = (lambda kept: 1 - 3 * kept) if reencoded else None
    selector = Keep(every(2), tokens=reencode)
    with qts_video.attach(model, selector, positions=positions) as handle:
        torch.manual_seed(3)
        ours = model.generate(**batch, **options)
    (call,) = selector.calls  # a sample is selected from once, however often generate() repeats it
    assert [(video.sample, video.grid) for video in handle.last.videos] == [
        (0, (4, 2, 3)),
        (1, (2, 3, 2)),
        (1, (3, 1, 2)),
    ]
    assert call.context.input_ids.shape == batch["input_ids"].shape
    assert call.context.inputs_embeds.shape[:2] == call.context.position_ids.shape[1:] == batch["input_ids"].shape
    keep = keep_mask(model, batch, selector.kept)
    torch.manual_seed(3)
    replaced = 1 - 3 * call.tokens[selector.kept] if reencoded else None
    theirs = masked_generate(model, batch, keep, positions == "compact", replaced, **options)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_without_a_cache_every_step_selects_again(model, options):
    batch = inputs(*SAMPLES)
    selector = Keep(every(2))
    with qts_video.attach(model, selector):
        cached = model.generate(**batch, **GREEDY, **options)
        assert len(selector.calls) == 1
        uncached = model.generate(**batch, **GREEDY, **options, use_cache=False)
    assert torch.equal(cached, uncached)
    assert len(selector.calls) == 1 + 4


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("samples", [SAMPLES[:1], SAMPLES])
def test_static_caches_equal_the_dynamic_one(model, samples, positions):
    batch = inputs(*samples)
    cache = make_cache(model, "static")
    with qts_video.attach(model, Keep(every(2)), positions=positions) as handle:
        dynamic = model.generate(**batch, **GREEDY)
        assert torch.equal(model.generate(**batch, **GREEDY, cache_implementation="static"), dynamic)
        assert torch.equal(model.generate(**batch, **GREEDY, past_key_values=cache), dynamic)
        kept = handle.last.columns.shape[1]
        assert int(cache.get_seq_length()) == kept + 3
        # The same cache, emptied, serves another prompt: nothing of the first one's selection is left in it.
        cache.reset()
        text = {k: v[:, -6:] for k, v in batch.items() if k in ("input_ids", "attention_mask", "mm_token_type_ids")}
        again = model.generate(**text, **GREEDY, past_key_values=cache)
    assert torch.equal(again, model.generate(**text, **GREEDY))


def test_a_cache_that_was_reset_serves_another_prompt_by_hand(model):
    batch, cache = inputs(SAMPLES[0]), make_cache(model, "static")
    text = inputs(prompt(user([30, 31])))

    def answer():
        model(**text, past_key_values=cache)
        step = {"input_ids": torch.tensor([[7]]), "attention_mask": torch.ones(1, text["input_ids"].shape[1] + 1)}
        where = torch.tensor([[[text["input_ids"].shape[1]]]]).expand(3, 1, 1)
        logits = model(**step, position_ids=where, past_key_values=cache).logits
        cache.reset()
        return logits

    with torch.no_grad():
        wanted = answer()
        with qts_video.attach(model, Keep(every(2))):
            model(**batch, past_key_values=cache)
            cache.reset()
            assert torch.equal(answer(), wanted)


def test_keeping_everything_in_a_static_cache_is_bit_identical(model):
    batch = inputs(*SAMPLES)
    options = GREEDY | {
        "cache_implementation": "static",
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    plain = model.generate(**batch, **options)
    with qts_video.attach(model, Keep(keep_all)):
        ours = model.generate(**batch, **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert all(map(torch.equal, ours.logits, plain.logits))


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_decoding_by_hand_with_forward(model, positions, cache, masked):
    """A loop over forward(), without position ids: they continue where the whole prompt's would have."""
    if (5,) < VERSION < (5, 13) and cache == "static" and not masked:
        pytest.skip("these versions make no positions for a static cache without a mask, with or without selection")
    batch = inputs(*SAMPLES)
    selector = Keep(every(2))
    past = make_cache(model, cache)
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


def make_cache(model, kind):
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(config=model.config.get_text_config(), max_cache_len=120)


def test_a_prompt_without_video_is_untouched(model):
    text = inputs(prompt(user([30, 31])), prompt(user([32, 33, 34])))
    image = inputs(prompt(user(Image(), [30, 31])), prompt(user(Image(3, 2), [32, 33, 34])))
    selector = Keep(every(2))
    for batch in (text, image):
        for options in ({}, {"cache_implementation": "static"}, {"num_beams": 2}, {"use_cache": False}):
            options = GREEDY | options | {"return_dict_in_generate": True, "output_logits": True}
            plain = model.generate(**batch, **options)
            with qts_video.attach(model, selector) as handle:
                ours = model.generate(**batch, **options)
            assert torch.equal(ours.sequences, plain.sequences)
            assert all(map(torch.equal, ours.logits, plain.logits))
    assert selector.calls == []
    with pytest.raises(RuntimeError, match="not selected anything yet"):
        _ = handle.last


def _second_turn(batch, answer, text):
    """The whole chat's ids, and those of the second turn alone."""
    new = torch.tensor([[505, 509, *[i for part in [*user(text), *ANSWER] for i in part]]])
    full = torch.cat([batch["input_ids"], answer, new], 1)
    return full, torch.cat([answer[:, -1:], new], 1)


@pytest.mark.skipif(not V5, reason="on 4.57 generate() slices the new ids by the cache's length")
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_turn_with_the_new_ids_alone(model, positions):
    batch = inputs(SAMPLES[0])
    selector = Keep(every(2))
    with qts_video.attach(model, selector, positions=positions):
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        answer = first.sequences[:, batch["input_ids"].shape[1] :]
        full, new = _second_turn(batch, answer, [35, 36])
        second = model.generate(
            input_ids=new, attention_mask=torch.ones_like(full), past_key_values=first.past_key_values, **GREEDY
        )
    whole = inputs(SAMPLES[0]) | {"input_ids": full, "attention_mask": torch.ones_like(full)}
    if "mm_token_type_ids" in whole:
        whole["mm_token_type_ids"] = (full == 501).long() * 2
    keep = keep_mask(model, whole, selector.kept)
    wanted, _ = Oracle(model, whole, keep, compact=positions == "compact").greedy(4)
    assert torch.equal(second[:, new.shape[1] :], wanted)
    assert len(selector.calls) == 1


@pytest.mark.parametrize("with_video", [True, False])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_second_turn_with_all_ids_raises(model, cache, with_video):
    batch = inputs(SAMPLES[0])
    past = make_cache(model, cache)
    with qts_video.attach(model, Keep(every(2))):
        first = model.generate(**batch, **GREEDY, past_key_values=past, return_dict_in_generate=True)
        answer = first.sequences[:, batch["input_ids"].shape[1] :]
        full, _ = _second_turn(batch, answer, [35, 36])
        # With the video's inputs given again, and without them: the placeholders are cut off by then.
        whole = (batch if with_video else {}) | {"input_ids": full, "attention_mask": torch.ones_like(full)}
        whole.pop("mm_token_type_ids", None)
        if V5:
            whole["mm_token_type_ids"] = (full == 501).long() * 2
        with pytest.raises(ValueError, match="do not continue it"):
            model.generate(**whole, **GREEDY, past_key_values=first.past_key_values)


def test_a_second_turn_after_keeping_everything_is_the_models_own_affair(model):
    batch = inputs(SAMPLES[0])

    def two_turns():
        first = model.generate(**batch, **GREEDY, return_dict_in_generate=True)
        answer = first.sequences[:, batch["input_ids"].shape[1] :]
        full, _ = _second_turn(batch, answer, [35, 36])
        return model.generate(
            input_ids=full, attention_mask=torch.ones_like(full), past_key_values=first.past_key_values, **GREEDY
        )

    plain = two_turns()
    with qts_video.attach(model, Keep(keep_all)):
        assert torch.equal(two_turns(), plain)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_video_after_a_cached_prefix(model, positions):
    """The system's turn is in the cache already, put there without a selector."""
    batch = inputs(SAMPLES[0])
    selector = Keep(every(2))
    cut = 7
    cache = DynamicCache()
    with torch.no_grad():
        oracle = Oracle(model, batch, torch.ones_like(batch["input_ids"], dtype=torch.bool))
        model.model.language_model(
            inputs_embeds=oracle.embeds[:, :cut], position_ids=oracle.positions[:, :, :cut], past_key_values=cache
        )
        rest = {k: v[:, cut:] if k in ("input_ids", "mm_token_type_ids") else v for k, v in batch.items()}
        with qts_video.attach(model, selector, positions=positions):
            output = model(**rest, position_ids=oracle.positions[:, :, cut:], past_key_values=cache)
            token = output.logits[:, -1].argmax(-1)
            second = model(input_ids=token[:, None], past_key_values=cache).logits
        keep = keep_mask(model, batch, selector.kept)
        wanted = Oracle(model, batch, keep, compact=positions == "compact")
    torch.testing.assert_close(output.logits, wanted.logits()[keep][None, cut:], rtol=0, atol=1e-10)
    tokens, logits = wanted.greedy(2)
    assert torch.equal(token, tokens[:, 0])
    torch.testing.assert_close(second[:, -1], logits[1], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "option", ["assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size"]
)
def test_what_counts_on_the_whole_prompts_length_is_refused(model, option):
    batch = inputs(SAMPLES[0])
    given = {option: model if option == "assistant_model" else 2}
    with qts_video.attach(model, Keep(every(2))):
        with pytest.raises(ValueError, match=option):
            model.generate(**batch, **GREEDY, **given)
        if option != "assistant_model":
            config = transformers.GenerationConfig(**given)
            with pytest.raises(ValueError, match=option):
                model.generate(**batch, generation_config=config, max_new_tokens=2)


def test_positional_inputs_of_generate_and_forward(model):
    batch = inputs(SAMPLES[0])
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        wanted, logits = model.generate(**batch, **GREEDY), model(**batch).logits
        ids, mask = batch.pop("input_ids"), batch.pop("attention_mask")
        assert torch.equal(model.generate(ids, attention_mask=mask, **batch, **GREEDY), wanted)
        assert torch.equal(model(ids, mask, **batch).logits, logits)


def test_a_batch_equals_its_samples_one_by_one(model):
    with qts_video.attach(model, Uniform(0.5)):
        alone = [model.generate(**inputs(sample, seed=7), **GREEDY)[:, -4:] for sample in SAMPLES[:1]]
        batch = inputs(SAMPLES[0], SAMPLES[1], seed=7)
        together = model.generate(**batch, **GREEDY)[:, -4:]
    assert torch.equal(together[:1], alone[0])


def test_a_cropped_cache_raises(model):
    batch, cache = inputs(SAMPLES[0]), DynamicCache()
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        model(**batch, past_key_values=cache)
        cache.crop(5 - cache.get_seq_length())  # 5.23 takes a negative number alone
        with pytest.raises(ValueError, match="cropped to 5 tokens"):
            model(input_ids=torch.ones(1, 1, dtype=torch.int64), past_key_values=cache)


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_a_second_video_on_a_shortened_cache(model, positions, masked):
    first, second = SAMPLES[0], [*user([41], Video(3, 2, 2), [33]), *ANSWER]
    whole, part = inputs([*first, *second]), inputs(first)
    cut, patches = part["input_ids"].shape[1], len(part["pixel_values_videos"])
    oracle = Oracle(model, whole, torch.ones_like(whole["input_ids"], dtype=torch.bool))
    rest = {name: value[:, cut:] for name, value in whole.items() if name in ("input_ids", "mm_token_type_ids")}
    rest |= {name: whole[name][1:] for name in ("video_grid_thw", "second_per_grid_ts")}
    rest |= {"pixel_values_videos": whole["pixel_values_videos"][patches:]}
    rest |= {"position_ids": oracle.positions[:, :, cut:]}
    rest |= {"attention_mask": whole["attention_mask"]} if masked else {}
    part |= {"pixel_values_videos": whole["pixel_values_videos"][:patches]}
    selector, cache = Keep(every(2)), DynamicCache()
    with qts_video.attach(model, selector, positions=positions), torch.no_grad():
        model(**part, past_key_values=cache)
        kept = [selector.kept]
        output = model(**rest, past_key_values=cache)
        kept.append(selector.kept + 24)
        token = output.logits[:, -1].argmax(-1)
        where = oracle.next.view(1, 1, 1).expand(3, 1, 1)
        step = model(input_ids=token[:, None], position_ids=where, past_key_values=cache).logits
    keep = keep_mask(model, whole, torch.cat(kept))
    wanted = Oracle(model, whole, keep, compact=positions == "compact")
    ours, theirs = output.logits[0], wanted.logits()[0, cut:][keep[0, cut:]]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    tokens, logits = wanted.greedy(2)
    assert torch.equal(token, tokens[:, 0])
    torch.testing.assert_close(step[:, -1], logits[1], rtol=0, atol=1e-10)
