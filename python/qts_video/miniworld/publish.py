"""Put what was trained where ``qts_video.embedded.load`` finds it: half the bytes, and a model card."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from qts_video.embedded import TRAINED
from qts_video.lite import LiteSelector
from qts_video.methods import QTSplus

from .questions import KINDS

_CARD = """\
# The model of the miniature world

A Qwen2.5-VL of {parameters:.2f} million parameters (`model`), a QTSplus selector (`qtsplus`) and a FlexSelect-Lite
selector (`lite`), trained from scratch by `make miniworld` (seed {seed}) on films that `qts_video.miniworld` draws:
docs/miniworld.md has the world, the training and all tables. Stored in float16, to be used in float32.

They answer six kinds of questions about films of coloured shapes, and know nothing else.

All tokens, films of 8 to 16 s that no training saw: {all:.1f} % of {questions} answers are right ({kinds}).
Films of 30 s, 10 % of the tokens kept: {selected}.

Measured on {machine}.
"""


def publish(folder: Path, figures: Path, seed: int, destination: Path = TRAINED) -> None:
    """Copy the model and its selectors from ``folder`` to ``destination``, whose content goes.

    Args:
        folder: what ``train`` wrote.
        figures: what ``report`` found, as JSON.
        seed: that they were trained from.
    """
    found = json.loads(figures.read_text())
    shutil.rmtree(destination, ignore_errors=True)
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float16)
    model.save_pretrained(destination / "model")
    _for_every_version(destination / "model" / "config.json")
    AutoProcessor.from_pretrained(folder / "model").save_pretrained(destination / "model")
    QTSplus.from_pretrained(folder / "qtsplus").half().save_pretrained(destination / "qtsplus")
    LiteSelector.from_pretrained(folder / "lite").half().save_pretrained(destination / "lite")
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    (destination / "README.md").write_text(_card(found, parameters, seed))


def _for_every_version(path: Path) -> None:
    """Rotary settings under the names that transformers 4 reads and 5 still does: those of 5 are unknown to 4."""
    config = json.loads(path.read_text())
    text = config["text_config"]
    if (rotary := text.pop("rope_parameters", None)) is not None:
        text["rope_theta"] = rotary.pop("rope_theta")
        text["rope_scaling"] = rotary
    config["vision_config"].pop("rope_parameters", None)
    path.write_text(json.dumps(config, indent=2) + "\n")


def _card(found: dict[str, Any], parameters: float, seed: int) -> str:
    short, long = found["accuracy"]["8-16"]["all tokens"], found["accuracy"]["30"]
    kept = ", ".join(
        f"{name.partition('|')[0]} {100 * row['all']:.1f} %" for name, row in long.items() if name.endswith("|0.1")
    )
    return _CARD.format(
        parameters=parameters,
        seed=seed,
        all=100 * short["all"],
        questions=short["questions"],
        kinds=", ".join(f"{kind} {100 * short[kind]:.1f}" for kind in KINDS),
        selected=f"all tokens {100 * long['all tokens']['all']:.1f} %, {kept}",
        machine=found["machine"],
    )
