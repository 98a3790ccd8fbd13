"""Options, messages and seams of FlexSelect, on one model."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import qts_video
import tiny_qwen
import tiny_qwen3
import torch
from exact_attention import exact_attention
from qts_video.flexselect import defaults
from qts_video.flexselect.early_exit import queries_and_keys
from qts_video.flexselect.relevance import Scorer, _fitting_sets, model_inputs, relevance_by_layer, score_sets
from qts_video.flexselect.sets import FrameSet, count_sets, split_frames
from qts_video.methods import FlexSelect, Videos
from safetensors import safe_open
from test_question import Tokenizer
from tiny import ANSWER, IM_END, SYSTEM_TURN, VERSION, Image, Keep, Video, keep_all, prompt, user
from tiny_qwen import build_model, inputs
from transformers import DynamicCache

GOLDEN = Path(__file__).parents[2] / "golden"
ONE = inputs(prompt(user(Video(4), [30, 31, 32])))
SEVERAL = inputs(
    prompt(user(Image(), Video(3), [30], Video(2, 2, 2), [31, 32])),
    prompt(user([33], Video(4, 2, 2), Image(2, 3), [34])),
)
quiet = pytest.mark.filterwarnings("ignore:training-free FlexSelect")


def videos_of(model, batch, **options):
    """What a method is given."""
    selector = Keep(keep_all)
    with qts_video.attach(model, selector), torch.no_grad():
        model(**batch, **options)
    return selector.calls[-1]


def run(model, batch, selector):
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        model(**batch)
    return handle.last


# What is refused, and what it says.


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"layer": -1}, ValueError, "layer must be at least 0, got -1"),
        ({"layer": 2.0}, TypeError, "layer must be an int, got 2.0"),
        ({"layer": True}, TypeError, "layer must be an int, got True"),
        ({"frames_per_set": 0}, ValueError, "frames_per_set must be at least 1, got 0"),
        ({"frames_per_set": None}, TypeError, "frames_per_set must be an int, got None"),
        ({"set_batch_size": 0}, ValueError, "set_batch_size must be at least 1, got 0"),
        ({"max_tokens": 0}, ValueError, "max_tokens must be at least 1, got 0"),
        ({"retention_ratio": 1.5}, ValueError, "retention_ratio must be in"),
        ({"reduce": "median"}, ValueError, "reduce must be one of max, mean, token_selection.*got 'median'"),
        ({"query": "answer"}, ValueError, "query must be one of prompt, question, got 'answer'"),
        ({"layer": 1, "selector": object()}, ValueError, "its own last layer: layer must be None, got 1"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        FlexSelect(**options)


@pytest.mark.parametrize(
    "samples, options, message",
    [
        ([prompt(user(Video(4), [30]))], {"layer": 3}, r"expected a layer of 0 \.\. 2, as .*TextModel has, got 3"),
        ([prompt(user(Video(4), [30]))], {"layer": None}, "no reference layer.*with 3 layers of width 64.*recall"),
        ([prompt(user(Video(4), [30]))], {"max_tokens": None}, "no budget is known for qwen2_5_vl.*give FlexSelect"),
        (
            [prompt(user(Video(2), [30], Video(2), [31]))],
            {"frames_per_set": 1},
            "frames_per_set of at least 2, got 1",
        ),
        ([[*SYSTEM_TURN, [30], Video(4)]], {}, "no text stands behind video 0 in sample 0"),
        (
            [prompt(user(Video(2), [30])), prompt(user([30, 31], Video(4)))],
            {"query": "question"},
            "the question of sample 1 stands before its video 1",
        ),
    ],
)
def test_bad_prompts_and_models(model, samples, options, message):
    batch = inputs(*samples)
    if message.startswith("no text"):  # the tag behind the video is text: take it away
        batch = {
            name: value[:, :-1] if value.shape == batch["input_ids"].shape else value for name, value in batch.items()
        }
    ran = []
    hook = model.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    selector = FlexSelect(**{"layer": 1, "max_tokens": 5, **options})
    attached = qts_video.attach(model, selector, tokenizer=Tokenizer())
    with attached, torch.no_grad(), pytest.raises(ValueError, match=message):
        model(**batch)
    hook.remove()
    assert ran == []


def test_a_question_has_to_be_found(model):
    attached = qts_video.attach(model, FlexSelect(1, 5, query="question"))
    with attached, torch.no_grad(), pytest.raises(ValueError, match="give attach"):
        model(**ONE)


def test_without_a_prefill():
    videos = Videos(torch.zeros(4, 2), torch.tensor([0, 4]), [4], [(1, 2, 2)], torch.zeros(4), [0])
    with pytest.raises(ValueError, match=r"videos.context is None: use it with attach\(\)"):
        FlexSelect(1, 5).select(videos)


@quiet
def test_sliding_windows_are_refused(model, monkeypatch):
    monkeypatch.setattr(model.model.language_model.layers[1].self_attn, "sliding_window", 8)
    with pytest.raises(ValueError, match=r"layer 1 of Qwen2_5_VLTextModel has sliding-window attention"):
        run(model, ONE, FlexSelect(1, 5))
    assert run(model, ONE, FlexSelect(2, 5)).kept == 5


def test_a_decoder_of_another_kind():
    class Other(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])

    with pytest.raises(TypeError, match="with a self_attn or attention, got Linear"):
        queries_and_keys(Other(), {}, [0])
    with pytest.raises(ValueError, match="at least one layer"):
        queries_and_keys(Other(), {}, [])


# Published defaults.


@pytest.mark.parametrize(
    "known, layer, budget",
    [
        (("qwen2_5_vl", 28, 3584), 20, 7040),
        (("qwen2_5_vl", 80, 8192), 60, None),
        (("qwen3_vl", 36, 4096), 24, None),
        (("qwen3_vl", 64, 5120), 48, None),
        (("llava_onevision", 28, 3584), 19, 6720),
        (("internvl_chat", 32, 4096), 15, 8256),
    ],
)
def test_published_defaults(known, layer, budget):
    found = defaults.DEFAULTS[known]
    assert (found.layer, found.budget) == (layer, budget)


@quiet
def test_defaults_are_those_of_the_model(model, monkeypatch):
    """The budget is of a sample: its videos share it in proportion to their tokens."""
    monkeypatch.setitem(defaults.DEFAULTS, ("qwen2_5_vl", 3, 64), defaults.Default(1, 13))
    ours = run(model, SEVERAL, FlexSelect())
    # 18 and 8 tokens share 13: 9 and 4; 16 tokens have 13 of their own.
    assert [video.kept for video in ours.videos] == [9, 4, 13]
    given = run(model, SEVERAL, FlexSelect(1, max_tokens=13))
    assert torch.equal(given.videos[2].indices, ours.videos[2].indices)
    assert torch.equal(given.videos[2].scores, ours.videos[2].scores)


# The query.


@quiet
def test_the_question_alone_may_ask(model):
    """Against the attention of those rows, by the whole model; text before a second video asks about the first."""
    batch = inputs(prompt(user([40], Video(2), [30, 31], Video(3), [32, 33])))
    found = {}
    for query in ("question", "prompt"):
        with qts_video.attach(model, FlexSelect(1, 5, query=query), tokenizer=Tokenizer()) as handle, torch.no_grad():
            model(**batch)
        found[query] = torch.cat([video.scores for video in handle.last.videos])
    with exact_attention(model.model.language_model) as exact, torch.no_grad():
        model(**batch)
    ids, weights = batch["input_ids"][0].tolist(), exact.weights[1][0]
    first, second = range(ids.index(501), ids.index(30) - 1), range(ids.index(31) + 2, ids.index(32) - 1)
    asks = [ids.index(token) for token in (30, 31, 32, 33)]
    for query, rows in (
        ("question", (asks, asks[2:])),
        ("prompt", ([c for c in range(first[-1] + 1, len(ids)) if ids[c] != 501], range(second[-1] + 1, len(ids)))),
    ):
        wanted = [weights[:, list(r)][:, :, list(c)].amax((0, 1)) for r, c in zip(rows, (first, second), strict=True)]
        torch.testing.assert_close(found[query], torch.cat(wanted).float(), rtol=1e-6, atol=0)
    assert not torch.equal(found["question"], found["prompt"])


@quiet
def test_a_given_question_asks_where_it_stands_in_the_prompt(model):
    batch = inputs(prompt(user([40], Video(2), [30, 31, 32, 33])))
    scores = {}
    for given in ([31, 32], [30, 31, 32, 33], None):
        with qts_video.attach(model, FlexSelect(1, 5, query="question"), tokenizer=Tokenizer()) as handle:
            handle.question(given)
            with torch.no_grad():
                model(**batch)
        scores[None if given is None else len(given)] = handle.last.videos[0].scores
    assert not torch.equal(scores[2], scores[None])
    assert torch.equal(scores[4], scores[None])
    with qts_video.attach(model, FlexSelect(1, 5, query="question"), tokenizer=Tokenizer()) as handle:
        handle.question([31, 33])
        with torch.no_grad(), pytest.raises(ValueError, match="is not in the prompt of sample 0, token for token"):
            model(**batch)


def test_reductions_by_the_names_of_the_published_code(model):
    videos = videos_of(model, SEVERAL)
    scores = {
        name: relevance_by_layer(videos, [1], reduce=name, frames_per_set=2)[1]
        for name in ("max", "mean", "token_selection", "token_selection_argmax", "token_selection_mean")
    }
    assert torch.equal(scores["token_selection"], scores["max"])
    assert torch.equal(scores["token_selection_argmax"], scores["max"])
    assert torch.equal(scores["token_selection_mean"], scores["mean"])
    assert not torch.equal(scores["max"], scores["mean"])


def test_the_pooled_query_is_a_sink(model):
    """One more key in every row's softmax: the maximum of the text's queries, head by head."""
    videos = videos_of(model, ONE)
    ours = relevance_by_layer(videos, [1], reduce="token_selection_pool")[1]
    context = videos.context
    every = torch.arange(ONE["input_ids"].shape[1])[None]
    taken = model_inputs(context)(torch.zeros(1, dtype=torch.int64), every)
    with torch.no_grad():
        q, k, scale = queries_and_keys(context.decoder, taken | {"attention_mask": torch.ones_like(every)}, [1])[1]
    q, k = q[0].transpose(0, 1), k[0].transpose(0, 1).repeat_interleave(2, 0)
    first, stop = ONE["input_ids"][0].tolist().index(501), ONE["input_ids"][0].tolist().index(503)
    wanted = []
    for head in range(4):
        text = q[head, stop:]
        sink = text.amax(0)
        for row in range(len(text)):
            logits = torch.cat([k[head, : stop + row + 1] @ text[row], (sink @ text[row])[None]]) * scale
            wanted.append(logits.softmax(0)[first:stop])
    torch.testing.assert_close(ours, torch.stack(wanted).amax(0), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["mrope", "rope"])
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_golden(name, reduce, monkeypatch):
    """From recorded queries and keys through sets of one prompt, as if a decoder had made them."""
    with safe_open(GOLDEN / f"flexselect_{name}.safetensors", "pt") as file:
        config = json.loads(file.metadata()["config"])
        q, k, wanted = file.get_tensor("q"), file.get_tensor("k"), file.get_tensor(f"score_{reduce}")
    pre, vision, length = config["pre"], config["vis"], k.shape[2]
    whole = torch.zeros(1, length, *q.shape[1::2])
    whole[:, pre + vision :] = q.transpose(1, 2)
    one = FrameSet(0, torch.arange(length), [0], [torch.arange(vision)], [torch.arange(pre, pre + vision)])
    query = torch.arange(length)[None] >= pre + vision

    def visit_attention(decoder, inputs, layers, visit):
        visit(5, whole, k.transpose(1, 2), config["Dh"] ** -0.5)

    monkeypatch.setattr("qts_video.flexselect.relevance.visit_attention", visit_attention)
    scorer = Scorer(torch.nn.Identity(), 5, lambda sample, columns: {})
    scores = score_sets(scorer, [5], [one], query, vision, torch.device("cpu"), reduce=reduce)[5]
    torch.testing.assert_close(scores, wanted[0], rtol=1e-5, atol=1e-6)


# The warning.


def test_the_cost_is_said_once(model):
    selector = FlexSelect(1, max_tokens=5)
    with pytest.warns(UserWarning, match="training-free FlexSelect on 5 frames: at 64 and below"):
        run(model, SEVERAL, selector)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, SEVERAL, selector)


def test_no_warning_where_it_pays(model):
    batch = inputs(prompt(user(Video(65, 1, 1), [30])))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        run(model, batch, FlexSelect(1, max_tokens=5))


# Early exit beside what else is done to models.


@pytest.fixture
def own():
    return build_model()


@quiet
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # reentrant, where gradients are off
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_and_training(own, reentrant):
    wanted = run(own, ONE, FlexSelect(1, 9, frames_per_set=2))
    own.train()
    own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    selector = FlexSelect(1, 9, frames_per_set=2)
    with qts_video.attach(own, selector) as handle:
        own(**ONE, labels=ONE["input_ids"]).loss.backward()
    assert torch.equal(handle.last.videos[0].indices, wanted.videos[0].indices)
    assert own.model.language_model.layers[1].self_attn.q_proj.weight.grad.abs().sum() > 0
    assert not handle.last.videos[0].scores.requires_grad


@quiet
def test_layers_that_are_compiled_one_by_one(own):
    wanted = run(own, ONE, FlexSelect(1, 9, frames_per_set=2))
    for layer in own.model.language_model.layers:
        layer.compile(backend="eager", dynamic=True)
    compiled = [layer._compiled_call_impl for layer in own.model.language_model.layers]
    with torch.no_grad():
        own(**ONE)
    ours = run(own, ONE, FlexSelect(1, 9, frames_per_set=2))
    assert torch.equal(ours.videos[0].indices, wanted.videos[0].indices)
    assert [layer._compiled_call_impl for layer in own.model.language_model.layers] == compiled


@quiet
def test_weights_that_accelerate_moves(own):
    """Offloaded to the CPU, every module's weights are there only while it runs."""
    from accelerate import cpu_offload

    wanted = run(own, ONE, FlexSelect(1, 9, frames_per_set=2))
    cpu_offload(own.model.language_model, execution_device=torch.device("cpu"))
    q_proj = own.model.language_model.layers[1].self_attn.q_proj
    assert q_proj.weight.is_meta
    ours = run(own, ONE, FlexSelect(1, 9, frames_per_set=2))
    assert torch.equal(ours.videos[0].scores, wanted.videos[0].scores)
    assert q_proj.weight.is_meta


