"""The QTSplus method on hand-made videos: budgets, batches, dtypes, initialisation from a language model."""

import pytest
import torch
from qts_video.methods import QTSplus, Selector, Videos
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qts_kernels.nn import QTSplus as SelectorModule

D = 48
LENGTHS, QUESTIONS = [60, 24, 96], [5, 3, 5]


def offsets(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_videos(dtype=torch.float32, chosen=(0, 1, 2)):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(length, D, generator=generator) for length in LENGTHS]
    questions = [torch.randn(length, D, generator=generator) for length in QUESTIONS]
    lengths = [LENGTHS[v] for v in chosen]
    return Videos(
        tokens=torch.cat([tokens[v] for v in chosen]).to(dtype),
        cu_seqlens=offsets(lengths),
        lengths=lengths,
        grids=[(length // 12, 3, 4) for length in lengths],
        timestamps=torch.cat([torch.arange(length // 12).repeat_interleave(12).float() for length in lengths]),
        sample=list(range(len(chosen))),
        question=torch.cat([questions[v] for v in chosen]).to(dtype),
        cu_seqlens_question=offsets([QUESTIONS[v] for v in chosen]),
        question_ids=[],
    )


@pytest.fixture
def module():
    torch.manual_seed(0)
    module = SelectorModule(D, 6, 2, reencode_layers=2).eval()
    torch.nn.init.normal_(module.time_embedding.proj.weight, std=0.1)
    return module.requires_grad_(False)


def test_it_is_a_selector(module):
    selector = QTSplus(module)
    assert isinstance(selector, Selector)
    assert (selector.name, selector.needs_question) == ("qtsplus", True)


def test_predicted_budget(module):
    videos = make_videos()
    selection = QTSplus(module).select(videos)
    predicted = (selection.rho * torch.tensor(LENGTHS)).ceil().long()
    assert torch.equal(selection.n, predicted)
    assert selection.tokens.shape == (int(predicted.sum()), D)
    assert selection.scores.shape == (sum(LENGTHS),)
    for v in range(3):
        alone = QTSplus(module).select(make_videos(chosen=(v,)))
        rows = slice(int(selection.cu_seqlens[v]), int(selection.cu_seqlens[v + 1]))
        assert torch.equal(selection.indices[rows] - sum(LENGTHS[:v]), alone.indices)
        torch.testing.assert_close(selection.tokens[rows], alone.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "budget, counts",
    [
        ({"retention_ratio": 0.1}, [6, 3, 10]),
        ({"retention_ratio": 1.0}, LENGTHS),
        ({"retention_ratio": 0.001}, [1, 1, 1]),
        ({"retention_ratio": 0.5, "max_tokens": 20}, [20, 12, 20]),
        ({"max_tokens": 4}, [4, 4, 4]),
    ],
)
def test_given_budget(module, budget, counts):
    selection = QTSplus(module, **budget).select(make_videos())
    assert selection.n.tolist() == counts
    assert selection.rho is not None
    scores = selection.scores.split(LENGTHS)
    kept = selection.indices.split(counts)
    for v, start in enumerate(offsets(LENGTHS)[:-1]):
        best = scores[v].argsort(descending=True, stable=True)[: counts[v]].sort().values
        assert torch.equal(kept[v] - start, best)


def test_max_tokens_never_raises_the_predicted_budget(module):
    assert torch.equal(
        QTSplus(module, max_tokens=1000).select(make_videos()).n, QTSplus(module).select(make_videos()).n
    )


def test_time_matters(module):
    videos = make_videos()
    before = QTSplus(module).select(videos)
    videos.timestamps = videos.timestamps * 3
    after = QTSplus(module).select(videos)
    assert torch.equal(before.indices, after.indices)
    assert not torch.allclose(before.tokens, after.tokens, atol=1e-3)


def test_selector_in_another_dtype(module):
    selection = QTSplus(module).select(make_videos(torch.bfloat16))
    assert selection.tokens.dtype == torch.bfloat16
    assert selection.scores.dtype == torch.float32
    exact = make_videos(torch.bfloat16)
    exact.tokens, exact.question = exact.tokens.float(), exact.question.float()
    expected = QTSplus(module).select(exact)
    assert torch.equal(selection.scores, expected.scores)
    assert torch.equal(selection.tokens, expected.tokens.bfloat16())


def test_it_trains_and_saves_as_a_module(module, tmp_path):
    selector = QTSplus(module.requires_grad_(), retention_ratio=0.5).train()
    before = {name: p.clone() for name, p in selector.named_parameters()}
    optimizer = torch.optim.SGD(selector.parameters(), lr=0.1)
    out = selector.select(make_videos())
    (out.tokens.square().mean() + out.scores.square().sum() + out.rho.sum()).backward()
    optimizer.step()
    moved = {name for name, p in selector.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in before if name not in moved} <= {n for n in before if n.endswith("k_proj.bias")}
    selector.save_pretrained(tmp_path)
    loaded = QTSplus.from_pretrained(tmp_path, max_tokens=7)
    assert loaded.max_tokens == 7
    assert not loaded.training
    a, b = (s.eval().select(make_videos()) for s in (selector, QTSplus.from_pretrained(tmp_path, 0.5)))
    assert torch.equal(a.tokens, b.tokens)
    fresh = QTSplus(SelectorModule(D, 6, 2, reencode_layers=2), 0.5)
    fresh.load_state_dict(selector.state_dict())
    assert torch.equal(a.tokens, fresh.select(make_videos()).tokens)


@pytest.mark.parametrize("budget", [{"retention_ratio": 0.0}, {"retention_ratio": 1.1}, {"max_tokens": 0}])
def test_bad_budget(module, budget):
    with pytest.raises(ValueError, match="must be"):
        QTSplus(module, **budget)


def test_bad_videos(module):
    videos = make_videos()
    videos.question = None
    with pytest.raises(ValueError, match=r"videos\.question is None"):
        QTSplus(module).select(videos)
    videos = make_videos()
    videos.tokens = torch.zeros(180, 40)
    with pytest.raises(ValueError, match="for a model of width 48, got tokens of width 40"):
        QTSplus(module).select(videos)
    with pytest.raises(ValueError, match="the selector is on meta, the model on cpu: move it there"):
        QTSplus(module).to("meta").select(make_videos())


SIZES = {
    "hidden_size": D,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


@pytest.fixture
def language_model():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES)).bfloat16()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_from_language_model(language_model):
    selector = QTSplus.from_language_model(
        language_model, scoring_layers=2, reencode_layers=2, n_max=33, retention_ratio=0.25
    )
    module, layers = selector.selector, language_model.model.layers
    assert module.config["num_kv_heads"] == 2
    assert module.config["n_max"] == 33
    assert {p.dtype for p in selector.parameters()} == {torch.bfloat16}
    assert not selector.training
    for ours, theirs in (
        (module.scoring_layers[0], layers[2]),
        (module.scoring_layers[1], layers[2]),
        (module.reencode_layers[0].core, layers[0]),
        (module.reencode_layers[1].core, layers[1]),
    ):
        assert torch.equal(ours.q_norm.weight, theirs.input_layernorm.weight)
        assert torch.equal(ours.kv_norm.weight, theirs.input_layernorm.weight)
        assert torch.equal(ours.q_proj.weight, theirs.self_attn.q_proj.weight)
        assert torch.equal(ours.q_proj.bias, theirs.self_attn.q_proj.bias)
        assert torch.equal(ours.k_proj.weight, theirs.self_attn.k_proj.weight)
        if hasattr(ours, "o_proj"):
            assert torch.equal(ours.k_proj.bias, theirs.self_attn.k_proj.bias)
            assert torch.equal(ours.v_proj.weight, theirs.self_attn.v_proj.weight)
            assert torch.equal(ours.v_proj.bias, theirs.self_attn.v_proj.bias)
            assert torch.equal(ours.o_proj.weight, theirs.self_attn.o_proj.weight)
            assert torch.equal(ours.ffn_norm.weight, theirs.post_attention_layernorm.weight)
    selection = selector.select(make_videos(torch.bfloat16))
    assert selection.n.tolist() == [15, 6, 24]
    assert selection.tokens.isfinite().all()
    # copies: training the selector leaves the language model alone
    assert module.scoring_layers[1].q_proj.weight.data_ptr() != layers[2].self_attn.q_proj.weight.data_ptr()


def test_from_language_model_is_seeded(language_model):
    state = torch.get_rng_state()
    a, b, c = (QTSplus.from_language_model(language_model, seed=s).state_dict() for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a[name], b[name]) for name in a)
    different = {name for name in a if not torch.equal(a[name], c[name])}
    assert different == {n for n in a if n.startswith("selector.budget.") or ".ffn." in n}


def test_language_model_without_biases():
    selector = QTSplus.from_language_model(LlamaForCausalLM(LlamaConfig(**SIZES)))
    assert not selector.selector.scoring_layers[0].q_proj.bias.any()
    assert not selector.selector.reencode_layers[0].core.v_proj.bias.any()


def test_language_models_that_do_not_fit(language_model):
    with pytest.raises(ValueError, match="at most 3 reencode_layers"):
        QTSplus.from_language_model(language_model, reencode_layers=4)
    with pytest.raises(ValueError, match="split the width 48 evenly, got query projections of width 96"):
        QTSplus.from_language_model(LlamaForCausalLM(LlamaConfig(**SIZES, head_dim=16)))
    language_model.model.layers = torch.nn.ModuleList()
    with pytest.raises(TypeError, match="expected a decoder with layers"):
        QTSplus.from_language_model(language_model)
