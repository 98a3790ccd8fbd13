"""How the cost of selection grows: the whole QTSplus selector from a thousand to a million tokens, time and memory.

There is no peer that could hold a million: eager PyTorch is beside ours as far as its attention matrix stays below
``MOST_BYTES``.
"""

import pytest
import torch
from qts_video.measure import peak_memory
from test_qtsplus import eager

from qts_kernels.nn import QTSplus

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
WIDTH, HEADS, KV_HEADS, LENGTH, KEPT = (3584, 28, 4, 64, 10_000) if GPU else (256, 2, 1, 16, 1000)
TOKENS = [1000, 10_000, 100_000, 1_000_000]
MOST_BYTES = 20e9 if GPU else 1e9


@pytest.mark.parametrize("who", ["qts_kernels", "eager"])
@pytest.mark.parametrize("m", TOKENS)
@torch.inference_mode()
def test_growth(timed, device, benchmark, m, who):
    matrix = 2 * 4 * HEADS * LENGTH * m
    if who == "eager" and matrix > MOST_BYTES:
        pytest.skip(f"its attention matrix takes {matrix / 1e9:.0f} GB")
    torch.manual_seed(0)
    module = QTSplus(WIDTH, HEADS, KV_HEADS, n_max=KEPT).to(device, DTYPE).eval()
    x, question = (torch.randn(n, WIDTH, device=device, dtype=DTYPE) for n in (m, LENGTH))
    n = min(KEPT, m // 10)
    runs = {
        "qts_kernels": lambda: module(x[None], question[None], n=n, max_n=n),
        "eager": lambda: eager(module, x, question, n),
    }
    with peak_memory(torch.device(device)) as peak:
        result = runs[who]()
        benchmark.extra_info["peak_mb"] = round(peak() / 2**20)
    if who == "qts_kernels":
        assert result.indices.shape == (n,)
        assert bool((result.indices.diff() > 0).all())
        assert result.tokens.isfinite().all()
    benchmark.extra_info["tokens"] = m
    shape = f"{str(DTYPE).removeprefix('torch.')} D={WIDTH} heads={HEADS}/{KV_HEADS} n={n} M={m}"
    timed("QTSplus selector by M", shape, who, runs[who], seconds=1.0)
