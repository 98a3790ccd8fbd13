"""From pixels to an answer: time to the first token and to the last, with each method and without, by frames.

Sizes are the published ones on a GPU, with random weights, and small on a CPU; budgets are published ones on a GPU, and
a tenth of the tokens on a CPU. The vision tower encodes ``CHUNK`` frames at a time, with and without selection.
"""

import time

import pytest
import qts_video
import torch
import whole_models
from qts_video.lite import LiteSelector
from qts_video.measure import measure
from qts_video.methods import FlexSelect, QTSplus, Uniform
from report import EVERYTHING

GPU = torch.cuda.is_available()
FRAMES, NEW_TOKENS = ((32, 128, 512, 650), 64) if GPU else ((16,), 4)
CHUNK = 32 if GPU else 8
QTSPLUS_TOKENS = 2560
PUBLISHED = {("qwen2_5_vl", 28): (20, 7040), ("llava_onevision", 28): (19, 6720)}
"""FlexSelect's layer and budget of the 7B models, by model type and layers."""
METHODS = (EVERYTHING, "QTSplus", "FlexSelect", "FlexSelect-Lite", "Uniform")
WORDS = list(range(30, 60))
"""The question, by its ids."""


class FirstToken:
    """A stopping criterion that never stops: when the first new token was there, in seconds since it was made."""

    def __init__(self):
        self._start, self.seconds = time.perf_counter(), None

    def __call__(self, input_ids, scores, **options):
        if self.seconds is None:
            input_ids[0, -1].item()  # the token itself, on the host
            self.seconds = time.perf_counter() - self._start
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def selector_of(who, model, tokens):
    """At its published budget where there is one, else at that of Qwen2.5-VL-7B; on a CPU at a tenth of ``tokens``."""
    tenth = None if GPU else max(1, tokens // 10)
    config = model.config.get_text_config()
    layers = config.num_hidden_layers
    layer, budget = PUBLISHED.get((model.config.model_type, layers), (layers * 2 // 3, 7040))
    budget = tenth or budget
    if who == "QTSplus":
        return QTSplus.from_language_model(model, max_tokens=tenth or QTSPLUS_TOKENS)
    if who == "FlexSelect":
        return FlexSelect(layer=layer, max_tokens=budget)
    if who == "FlexSelect-Lite":
        sizes = {} if GPU else {"hidden_size": 64, "intermediate_size": 256, "layers": 3, "heads": 2}
        return FlexSelect(selector=LiteSelector.build(model, **sizes), max_tokens=budget)
    return Uniform(max_tokens=budget)


@pytest.fixture(scope="module", params=whole_models.names())
def loaded(request, device):
    model = whole_models.build(request.param, device)
    yield request.param, model
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("who", METHODS)
@pytest.mark.parametrize("frames", FRAMES)
@torch.inference_mode()
def test_answer(timed, loaded, benchmark, frames, who):
    """Vision tower, selection and prefill in seconds, and peak memory, beside the whole."""
    name, model = loaded
    inputs = whole_models.prompt(name, model, frames)
    ids = inputs["input_ids"]
    tokens = int(((ids == whole_models.VIDEO) | (ids == whole_models.IMAGE)).sum())
    selector = Uniform(retention_ratio=1.0) if who == EVERYTHING else selector_of(who, model, tokens)
    with qts_video.attach(model, selector, vision_chunk_frames=CHUNK) as handle:
        if selector.needs_question:
            handle.question(WORDS)

        def run(**more):
            return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **more)

        run()
        with measure(model) as took:
            first = FirstToken()
            answer = run(stopping_criteria=[first])
        assert 0 < first.seconds <= took.total
        assert answer.shape[1] in (NEW_TOKENS, ids.shape[1] + NEW_TOKENS)
        kept = handle.last.kept
        assert kept == tokens if who == EVERYTHING else 0 < kept <= tokens
        benchmark.extra_info["peak_mb"] = round(took.peak_bytes / 2**20)
        benchmark.extra_info["first_token_s"] = first.seconds
        benchmark.extra_info["vision_s"], benchmark.extra_info["prefill_s"] = took.vision, took.prefill
        shape = f"{name if GPU else f'small {name}'} frames={frames} M={tokens} new tokens={NEW_TOKENS}"
        timed("pixels to answer", shape, who, run, graph=False, calls=3)