@quiet
@pytest.mark.parametrize("attn", ["eager", "sdpa"])
@pytest.mark.parametrize("tiny", [tiny_qwen, tiny_qwen3], ids=["qwen2_5_vl", "qwen3_vl"])
def test_the_model_is_configured_as_before(tiny, attn):
    """With a config that asks for hidden states too: then transformers 4 swaps the layers' forwards while they run."""
    own = tiny.build_model(attn)
    batch = tiny.inputs(prompt(user(Video(4), [30, 31, 32])))
    wanted = run(own, batch, FlexSelect(2, 9, frames_per_set=2))
    decoder = own.model.language_model
    decoder.config.output_hidden_states = True
    forwards = [layer.forward for layer in decoder.layers]
    ours = run(own, batch, FlexSelect(2, 9, frames_per_set=2))
    assert torch.equal(ours.videos[0].scores, wanted.videos[0].scores)
    assert [layer.forward for layer in decoder.layers] == forwards
    assert {layer.self_attn.config._attn_implementation for layer in decoder.layers} == {attn}


@quiet
def test_a_copy_of_the_model_selects_by_itself(own):
    with qts_video.attach(own, FlexSelect(1, 9, frames_per_set=2)) as handle, torch.no_grad():
        own(**ONE)
        twin = copy.deepcopy(own)
        twin(**SEVERAL)
    assert len(handle.last.videos) == 1


