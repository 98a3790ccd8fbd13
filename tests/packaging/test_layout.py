"""What the project promises about its own files."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CODE = (".py", ".cpp", ".cu", ".h", ".cuh", ".inl")


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\n") if name and (ROOT / name).exists()]


def test_no_file_is_longer_than_500_lines():
    long = [p.name for p in tracked() if p.suffix in CODE and len(p.read_text().split("\n")) > 501]
    assert long == []


def test_nothing_is_swallowed():
    swallowed = re.compile(r"except( \(?(Base)?Exception\)?)?:\s*(pass|\.\.\.)?\s*$", re.MULTILINE)
    guilty = [
        p.name for p in tracked() if p.suffix == ".py" and p != Path(__file__) and swallowed.search(p.read_text())
    ]
    assert guilty == []


def test_every_public_name_has_a_docstring():
    import qts_kernels

    undocumented = [n for n in qts_kernels.__all__ if n != "__version__" and not getattr(qts_kernels, n).__doc__]
    assert undocumented == []
