"""QTSplus in training mode: what the gate keeps, and that its gradients are those of gates written down densely."""

import math

import pytest
import torch
from selector_oracle import EPS, make_selector
from torch.nn import functional as F

from qts_kernels.nn.gate import keep_logits, logistic_noise, segment_seeds
from qts_kernels.testing import ragged_cu_seqlens

D, HEADS, KV_HEADS = 48, 6, 2
VISION, QUESTION = [37, 1, 64], [5, 3, 6]
TAU = 0.01  # scores are about 1/50


def packed(dtype=torch.float32, seed=0):
    """(args, kwargs) of three packed segments with their seconds."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(VISION), D, generator=generator, dtype=torch.float64).to(dtype)
    question = torch.randn(sum(QUESTION), D, generator=generator, dtype=torch.float64).to(dtype)
    cu = {"cu_seqlens": ragged_cu_seqlens(VISION), "cu_seqlens_question": ragged_cu_seqlens(QUESTION)}
    return (x, question), {"timestamps": torch.rand(sum(VISION), generator=generator).to(dtype) * 60, **cu}


def make(**options):
    return make_selector(D, HEADS, KV_HEADS, **{"tau_s": TAU, "rho_min": 0.2, "rho_max": 0.6} | options).train()


def test_kept_tokens_average_rho_m():
    module = make(n_max=1000)
    args, kwargs = packed()
    with torch.no_grad():
        kept = torch.stack([module(*args, **kwargs, seed=seed).n for seed in range(200)]).double()
        out = module(*args, **kwargs)
    expected = out.rho.double() * torch.tensor(VISION)
    torch.testing.assert_close(out.n_expected.double(), expected, rtol=1e-6, atol=0)
    for segment in (0, 2):
        deviation = kept[:, segment].std() / math.sqrt(len(kept))
        assert (kept[:, segment].mean() - expected[segment]).abs() < 4 * deviation
        assert kept[:, segment].std() > 1  # it is drawn, not fixed
    assert (kept[:, 1] == 1).all()  # at least one token a segment, though it is dropped more often than not


def test_each_token_is_kept_with_its_probability():
    module = make(n_max=1000)
    args, kwargs = packed()
    counts, draws = torch.zeros(sum(VISION)), 300
    with torch.no_grad():
        for seed in range(draws):
            counts[module(*args, **kwargs, seed=seed).indices] += 1
        out = module(*args, **kwargs)
        p = torch.sigmoid(keep_logits(out.scores, out.rho, TAU, kwargs["cu_seqlens"]))
    several = torch.ones(sum(VISION), dtype=torch.bool).index_fill(0, torch.tensor([37]), False)
    z = (counts / draws - p) / (p * (1 - p) / draws).sqrt()
    assert z[several].abs().max() < 4.5
    assert p[several].max() > 2 * p[several].min()  # or the test would say nothing


def test_noise_is_logistic_and_depends_on_seed_and_place_alone():
    cu = ragged_cu_seqlens([20000, 5])
    noise = logistic_noise(torch.tensor([3, 4]), cu, 20005)
    assert torch.equal(noise[20000:], logistic_noise(torch.tensor([4]), ragged_cu_seqlens([9]), 9)[:5])
    assert not torch.equal(noise[:5], noise[20000:])
    uniform = torch.sigmoid(noise[:20000].double()).sort().values
    steps = (torch.arange(20000) + 0.5) / 20000
    assert (uniform - steps).abs().max() < 1.63 / math.sqrt(20000)  # Kolmogorov-Smirnov at 1 %
    centred = uniform[torch.randperm(20000, generator=torch.Generator().manual_seed(0))]
    assert centred.mean().sub(0.5).abs() < 0.01
    raw = torch.sigmoid(noise[:20000].double()) - 0.5
    assert (raw[1:] * raw[:-1]).mean().abs() < 4 / 12 / math.sqrt(20000)  # neighbours know nothing of each other
    streams = torch.stack([logistic_noise(torch.tensor([s]), ragged_cu_seqlens([64]), 64) for s in range(64)])
    assert streams.unique().numel() > 64 * 64 - 8
    assert segment_seeds(5, 3, torch.device("cpu")).unique().numel() == 3


def test_the_number_that_noise_keeps_is_capped_by_its_largest():
    module = make(n_max=1000)
    args, kwargs = packed()
    with torch.no_grad():
        free = module(*args, **kwargs, seed=1)
        capped = module(*args, **kwargs, seed=1, max_n=4)
        module.budget.n_max = 4
        by_module = module(*args, **kwargs, seed=1)
        logits = keep_logits(free.scores, free.rho, TAU, kwargs["cu_seqlens"])
        noisy = logits + logistic_noise(segment_seeds(1, 3, logits.device), kwargs["cu_seqlens"], len(logits))
    assert free.n[0] > 4
    assert capped.n.tolist() == [4, 1, 4]
    assert torch.equal(capped.indices, by_module.indices)
    assert torch.equal(free.indices[: free.n[0]], (noisy[:37] > 0).nonzero().squeeze(1))
    assert torch.equal(capped.indices[:4], noisy[:37].topk(4).indices.sort().values)


def test_a_seed_repeats_and_a_segment_knows_nothing_of_the_others():
    module = make()
    args, kwargs = packed()
    seeds = torch.tensor([7, 8, 9])
    with torch.no_grad():
        first, again = (module(*args, **kwargs, seed=seeds) for _ in range(2))
        assert torch.equal(first.indices, again.indices)
        assert not torch.equal(first.indices, module(*args, **kwargs, seed=seeds + 1).indices)
        rows, text = slice(38, 102), slice(8, 14)
        alone = module(
            args[0][rows],
            args[1][text],
            timestamps=kwargs["timestamps"][rows],
            cu_seqlens=ragged_cu_seqlens([64]),
            cu_seqlens_question=ragged_cu_seqlens([6]),
            seed=seeds[2:],
        )
        assert torch.equal(alone.indices + 38, first.indices[first.cu_seqlens[2] :])
        torch.manual_seed(0)
        drawn = module(*args, **kwargs)
        torch.manual_seed(0)
        assert torch.equal(drawn.indices, module(*args, **kwargs).indices)


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_forward_is_inference_given_the_same_tokens(layers):
    module = make(reencode_layers=layers)
    args, kwargs = packed()
    out = module(*args, **kwargs, seed=3)
    plain = module.reencode(args[0], out.indices, out.cu_seqlens, int(out.n.max()), kwargs["timestamps"])
    assert torch.equal(out.tokens, plain)
    still = module(*args, **kwargs, noise=False)
    given = module(*args, **kwargs, n=5)
    module.eval()
    with torch.no_grad():
        inference, five = module(*args, **kwargs), module(*args, **kwargs, n=5)
    assert torch.equal(still.indices, inference.indices)
    assert torch.equal(still.tokens, inference.tokens)
    assert torch.equal(given.tokens, five.tokens)
    assert inference.n_expected is None


def dense_tokens(module, x, seconds, gate, indices):
    """The re-encoder over one segment with gates [M]: a kept row is scaled by its gate, and in the first layer's
    attention every token counts as much as its gate says."""
    state = dict(module.named_parameters())

    def norm(y, name):
        return y * (y.square().mean(-1, keepdim=True) + EPS).rsqrt() * state[f"{name}.weight"]

    def linear(y, name):
        return F.linear(y, state[f"{name}.weight"], state.get(f"{name}.bias"))

    def split(y):
        y = y.view(len(y), -1, D // HEADS).transpose(0, 1)
        return y.repeat_interleave(HEADS // len(y), 0)

    time = module.time_embedding(seconds)
    kept, every = x[indices] * gate[indices, None] + time[indices], x + time
    # A kept token's own row is the scaled one; what its gate does to its key and value goes with it.
    every = torch.where((gate.detach() > 0)[:, None], x * gate[:, None] + time, every.detach())
    for i in range(len(module.reencode_layers)):
        name = f"reencode_layers.{i}.core"
        keys, weights = (every, gate) if i == 0 else (kept, torch.ones_like(gate[indices]))
        key, value = (split(linear(norm(keys, f"{name}.kv_norm"), f"{name}.{part}_proj")) for part in "kv")
        query = split(linear(norm(kept, f"{name}.q_norm"), f"{name}.q_proj"))
        e = weights * (query @ key.mT / math.sqrt(D // HEADS)).exp()
        out = (e @ value) / e.sum(-1, keepdim=True)
        kept = kept + linear(out.transpose(0, 1).flatten(1), f"{name}.o_proj")
        hidden = F.gelu(linear(norm(kept, f"{name}.ffn_norm"), f"{name}.ffn.net.0"))
        kept = kept + linear(hidden, f"{name}.ffn.net.2")
    return kept


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_gradients_are_those_of_gates_written_down_densely(layers):
    module = make(reencode_layers=max(layers, 1)).double()
    if layers == 0:
        module.reencode_layers = torch.nn.ModuleList()
    elif layers == 2:
        module = make(reencode_layers=2).double()
    args, kwargs = packed(torch.float64)
    x = args[0].clone().requires_grad_()
    out = module(x, args[1], **kwargs, seed=2)
    weights = torch.randn(out.tokens.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    (out.tokens * weights).sum().backward()
    ours = {name: p.grad for name, p in module.named_parameters()} | {"x": x.grad}

    module.zero_grad()
    x = args[0].clone().requires_grad_()
    again = module(x, args[1], **kwargs, seed=2)
    logits = keep_logits(again.scores, again.rho, TAU, kwargs["cu_seqlens"])
    p = torch.sigmoid(logits)
    gate = torch.zeros_like(p).index_fill(0, out.indices, 1) + p - p.detach()
    parts = []
    for s, length in enumerate(VISION):
        first = int(kwargs["cu_seqlens"][s])
        rows = slice(first, first + length)
        kept = out.indices[out.cu_seqlens[s] : out.cu_seqlens[s + 1]] - first
        if layers == 0:
            parts.append(x[rows][kept] * gate[rows][kept, None])
        else:
            parts.append(dense_tokens(module, x[rows], kwargs["timestamps"][rows], gate[rows], kept))
    tokens = torch.cat(parts)
    torch.testing.assert_close(tokens, out.tokens, rtol=1e-10, atol=1e-10)
    (tokens * weights).sum().backward()
    for name, gradient in ours.items():
        theirs = x.grad if name == "x" else module.get_parameter(name).grad
        if theirs is None:
            assert gradient is None, name
            continue
        # fp32 constants in the modules' norms bound what agrees
        torch.testing.assert_close(gradient, theirs, rtol=1e-8, atol=1e-9 * float(theirs.abs().max() + 1), msg=name)


@pytest.mark.parametrize("layers", [1, 2])
def test_dropped_tokens_alone_give_their_scores_a_gradient(layers):
    """Of gates that only dropped tokens have: without them the loss would not know what it missed."""
    module = make(reencode_layers=layers)
    args, kwargs = packed()
    out = module(*args, **kwargs, seed=2)
    scores = out.scores.detach().requires_grad_()
    rho = out.rho.detach()
    logits = keep_logits(scores, rho, TAU, kwargs["cu_seqlens"])
    from qts_kernels.nn.gate import Gate, straight_through
    from qts_kernels.nn.packing import pack

    vision = pack(args[0], None, kwargs["cu_seqlens"])
    gate = Gate(straight_through(logits, out.indices), vision)
    gate.value.retain_grad()
    tokens = module.reencode(args[0], out.indices, out.cu_seqlens, 64, kwargs["timestamps"], gate)
    tokens.square().sum().backward()
    dropped = torch.ones(len(scores), dtype=torch.bool).index_fill(0, out.indices, False)
    assert (gate.value.grad[dropped] != 0).all()
    assert (scores.grad[dropped] != 0).all()


@pytest.mark.parametrize("scoring", [1, 2])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_one_step_reaches_every_parameter_but_the_key_biases(scoring, layers):
    module = make(scoring_layers=scoring, reencode_layers=layers)
    args, kwargs = packed()
    out = module(*args, **kwargs, seed=0)
    (out.tokens.pow(3).sum() + (out.n_expected / 512).square().sum()).backward()
    gradients = {name: p.grad for name, p in module.named_parameters()}
    assert not [name for name, g in gradients.items() if g is None or not g.isfinite().all() or not g.any()]
    largest = max(g.abs().max() for g in gradients.values())
    biases = [name for name in gradients if name.endswith("k_proj.bias")]
    assert len(biases) == scoring - 1 + layers  # the last scoring layer has none
    assert all(gradients[name].abs().max() < 1e-5 * largest for name in biases)  # it leaves the softmax
    assert set(biases) == {name for name, _ in module.named_parameters()} - set(dict(module.trained_parameters()))


@pytest.mark.parametrize("layers", [0, 1])
def test_dense_input_with_masks(layers):
    module = make(reencode_layers=layers)
    generator = torch.Generator().manual_seed(1)
    x, question = torch.randn(2, 40, D, generator=generator), torch.randn(2, 6, D, generator=generator)
    mask = torch.rand(2, 40, generator=generator) > 0.3
    question_mask = torch.rand(2, 6, generator=generator) > 0.3
    question_mask[:, 0] = True
    seconds = torch.rand(2, 40, generator=generator)
    seeds = torch.tensor([3, 4])
    leaf = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = module(leaf, question, timestamps=seconds, vision_mask=mask, question_mask=question_mask, seed=seeds)
    out.tokens.square().sum().backward()
    assert leaf.grad.isfinite().all()
    assert mask.flatten()[out.indices].all()
    together = module(
        x[mask],
        question[question_mask],
        timestamps=seconds[mask],
        cu_seqlens=ragged_cu_seqlens(mask.sum(1).tolist()),
        cu_seqlens_question=ragged_cu_seqlens(question_mask.sum(1).tolist()),
        seed=seeds,
    )
    assert torch.equal(mask.flatten().nonzero().squeeze(1)[together.indices], out.indices)
    torch.testing.assert_close(together.tokens, out.tokens, rtol=1e-5, atol=1e-5)


def test_autocast_and_bfloat16_train(recwarn):
    args, kwargs = packed(torch.bfloat16)
    for module, inputs in ((make().bfloat16(), args), (make(), packed()[0])):
        with torch.autocast("cpu", torch.bfloat16, enabled=inputs[0].dtype == torch.float32):
            out = module(*inputs, **kwargs | {"timestamps": kwargs["timestamps"].float()}, seed=0)
        (out.tokens.float().square().sum() + out.n_expected.sum()).backward()
        assert all(p.grad.isfinite().all() for p in module.parameters())


def test_at_the_published_temperature_the_gate_hardly_knows_the_scores():
    """Scores are weights of a softmax, about 1/M; docs/training.md."""
    generator = torch.Generator().manual_seed(0)
    x, question = torch.randn(1, 1000, D, generator=generator), torch.randn(1, 6, D, generator=generator)
    spread = {}
    for tau in (0.5, 0.1, 0.002):
        with torch.no_grad():
            out = make(tau_s=tau)(x, question, seed=0)
            p = torch.sigmoid(keep_logits(out.scores[0], out.rho, tau, ragged_cu_seqlens([1000])))
        spread[tau] = float(p.max() / p.min())
    assert spread[0.5] < 1.05
    assert spread[0.1] < 1.2
    assert spread[0.002] > 2


def test_the_backward_holds_a_bounded_number_of_logits(monkeypatch):
    from qts_kernels.nn import gate_attention

    monkeypatch.setattr(gate_attention, "LOGITS", 4 * 300 * HEADS)
    generator = torch.Generator().manual_seed(0)
    x, question = torch.randn(1, 300, D, generator=generator), torch.randn(1, 6, D, generator=generator)
    largest = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **kwargs or {})
            largest.append(out.numel() if isinstance(out, torch.Tensor) else 0)
            return out

    module = make()
    out = module(x, question, seed=0)
    assert int(out.n) > 50
    with Sizes():
        out.tokens.square().sum().backward()
    every_logit = int(out.n) * 300 * HEADS
    assert max(largest) < every_logit / 2


def test_rho_of_one_and_empty_segments_and_one_token():
    module = make(rho_min=1.0, rho_max=1.0)
    args, kwargs = packed()
    out = module(*args, **kwargs, seed=0)
    assert out.n.tolist() == VISION
    out.tokens.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    empty = module(
        args[0][:5],
        args[1][:4],
        cu_seqlens=ragged_cu_seqlens([0, 5]),
        cu_seqlens_question=ragged_cu_seqlens([2, 2]),
        seed=0,
    )
    assert empty.n.tolist() == [0, 5]


def test_the_running_mean_moves_in_training_and_is_saved(tmp_path):
    module = make()
    module.update_rho_mean(torch.tensor(0.6), 2)
    assert float(module.rho_mean) == pytest.approx(0.3)
    module.update_rho_mean(torch.tensor(0.5), 1)
    assert float(module.rho_mean) == pytest.approx(0.99 * 0.3 + 0.01 * 0.5)
    module.save_pretrained(tmp_path)
    loaded = type(module).from_pretrained(tmp_path)
    assert torch.equal(loaded.rho_mean, module.rho_mean)
    with pytest.raises(RuntimeError, match="training mode"):
        loaded.update_rho_mean(torch.tensor(0.5), 1)
    state = {name: x for name, x in module.state_dict().items() if name != "rho_mean"}
    fresh = make()
    fresh.load_state_dict(state)  # of a checkpoint from before there was one
    assert float(fresh.rho_mean) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": torch.tensor([1])}, r"seed must have shape \[S\]"),
        ({"seed": 1.5}, "seed must be an int or an int64 tensor"),
    ],
)
def test_bad_seeds_are_refused(options, message):
    args, kwargs = packed()
    with pytest.raises((ValueError, TypeError), match=message):
        make()(*args, **kwargs, **options)
