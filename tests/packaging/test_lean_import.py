"""`import qts_kernels` is inert: torch alone, no Triton, no CUDA start-up, nothing patched."""

import subprocess
import sys
import textwrap

import pytest


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_loads_neither_triton_nor_transformers_nor_cuda():
    out = run("""
        import sys, torch
        before = set(sys.modules)
        import qts_kernels
        new = set(sys.modules) - before
        heavy = ("triton", "transformers", "flash_attn", "av", "PIL", "matplotlib")
        print([m for m in new if m.split(".")[0] in heavy], torch.cuda.is_initialized())
    """)
    assert out == "[] False"


@pytest.mark.parametrize("blocked", ["triton", "transformers", "safetensors.torch"])
def test_ops_run_without(blocked):
    out = run(f"""
        import sys, warnings
        sys.modules[{blocked!r}] = None
        import torch, qts_kernels
        warnings.simplefilter("ignore")
        indices, _ = qts_kernels.topn(torch.tensor([0.5, 2.0, 1.0]), 2)
        print(indices.tolist())
    """)
    assert out == "[1, 2]"


def test_importing_the_video_package_does_not_start_cuda_or_load_models():
    out = run("""
        import sys, torch, qts_video
        print("transformers.models.qwen2_5_vl.modeling_qwen2_5_vl" in sys.modules, torch.cuda.is_initialized())
    """)
    assert out == "False False"


def test_every_op_has_a_schema_a_fake_and_an_implementation():
    out = run("""
        import torch, qts_kernels
        from qts_kernels._schemas import SCHEMAS
        names = [f"qts_kernels::{n}" for n in SCHEMAS]
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        print([n for n in names for key in ("CPU", "CUDA") if not has(n, key)])
        fakes = torch._library.simple_registry.singleton
        print([n for n in names if fakes.find(n).fake_impl.kernel is None])
    """)
    assert out == "[]\n[]"
