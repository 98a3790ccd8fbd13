"""Times and memory are of the call that was measured, and nothing stays behind."""

import time

import pytest
import torch

pytest.importorskip("transformers")

from qts_video import embedded
from qts_video.measure import measure, resident_bytes


@pytest.fixture(scope="module")
def model():
    return embedded.build()[0]


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_prefill_is_the_first_call_alone(model):
    before = hooks(model)
    ids = torch.arange(10)[None] + 5
    with measure(model) as both, torch.no_grad():
        model(input_ids=ids)
        first = both._stopwatch.seconds()["prefill"]
        model(input_ids=ids)
    assert both.prefill == first > 0
    assert both.total > both.prefill
    assert both.vision == 0
    assert hooks(model) == before


def test_a_call_that_is_left_is_not_the_prefill(model):
    """FlexSelect leaves the decoder early to score, and the prefill comes after."""
    ids, decoder, left = torch.arange(10)[None] + 5, model.get_decoder(), []

    def leave(*_: object) -> None:
        if not left:
            left.append(True)
            raise RuntimeError("left")

    hook = decoder.layers[0].register_forward_pre_hook(leave)
    with measure(model) as took, torch.no_grad():
        with pytest.raises(RuntimeError, match="left"):
            model(input_ids=ids)
        model(input_ids=ids)
    hook.remove()
    assert took.prefill > 0


def test_a_call_inside_of_the_prefill_is_not_the_prefill(model):
    """QuoTA has the model say what frames must show, before the prefill that it shortens."""
    ids, decoder, inside = torch.arange(10)[None] + 5, model.get_decoder(), []

    def ask(*_: object) -> None:
        if not inside:
            inside.append(True)
            model(input_ids=ids)
            model(input_ids=ids)
            inside.append(took._stopwatch.seconds().get("prefill"))

    hook = decoder.register_forward_pre_hook(ask)
    with measure(model) as took, torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    assert inside == [True, None]
    assert took.prefill > 0


def test_hooks_go_when_the_call_fails(model):
    before = hooks(model)
    with pytest.raises(RuntimeError, match="mine"), measure(model):
        raise RuntimeError("mine")
    assert hooks(model) == before


@pytest.mark.skipif(resident_bytes() is None, reason="no /proc here")
def test_peak_memory_sees_what_was_freed_in_between(model):
    size = 64 * 2**20
    with measure(model) as took:
        block = torch.ones(size, dtype=torch.uint8)
        time.sleep(0.05)
        del block
    assert size <= took.peak_bytes < 1.5 * size