def test_several_layers_in_one_pass(model):
    videos = videos_of(model, SEVERAL)
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        for i, layer in enumerate(model.model.language_model.layers)
    ]
    scores = relevance_by_layer(videos, [2, 0], frames_per_set=64, set_batch_size=2)
    for hook in hooks:
        hook.remove()
    assert ran == [0, 1, 2]
    assert sorted(scores) == [0, 2]
    for layer in scores:
        alone = relevance_by_layer(videos, [layer], frames_per_set=64, set_batch_size=2)[layer]
        assert torch.equal(scores[layer], alone)


def test_scores_are_differentiable(own):
    """What a distilled selector is trained with."""
    videos = videos_of(own, ONE)
    context = videos.context
    scorer = Scorer(context.decoder, 1, model_inputs(context))
    query = torch.zeros(ONE["input_ids"].shape, dtype=torch.bool)
    query[0, -4:] = True
    sets = split_frames(context.layout, 2)
    scores = score_sets(scorer, [1], sets, query, len(videos.tokens), torch.device("cpu"), reduce="mean")[1]
    scores.square().sum().backward()
    for layer, name in ((0, "v_proj"), (1, "q_proj"), (1, "k_proj")):
        weight = getattr(own.model.language_model.layers[layer].self_attn, name).weight
        assert weight.grad.abs().sum() > 0


