"""Budgets, time, state dicts, saving, and what is refused."""

import json

import pytest
import torch
from selector_oracle import make_selector, select_one

from qts_kernels.nn import QTSplus
from qts_kernels.testing import ragged_cu_seqlens

D = 48


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 50, D, generator=generator), torch.randn(2, 6, D, generator=generator)


@torch.no_grad()
def test_n_overrides_the_budget_and_max_n_caps_it(inputs):
    module = make_selector(n_max=7)
    predicted = module(*inputs)
    assert torch.equal(predicted.n, torch.tensor([7, 7]))
    for n, kept in (
        (20, [20, 20]),
        (torch.tensor([3, 0]), [3, 0]),
        (torch.tensor([60, 1], dtype=torch.int32), [50, 1]),
    ):
        out = module(*inputs, n=n)
        assert out.n.tolist() == kept
        assert torch.equal(out.rho, predicted.rho)
        for b in range(2):
            rows = out.indices[out.cu_seqlens[b] : out.cu_seqlens[b + 1]] - 50 * b
            best = out.scores[b].argsort(descending=True, stable=True)[: kept[b]].sort().values
            assert torch.equal(rows, best)
    assert module(*inputs, max_n=4).n.tolist() == [4, 4]
    assert module(*inputs, max_n=torch.tensor([2, 100])).n.tolist() == [2, 7]
    assert module(*inputs, n=torch.tensor([30, 5]), max_n=10).n.tolist() == [10, 5]
    assert module(*inputs, n=0).tokens.shape == (0, D)


@torch.no_grad()
def test_rho_range_bounds_the_kept_share(inputs):
    for low, high in ((0.05, 0.06), (0.999, 1.0), (1.0, 1.0)):
        out = make_selector(rho_min=low, rho_max=high)(*inputs)
        assert ((out.rho >= low) & (out.rho <= high * (1 + 1e-6))).all()
        assert torch.equal(out.n, (out.rho * 50).ceil().long())


@torch.no_grad()
def test_without_reencoder_tokens_are_the_gathered_rows(inputs):
    module = make_selector(reencode_layers=0)
    out = module(*inputs, timestamps=torch.rand(2, 50))
    assert torch.equal(out.tokens, inputs[0].flatten(0, 1)[out.indices])
    assert module.time_embedding is None


@torch.no_grad()
def test_time_embedding_is_neutral_until_trained(inputs):
    module = make_selector(time_scale=0)
    assert not module.time_embedding.proj.weight.any()
    plain = module(*inputs).tokens
    seconds = torch.linspace(0, 100, 50).expand(2, -1)
    assert torch.equal(plain, module(*inputs, timestamps=seconds).tokens)
    without = make_selector(time_embedding=False)
    without.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("time_embedding")})
    assert torch.equal(plain, without(*inputs, timestamps=seconds).tokens)
    module.time_embedding.proj.weight.normal_()
    timed = module(*inputs, timestamps=seconds)
    assert not torch.allclose(plain, timed.tokens, atol=1e-2)
    assert torch.equal(plain, module(*inputs).tokens)
    later = module(*inputs, timestamps=seconds + 10)
    assert torch.equal(timed.indices, later.indices)
    assert not torch.allclose(timed.tokens, later.tokens, atol=1e-2)


@torch.no_grad()
def test_time_is_exact_after_hours():
    module = make_selector(time_scale=1.0)
    generator = torch.Generator().manual_seed(1)
    x, question = torch.randn(40, D, generator=generator), torch.randn(3, D, generator=generator)
    seconds = 14000 + torch.arange(40) / 8
    out = module(x[None], question[None], timestamps=seconds[None])
    expected = select_one(module.double(), x.double(), question.double(), seconds)
    torch.testing.assert_close(out.tokens.double(), expected.tokens, rtol=1e-4, atol=1e-4)


def released_state(module: QTSplus) -> dict[str, torch.Tensor]:
    """What a released checkpoint holds for such a selector: dead weights too, and no time embedding."""
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("time_embedding")}
    last = f"scoring_layers.{module.config['scoring_layers'] - 1}"
    shapes = {
        "k_proj.bias": (16,),
        "v_proj.weight": (16, D),
        "v_proj.bias": (16,),
        "o_proj.weight": (D, D),
        "ffn_norm.weight": (D,),
        "ffn.net.0.weight": (4 * D, D),
        "ffn.net.0.bias": (4 * D,),
        "ffn.net.2.weight": (D, 4 * D),
        "ffn.net.2.bias": (D,),
    }
    return state | {f"{last}.{name}": torch.randn(shape) for name, shape in shapes.items()}


