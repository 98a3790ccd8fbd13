"""The whole models of the benchmarks, the small ones: what QuoTA's row runs and tells."""

import pytest
import torch

pytest.importorskip("transformers")

import qts_video
import whole_models
import whole_quota
from qts_video.methods import QuoTA


@pytest.mark.skipif(whole_models.GPU, reason="on a GPU these models have the published sizes")
@pytest.mark.parametrize("family", whole_models.FAMILIES)
def test_quota_decouples_and_scores_in_every_answer(family):
    name, frames = f"{family}-7B", 4
    model = whole_models.build(name, "cpu")
    inputs, processor = whole_models.prompt(name, model, frames), whole_models.processor(name)
    tokens = whole_models.vision_tokens(model, inputs)
    scorer = whole_quota.Scorer(model, processor.tokenizer)
    with qts_video.attach(model, QuoTA(scorer, total_tokens=tokens // 4), tokenizer=processor) as handle:
        handle.question(whole_quota.QUESTION)
        for _ in range(2):
            scorer.bind([whole_models.frames_of(name, frames)])
            assert (scorer.decoupling_s, scorer.scoring_s) == (0, 0)
            answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert answer.shape[1] in (2, inputs["input_ids"].shape[1] + 2)
            assert f"frames are scored by {whole_quota.OBJECT}" in handle.last.notes
            assert min(scorer.decoupling_s, scorer.scoring_s) > 0
        assert 0 < handle.last.kept <= tokens // 4
        assert len(set(scorer.scores.tolist())) == len(scorer.scores) > 1
    assert model.generation_config.eos_token_id is None
    assert not model.get_output_embeddings()._forward_hooks
    assert torch.isfinite(scorer.scores).all()
