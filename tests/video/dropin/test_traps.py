"""What broke other drop-ins: each of these either works exactly, or raises and says what to do."""

import pytest
import qts_video
import torch
import transformers
from qts_video.attach import Prefill
from tiny import HIDDEN, Image, Keep, Oracle, Video, every, keep_mask, prompt, rows, user
from tiny_qwen import build_model, inputs
from transformers import DynamicCache

VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
BATCH = inputs(prompt(user([40], Video(4), [30, 31, 32])))
UNEQUAL = inputs(prompt(user([40], Video(4), [30, 31, 32])), prompt(user(Image(), Video(2), [33])))


def without(batch, *names):
    return {name: value for name, value in batch.items() if name not in names}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("rank", [None, 3, 4])
@pytest.mark.parametrize("use_cache", [True, False])
def test_gapped_positions_without_a_mask_are_not_read_as_packed(model, use_cache, rank, positions):
    """Without a mask and a cache, gaps in the (text) positions would be taken for several packed sequences."""
    batch, selector = without(BATCH, "attention_mask"), Keep(every(3))
    if rank is not None:
        where = Oracle(model, BATCH, torch.ones_like(BATCH["input_ids"], dtype=torch.bool)).positions
        text = torch.arange(where.shape[2]).view(1, 1, -1)
        batch["position_ids"] = where if rank == 3 else torch.cat([text, where])
    with qts_video.attach(model, selector, positions=positions), torch.no_grad():
        logits = model(**batch, use_cache=use_cache).logits
    keep = keep_mask(model, BATCH, selector.kept)
    wanted = Oracle(model, BATCH, keep, compact=positions == "compact").logits()[keep][None]
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_the_decoder_gets_a_mask_and_text_positions_without_gaps(model, positions):
    """Flash attention looks for packed sequences in the text positions, the first of four rows, by itself."""
    got = {}
    with qts_video.attach(model, Keep(every(3)), positions=positions):
        hook = model.model.language_model.register_forward_pre_hook(
            lambda module, args, kwargs: got.update(kwargs) if not got else None, with_kwargs=True
        )
        model.generate(**BATCH, max_new_tokens=2, do_sample=False)
        hook.remove()
    kept = got["inputs_embeds"].shape[1]
    assert kept < BATCH["input_ids"].shape[1]
    assert got["attention_mask"].tolist() == [[1] * kept]
    text, *rotary = got["position_ids"]
    assert text.tolist() == [list(range(kept))]
    assert (max(rotary[0][0].diff()) > 1) == (positions == "original")


def test_flat_position_ids(model):
    """[B, L] positions, as for a text model: gathered like the others."""
    selector = Keep(every(2))
    where = torch.arange(BATCH["input_ids"].shape[1])[None]
    with qts_video.attach(model, selector), torch.no_grad():
        logits = model(**BATCH, position_ids=where).logits
    keep = keep_mask(model, BATCH, selector.kept)
    oracle = Oracle(model, BATCH, keep)
    oracle.positions = where.expand(3, 1, -1)
    torch.testing.assert_close(logits, oracle.logits()[keep][None], rtol=0, atol=1e-10)


def test_token_types_are_asked_for_where_the_model_needs_them(model):
    batch, selector = without(UNEQUAL, "mm_token_type_ids"), Keep(every(2))
    with qts_video.attach(model, selector), torch.no_grad():
        if VERSION < (5, 0):
            model(**batch)
            return
        with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
            model(**batch)
        with pytest.raises(ValueError, match="mm_token_type_ids is missing"):
            model.generate(**batch, max_new_tokens=2)
    where = Oracle(model, UNEQUAL, torch.ones_like(UNEQUAL["input_ids"], dtype=torch.bool)).positions
    with qts_video.attach(model, selector), torch.no_grad():
        assert torch.equal(model(**batch, position_ids=where).logits, model(**UNEQUAL).logits)


def test_embeddings_alone_do_not_say_where_the_videos_are(model):
    embeds = model.get_input_embeddings()(BATCH["input_ids"]).detach()
    batch = without(BATCH, "input_ids") | {"inputs_embeds": embeds}
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        with pytest.raises(ValueError, match="can't be located in inputs_embeds alone"):
            model(**batch)
        with pytest.raises(ValueError, match="can't be located in inputs_embeds alone"):
            model.generate(**batch, max_new_tokens=2)
        text = {"inputs_embeds": embeds[:, :5], "attention_mask": BATCH["attention_mask"][:, :5]}
        assert model(**text).logits.shape[1] == 5  # no video, nothing to locate


def test_embeddings_with_ids(model):
    embeds = model.get_input_embeddings()(BATCH["input_ids"]).detach()
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        wanted = model(**BATCH).logits
        ids = BATCH["input_ids"]
        base = model.model(**BATCH | {"inputs_embeds": embeds})
    assert base.last_hidden_state.shape[1] == wanted.shape[1] < ids.shape[1]


def test_placeholders_without_a_video_raise(model):
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        with pytest.raises(ValueError, match="no video was given with them"):
            model(**without(BATCH, "pixel_values_videos"))
        with pytest.raises(ValueError, match="video_grid_thw is missing"):
            model(**without(BATCH, "video_grid_thw"))


