"""The doctor says what is there and what is not, and never falls over what is missing."""

import subprocess
import sys

import torch
from qts_video import doctor
from qts_video.cli import main


def test_names_versions_ops_and_methods(capsys):
    main(["doctor"])
    out = capsys.readouterr().out
    assert torch.__version__ in out
    from qts_kernels import backends

    for row in backends.report():
        assert row.op in out
        assert row.reason in out
    assert "uniform" in out
    assert "qwen2_5_vl" in out


def run_without(*packages: str) -> subprocess.CompletedProcess:
    """``qts doctor`` in a process in which these packages do not exist."""
    code = f"""
import importlib.util, importlib.metadata, sys
gone = {packages!r}
class Gone:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in gone:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Gone())
spec, version = importlib.util.find_spec, importlib.metadata.version
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in gone else spec(name, *a)
def find(name):
    if name.replace("-", "_") in gone:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = find
from qts_video import doctor
sys.exit(doctor.run())
"""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_without_the_video_packages():
    done = run_without("transformers", "av", "matplotlib", "triton", "flash_attn", "qwen_vl_utils")
    assert "Traceback" not in done.stderr
    assert done.returncode == 1
    missing = done.stdout.split("\nmissing\n")[1]
    for name in ("transformers", "av", "matplotlib", "triton", "qwen-vl-utils"):
        assert f"  {name}, for " in missing
    assert "pip install 'qts_kernels[video]'" in missing


def test_a_broken_install_is_reported(monkeypatch, capsys):
    def broken():
        raise ImportError("libtorch.so: cannot open shared object file\nmore")

    monkeypatch.setattr("qts_kernels.backends.report", broken)
    doctor.run()
    out = capsys.readouterr().out
    assert "ImportError: libtorch.so" in out
    assert "more" not in out.split("ImportError", 1)[1].splitlines()[0]
