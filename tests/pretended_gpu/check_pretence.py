"""That the pretended GPU refuses what a card refuses; started by tests/test_on_a_pretended_gpu.py."""

import pytest
import torch

import qts_kernels
from pretended_gpu.tensors import SynchronisationError
from qts_kernels import backends


@pytest.fixture
def forbidden():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_tensors_of_two_devices_are_refused():
    there, here = torch.arange(3.0, device="cuda"), torch.arange(3.0)
    for call in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here.mul_(there)):
        with pytest.raises(RuntimeError, match="on the same device"):
            call()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    assert (there + torch.tensor(1.0)).tolist() == [1, 2, 3]  # a scalar is of either
    assert there[torch.tensor([2, 0])].tolist() == [2, 0]


def test_moving_there_and_back_carries_gradients():
    x = torch.arange(3.0).requires_grad_()
    y = x.to("cuda")
    assert (y.device.type, y.is_cuda, x.is_cuda) == ("cuda", True, False)
    (y * y).to("cpu").sum().backward()
    assert x.grad.tolist() == [0, 2, 4]
    leaf = torch.ones(3, device="cuda", requires_grad=True)
    (leaf * 3).sum().backward()
    assert leaf.grad.is_cuda


def test_a_module_moves_and_is_copied():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2)).cuda()
    assert all(x.is_cuda for x in (*module.parameters(), *module.buffers()))
    assert module(torch.ones(4, 3, device="cuda")).is_cuda
    with pytest.raises(RuntimeError, match="on the same device"):
        module(torch.ones(4, 3))


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.tolist(),
        lambda x: x[x > 1],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x[torch.tensor([1])],
        lambda x: x.copy_(torch.ones(3)),
        lambda x: bool((x > 1).any()),
        lambda x: x.repeat_interleave(x.long()),
    ],
    ids=["item", "cpu", "tolist", "mask", "nonzero", "tensor", "indices of the CPU", "copy_", "bool", "repeats"],
)
def test_what_waits_for_the_card_is_refused(call, forbidden):
    with pytest.raises(SynchronisationError, match="synchronizing"):
        call(torch.arange(3.0, device="cuda"))


def test_what_does_not_wait_is_not(forbidden):
    x = torch.arange(3.0, device="cuda")
    x.copy_(torch.ones(3), non_blocking=True)
    torch.where(x > 1, x, 0.0)
    x.repeat_interleave(torch.ones(3, dtype=torch.long, device="cuda"), output_size=3)
    assert x[1:].sum().is_cuda


def test_a_graph_replays_on_new_numbers_and_forbids_waiting():
    x = torch.ones(4, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        view = x[1:]
        y = torch.zeros(3, device="cuda")
        y += view * 2
        kept, _ = qts_kernels.topn(view, 1, max_n=1)
    for numbers in ([9.0, 1, 5, 2], [9.0, 7, 0, 0]):
        x.copy_(torch.tensor(numbers))
        graph.replay()
        assert y.tolist() == [2 * n for n in numbers[1:]]
        assert kept.tolist() == [numbers[1:].index(max(numbers[1:]))]
    with pytest.raises(SynchronisationError), torch.cuda.graph(torch.cuda.CUDAGraph()):
        x.tolist()


def test_ops_are_served_as_on_a_card():
    served = {row.op: row.implementation for row in backends.report() if row.device == "cuda"}
    assert {served["relevance"], served["topn"]} == {"triton"}
    with pytest.raises(RuntimeError, match="on the same device"):
        torch.ops.qts_kernels.gather_rows([torch.ones(3, 4, device="cuda")], torch.tensor([1]))