def test_a_decoder_that_runs_past_the_hooks_is_noticed(model, monkeypatch):
    """What a fused forward of another library would do: call the decoder's forward instead of the decoder."""
    decoder = model.model.language_model
    monkeypatch.setattr(type(decoder), "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        for run in (
            lambda: model(**BATCH),
            lambda: model.model(**BATCH),
            lambda: model.generate(**BATCH, max_new_tokens=2),
        ):
            with pytest.raises(RuntimeError, match="keep is attached, but selected nothing"):
                run()
        model(**inputs(prompt(user([30]))))


def test_a_generate_that_never_reaches_the_model_is_noticed(model, monkeypatch):
    monkeypatch.setattr(type(model), "generate", lambda self, **kwargs: kwargs["input_ids"])
    with qts_video.attach(model, Keep(every(2))):
        with pytest.raises(RuntimeError, match="selected nothing"):
            model.generate(**BATCH)
        model.generate(input_ids=torch.tensor([[1, 2]]))


def test_generate_of_the_class_either_works_or_says_what_is_missing(model):
    """It goes past the instance's generate(), the only one to see the grids that transformers takes away since 5.18."""
    with qts_video.attach(model, Keep(every(2))):
        wanted = model.generate(**BATCH, max_new_tokens=2, do_sample=False)
        if VERSION < (5, 18):
            assert torch.equal(type(model).generate(model, **BATCH, max_new_tokens=2, do_sample=False), wanted)
        else:
            with pytest.raises(ValueError, match="video_grid_thw is missing"):
                type(model).generate(model, **BATCH, max_new_tokens=2, do_sample=False)


@pytest.mark.skipif(VERSION < (5, 18), reason="encoded videos can be given since 5.18")
def test_videos_encoded_ahead(model):
    selector = Keep(every(2))
    with qts_video.attach(model, selector), torch.no_grad():
        wanted, logits = model.generate(**BATCH, max_new_tokens=3, do_sample=False), model(**BATCH).logits
        features = {"video": model.get_video_features(BATCH["pixel_values_videos"], BATCH["video_grid_thw"])}
        batch = without(BATCH, "pixel_values_videos") | {"mm_encoder_outputs": features}
        assert torch.equal(model(**batch).logits, logits)
        assert torch.equal(model.generate(**batch, max_new_tokens=3, do_sample=False), wanted)
    assert len(selector.calls) == 4


def test_masks_that_can_not_be_shortened_raise(model):
    length = BATCH["input_ids"].shape[1]
    masks = {
        "a 4-D mask can't be shortened": torch.ones(1, 1, length, length, dtype=torch.bool).tril(),
        rf"must be \[1, {length}\], got \[1, {length + 1}\]": torch.ones(1, length + 1),
        "0 on video placeholders": BATCH["attention_mask"] * (BATCH["input_ids"] != 501),
    }
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        for message, mask in masks.items():
            where = torch.arange(length).expand(3, 1, -1)
            with pytest.raises(ValueError, match=message):
                model(**BATCH | {"attention_mask": mask, "position_ids": where})


def test_grids_that_do_not_fit_the_placeholders_raise(model):
    for grid, message in (
        ([[3, 4, 6]], "24 video placeholders, but its videos' grids .* make 18 tokens"),
        ([[4, 4, 6], [1, 4, 6]], "2 video grids were given, but input_ids hold placeholders for 1"),
        ([[4, 4, 8]], "24 video placeholders, .* make 32 tokens"),
    ):
        with qts_video.attach(model, Keep(every(2))), torch.no_grad(), pytest.raises(ValueError, match=message):
            model(**BATCH | {"video_grid_thw": torch.tensor(grid)})


def test_seconds_of_another_number_of_videos_raise(model):
    message = "the seconds per grid step of 1 videos, got 2"
    with qts_video.attach(model, Keep(every(2))), torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**BATCH | {"second_per_grid_ts": torch.tensor([1.0, 2.0])})


def test_a_cache_of_another_batch_raises(model):
    cache = DynamicCache()
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        model(**UNEQUAL, past_key_values=cache)
        with pytest.raises(ValueError, match="filled by a batch of 2, got a batch of 4"):
            model(input_ids=torch.ones(4, 1, dtype=torch.int64), past_key_values=cache)


def test_a_4d_mask_on_a_shortened_cache_raises(model):
    cache = DynamicCache()
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        model(**BATCH, past_key_values=cache)
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, L\] for a cache"):
            model(
                input_ids=torch.ones(1, 1, dtype=torch.int64),
                past_key_values=cache,
                attention_mask=torch.ones(1, 1, 1, 46),
            )


def test_a_wrong_mask_at_a_decode_step_raises(model):
    cache = DynamicCache()
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        kept = model(**BATCH, past_key_values=cache).logits.shape[1]
        with pytest.raises(ValueError, match="do not continue it"):
            model(
                input_ids=torch.ones(1, 1, dtype=torch.int64),
                past_key_values=cache,
                attention_mask=torch.ones(1, kept + 1),
            )


