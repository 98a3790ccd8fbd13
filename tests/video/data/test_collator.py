"""Batches of every family: the prompt of ``qts ask``, the answer and its end, what is learnt, and what is refused."""

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from qts_video import attach, embedded
from qts_video.answer import prepare
from qts_video.data import Collator, Sample
from qts_video.methods import Uniform
from qts_video.video import Video

END = {"llava_next_video": "</s>"}


def video(frames=4, height=56, width=84, fps=2.0, seed=0):
    noise = np.random.default_rng(seed).integers(0, 255, (frames, 3, height, width), np.uint8)
    seconds = [i / fps for i in range(frames)]
    return Video(torch.from_numpy(noise), seconds, fps, list(range(frames)), frames, frames / fps, f"noise{seed}", "")


SAMPLES = [
    Sample(video(), "Where does the red circle go?", " to the left \n", id="one", source="train.jsonl:1"),
    Sample(video(height=84, seed=1), "Which?", "B", choices=("red", "blue")),
    Sample(video(fps=1.0, seed=2), "How many?", "2"),
]


@pytest.fixture(scope="module", params=embedded.MODEL_TYPES)
def family(request):
    """(name, model, processor)"""
    return request.param, *embedded.build(request.param)


def test_learnt_is_the_answer_and_its_end(family):
    name, _, processor = family
    batch = Collator(processor)(SAMPLES)
    assert "seconds_per_step" not in batch
    end = END.get(name, "<|im_end|>")
    for row, sample in enumerate(SAMPLES):
        labels, ids, mask = (batch[key][row] for key in ("labels", "input_ids", "attention_mask"))
        assert processor.tokenizer.decode(labels[labels >= 0]).strip() == sample.answer.strip() + end
        assert labels[labels >= 0][-1] == processor.tokenizer.eos_token_id
        learnt = (labels >= 0).nonzero().squeeze(1)
        assert torch.equal(ids[learnt], labels[learnt])
        # one stretch, the last of what is not padding, which is on the right
        length = int(mask.sum())
        assert learnt.tolist() == list(range(length - len(learnt), length))
        assert mask[:length].all()
        assert set(labels[length:].tolist()) <= {-100}
        alone = prepare(processor, sample.video, sample.prompt)
        assert torch.equal(ids[: length - len(learnt)], alone["input_ids"][0])
    assert {value.dtype for key, value in batch.items() if key.startswith("pixel_values")} == {torch.float32}


def test_a_batch_is_its_samples(family):
    """Logits of a batch are those of the samples alone, and the loss is that of all learnt tokens."""
    _, model, processor = family
    collator = Collator(processor)
    with torch.no_grad():
        together = model(**collator(SAMPLES))
        losses, counts = [], []
        for row, sample in enumerate(SAMPLES):
            batch = collator([sample])
            alone = model(**batch)
            length = batch["input_ids"].shape[1]
            torch.testing.assert_close(together.logits[row, :length], alone.logits[0])
            counts.append(int((batch["labels"] >= 0).sum()))
            losses.append(float(alone.loss) * counts[-1])
    assert float(together.loss) == pytest.approx(sum(losses) / sum(counts), rel=1e-4)


def test_the_loss_with_selection(family):
    _, model, processor = family
    batch = Collator(processor, seconds_per_step=True)(SAMPLES)
    seconds = batch.pop("seconds_per_step", None)
    with torch.no_grad(), attach(model, Uniform(retention_ratio=1.0), tokenizer=processor) as handle:
        kept = model(**batch)
        handle.seconds_per_step(seconds)
        assert torch.equal(model(**batch).logits, kept.logits)
    assert torch.equal(kept.loss, model(**batch).loss)


def test_seconds_for_families_whose_inputs_do_not_say(family):
    name, _, processor = family
    batch = Collator(processor, seconds_per_step=True)(SAMPLES)
    expected = None if name.startswith("qwen") else [0.5, 0.5, 1.0]
    assert batch.get("seconds_per_step") == expected
    if name == "qwen2_5_vl":
        assert batch["second_per_grid_ts"].tolist() == [1, 1, 2]


def test_for_generation(family):
    _, model, processor = family
    collator = Collator(processor, train=False)
    batch = collator(SAMPLES)
    assert "labels" not in batch
    assert batch["attention_mask"][:, -1].all()
    with torch.no_grad():
        together = model.generate(**batch, max_new_tokens=3, do_sample=False, eos_token_id=None)
        for row, sample in enumerate(SAMPLES):
            alone = prepare(processor, sample.video, sample.prompt)
            length = alone["input_ids"].shape[1]
            assert torch.equal(batch["input_ids"][row, -length:], alone["input_ids"][0])
            generated = model.generate(**alone, max_new_tokens=3, do_sample=False, eos_token_id=None)
            assert torch.equal(together[row, -3:], generated[0, -3:])


def test_different_numbers_of_frames(family):
    name, model, processor = family
    samples = [SAMPLES[0], Sample(video(6), "Which?", "A", source="train.jsonl:2")]
    if name.startswith("llava"):
        with pytest.raises(ValueError, match=r"of frames 4 \(train.jsonl:1 \(id one\)\), 6 \(train.jsonl:2\): batch"):
            Collator(processor)(samples)
        return
    with torch.no_grad():
        assert model(**Collator(processor)(samples)).loss.isfinite()


def test_nothing_is_cut(family):
    _, _, processor = family
    length = Collator(processor)(SAMPLES[:1])["input_ids"].shape[1]
    fits = Collator(processor, max_length=length)(SAMPLES[:1])
    assert fits["input_ids"].shape[1] == length
    with pytest.raises(ValueError, match=rf"train.jsonl:1 \(id one\): {length} tokens, .* max_length {length - 1}: "):
        Collator(processor, max_length=length - 1)(SAMPLES[:1])


def test_what_can_not_be_collated(family):
    _, _, processor = family
    with pytest.raises(ValueError, match="at least one sample"):
        Collator(processor)([])
    with pytest.raises(ValueError, match=r"noise0: the answer is empty"):
        Collator(processor)([Sample(video(), "What?", " ")])
    with pytest.raises(ValueError, match="max_length must be at least 1, got 0"):
        Collator(processor, max_length=0)


def test_a_template_that_opens_turns_differently():
    processor = embedded.build_processor()
    processor.chat_template += "{%- if add_generation_prompt -%}<think>{%- endif -%}"
    with pytest.raises(ValueError, match="the chat template must open an answered turn as it opens one to be"):
        Collator(processor)
    Collator(processor, train=False)


def test_the_end_of_a_turn_is_the_template_s():
    """Not the tokenizer's, where the two differ."""
    processor = embedded.build_processor()
    processor.tokenizer.eos_token = "<|endoftext|>"
    labels = Collator(processor)(SAMPLES[:1])["labels"][0]
    assert processor.tokenizer.convert_ids_to_tokens(labels[labels >= 0][-1:])[0] == "<|im_end|>"


@pytest.mark.parametrize("answer", ["Yes.", "(B) a", "éß", "12 s", "\N{NO-BREAK SPACE}x", "a\nb"])
def test_answers_are_spelt_as_the_whole_text_is(answer):
    processor = embedded.build_processor()
    sample = Sample(video(), "What?", answer)
    ids = Collator(processor)([sample])["input_ids"][0]
    text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert torch.equal(torch.tensor(processor.tokenizer.encode(text, add_special_tokens=False)), ids)
    assert text.endswith(f"assistant\n{answer.strip()}<|im_end|>")
