"""FlexSelect in every model: what it keeps, what it leaves alone, what it refuses."""

from collections import Counter

import pytest
import qts_video
import torch
from families import FAMILIES
from qts_video.adapters import find_adapter
from qts_video.methods import FlexSelect
from tiny import Oracle, keep_mask, rows

import qts_kernels

GREEDY = {"max_new_tokens": 4, "do_sample": False}
NAMES = pytest.mark.parametrize("name", ["one", "unequal", "several"])
pytestmark = pytest.mark.filterwarnings("ignore:training-free FlexSelect")


@pytest.fixture
def model(model):
    before = state(model)
    yield model
    assert state(model) == before


@pytest.fixture(scope="module")
def qwen():
    return FAMILIES["qwen2_5_vl"].build_model()


def state(model):
    """Everything in the decoder that a hook, a replaced method, module, parameter or config would change."""
    generated = {"_cache", "_previous_max_cache_length"}  # what generate() keeps
    return [
        (
            type(module),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            id(getattr(module, "config", None)),
            set(module.__dict__) - generated,
            {name: id(child) for name, child in module._modules.items()},
            {name: id(parameter) for name, parameter in module._parameters.items()},
        )
        for module in find_adapter(model).parts(model).decoder.modules()
    ]


class Watch:
    """A FlexSelect, and what it was given and returned."""

    needs_question = False
    name = "flexselect"

    def __init__(self, **options):
        self.inner, self.calls = FlexSelect(**options), []

    def select(self, videos):
        selection = self.inner.select(videos)
        self.calls.append((videos, selection))
        return selection


def select(model, batch, **options):
    """The videos of a prefill, and what is selected of them."""
    watch = Watch(**{"layer": 1, **options})
    with qts_video.attach(model, watch), torch.no_grad():
        model(**batch)
    (call,) = watch.calls
    return call


