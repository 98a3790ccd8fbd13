"""Every Triton kernel compiles, without a card, for four of them, and fits them."""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

_PATH = Path(__file__).parents[2] / "benchmarks" / "triton_resources.py"
sys.path.insert(0, str(_PATH.parent))
_SPEC = importlib.util.spec_from_file_location("triton_resources", _PATH)
resources = importlib.util.module_from_spec(_SPEC)
sys.modules["triton_resources"] = resources
_SPEC.loader.exec_module(resources)

# What people run: no register may spill, and two programs are to share a Hopper multiprocessor.
MAIN = ("relevance, bf16 128 max", "relevance, bf16 128 max key_scale")
HOPPER_REGISTERS, HOPPER_SHARED = 65536, 228 << 10


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("target", resources.TARGETS)
@pytest.mark.parametrize("case", resources.cases())
def test_compiles_and_fits(case, target):
    found, loops = resources.compile_case(case, target)
    assert found
    for kernel in found:
        assert kernel.shared <= resources.SHARED_MEMORY[target], kernel
    if target == "sm_90" and "backward" not in case:
        assert all(kernel.spills == 0 for kernel in found), found
    if target == "sm_90" and case in MAIN:
        for kernel in found:
            assert 2 * kernel.warps * 32 * kernel.registers <= HOPPER_REGISTERS, kernel
            assert 2 * (kernel.shared + 1024) <= HOPPER_SHARED, kernel

    if target == "sm_90" and "bf16" in case and case.startswith("relevance"):
        # To find the row that attains a maximum takes as many instructions again as the maximum.
        assert_tensor_cores_bound(loops, 1.4 if "argrow" in case else 1.2)


def assert_tensor_cores_bound(loops, most):
    """The loop of each kernel that masks nothing issues for hardly longer than its tensor cores work."""
    quickest = {}
    for loop in loops:
        quickest[loop.kernel] = min(loop, quickest.get(loop.kernel, loop), key=lambda loop: loop.issue)
    assert quickest
    for loop in quickest.values():
        assert loop.issue <= most * loop.tensor, loop


def test_every_kernel_has_a_case():
    """A kernel that no case launches would be compiled by nothing."""
    from triton.runtime.jit import JITFunction

    launched = set()
    with resources.recorded(resources.TARGETS["sm_90"]) as launches:
        for call in resources.cases().values():
            call()
    launched = {launch.kernel.fn.__qualname__ for launch in launches}
    helpers = {name for kernel in launches for name in kernel.kernel.fn.__code__.co_names}
    modules = [m for name, m in sys.modules.items() if name.startswith("qts_kernels.ops.") and "triton" in name]
    defined = {
        value.fn.__qualname__: value for module in modules for value in vars(module).values()
        if isinstance(value, JITFunction)
    }  # fmt: skip
    while wider := {n for name in helpers & defined.keys() for n in defined[name].fn.__code__.co_names} - helpers:
        helpers |= wider
    assert defined.keys() <= launched | helpers


@pytest.mark.parametrize("tokens", [1, 20, 64, 300, 3000])
@pytest.mark.parametrize("keys", [100_000, 1_000_000])
def test_chunks_of_one_segment_fill_the_card_to_the_end(tokens, keys):
    """132 multiprocessors hold two programs each: a few programs more would take as long as all of them again."""
    from qts_kernels.ops.relevance.triton_tiles import gradient_tiles, row_tiles, split_keys

    query = torch.empty(1, 1, 128, dtype=torch.bfloat16).expand(tokens, 28, 128)
    key = torch.empty(1, 1, 128, dtype=torch.bfloat16).expand(keys, 4, 128)
    for tiles in (row_tiles(query, 7 * tokens), gradient_tiles(query, 7 * tokens)):
        splits = split_keys(query, key, 1, tiles, bytes_a_row=8)
        programs = splits.blocks * 4 * splits.slots
        assert programs / (-(-programs // 264) * 264) > 0.85, splits
