"""``qts split``: what the parts compute is what they computed in the whole, whoever wrote the checkpoint."""

import hashlib
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

import qts_video.split as module
from qts_video import embedded
from qts_video.checkpoints import load_model
from qts_video.cli import main
from qts_video.split import split, text_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.internvl.modeling_internvl import InternVLVisionModel
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.siglip.modeling_siglip import SiglipVisionModel

TOWERS = {
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
    "internvl": InternVLVisionModel,
    "llava_onevision": SiglipVisionModel,
}
IDS = torch.tensor([[3, 14, 15, 92, 65, 35, 8, 97]])
INDEX = "model.safetensors.index.json"


def newer_name(name):
    """Of a tensor in whichever of the two styles, its name in the newer."""
    if name.startswith(("lm_head.", "model.language_model.", "model.visual.", "model.vision_tower.", "model.multi")):
        return name
    if name == "model.image_newline":
        return name
    for old, new in (
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("model.", "model.language_model."),
    ):
        if name.startswith(old):
            return new + name.removeprefix(old)
    return f"model.{name}"


def older_name(family, name):
    name = newer_name(name)
    if family == "qwen2_5_vl":
        return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")
    if name.startswith("lm_head."):
        return f"language_model.{name}"
    return name.replace("model.language_model.", "language_model.model.") if "language" in name else name[6:]


def rewrite(folder, rename, shards=1):
    """The checkpoint with its tensors renamed, in ``shards`` files."""
    tensors = {}
    for file in folder.glob("*.safetensors"):
        tensors |= {rename(name): tensor for name, tensor in load_file(file).items()}
        file.unlink()
    (folder / INDEX).unlink(missing_ok=True)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(weight_map.values()):
        save_file({n: t for n, t in tensors.items() if weight_map[n] == file}, folder / file, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module", params=TOWERS)
def family(request):
    return request.param


@pytest.fixture
def saved(family, tmp_path):
    return embedded.save(tmp_path / "whole", model_type=family)


@torch.no_grad()
def check_parts(saved, parts, family):
    """Logits of the language model, and features of the vision tower, bit for bit those of the whole."""
    whole, _, _ = load_model(saved)
    language = AutoModelForCausalLM.from_pretrained(parts.language_model)
    assert torch.equal(language(IDS).logits, whole(input_ids=IDS).logits)
    tower = TOWERS[family].from_pretrained(parts.vision)
    inside = whole.model.visual if family == "qwen2_5_vl" else whole.model.vision_tower
    ours, theirs = tower.state_dict(), inside.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    projector = parts.vision / "projector.safetensors"
    assert projector.exists() == (family != "qwen2_5_vl")
    if projector.exists():
        theirs = whole.model.state_dict()
        tensors = load_file(projector)
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())
        wanted = {name for name in theirs if name.startswith(("multi_modal_projector.", "image_newline"))}
        assert tensors.keys() == wanted


@pytest.mark.parametrize("style", ["as saved", "older", "newer"])
@pytest.mark.parametrize("shards", [1, 3])
def test_the_parts_compute_what_the_whole_does(family, saved, tmp_path, style, shards):
    if (style, shards) == ("newer", 3):
        pytest.skip("the older names are tested in shards")
    names = {"as saved": lambda name: name, "newer": newer_name, "older": lambda name: older_name(family, name)}
    rewrite(saved, names[style], shards)
    before = digest(saved)
    parts = split(saved, tmp_path / "parts")
    assert digest(saved) == before
    check_parts(saved, parts, family)
    assert (parts.language_model / INDEX).exists() == (shards > 1)
    tokenizer = AutoTokenizer.from_pretrained(parts.language_model)
    assert tokenizer.encode("Which shape?") == AutoTokenizer.from_pretrained(saved).encode("Which shape?")
    assert json.loads((parts.vision / "source_config.json").read_text()) == json.loads(
        (saved / "config.json").read_text()
    )
    assert list(parts.vision.glob("*preprocessor_config.json")) or (parts.vision / "processor_config.json").exists()


