"""Parity with what the released method computes: outputs and gradients, from its own state dicts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import qts_kernels
from qts_kernels.nn import QTSplus

GOLDEN = Path(__file__).parents[1] / "golden"


class Golden:
    def __init__(self, name: str) -> None:
        with safe_open(GOLDEN / f"qtsplus_{name}.safetensors", "pt") as file:
            self.config = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  no dict
        c = self.config
        self.module = QTSplus(
            c["D"],
            c["H"],
            c["Hkv"],
            n_max=c["nmax"],
            rho_min=c["lo"],
            rho_max=c["hi"],
            scoring_layers=c["ns"],
            reencode_layers=c["nr"],
        ).eval()
        self.module.load_state_dict(self.named("state."))

    def named(self, prefix: str) -> dict[str, torch.Tensor]:
        return {key.removeprefix(prefix): x for key, x in self.tensors.items() if key.startswith(prefix)}


@pytest.fixture(params=["gqa", "mha_two_layers_capped"])
def golden(request) -> Golden:
    return Golden(request.param)


def test_outputs(golden):
    expected = golden.tensors
    with torch.no_grad():
        out = golden.module(expected["X"], expected["Q"])
    torch.testing.assert_close(out.scores, expected["r"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(out.rho, expected["rho"], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.entropy, expected["entropy"], rtol=1e-5, atol=0)
    assert torch.equal(out.n, expected["n"])
    for b, n in enumerate(out.n.tolist()):
        rows = slice(int(out.cu_seqlens[b]), int(out.cu_seqlens[b + 1]))
        assert torch.equal(out.indices[rows] - b * golden.config["M"], expected["indices"][b, :n])
        if n == int(out.n.max()):  # shorter samples of the release attend to the padding of their batch
            torch.testing.assert_close(out.tokens[rows], expected["Z"][b, :n], rtol=1e-5, atol=1e-5)


def test_threshold(golden):
    t = qts_kernels.soft_threshold(golden.tensors["r"], golden.tensors["rho"], 0.1)
    torch.testing.assert_close(t, golden.tensors["threshold"], rtol=1e-5, atol=0)


def test_gradients(golden):
    x, question = (golden.tensors[name].clone().requires_grad_() for name in "XQ")
    out = golden.module(x, question)
    (100 * (out.scores * golden.tensors["W"]).sum() + out.rho.sum()).backward()
    expected = golden.named("grad.")
    last = len(golden.module.scoring_layers) - 1
    largest = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        if name.endswith("k_proj.bias"):  # leaves the softmax: what the release has here is its rounding error
            assert gradient.abs().max() < 1e-6 * largest
        if name == f"scoring_layers.{last}.k_proj.bias":
            assert name not in dict(golden.module.named_parameters())
            continue
        ours = golden.module.get_parameter(name).grad
        atol = 1e-6 * largest if name.endswith("k_proj.bias") else 1e-5 * float(gradient.abs().max())
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=atol, msg=lambda m, name=name: f"{name}: {m}")
    for name, leaf in (("X", x), ("Q", question)):
        gradient = golden.tensors[f"grad_input.{name}"]
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    without = {name for name, p in golden.module.named_parameters() if p.grad is None}
    assert all(name.startswith(("reencode_layers.", "time_embedding.")) for name in without)  # the loss has no tokens
    assert set(expected) >= set(dict(golden.module.named_parameters())) - without


def test_every_parameter_can_be_trained(golden):
    out = golden.module(golden.tensors["X"], golden.tensors["Q"], timestamps=torch.zeros(golden.tensors["r"].shape))
    (out.scores.square().sum() + out.rho.sum() + out.tokens.square().sum()).backward()
    assert not [name for name, p in golden.module.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    cosine = golden.module.time_embedding.proj.weight.grad[:, golden.module.time_embedding.periods :]
    assert (cosine != 0).any()