def segments_of(videos, frames_per_set):
    """(video, [rows of the packed axis]) of every set of every video, by the definition."""
    found = []
    for sample in sorted(set(videos.sample)):
        of_sample = [v for v, of in enumerate(videos.sample) if of == sample]
        number = 1
        while sum(len(range(0, videos.grids[v][0], number)) for v in of_sample) > frames_per_set:
            number += 1
        for k in range(number):
            for v in of_sample:
                start, area = sum(videos.lengths[:v]), videos.grids[v][1] * videos.grids[v][2]
                tokens = [start + i for i in range(videos.lengths[v]) if i // area % number == k]
                if tokens:
                    found.append((v, tokens))
    return found


def shares_of(budget, sizes):
    """Largest remainder, in fractions of a share."""
    total = sum(sizes)
    budget = min(budget, total)
    shares = [budget * size // total for size in sizes]
    while sum(shares) < budget:
        missing = [budget * size / total - given for size, given in zip(sizes, shares, strict=True)]
        shares[missing.index(max(missing))] += 1
    return shares


def fill(scores, tokens, budget, span, start):
    """The best tokens that fit a budget together with the newlines of their lines, one at a time."""
    ranked = sorted(tokens, key=lambda token: (-scores[token], token))
    kept, lines, spent = [], set(), 0
    for token in ranked:
        line = (token - start) // span if span else None
        cost = 1 + (span > 0 and line not in lines)
        if spent + cost > budget:
            break
        kept.append(token)
        lines.add(line)
        spent += cost
    if spent < budget:
        more = [t for t in ranked if t not in kept and span and (t - start) // span in lines]
        kept += more[:1]
    return kept


def expected(videos, scores, frames_per_set, budgets):
    spans = videos.newline_spans or [0] * len(budgets)
    kept = []
    for v, budget in enumerate(budgets):
        start, span = sum(videos.lengths[:v]), spans[v]
        if span == videos.lengths[v]:
            budget, span = max(budget - 1, 1), 0
        segments = [tokens for of, tokens in segments_of(videos, frames_per_set) if of == v]
        sizes = [len(tokens) + (len(tokens) // span if span else 0) for tokens in segments]
        best = []
        for tokens, share in zip(segments, shares_of(budget, sizes), strict=True):
            best += fill(scores.tolist(), tokens, share, span, start)
        kept.append(sorted(best))
    return kept


@NAMES
@pytest.mark.parametrize("frames_per_set", [2, 3, 64])
@pytest.mark.parametrize("budget", [{"max_tokens": 7}, {"retention_ratio": 0.4}, {"max_tokens": 1000}])
def test_the_best_of_every_set_are_kept(family, model, name, frames_per_set, budget):
    batch = family.inputs(*family.prompts[name])
    videos, selection = select(model, batch, frames_per_set=frames_per_set, **budget)
    newlines = [m // s if s else 0 for m, s in zip(videos.lengths, videos.newline_spans, strict=True)]
    totals = [m + n for m, n in zip(videos.lengths, newlines, strict=True)]
    if "max_tokens" in budget:
        budgets = [min(budget["max_tokens"], total) for total in totals]
    else:
        budgets = [-(-2 * total // 5) for total in totals]
    wanted = expected(videos, selection.scores, frames_per_set, budgets)
    offsets = selection.cu_seqlens.tolist()
    for v, of_video in enumerate(wanted):
        assert selection.indices[offsets[v] : offsets[v + 1]].tolist() == of_video
    assert selection.n.tolist() == [len(of_video) for of_video in wanted]
    assert selection.scores.shape == (sum(videos.lengths),)
    assert selection.scores.dtype == torch.float32
    assert selection.tokens is None


@pytest.mark.parametrize("max_tokens", [5, 6, 9, 10])
def test_the_report_counts_the_budget(family, model, max_tokens):
    """Newlines included; short by one token a set at most, where the touched rows are all kept."""
    batch = family.inputs(*family.prompts["unequal"])
    with qts_video.attach(model, FlexSelect(1, max_tokens=max_tokens, frames_per_set=2)) as handle, torch.no_grad():
        model(**batch)
    for video in handle.last.videos:
        budget = min(max_tokens, video.total)
        assert budget - 2 * (video.newlines > 1) <= video.kept <= budget


@NAMES
def test_the_answer_is_that_of_the_kept_columns(family, model, name):
    batch = family.inputs(*family.prompts[name])
    watch = Watch(layer=1, retention_ratio=0.4, frames_per_set=2)
    with qts_video.attach(model, watch) as handle, torch.no_grad():
        logits = model(**batch).logits
        generated = model.generate(**batch, **GREEDY)
    assert len(watch.calls) == 2
    selection = watch.calls[0][1]
    keep = keep_mask(model, batch, selection.indices[: int(selection.cu_seqlens[-1])])
    oracle = Oracle(model, batch, keep)
    for ours, theirs in zip(rows(logits, handle.last.columns >= 0), rows(oracle.logits(), keep), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert torch.equal(generated[:, -4:], oracle.greedy(4)[0])
    torch.testing.assert_close(
        torch.cat([video.scores for video in handle.last.videos]), watch.calls[1][1].scores, rtol=0, atol=0
    )


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static"}], ids=["beams", "static"])
def test_other_ways_to_generate(family, model, options):
    """Beams select once a sample, and the same as a forward call."""
    if not family.repeats and "num_beams" in options:
        pytest.skip("this version repeats the samples of this model wrongly")
    batch = family.inputs(*family.prompts["several"])
    _, wanted = select(model, batch, max_tokens=9, frames_per_set=2)
    watch = Watch(layer=1, max_tokens=9, frames_per_set=2)
    with qts_video.attach(model, watch):
        model.generate(**batch, **GREEDY, **options)
    assert len(watch.calls) == 1
    assert torch.equal(watch.calls[0][1].indices, wanted.indices)


@NAMES
def test_sets_may_go_together(family, model, name):
    """Sets of unequal length, of several samples, in one forward: the same scores."""
    batch = family.inputs(*family.prompts[name])
    found = [select(model, batch, max_tokens=9, frames_per_set=2, set_batch_size=n) for n in (None, 1, 2, 100)]
    for _, selection in found[1:]:
        torch.testing.assert_close(selection.scores, found[0][1].scores, rtol=1e-6, atol=0)
        assert torch.equal(selection.indices, found[0][1].indices)


class Counting(Watch):
    """Counts what runs in the decoder's layers while it selects, and the masks that the first layer is given."""

    def __init__(self, model, **options):
        super().__init__(**options)
        self.decoder, self.ran, self.masks = find_adapter(model).parts(model).decoder, Counter(), []

    def select(self, videos):
        hooks = [
            module.register_forward_hook(lambda *_, name=name: self.ran.update([name]))
            for name, module in self.decoder.named_modules()
            if name.startswith("layers.")
        ]
        first = self.decoder.layers[0]
        hooks.append(
            first.register_forward_pre_hook(
                lambda module, args, kwargs: self.masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
        )
        try:
            return super().select(videos)
        finally:
            for hook in hooks:
                hook.remove()


def test_nothing_behind_the_queries_and_keys_of_the_layer_runs(family, model, monkeypatch):
    batch, ranked = family.inputs(*family.prompts["one"]), []
    topn = qts_kernels.topn
    monkeypatch.setattr(qts_kernels, "topn", lambda *args, **kwargs: ranked.append(args) or topn(*args, **kwargs))
    watch = Counting(model, layer=1, max_tokens=9, frames_per_set=2)
    with qts_video.attach(model, watch), torch.no_grad():
        model(**batch)
    sets = len(segments_of(watch.calls[0][0], 2))
    assert sets == 2
    assert len(ranked) == 1
    assert watch.ran["layers.0"] == sets
    behind = {name: count for name, count in watch.ran.items() if not name.startswith("layers.0")}
    if "internlm2" in family.name:
        names = ["attention_norm", "attention.wqkv", "attention.rotary_emb"]
    else:
        names = ["input_layernorm", "self_attn.q_proj", "self_attn.k_proj"]
        names += ["self_attn.q_norm", "self_attn.k_norm"] if "qwen3" in family.name else []
    assert behind == {f"layers.1.{name}": sets for name in names}


def test_sets_of_unequal_length_need_no_mask(family, model):
    """A mask [sets, 1, L, L] would grow with the square of the prompt."""
    if "internlm2" in family.name:
        pytest.skip("makes a mask of its own")
    batch = family.inputs(*family.prompts["unequal"])
    watch = Counting(model, layer=1, max_tokens=9, frames_per_set=2, set_batch_size=100)
    with qts_video.attach(model, watch), torch.no_grad():
        model(**batch)
    assert watch.masks == [None]


def fails(*args, **kwargs):
    raise OSError("inside")


@pytest.mark.parametrize("where", ["a layer before", "the layer's attention", "relevance"])
def test_an_error_inside_leaves_nothing_behind(family, model, monkeypatch, where):
    batch = family.inputs(*family.prompts["one"])
    layers = find_adapter(model).parts(model).decoder.layers
    with torch.no_grad():
        logits = model(**batch).logits
    before = state(model)
    attention = layers[1].attention.wqkv if "internlm2" in family.name else layers[1].self_attn.k_proj
    with qts_video.attach(model, FlexSelect(1, max_tokens=9)), torch.no_grad():
        attached = state(model)
        with monkeypatch.context() as patch:
            if where == "relevance":
                patch.setattr(qts_kernels, "relevance", fails)
            else:
                patch.setattr(attention if where.startswith("the") else layers[0], "forward", fails)
            with pytest.raises(OSError, match="inside"):
                model(**batch)
        assert state(model) == attached
    assert state(model) == before
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(family, dtype):
    model = family.build_model().to(dtype)
    batch = family.inputs(*family.prompts["several"])
    _, selection = select(model, batch, max_tokens=9, frames_per_set=2, set_batch_size=2)
    assert torch.isfinite(selection.scores).all()
    assert (selection.scores > 0).all()
    if dtype == torch.float32:
        exact = select(family.build_model(), batch, max_tokens=9, frames_per_set=2)[1].scores
        torch.testing.assert_close(selection.scores, exact, rtol=1e-3, atol=1e-5)