@torch.no_grad()
def test_tied_embeddings(tmp_path):
    model, processor = embedded.build("qwen2_5_vl")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    model.save_pretrained(tmp_path / "whole")
    processor.save_pretrained(tmp_path / "whole")
    with safe_open(tmp_path / "whole" / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  (no dict)
    parts = split(tmp_path / "whole", tmp_path / "parts")
    language = AutoModelForCausalLM.from_pretrained(parts.language_model)
    assert language.lm_head.weight is language.model.embed_tokens.weight
    assert torch.equal(language(IDS).logits, model(input_ids=IDS).logits)


def test_one_shard_is_in_memory_at_a_time(saved, tmp_path, monkeypatch):
    rewrite(saved, lambda name: name, shards=4)
    largest = max(file.stat().st_size for file in saved.glob("*.safetensors"))
    sizes, save = [], module.save_file

    def watched(tensors, *arguments, **options):
        sizes.append(sum(tensor.nbytes for tensor in tensors.values()))
        return save(tensors, *arguments, **options)

    monkeypatch.setattr(module, "save_file", watched)
    split(saved, tmp_path / "parts")
    assert len(sizes) >= 8
    assert max(sizes) <= largest


def test_internvl_chat(tmp_path):
    """Names and configs of InternVLChatModel, whose vision tower is code of its own."""
    source = tmp_path / "whole"
    embedded.save(source, model_type="internvl")

    def rename(name):
        name = newer_name(name)
        for new, old in (
            ("model.language_model.", "language_model.model."),
            ("lm_head.", "language_model.lm_head."),
            ("model.vision_tower.", "vision_model."),
            ("model.multi_modal_projector.", "mlp1."),
        ):
            if name.startswith(new):
                return old + name.removeprefix(new)
        raise AssertionError(name)

    whole, _, _ = load_model(source)
    rewrite(source, rename)
    config = json.loads((source / "config.json").read_text())
    config = {"model_type": "internvl_chat", "llm_config": config["text_config"], "vision_config": {"hidden_size": 64}}
    (source / "config.json").write_text(json.dumps(config))
    (source / "modeling_intern_vit.py").write_text("# the model's own\n")
    parts = split(source, tmp_path / "parts")
    with torch.no_grad():
        language = AutoModelForCausalLM.from_pretrained(parts.language_model)
        assert torch.equal(language(IDS).logits, whole(input_ids=IDS).logits)
    assert (parts.vision / "modeling_intern_vit.py").exists()
    assert json.loads((parts.vision / "config.json").read_text())["auto_map"]["AutoModel"].startswith("modeling_intern")
    assert all(name.startswith("mlp1.") for name in load_file(parts.vision / "projector.safetensors"))


def test_flat_config_of_qwen_with_other_rotary_scaling():
    config = {
        "model_type": "qwen2_5_vl",
        "hidden_size": 8,
        "torch_dtype": "bfloat16",
        "video_token_id": 9,
        "vision_config": {},
        "rope_theta": 5e5,
    }
    scaled = {"rope_scaling": {"type": "yarn", "factor": 4, "mrope_section": [1, 2, 1]}}
    expected = {"model_type": "qwen2", "hidden_size": 8, "torch_dtype": "bfloat16", "rope_theta": 5e5}
    expected |= {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True}
    assert text_config(config, True) == expected
    assert text_config(config | {"rope_scaling": {"type": "mrope", "mrope_section": [1, 2, 1]}}, True) == expected
    assert text_config(config | scaled, True) == expected | {"rope_scaling": {"rope_type": "yarn", "factor": 4}}


def test_command(tmp_path, capsys):
    saved = embedded.save(tmp_path / "whole")
    command = ["split", str(saved), "--output", str(tmp_path / "parts")]
    assert main(command) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "parts" / part) for part in ("language_model", "vision")]
    assert main(command) == 2
    assert "language_model is there and not empty: choose another folder, or overwrite with --force" in said(capsys)
    stale = tmp_path / "parts" / "language_model" / "model-00001-of-00002.safetensors"
    stale.touch()
    assert main([*command, "--force"]) == 0
    assert not stale.exists()


def said(capsys):
    return capsys.readouterr().err


def test_what_can_not_be_split(tmp_path, capsys):
    saved = embedded.save(tmp_path / "whole")
    before = digest(saved)
    for output in (saved, saved / "parts"):
        assert main(["split", str(saved), "--output", str(output), "--force"]) == 2
        assert "lies in the checkpoint" in said(capsys)
    rewrite(saved, lambda name: name.replace("lm_head", "head"))
    assert main(["split", str(saved), "--output", str(tmp_path / "parts")]) == 2
    assert "1 tensors are of no known part, the first 'head.weight'; expected names that begin with" in said(capsys)
    rewrite(saved, lambda name: "lm_head." + name)
    assert main(["split", str(saved), "--output", str(tmp_path / "parts")]) == 2
    assert "no tensor belongs to the part vision" in said(capsys)
    (saved / "config.json").write_text('{"model_type": "bert"}')
    assert main(["split", str(saved), "--output", str(tmp_path / "parts")]) == 2
    assert "is a model of type 'bert'; known types: qwen2_5_vl, internvl, llava_onevision" in said(capsys)
    assert main(["split", str(tmp_path / "none"), "--output", str(tmp_path / "parts")]) == 2
    assert "no such folder" in said(capsys)
    assert not (tmp_path / "parts").exists()
    assert before.keys() == digest(saved).keys()
