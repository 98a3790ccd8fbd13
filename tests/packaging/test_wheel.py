"""The wheel: built once, installed where nothing of ours is, and loaded by another torch than it was built with."""

import os
import re
import shutil
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from importlib.util import cache_from_source
from pathlib import Path

import pytest
import torch
from builds import copy_checkout, run
from packaging.requirements import Requirement

OTHER_TORCH = "2.13.0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("wheel"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the wheel's native code needs g++"),
]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    """A manylinux wheel made from an sdist of the checkout, CUDA code included where it can be compiled."""
    source = copy_checkout(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    # What a torch brings with it stays out, as in `make wheel`.
    outside = [f"--exclude={name}*" for name in ("libtorch", "libc10", "libcudart")]
    tools = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    run(sys.executable, "-m", "auditwheel", "repair", "--strip", *outside, "-w", out / "many", built, cwd=out, **tools)
    (repaired,) = (out / "many").glob("*.whl")
    return repaired


def environment(path: Path, *packages: str, present: Iterable[metadata.Distribution] = ()) -> Path:
    """A new virtual environment with ``packages``; its python. Those ``present`` are there before pip is asked."""
    venv.create(path, with_pip=True)
    python = path / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=path).strip())
    for distribution in present:
        share(distribution, site)
    install(python, *packages)
    return python


def install(python: Path, *packages: str | Path) -> None:
    # What is never imported need not become bytecode.
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", *packages, cwd=python.parent)


def with_what_they_need(*names: str) -> list[metadata.Distribution]:
    """The distributions ``names`` and all that they ask for, as they are installed here."""
    found, ahead = {}, [Requirement(name) for name in names]
    while ahead:
        wanted = ahead.pop()
        of_this = found.setdefault(wanted.name, metadata.distribution(wanted.name))
        extras = [{"extra": extra} for extra in ("", *wanted.extras)]
        asked = map(Requirement, of_this.requires or ())
        asked = [of for of in asked if of.marker is None or any(map(of.marker.evaluate, extras))]
        ahead += [of for of in asked if of.extras or of.name not in found]
    return list(found.values())


def share(distribution: metadata.Distribution, site: Path) -> None:
    """The files that pip has unpacked into this environment, once more in another: links, as they are gigabytes."""
    here = Path(distribution.locate_file(""))
    files = [here / file for file in distribution.files if ".." not in file.parts]  # no scripts: nothing here runs them
    bytecode = (Path(cache_from_source(file)) for file in files if file.suffix == ".py")
    for source in {*files, *filter(Path.exists, bytecode)}:
        target = site / source.relative_to(here)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            target.hardlink_to(source)
        except OSError:  # another file system
            shutil.copy2(source, target)


REPORT = """
import torch, qts_kernels
from qts_kernels import backends
served = {r.implementation for r in backends.report() if r.device == "cpu" and r.op in ("relevance", "topn")}
query, key = torch.randn(1, 4, 4, 16), torch.randn(1, 100, 2, 16)
ours = qts_kernels.relevance(query, key)
with backends.force("reference"):
    assert torch.allclose(ours, qts_kernels.relevance(query, key), atol=1e-6)
print(torch.__version__, sorted(served), qts_kernels.__file__)
"""


def test_is_one_abi3_wheel_with_both_packages(wheel):
    assert re.search(r"-cp310-abi3-manylinux_2_\d+_x86_64\.whl$", wheel.name)
    assert wheel.stat().st_size < 20 << 20
    names = zipfile.ZipFile(wheel).namelist()
    assert "qts_kernels/_C.abi3.so" in names
    assert "qts_kernels/ops/relevance/triton.py" in names
    assert "qts_video/attach.py" in names
    assert not [n for n in names if n.startswith(("tests/", "benchmarks/", "csrc/"))]
    if torch.version.cuda and shutil.which("nvcc"):
        assert "qts_kernels/_C_cuda.abi3.so" in names


def test_runs_in_a_clean_environment(wheel, tmp_path):
    import torchvision
    import transformers

    versions = [f"{m.__name__}=={m.__version__.split('+')[0]}" for m in (torch, torchvision, transformers)]
    present = with_what_they_need("torch", "torchvision")
    python = environment(tmp_path / "venv", f"{wheel}[video]", *versions, present=present)
    assert "['native']" in run(python, "-c", REPORT, cwd=tmp_path)
    table = run(tmp_path / "venv" / "bin" / "qts", "demo", cwd=tmp_path)
    _, asked, right, *_ = re.search(r"^right .*$", table, re.MULTILINE).group().split()
    assert asked == right  # with all tokens: the weights came with the wheel
    assert list(tmp_path.rglob("*.png"))


def test_loads_in_another_torch(wheel, tmp_path):
    python = environment(tmp_path / "venv", f"torch=={OTHER_TORCH}", "numpy", "safetensors")
    install(python, "--no-deps", wheel)
    out = run(python, "-c", REPORT, cwd=tmp_path)
    assert out.startswith(OTHER_TORCH)
    assert "['native']" in out
