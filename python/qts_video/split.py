"""``qts split``: a checkpoint becomes a language model and a vision tower, each a folder of its own."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qts_video.loading import CommandError, first_line
from qts_video.weights import CONFIG, INDEX, SINGLE, Checkpoint

LANGUAGE, TOWER, PROJECTOR = "language_model", "vision", "projector"
SOURCE_CONFIG, PROJECTOR_FILE = "source_config.json", "projector.safetensors"
PT = {"format": "pt"}  # without it transformers refuses a file

# Of each family, where tensors go by how their names begin, and what the beginning becomes; the first that fits. The
# names with "model." in front are those of transformers 4.52 and newer.
_TRANSFORMERS = (
    ("model.vision_tower.", TOWER, ""),
    ("vision_tower.", TOWER, ""),
    ("model.multi_modal_projector.", PROJECTOR, "multi_modal_projector."),
    ("multi_modal_projector.", PROJECTOR, "multi_modal_projector."),
    ("model.image_newline", PROJECTOR, "image_newline"),
    ("image_newline", PROJECTOR, "image_newline"),
    ("model.language_model.", LANGUAGE, "model."),
    ("language_model.", LANGUAGE, ""),
    ("lm_head.", LANGUAGE, "lm_head."),
)
RULES: dict[str, tuple[tuple[str, str, str], ...]] = {
    "qwen2_5_vl": (
        ("model.visual.", TOWER, ""),
        ("visual.", TOWER, ""),
        ("model.language_model.", LANGUAGE, "model."),
        ("model.", LANGUAGE, "model."),
        ("lm_head.", LANGUAGE, "lm_head."),
    ),
    "internvl": _TRANSFORMERS,
    "llava_onevision": _TRANSFORMERS,
    "internvl_chat": (
        ("vision_model.", TOWER, ""),
        ("mlp1.", PROJECTOR, "mlp1."),
        ("language_model.", LANGUAGE, ""),
    ),
}

_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "generation_config.json",
)
_PICTURES = ("*preprocessor_config.json", "processor_config.json")
# What InternVLChatModel's own classes are called where it keeps them.
_OWN_VISION = {
    "AutoConfig": "configuration_intern_vit.InternVisionConfig",
    "AutoModel": "modeling_intern_vit.InternVisionModel",
}
_CLASSES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}


@dataclass(frozen=True)
class Parts:
    """What ``split`` wrote."""

    language_model: Path
    """``AutoModelForCausalLM.from_pretrained`` loads it."""
    vision: Path
    """The tower's own class in transformers loads it; ``projector.safetensors`` beside it, but where the tower's class
    holds the projector (Qwen2.5-VL's merger)."""


def run(arguments: argparse.Namespace) -> int:
    """The two folders on stdout."""
    try:
        parts = split(arguments.checkpoint, arguments.output, force=arguments.force)
    except (OSError, ValueError) as error:
        raise CommandError(first_line(error)) from error
    print(parts.language_model, parts.vision, sep="\n")
    return 0


def split(path_or_id: str | Path, output: str | Path, *, force: bool = False) -> Parts:
    """Take a checkpoint apart. One shard of it is in memory at a time, and it is never written to.

    A Qwen2.5-VL's language model becomes a Qwen2: on text alone its rotary positions in three axes are those in one.

    Args:
        path_or_id: folder or hub id of a Qwen2.5-VL, an InternVL (in transformers' class or ``InternVLChatModel``), a
            LLaVA-OneVision or a converted LLaVA-Video, in safetensors.
        output: folder in which ``language_model`` and ``vision`` are written.
        force: overwrite weights that are there.

    Raises:
        FileNotFoundError: no such checkpoint, or a file of it is missing.
        FileExistsError: a folder that is to be written is not empty, without ``force``.
        ValueError: a model of another kind, a tensor that has no place, an ``output`` inside of the checkpoint, or a
            part without tensors.
    """
    checkpoint, output = Checkpoint(path_or_id), Path(output).expanduser()
    kind = checkpoint.config.get("model_type")
    if kind not in RULES:
        raise ValueError(f"{checkpoint.name} is a model of type {kind!r}; known types: {', '.join(RULES)}")
    files = _by_file(checkpoint, RULES[kind])
    parts = Parts(output / LANGUAGE, output / TOWER)
    _check_output(checkpoint.folder, output, (parts.language_model, parts.vision), force)

    tied = not any(new == "lm_head.weight" or new == "output.weight" for new in _names(files, LANGUAGE))
    configs = {parts.language_model: text_config(checkpoint.config, tied), parts.vision: _vision(checkpoint)}
    for folder, config in configs.items():
        folder.mkdir(parents=True, exist_ok=True)
        for old in (*folder.glob("*.safetensors"), *folder.glob(INDEX)):
            old.unlink()
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    (parts.vision / SOURCE_CONFIG).write_text(json.dumps(checkpoint.config, indent=2) + "\n")
    _copy(checkpoint.folder, parts.language_model, _TOKENIZER)
    _copy(checkpoint.folder, parts.vision, _PICTURES)
    if kind == "internvl_chat":
        for folder in (parts.language_model, parts.vision):
            _copy(checkpoint.folder, folder, ("*.py",))

    _write(checkpoint, files, LANGUAGE, parts.language_model)
    _write(checkpoint, files, TOWER, parts.vision)
    projector = [_read(checkpoint, files, PROJECTOR, file) for file in files if PROJECTOR in files[file]]
    if projector:  # small, so in one file wherever it came from
        save_file(
            {name: x for part in projector for name, x in part.items()}, parts.vision / PROJECTOR_FILE, metadata=PT
        )
    return parts


# Of every file of a checkpoint, of every part: the tensors' names there, and what they become.
_Files = dict[str, dict[str, dict[str, str]]]


def _by_file(checkpoint: Checkpoint, rules: Sequence[tuple[str, str, str]]) -> _Files:
    files: _Files = {}
    strange = []
    for name, file in sorted(checkpoint.names().items()):
        rule = next((rule for rule in rules if name.startswith(rule[0])), None)
        if rule is None:
            strange.append(name)
            continue
        before, part, after = rule
        files.setdefault(file, {}).setdefault(part, {})[name] = after + name.removeprefix(before)
    if strange:
        raise ValueError(
            f"{checkpoint.name}: {len(strange)} tensors are of no known part, the first {strange[0]!r}; expected names "
            f"that begin with {', '.join(rule[0] for rule in rules)}"
        )
    for part in (LANGUAGE, TOWER):
        if not _names(files, part):
            raise ValueError(f"{checkpoint.name}: no tensor belongs to the part {part}")
    return files


def _names(files: _Files, part: str) -> list[str]:
    return [new for parts in files.values() for new in parts.get(part, {}).values()]


def _check_output(source: Path, output: Path, folders: Sequence[Path], force: bool) -> None:
    inside = source.resolve() in (output.resolve(), *output.resolve().parents)
    if inside:
        raise ValueError(f"output {output} lies in the checkpoint {source}: choose another folder")
    for folder in folders:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())) and not force:
            raise FileExistsError(f"{folder} is there and not empty: choose another folder, or overwrite with --force")


