"""Static shapes: torch.compile without a graph break, no synchronisation, CUDA graphs."""

import pytest
import torch
from selector_oracle import make_selector
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from qts_kernels.nn import QTSplus
from qts_kernels.ops.reencode import attention
from qts_kernels.testing import ragged_cu_seqlens

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")


def calls(device="cpu", dtype=torch.float32):
    """(args, kwargs) for each layout."""
    generator = torch.Generator().manual_seed(0)
    x, question = (torch.randn(2, size, 64, generator=generator).to(device, dtype) for size in (96, 7))
    seconds = (torch.rand(2, 96, generator=generator) * 60).to(device)
    vision_mask, question_mask = ((torch.rand(2, size, generator=generator) > 0.3).to(device) for size in (96, 7))
    return {
        "dense": ((x, question), {"timestamps": seconds}),
        "masked": ((x, question), {"vision_mask": vision_mask, "question_mask": question_mask}),
        "packed": (
            (x.flatten(0, 1), question.flatten(0, 1)),
            {
                "timestamps": seconds.flatten(),
                "cu_seqlens": ragged_cu_seqlens([100, 92], device),
                "cu_seqlens_question": ragged_cu_seqlens([4, 10], device),
            },
        ),
        "given n": ((x, question), {"n": torch.tensor([5, 90], device=device), "max_n": 40}),
    }


LAYOUTS = list(calls())


def check_padded(static, eager):
    """``static`` may end in padding, and is else what ``eager`` is."""
    count = int(eager.n.sum())
    assert torch.equal(static.cu_seqlens, eager.cu_seqlens)
    assert torch.equal(static.indices[:count], eager.indices[:count])
    assert (static.indices[count:] == -1).all()
    assert (static.tokens[count:] == 0).all()
    for name in ("scores", "rho", "entropy"):
        torch.testing.assert_close(getattr(static, name), getattr(eager, name))
    torch.testing.assert_close(static.tokens[:count], eager.tokens[:count], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiles_as_one_graph(layout):
    module = make_selector(64, 4, 2, scoring_layers=2, reencode_layers=2)
    args, kwargs = calls()[layout]
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        check_padded(compiled(*args, **kwargs), module(*args, **kwargs))


def test_one_graph_serves_all_lengths():
    module = make_selector(64, 4, 2)
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=count)
    generator = torch.Generator().manual_seed(0)
    for m, length in ((96, 7), (50, 5), (333, 9)):
        x, question = (torch.randn(2, size, 64, generator=generator) for size in (m, length))
        seconds = torch.rand(2, m, generator=generator)
        with torch.no_grad():
            check_padded(compiled(x, question, timestamps=seconds), module(x, question, timestamps=seconds))
    assert len(graphs) == 1


def test_compiled_gradients():
    module = make_selector(64, 4, 2)
    args, kwargs = calls()["dense"]
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for run in (module, compiled):
        module.zero_grad()
        out = run(*args, **kwargs)
        (out.scores.square().sum() + out.rho.sum() + out.tokens.square().sum()).backward()
        gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="a torch for CPUs alone can't pretend to have a GPU")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("flash", [True, False])
def test_nothing_is_read_from_a_gpu(layout, flash, monkeypatch):
    """On fake CUDA tensors, reading a value raises; so this finds a synchronisation on a machine without a GPU."""
    backend = attention.AttentionBackend("torch.varlen_attn" if flash else "SDPA", "forced")
    monkeypatch.setattr(attention, "attention_backend", lambda *_: backend)
    args, kwargs = calls(dtype=torch.bfloat16)[layout]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        with torch.device("cuda"):
            module = QTSplus(64, 4, 2, scoring_layers=2, reencode_layers=2).requires_grad_(False)
            for name, parameter in list(module.named_parameters()):
                owner = module.get_submodule(name.rpartition(".")[0])
                setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(parameter.to(torch.bfloat16)))

        def fake(x):
            return mode.from_tensor(x).to("cuda") if isinstance(x, torch.Tensor) else x

        out = module(*map(fake, args), **{k: fake(v) for k, v in kwargs.items()})
        assert out.tokens.device.type == "cuda"
        assert out.tokens.shape[0] == out.indices.shape[0]
        with pytest.raises(DataDependentOutputException):
            out.n.tolist()


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu_without_synchronisation(layout, dtype):
    module = make_selector(64, 4, 2, scoring_layers=2, reencode_layers=2).to("cuda", dtype)
    args, kwargs = calls("cuda", dtype)[layout]
    with torch.no_grad():
        module(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            out = module(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if dtype == torch.float32:
            args, kwargs = calls()[layout]
            eager = module.cpu()(*args, **kwargs)
            moved = {k: v.cpu() for k, v in vars(out).items() if isinstance(v, torch.Tensor)}
            check_padded(type(out)(**moved), eager)


@pytest.mark.gpu
@GPU
def test_cuda_graph():
    module = make_selector(64, 4, 2, reencode_layers=2).to("cuda", torch.bfloat16)
    (x, question), kwargs = calls("cuda", torch.bfloat16)["dense"]
    with torch.no_grad():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            module(x, question, **kwargs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = module(x, question, **kwargs)
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            eager = module(x, question, **kwargs)
            assert torch.equal(out.indices, eager.indices)
            assert torch.equal(out.tokens, eager.tokens)