class RunsTheModel:
    """A method that runs the language model, and generates with it, while it selects."""

    name, needs_question = "runs the model", False

    def select(self, videos):
        self.context = context = videos.context
        with torch.no_grad():
            hidden = context.model.model.language_model(
                inputs_embeds=context.inputs_embeds,
                position_ids=context.position_ids,
                attention_mask=context.attention_mask,
                use_cache=False,
            )[0]
            self.logits = context.model.lm_head(hidden)
            self.answer = context.model.generate(**BATCH, max_new_tokens=2, do_sample=False)
            self.forward = context.model(**BATCH).logits
        return Keep(every(2)).select(videos)


def test_a_selector_may_run_the_model_itself(model):
    selector = RunsTheModel()
    with torch.no_grad():
        plain, answer = model(**UNEQUAL).logits, model.generate(**BATCH, max_new_tokens=2, do_sample=False)
        single = model(**BATCH).logits
        with qts_video.attach(model, selector) as handle:
            output = model(**UNEQUAL)
            assert handle.last.columns.shape[1] == output.logits.shape[1] < plain.shape[1]
        with qts_video.attach(model, Keep(every(2))):
            assert torch.equal(model(**UNEQUAL).logits, output.logits)
    context = selector.context
    assert isinstance(context, Prefill)
    assert context.model is model
    assert torch.equal(context.input_ids, UNEQUAL["input_ids"])
    assert context.inputs_embeds.shape == (*UNEQUAL["input_ids"].shape, HIDDEN)
    assert context.position_ids.shape[1:] == UNEQUAL["input_ids"].shape
    assert torch.equal(context.attention_mask, UNEQUAL["attention_mask"])
    for ours, theirs in zip(
        rows(selector.logits, UNEQUAL["attention_mask"]), rows(plain, UNEQUAL["attention_mask"]), strict=True
    ):
        assert torch.equal(ours, theirs)  # as the decoder would have seen it
    assert torch.equal(selector.answer, answer)
    assert torch.equal(selector.forward, single)


def test_methods_that_another_library_put_on_the_instance_come_back(model):
    calls = []

    def theirs(*args, **kwargs):
        calls.append("generate")
        return type(model).generate(model, *args, **kwargs)

    model.generate = theirs
    try:
        with qts_video.attach(model, Keep(every(2))):
            assert model.generate is not theirs
        assert model.generate is theirs
        assert calls == []
    finally:
        del model.generate


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_hidden_states_and_attentions_have_the_shortened_length(attn):
    model, selector = build_model(attn), Keep(every(2))
    # In float64, the unpatched eager attention turns padding to NaN: it masks with the least float64, in float32.
    batch = UNEQUAL if attn == "sdpa" else BATCH
    with qts_video.attach(model, selector), torch.no_grad():
        output = model(**batch, output_hidden_states=True, output_attentions=attn == "eager")
    keep = keep_mask(model, batch, selector.kept)
    length = int(keep.sum(1).max())
    assert all(hidden.shape[1] == length for hidden in output.hidden_states)
    if attn == "eager":
        assert all(weights.shape[-2:] == (length, length) for weights in output.attentions)
    valid = torch.arange(length) >= length - keep.sum(1, keepdim=True)
    for ours, theirs in zip(rows(output.logits, valid), rows(Oracle(model, batch, keep).logits(), keep), strict=True):
        atol = 1e-10 if attn == "sdpa" else 1e-6  # eager attention takes its softmax in float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=atol)


@pytest.mark.parametrize("keep", [1, 3])
def test_logits_to_keep_counts_from_the_end_of_what_is_left(model, keep):
    with qts_video.attach(model, Keep(every(2))), torch.no_grad():
        whole = model(**UNEQUAL).logits
        torch.testing.assert_close(model(**UNEQUAL, logits_to_keep=keep).logits, whole[:, -keep:], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(dtype):
    """The model's own dtype all the way: tokens reach the selector in it, and re-encoded ones leave in it."""
    model = build_model().to(dtype)
    selector = Keep(every(2), tokens=lambda kept: kept)
    with qts_video.attach(model, selector):
        ours = model.generate(
            **UNEQUAL, max_new_tokens=2, do_sample=False, return_dict_in_generate=True, output_logits=True
        )
    assert selector.calls[0].tokens.dtype == dtype
    assert torch.isfinite(ours.logits[0]).all()


def test_compiled_static_decoding():
    """generate() compiles the decode step for static caches where the device is a GPU; here it is asked to."""
    model = build_model()  # it keeps its compiled call
    config = transformers.CompileConfig(backend="eager", fullgraph=False, mode=None)
    config._compile_all_devices = True
    options = {"max_new_tokens": 4, "do_sample": False}
    selector = Keep(every(2))
    with qts_video.attach(model, selector):
        wanted = model.generate(**UNEQUAL, **options)
        compiled = model.generate(**UNEQUAL, **options, cache_implementation="static", compile_config=config)
    assert model._compiled_call is not None
    assert torch.equal(compiled, wanted)
    assert len(selector.calls) == 2
