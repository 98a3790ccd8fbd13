"""From pixels to an answer: time to the first token and to the last, with each method and without, by frames.

Sizes are the published ones on a GPU, with random weights, and small on a CPU; budgets are published ones on a GPU, and
a tenth of the tokens on a CPU. The vision tower encodes ``CHUNK`` frames at a time, with and without selection.
QuoTA's frame scorer and its decoupling run in every answer, and are in all of its times.
"""

import time
from contextlib import ExitStack

import pytest
import qts_video
import torch
import whole_models
import whole_quota
from qts_video.answer import default_positions, lay_out
from qts_video.lite import LiteSelector
from qts_video.measure import measure
from qts_video.methods import FlexSelect, QTSplus, QuoTA, Uniform
from report import EVERYTHING

GPU = torch.cuda.is_available()
FRAMES, NEW_TOKENS = ((32, 128, 512, 650), 64) if GPU else ((16,), 4)
CHUNK = 32 if GPU else 8
QTSPLUS_TOKENS, QUOTA_TOKENS = 2560, 12544
PUBLISHED = {("qwen2_5_vl", 28): (20, 7040), ("llava_onevision", 28): (19, 6720)}
"""FlexSelect's layer and budget of the 7B models, by model type and layers."""
METHODS = (EVERYTHING, "QTSplus", "FlexSelect", "FlexSelect-Lite", "QuoTA", "Uniform")
WORDS = list(range(30, 60))
"""The question, by its ids."""
LONG = 20
"""Seconds of an answer that is timed once, for all rows of a model to fit a step of gpu.sh."""


class FirstToken:
    """A stopping criterion that never stops: when the first new token was there, in seconds since it was made."""

    def __init__(self):
        self._start, self.seconds = time.perf_counter(), None

    def __call__(self, input_ids, scores, **options):
        if self.seconds is None:
            input_ids[0, -1].item()  # the token itself, on the host
            self.seconds = time.perf_counter() - self._start
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def selector_of(who, name, model, tokens):
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
    if who == "QuoTA":
        return QuoTA(
            whole_quota.Scorer(model, whole_models.processor(name).tokenizer), total_tokens=tenth or QUOTA_TOKENS
        )
    return Uniform(max_tokens=budget)


@pytest.fixture(scope="module", params=whole_models.names())
def loaded(request, device):
    model = whole_models.build(request.param, device)
    yield request.param, model
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def attached(name, model, selector):
    """As ``qts ask`` attaches it."""
    handle = qts_video.attach(
        model,
        selector,
        tokenizer=whole_models.processor(name),
        positions=default_positions(model, selector),
        vision_chunk_frames=CHUNK,
    )
    if selector.needs_question:
        handle.question(whole_quota.QUESTION if selector.name == "quota" else WORDS)
    return handle


def check_quota(name, model, selector, run):
    """The answer is that by the same scores, given; the frames were scored by what the model named."""
    with attached(name, model, selector) as handle:
        found, scorer = run(), selector.scorer
        assert scorer.scores is None or f"frames are scored by {whole_quota.OBJECT}" in handle.last.notes
    if scorer.scores is not None:
        with attached(name, model, QuoTA(scorer.scores, total_tokens=selector.total_tokens)):
            assert torch.equal(run(), found)


@pytest.mark.parametrize("who", METHODS)
@pytest.mark.parametrize("frames", FRAMES)
@torch.inference_mode()
def test_answer(timed, loaded, benchmark, frames, who):
    """Vision tower, selection and prefill in seconds, and peak memory, beside the whole; what QuoTA's scorer takes."""
    name, model = loaded
    inputs, extra = whole_models.prompt(name, model, frames), benchmark.extra_info
    tokens = whole_models.vision_tokens(model, inputs)
    selector = Uniform(retention_ratio=1.0) if who == EVERYTHING else selector_of(who, name, model, tokens)
    film = whole_models.frames_of(name, frames)

    def run(**more):
        if who == "QuoTA":
            selector.scorer.bind([film])
        return model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False, **more)

    with ExitStack() as stack:
        inputs = lay_out(stack, model, inputs, selector)
        if who == "QuoTA":
            check_quota(name, model, selector, run)
        handle = stack.enter_context(attached(name, model, selector))
        if who != "QuoTA":  # which has run
            run()
        with measure(model) as took:
            first = FirstToken()
            answer = run(stopping_criteria=[first])
        assert 0 < first.seconds <= took.total
        assert answer.shape[1] in (NEW_TOKENS, inputs["input_ids"].shape[1] + NEW_TOKENS)
        kept = handle.last.kept
        assert kept == tokens if who == EVERYTHING else 0 < kept <= getattr(selector, "total_tokens", tokens)
        extra["peak_mb"], extra["kept"] = round(took.peak_bytes / 2**20), kept
        extra["first_token_s"], extra["vision_s"], extra["prefill_s"] = first.seconds, took.vision, took.prefill
        if who == "QuoTA":
            scorer = selector.scorer
            extra["scorer_mb"] = round(scorer.megabytes)
            extra["decoupling_s"], extra["scoring_s"] = scorer.decoupling_s, scorer.scoring_s
        shape = f"{name if GPU else f'small {name}'} frames={frames} M={tokens} new tokens={NEW_TOKENS}"
        timed("pixels to answer", shape, who, run, graph=False, calls=3 if took.total < LONG else 1)
