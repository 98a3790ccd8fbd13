"""``qts doctor``: what is installed, what serves each op and why, what is missing and how to get it."""

import importlib.util
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    ("torch", "pip install torch", "everything"),
    ("numpy", "pip install numpy", "everything"),
    ("safetensors", "pip install safetensors", "loading selectors"),
    ("triton", "pip install triton (Linux)", "the GPU kernels"),
    ("transformers", "pip install 'qts_kernels[video]'", "models"),
    ("torchvision", "pip install 'qts_kernels[video]'", "the Qwen2.5-VL processor"),
    ("accelerate", "pip install 'qts_kernels[video]'", "loading onto devices"),
    ("av", "pip install 'qts_kernels[video]'", "reading videos"),
    ("qwen-vl-utils", "pip install 'qts_kernels[video]'", "--reader qwen-vl-utils"),
    ("pillow", "pip install 'qts_kernels[video]'", "folders of images"),
    ("matplotlib", "pip install 'qts_kernels[video]'", "pictures of selections"),
    ("tqdm", "pip install 'qts_kernels[video]'", "progress bars"),
    (
        "flash-attn",
        "pip install 'qts_kernels[flash]' (CUDA)",
        "the re-encoder's fastest attention; torch's serves without it",
    ),
)


def run() -> int:
    """Print the report; 0 where the ops and the video side can run, 1 where something they need is missing."""
    missing: list[str] = []
    sections = {
        "versions": _versions(missing),
        "devices": _devices(),
        "ops": _ops(missing),
        "methods and models": _models(),
    }
    for title, rows in sections.items():
        print(title)
        for row in _columns(rows):
            print(f"  {row}".rstrip())
        print()
    print("missing")
    for line in missing or ["nothing"]:
        print(f"  {line}")
    needed = [name for name, _, _ in PACKAGES if name not in ("triton", "flash-attn", "qwen-vl-utils")]
    return int(any(_version(name) is None for name in needed))


def _versions(missing: list[str]) -> list[tuple[str, ...]]:
    rows = [("python", platform.python_version(), sys.executable), ("qts_kernels", *_own_version())]
    for name, how, what in PACKAGES:
        found = _version(name)
        rows.append((name, found or "not installed", "" if found else f"for {what}"))
        if found is None:
            missing.append(f"{name}, for {what}: {how}")
    return rows


def _own_version() -> tuple[str, str]:
    try:
        import qts_kernels
    except Exception as error:  # noqa: BLE001 - the report is what tells it
        return "broken", _line(error)
    return qts_kernels.__version__, str(Path(qts_kernels.__file__).parent)


def _devices() -> list[tuple[str, ...]]:
    rows = [("cpu", f"{os.cpu_count()} cores", _cpu_features())]
    try:
        import torch
    except Exception as error:  # noqa: BLE001
        return [*rows, ("gpu", "unknown", f"torch does not import: {_line(error)}")]
    rows.append(("", f"{torch.get_num_threads()} threads used by torch", ""))
    try:
        count = torch.cuda.device_count()
        for number in range(count):
            p = torch.cuda.get_device_properties(number)
            rows.append((f"cuda:{number}", p.name, f"{p.total_memory / 2**30:.0f} GiB, compute {p.major}.{p.minor}"))
    except Exception as error:  # noqa: BLE001
        return [*rows, ("gpu", "unusable", _line(error))]
    if count == 0:
        built = torch.version.cuda or torch.version.hip
        why = (
            f"torch is built for CUDA {built}, but no driver or device answers"
            if built
            else "torch is built for the CPU"
        )
        rows.append(("gpu", "none", why))
    return rows


def _cpu_features() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""
    flags = next((line.split(":", 1)[1].split() for line in text.splitlines() if line.startswith("flags")), [])
    shown = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags]
    return " ".join(shown)


def _ops(missing: list[str]) -> list[tuple[str, ...]]:
    try:
        import qts_kernels  # noqa: F401  (registers the ops)
        from qts_kernels import backends

        rows = [(row.op, row.device, row.implementation, row.reason) for row in backends.report()]
        rows += _attention()
    except Exception as error:  # noqa: BLE001
        missing.append("a working qts_kernels: pip install --force-reinstall qts_kernels")
        return [("none", _line(error))]
    slow = sorted({row[0] for row in rows if row[2] == "reference" and row[3] != "first choice"})
    if slow:
        missing.append(
            f"compiled code for {', '.join(slow)}, which run in eager PyTorch (correct, slower): "
            "install a wheel, or build where there is a C++ compiler"
        )
    return [("op", "device", "implementation", "why"), *rows]


def _attention() -> list[tuple[str, ...]]:
    """What serves the re-encoder's attention, which is not an op of ours."""
    import torch

    from qts_kernels.ops.reencode.attention import attention_backend

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    chosen = [(device, attention_backend(device, torch.bfloat16)) for device in devices]
    return [("attention of the re-encoder", device, backend.name, backend.reason) for device, backend in chosen]


def _models() -> list[tuple[str, ...]]:
    try:
        from . import methods
        from .adapters import ADAPTERS

        rows = [("methods", ", ".join(sorted(names(methods)))), ("models", ", ".join(sorted(ADAPTERS)))]
        import transformers

        from .dropin.versions import check_version

        check_version(transformers.__version__)
    except Exception as error:  # noqa: BLE001
        return [("not available", _line(error))]
    return [*rows, ("transformers", f"{transformers.__version__} is supported")]


def names(methods: object) -> set[str]:
    """Names of the selection methods that the package exports."""
    classes = (getattr(methods, name) for name in methods.__all__)
    return {c.name for c in classes if isinstance(getattr(c, "name", None), str)}


def _version(package: str) -> str | None:
    """Version of an installed package, None where it is not installed."""
    loaded = getattr(sys.modules.get(package), "__version__", None)  # torch's says what it was built for
    try:
        return loaded or version(package)
    except PackageNotFoundError:
        found = importlib.util.find_spec(package.replace("-", "_"))
        return "unknown version" if found else None


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    """Rows of cells, aligned; the last cell is as long as it likes."""
    count = max(map(len, rows))
    padded = [(*row, *[""] * (count - len(row))) for row in rows]
    widths = [max(len(row[i]) for row in padded) for i in range(count - 1)]
    return ["  ".join([*(c.ljust(w) for c, w in zip(row[:-1], widths, strict=True)), row[-1]]) for row in padded]


def _line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