def text_config(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """``config.json`` of the language model alone.

    Args:
        config: of the whole model.
        tied: whether the checkpoint has no output matrix besides the embeddings.
    """
    kind = config["model_type"]
    text = dict(config.get("text_config") or config.get("llm_config") or {})
    if kind == "qwen2_5_vl":
        text = _qwen2({**{k: v for k, v in config.items() if k not in ("text_config", "vision_config")}, **text})
    for name in ("dtype", "torch_dtype"):
        if text.get(name) is None and config.get(name) is not None:
            text[name] = config[name]
    if text.get("model_type") in _CLASSES:
        text["architectures"] = [_CLASSES[text["model_type"]]]
    return text | {"tie_word_embeddings": tied}


def _qwen2(text: dict[str, Any]) -> dict[str, Any]:
    """Of Qwen2.5-VL's text config that of a Qwen2. The rotary embedding loses its three axes."""
    left_out = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
    text = {name: value for name, value in text.items() if name not in left_out}
    rope = {**(text.pop("rope_scaling", None) or {}), **(text.pop("rope_parameters", None) or {})}
    theta = rope.pop("rope_theta", None) or text.get("rope_theta")
    rope.pop("mrope_section", None)
    kind = rope.pop("rope_type", rope.pop("type", None))
    rope.pop("type", None)
    scaled = {} if kind in (None, "default", "mrope") else {"rope_scaling": {"rope_type": kind, **rope}}
    return {**text, "model_type": "qwen2", **scaled, **({} if theta is None else {"rope_theta": theta})}


def _vision(checkpoint: Checkpoint) -> dict[str, Any]:
    config = checkpoint.config
    if not config.get("vision_config"):
        raise ValueError(f"{checkpoint.name}: config.json has no vision_config")
    vision = dict(config["vision_config"])
    if config["model_type"] == "internvl_chat" and "auto_map" not in vision:
        vision["auto_map"] = _OWN_VISION
    return vision


def _copy(source: Path, folder: Path, patterns: Sequence[str]) -> None:
    for path in (path for pattern in patterns for path in source.glob(pattern)):
        if path.is_file():
            shutil.copyfile(path, folder / path.name)


def _read(checkpoint: Checkpoint, files: _Files, part: str, file: str) -> dict[str, torch.Tensor]:
    """The tensors of a part in one file, by their new names."""
    with safe_open(checkpoint.file(file), "pt") as opened:
        return {new: opened.get_tensor(old) for old, new in files[file][part].items()}


def _write(checkpoint: Checkpoint, files: _Files, part: str, folder: Path) -> None:
    """The tensors of a part, each shard by itself; an index where there are several."""
    shards = [file for file in files if part in files[file]]
    weight_map, size = {}, 0
    for number, file in enumerate(shards, 1):
        target = SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = _read(checkpoint, files, part, file)
        weight_map |= dict.fromkeys(tensors, target)
        size += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, folder / target, metadata=PT)
        del tensors
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
