"""The fast ways of the training give what the processor and the model give."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from qts_video.answer import prepare
from qts_video.miniworld.evaluate import as_video
from qts_video.miniworld.forward import answer_states, encode_steps, normalise
from qts_video.miniworld.model import build_model, build_processor
from qts_video.miniworld.packing import BLOCK, PREFIX, Packer, patchify
from qts_video.miniworld.questions import KINDS, sample_questions
from qts_video.miniworld.render import render
from qts_video.miniworld.tokenizer import answers
from qts_video.miniworld.world import CELLS, sample_scene

from qts_kernels.testing import assert_within_budget

SECONDS, ASKED = 7, 5
TOKENS = SECONDS * CELLS**2


@pytest.fixture(scope="module")
def world():
    processor = build_processor()
    return processor, build_model(processor).eval()


@pytest.fixture(scope="module")
def packed(world):
    """Two whole films: (scenes, questions, batch, patches [B, S, patches, values])."""
    scenes = [sample_scene("validation", number, SECONDS) for number in range(2)]
    questions = [sample_questions(scene, ASKED, dict.fromkeys(KINDS, 1.0)) for scene in scenes]
    behind = np.array([[False] * ASKED, [False] * ASKED])
    batch = Packer(world[0]).pack_text([SECONDS, SECONDS], TOKENS, questions, behind)
    place = np.stack(np.unravel_index(np.arange(TOKENS), (SECONDS, CELLS, CELLS)))
    batch.positions[:, :, PREFIX : PREFIX + TOKENS] = PREFIX + torch.from_numpy(place)[:, None]
    return scenes, questions, batch, torch.stack([patchify(render(scene)) for scene in scenes])


def test_pixels_and_ids_are_the_processors(world, packed):
    processor, _ = world
    scenes, questions, batch, patches = packed
    for sample, scene in enumerate(scenes):
        for number, question in enumerate(questions[sample]):
            prompt = prepare(processor, as_video(scene), question.text)
            assert prompt["second_per_grid_ts"] == torch.tensor([1.0])
            pixels = normalise(patches[sample], processor).flatten(0, 1)
            torch.testing.assert_close(pixels, prompt["pixel_values_videos"], rtol=0, atol=1e-6)
            start = PREFIX + TOKENS
            block = batch.ids[sample, start + number * BLOCK : batch.ask[sample, number] + 1]
            assert torch.equal(torch.cat([batch.ids[sample, :start], block]), prompt["input_ids"][0])
            assert processor.tokenizer.decode([int(batch.answers[sample, number])]) == question.answer


def test_answers_are_one_word_that_the_tokenizer_knows(world):
    tokenizer = world[0].tokenizer
    ids = [tokenizer.encode(word, add_special_tokens=False) for word in answers()]
    assert all(len(one) == 1 for one in ids)
    assert tokenizer.unk_token_id not in {token for one in ids for token in one}
    assert tokenizer.encode("<|im_start|>user\n") == tokenizer.encode("<|im_start|>user")
    assert tokenizer.encode("WHICH Colour?") == tokenizer.encode("which colour ?")
    assert tokenizer.encode("zebra") == [tokenizer.unk_token_id]


def test_states_are_those_of_each_question_alone(world, packed):
    """In float64 the two ways differ by rounding alone, and in float32 by no more than eager's own rounding."""
    processor, model = world
    scenes, questions, batch, patches = packed
    wide = build_model(processor).double().eval()
    tokens = encode_steps(model.model.visual, normalise(patches, processor).flatten(0, 1)).reshape(2, -1, 128)
    exact = encode_steps(wide.model.visual, normalise(patches, processor).double().flatten(0, 1))
    with torch.no_grad():
        logits = model.lm_head(answer_states(model, batch, tokens, torch.float32))[:, :, 0]
        exact = wide.lm_head(answer_states(wide, batch, exact.reshape(2, -1, 128), torch.float64))[:, :, 0]
        for sample, scene in enumerate(scenes):
            for number, question in enumerate(questions[sample]):
                prompt = prepare(processor, as_video(scene), question.text)
                eager = model(**prompt).logits[0, -1]
                prompt["pixel_values_videos"] = prompt["pixel_values_videos"].double()
                reference = wide(**prompt).logits[0, -1]
                torch.testing.assert_close(exact[sample, number], reference, rtol=0, atol=1e-5)
                assert_within_budget(logits[sample, number], eager, reference, atol=1e-5)


def test_no_question_sees_another(world, packed):
    _, model = world
    _scenes, _questions, batch, _patches = packed
    tokens = torch.randn(2, TOKENS, 128)
    with torch.no_grad():
        states = answer_states(model, batch, tokens, torch.float32)
        start = PREFIX + TOKENS
        batch.ids[:, start : start + BLOCK] = batch.ids[:, start : start + BLOCK].flip(-1)
        again = answer_states(model, batch, tokens, torch.float32)
        batch.ids[:, start : start + BLOCK] = batch.ids[:, start : start + BLOCK].flip(-1)
    assert torch.equal(states[:, 1:], again[:, 1:])
    assert not torch.allclose(states[:, 0], again[:, 0])