@quiet
def test_a_video_on_a_filled_cache(model):
    """Only what is fed now is in the sets' prompts, at the positions that it has."""
    first = inputs([*SYSTEM_TURN, [40, 41]])
    ids = inputs([[IM_END], *user(Video(4), [30, 31]), *ANSWER])
    past = DynamicCache()
    seen = first["input_ids"].shape[1]
    with torch.no_grad():
        model(input_ids=first["input_ids"], past_key_values=past)
    mask = torch.ones(1, seen + ids["input_ids"].shape[1], dtype=torch.int64)
    options = {"past_key_values": past, "attention_mask": mask}
    positions = model.model.get_rope_index(
        ids["input_ids"],
        **{name: ids[name] for name in ("video_grid_thw", "second_per_grid_ts")},
        **({"mm_token_type_ids": ids["mm_token_type_ids"]} if VERSION >= (5,) else {}),
    )[0]
    selector = FlexSelect(1, max_tokens=9, frames_per_set=2)
    with qts_video.attach(model, selector) as handle, torch.no_grad():
        model(**(ids | options), position_ids=positions + seen)
    after = handle.last.videos[0]
    fresh = run(model, ids, FlexSelect(1, max_tokens=9, frames_per_set=2)).videos[0]
    torch.testing.assert_close(after.scores, fresh.scores, rtol=1e-4, atol=0)  # rotary angles are float32
    assert after.kept == fresh.kept == 9


# Sets.


@pytest.mark.parametrize(
    "steps, frames_per_set, sets",
    [([64], 64, 1), ([65], 64, 2), ([128], 64, 2), ([129], 64, 3), ([3, 2], 2, 3), ([5], 1, 5)],
)
def test_as_few_sets_as_fit(steps, frames_per_set, sets):
    assert count_sets(steps, frames_per_set) == sets


def test_as_many_sets_at_once_as_the_gpu_holds(model, monkeypatch):
    sets = [FrameSet(0, torch.arange(n), [], [], []) for n in (100, 90)]
    of_set = 100 * (10 * 64 + 3 * 96) * 8
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 100)
    decoder = model.model.language_model
    for free, wanted in ((0, 1), (2 * 5 * of_set - 200, 5), (2 * 5 * of_set - 201, 4)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**9))
        assert _fitting_sets(decoder, sets, torch.device("cuda")) == wanted
    assert _fitting_sets(decoder, sets, torch.device("cpu")) == 1
