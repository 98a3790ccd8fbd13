"""How the CPU's ops scale: all of torch's threads against one, the same bits either way."""

import pytest
import torch

import qts_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
THREADS = torch.get_num_threads()

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="threads are the CPU's"),
    pytest.mark.skipif(THREADS == 1, reason="torch has one thread here"),
]


@pytest.fixture
def one_thread():
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(THREADS)


def case(op, dtype):
    draw = {"generator": torch.Generator().manual_seed(0)}
    if op == "relevance":
        query = torch.randn(1, 32, 16, 128, **draw).to(dtype)
        key = torch.randn(1, 16384, 2, 128, **draw).to(dtype)
        return "M=16384 heads=16/2 L=32", lambda: qts_kernels.relevance(query, key)
    x = torch.randn(16384, 2048, **draw).to(dtype)
    return "M=16384 D=2048", lambda: qts_kernels.rms_scale(x)


@pytest.mark.parametrize("who", ["qts_kernels", "one thread"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["relevance", "rms_scale"])
@torch.inference_mode()
def test_threads(timed, request, op, dtype, who):
    shape, run = case(op, DTYPES[dtype])
    result = run()
    if who == "one thread":
        request.getfixturevalue("one_thread")
        assert torch.equal(run(), result)
    timed(f"{op}, {THREADS} threads", f"{dtype} {shape}", who, run)