@pytest.mark.parametrize("layers", [1, 2])
def test_released_state_loads_as_it_is(inputs, layers):
    source = make_selector(scoring_layers=layers, time_scale=0)
    state = released_state(source)
    keys = set(state)
    module = make_selector(scoring_layers=layers, seed=1)
    assert str(module.load_state_dict(state)) == "<All keys matched successfully>"
    assert set(state) == keys  # the caller's dict is left alone
    assert not module.time_embedding.proj.weight.any()
    assert torch.equal(module(*inputs, timestamps=torch.rand(2, 50)).tokens, source(*inputs).tokens)

    holder = torch.nn.ModuleDict({"selector": make_selector(scoring_layers=layers, seed=1)})
    holder.load_state_dict({f"selector.{k}": v for k, v in state.items()})
    assert torch.equal(holder["selector"](*inputs).tokens, source(*inputs).tokens)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("budget.mlp.0.weight"), "Missing key"),
        (lambda s: s.update({"scoring_layers.0.extra": torch.zeros(1)}), "Unexpected key"),
        (lambda s: s.update({"scoring_layers.1.v_proj.bias": torch.zeros(16)}), "Unexpected key"),
        (lambda s: s.update({"scoring_layers.0.q_norm.weight": torch.zeros(3)}), "size mismatch"),
    ],
)
def test_any_other_mismatch_raises(change, message):
    module = make_selector()
    state = released_state(module)
    change(state)
    with pytest.raises(RuntimeError, match=message):
        module.load_state_dict(state)


def test_dead_weights_of_an_earlier_layer_are_alive():
    module = make_selector(scoring_layers=2)
    state = released_state(module)
    del state["scoring_layers.0.v_proj.weight"]
    with pytest.raises(RuntimeError, match="Missing key"):
        module.load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load(inputs, tmp_path, dtype):
    module = make_selector(scoring_layers=2, reencode_layers=2, n_max=9, tau_s=0.5).to(dtype)
    module.save_pretrained(tmp_path / "new" / "folder")
    loaded = QTSplus.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == module.config
    assert not loaded.training
    x, question = (t.to(dtype) for t in inputs)
    assert torch.equal(loaded(x, question).tokens, module(x, question).tokens)
    loaded.requires_grad_()(x, question).tokens.sum().backward()  # weights that were read can be trained


def test_loading_something_else(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        QTSplus.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match=r"holds model_type 'bert', expected 'qts_kernels.QTSplus'"):
        QTSplus.from_pretrained(tmp_path)
    make_selector().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        QTSplus.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_model": 50}, "multiple of num_heads"),
        ({"num_kv_heads": 4}, "multiple of num_kv_heads"),
        ({"scoring_layers": 0}, "scoring_layers >= 1"),
        ({"reencode_layers": -1}, "reencode_layers >= 0"),
        ({"rho_min": 0.0}, "rho_min <= rho_max"),
        ({"rho_min": 0.6}, "rho_min <= rho_max"),
        ({"rho_max": 1.5}, "rho_min <= rho_max"),
        ({"n_max": 0}, "n_max >= 1"),
        ({"tau_s": 0.0}, "tau_s > 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        QTSplus(**{"d_model": 48, "num_heads": 6, "num_kv_heads": 2} | options)


def test_bad_input(inputs):
    module = make_selector()
    x, question = inputs
    packed = {"cu_seqlens": ragged_cu_seqlens([50, 50]), "cu_seqlens_question": ragged_cu_seqlens([6, 6])}
    flat = x.flatten(0, 1), question.flatten(0, 1)
    for error, message, args, kwargs in (
        (ValueError, r"vision_tokens must have shape \[B, M, D\], got \[50, 48\]", (x[0], question), {}),
        (
            ValueError,
            r"question must have shape \[B, L, D\] with D = 48, got \[2, 6, 40\]",
            (x, question[..., :40]),
            {},
        ),
        (TypeError, "dtype of the parameters, torch.float32, got torch.bfloat16", (x.bfloat16(), question), {}),
        (ValueError, "same batch, at least 1, got 2 and 1", (x, question[:1]), {}),
        (ValueError, "same batch, at least 1, got 0 and 0", (x[:0], question[:0]), {}),
        (TypeError, "vision_mask must be bool, got int64", (x, question), {"vision_mask": torch.ones(2, 50).long()}),
        (ValueError, "vision_mask must have shape", (x, question), {"vision_mask": torch.ones(2, 49).bool()}),
        (ValueError, "question_mask must have shape", (x, question), {"question_mask": torch.ones(2, 7).bool()}),
        (ValueError, r"timestamps must have shape \[B, M\]", (x, question), {"timestamps": torch.ones(2, 49)}),
        (TypeError, "timestamps must be", (x, question), {"timestamps": torch.ones(2, 50).long()}),
        (ValueError, "got no cu_seqlens_question", flat, {"cu_seqlens": packed["cu_seqlens"]}),
        (ValueError, r"vision_tokens must have shape \[sum M, D\]", (x, question), packed),
        (ValueError, "takes no vision_mask", flat, packed | {"vision_mask": torch.ones(2, 50).bool()}),
        (ValueError, "must end at the number of packed rows", (flat[0][:-1], flat[1]), packed),
        (TypeError, "n must be an int or an int tensor", (x, question), {"n": 0.5}),
        (ValueError, "max_n must not be negative", (x, question), {"max_n": -1}),
        (ValueError, r"n must have shape \[S\]", (x, question), {"n": torch.tensor([1])}),
        (ValueError, "n must not be negative", (x, question), {"n": torch.tensor([1, -1])}),
    ):
        with pytest.raises(error, match=message):
            module(*args, **kwargs)
