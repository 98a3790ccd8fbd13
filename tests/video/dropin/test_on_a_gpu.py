"""On a GPU every family selects what it selects on the CPU, and answers the same."""

import copy

import pytest
import qts_video
import torch
from families import FAMILIES
from qts_video.methods import Chain, FlexSelect, QuoTA, Uniform

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:training-free FlexSelect"),
]


class Ramp:
    """Scores 0, 1, 2, 0, 1, 2, ... of the time steps."""

    def score(self, videos):
        return (torch.arange(sum(t for t, _, _ in videos.grids)).float() % 3).to(videos.tokens.device)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Uniform(0.4),
        lambda: FlexSelect(layer=1, retention_ratio=0.4),
        lambda: QuoTA(Ramp(), total_tokens=9),
        lambda: QuoTA(Ramp(), total_tokens=9, mode="merge"),
        lambda: Chain([QuoTA(Ramp(), total_tokens=11), FlexSelect(layer=1, retention_ratio=0.5)]),
    ],
    ids=["uniform", "flexselect", "quota", "quota merge", "chain"],
)
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_same_tokens_and_logits_as_on_the_cpu(family, make):
    model, batch = family.build_model(), family.inputs(*family.prompts["several"])
    there = copy.deepcopy(model).cuda()
    moved = {name: value.cuda() for name, value in batch.items()}
    kept, logits = [], []
    for on, inputs in ((model, batch), (there, moved)):
        with qts_video.attach(on, make()) as handle, torch.no_grad():
            logits.append(on(**inputs).logits.cpu())
            kept.append([video.indices for video in handle.last.videos])
    assert all(map(torch.equal, *kept))
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-8)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_bfloat16_generates_and_a_second_question_encodes_nothing(family):
    model = family.build_model().to("cuda", torch.bfloat16)
    batch = {name: value.cuda() for name, value in family.inputs(*family.prompts["one"]).items()}
    cache = qts_video.VideoCache()
    with qts_video.attach(model, FlexSelect(layer=1, max_tokens=6), cache=cache):
        first = model.generate(**batch, max_new_tokens=3, do_sample=False)
        second = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert (cache.misses, cache.hits) == (1, 1)
    assert torch.equal(first, second)
