"""Attaching and removing: what changes in the model, and that all of it goes away."""

import copy

import pytest
import qts_video
import torch
import transformers
from qts_video.dropin.versions import check_version
from qts_video.methods import Uniform
from tiny import Keep, Video, every, keep_all, prompt, user
from tiny_qwen import inputs

BATCH = inputs(prompt(user([40], Video(4), [30, 31, 32])))


def state(model):
    """Everything that a hook, a replaced method or a swapped class would change."""
    return [
        (type(module), dict(module._forward_pre_hooks), dict(module._forward_hooks), set(module.__dict__))
        for module in model.modules()
    ]


def test_no_forward_and_no_class_is_replaced(model):
    classes = [type(module) for module in model.modules()]
    with qts_video.attach(model, Uniform(0.5)):
        assert [type(module) for module in model.modules()] == classes
        for module in model.modules():
            assert "forward" not in module.__dict__
        hooked = [name for name, m in model.named_modules() if m._forward_pre_hooks or m._forward_hooks]
        assert hooked == ["", "model", "model.visual", "model.language_model"]


def test_removal_undoes_everything(model):
    with torch.no_grad():
        logits, before = model(**BATCH).logits, state(model)
        handle = qts_video.attach(model, Keep(every(2)))
        assert handle.attached
        assert model(**BATCH).logits.shape != logits.shape
        handle.remove()
        assert not handle.attached
        assert state(model) == before
        assert torch.equal(model(**BATCH).logits, logits)
        handle.remove()  # once more does nothing
        assert handle.last.kept == 12  # the report stays


def test_an_error_inside_the_block_removes_too(model):
    before = state(model)
    with pytest.raises(KeyError, match="mine"), qts_video.attach(model, Keep(every(2))):
        raise KeyError("mine")
    assert state(model) == before


def test_an_error_inside_a_selector_leaves_the_model_usable(model):
    def fail(videos):
        raise ArithmeticError("selector")

    selector = Keep(fail)
    with torch.no_grad():
        logits = model(**BATCH).logits
        with qts_video.attach(model, selector) as handle:
            with pytest.raises(ArithmeticError, match="selector"):
                model(**BATCH)
            with pytest.raises(ArithmeticError, match="selector"):
                model.generate(**BATCH, max_new_tokens=2)
            selector.choose = every(2)  # in the multimodal part alone, called straight after the error
            other = inputs(prompt(user(Video(2), [33])))
            assert model.model(**other).last_hidden_state.shape[1] == handle.last.columns.shape[1]
            assert handle.last.total == 12
            text = inputs(prompt(user([30])))
            assert model(**text).logits.shape[1] == text["input_ids"].shape[1]
            model(**BATCH)
            assert handle.last.kept == 12
        assert torch.equal(model(**BATCH).logits, logits)


def test_attaching_twice_raises_and_again_after_removal_works(model):
    with qts_video.attach(model, Uniform(0.5)):
        with pytest.raises(RuntimeError, match="uniform is attached to this model already"):
            qts_video.attach(model, Uniform(0.5))
        with pytest.raises(RuntimeError, match="already"):
            qts_video.attach(model, Keep(keep_all))
    qts_video.attach(model, Keep(keep_all)).remove()


def test_an_unknown_model_names_the_known_ones():
    class Other(torch.nn.Module):
        config = transformers.PretrainedConfig()

    for unknown in (Other(), torch.nn.Linear(2, 2)):
        with pytest.raises(TypeError, match=r"known model types: .*qwen2_5_vl"):
            qts_video.attach(unknown, Uniform(0.5))


def test_a_wrapped_or_bare_model_says_what_is_expected(model):
    with pytest.raises(TypeError, match="expected a Qwen2_5_VLForConditionalGeneration, got Qwen2_5_VLModel"):
        qts_video.attach(model.model, Uniform(0.5))


@pytest.mark.parametrize("version", ["4.56.2", "4.58.0", "5.0.0", "5.3.0", "5.5.4", "5.18.1", "5.24.0", "6.0.0"])
def test_an_unknown_transformers_version_names_the_known_ones(model, monkeypatch, version):
    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(
        RuntimeError, match=rf"transformers {version} .*known versions: 4\.57.*5\.6 to 5\.17, 5\.19 to 5\.23"
    ):
        qts_video.attach(model, Uniform(0.5))


@pytest.mark.parametrize("version", ["4.57.6", "5.6.0", "5.17.0", "5.19.0.dev0", "5.23.0"])
def test_known_transformers_versions_pass(version):
    check_version(version)


def test_what_is_no_selector_raises(model):
    for wrong in (None, "uniform", Uniform, lambda videos: None):
        with pytest.raises(TypeError, match="a selector has a name, needs_question and select"):
            qts_video.attach(model, wrong)
    with pytest.raises(ValueError, match=r"positions must be .* got 'packed'"):
        qts_video.attach(model, Uniform(0.5), positions="packed")


def test_saving_and_loading_while_attached(model, tmp_path):
    class Module(torch.nn.Module):
        name, needs_question = "module", False

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(3))
            self.select = Keep(every(2)).select

    keys = list(model.state_dict())
    with qts_video.attach(model, Module()), torch.no_grad():
        assert list(model.state_dict()) == keys
        model.save_pretrained(tmp_path)
        shortened = model(**BATCH).logits
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in loaded.modules())
    with torch.no_grad():
        assert torch.equal(loaded(**BATCH).logits, model(**BATCH).logits)
        with qts_video.attach(loaded, Keep(every(2))):
            assert torch.equal(loaded(**BATCH).logits, shortened)


def test_a_deep_copy_has_an_attachment_of_its_own(model):
    with qts_video.attach(model, Keep(every(2))) as handle, torch.no_grad():
        shortened = model.generate(**BATCH, max_new_tokens=3, do_sample=False)
        twin = copy.deepcopy(model)
        for parameter in twin.parameters():
            parameter.zero_()
        calls = len(handle._attachment.selector.calls)
        twin.generate(**BATCH, max_new_tokens=3, do_sample=False)
        assert len(handle._attachment.selector.calls) == calls  # the copy ran its own selector, on its own weights
        assert twin(**BATCH).logits.shape[1] == handle.last.columns.shape[1]
        assert torch.equal(model.generate(**BATCH, max_new_tokens=3, do_sample=False), shortened)


def test_importing_patches_nothing_and_loads_no_transformers():
    import subprocess
    import sys

    code = "import sys, qts_video, qts_video.methods; assert 'transformers' not in sys.modules, 'transformers'"
    subprocess.run([sys.executable, "-c", code], check=True)
