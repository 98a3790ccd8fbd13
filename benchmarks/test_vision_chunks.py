"""A long film through the vision tower a few frames at a time, against all at once: time and peak memory."""

import pytest
import qts_video
import torch
import whole_models
from qts_video.measure import measure
from qts_video.methods import Uniform

GPU = torch.cuda.is_available()
FRAMES, CHUNK = (512, 32) if GPU else (96, 8)


@pytest.fixture(scope="module", params=whole_models.names())
def loaded(request, device):
    model = whole_models.build(request.param, device)
    yield request.param, model, whole_models.prompt(request.param, model, FRAMES)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize("who", ["qts_kernels", "all frames at once"])
@torch.inference_mode()
def test_vision_chunks(timed, loaded, benchmark, who):
    """One prefill of a tenth of the tokens, so that the vision tower is most of it."""
    name, model, inputs = loaded

    def run(frames):
        with qts_video.attach(model, Uniform(retention_ratio=0.1), vision_chunk_frames=frames):
            return model(**inputs, logits_to_keep=1).logits

    assert torch.equal(run(CHUNK).argmax(-1), run(None).argmax(-1))
    frames = CHUNK if who == "qts_kernels" else None
    with measure(model) as took:
        run(frames)
    benchmark.extra_info["peak_mb"] = round(took.peak_bytes / 2**20)
    benchmark.extra_info["vision_s"], benchmark.extra_info["prefill_s"] = took.vision, took.prefill
    shape = f"{name if GPU else f'small {name}'} frames={FRAMES} chunk={CHUNK}"
    timed("vision tower in chunks", shape, who, lambda: run(frames), graph=False, seconds=1.0)
