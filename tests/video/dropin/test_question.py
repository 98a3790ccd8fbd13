"""The question is the text of the last user turn, or what the user says it is."""

import re
from typing import ClassVar

import pytest
import qts_video
import torch
from qts_video.adapters import ADAPTERS
from qts_video.dropin.question import ChatMarkers, find_question, read_question, resolve_markers
from tiny import (
    ASSISTANT,
    IM_END,
    IM_START,
    NEWLINE,
    SYSTEM,
    USER,
    VISION_END,
    VISION_START,
    Image,
    Keep,
    Video,
    assistant,
    every,
    prompt,
    user,
)
from tiny_qwen import inputs


class Tokenizer:
    """Words with fixed ids; like Qwen2's, it merges two newlines into one token."""

    words: ClassVar = {
        "<|im_start|>": IM_START, "<|im_end|>": IM_END, "user": USER, "assistant": ASSISTANT, "system": SYSTEM,
        "\n": NEWLINE, "\n\n": 510, "what": 30, "is": 31, "this": 32,
    }  # fmt: skip
    unk_token_id = None

    def convert_tokens_to_ids(self, token):
        return self.words.get(token)

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        longest_first = sorted(self.words, key=len, reverse=True)
        return [self.words[word] for word in re.findall("|".join(map(re.escape, longest_first)), text)]

    def decode(self, ids):
        names = {token: word for word, token in self.words.items()}
        return "".join(names.get(token, f"<{token}>") for token in ids)


class Processor:
    tokenizer = Tokenizer()


def found(model, batch, tokenizer=None, setup=lambda handle: None):
    """The question of every video, as ids and as embeddings."""
    selector = Keep(every(2), needs_question=True)
    with qts_video.attach(model, selector, tokenizer=tokenizer or Tokenizer()) as handle, torch.no_grad():
        setup(handle)
        model(**batch)
    (videos,) = selector.calls
    assert videos.cu_seqlens_question.dtype == torch.int32
    lengths = videos.cu_seqlens_question.diff().tolist()
    assert [len(ids) for ids in videos.question_ids] == lengths
    wanted = model.get_input_embeddings().weight[torch.cat(videos.question_ids)]
    assert torch.equal(videos.question, wanted)
    return [ids.tolist() for ids in videos.question_ids]


def test_text_on_both_sides_of_the_vision_and_no_template_token(model):
    batch = inputs(prompt(user([28, 29], Video(2), [30, 31], Image(), [32])))
    assert found(model, batch) == [[28, 29, 30, 31, 32]]


def test_the_last_of_several_user_turns(model):
    turns = (user(Video(2), [30]), assistant(40, 41), user([31]), assistant(42), user([33, 34]))
    assert found(model, inputs(prompt(*turns))) == [[33, 34]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_every_video_has_its_own_samples_question_despite_padding(model, side):
    batch = inputs(
        prompt(user(Video(2), [30])),
        prompt(user([35], Video(1), Video(3), [31, 32], Image())),
        prompt(user([36])),
        prompt(user(Video(1), [33, 34])),
        side=side,
    )
    assert found(model, batch) == [[30], [35, 31, 32], [35, 31, 32], [33, 34]]


def test_an_unfinished_turn_and_a_missing_newline(model):
    ids = [[IM_START, USER], Video(2), [30, 31]]  # no newline, no end of the turn
    assert found(model, inputs(ids)) == [[30, 31]]


def test_a_processor_is_taken_for_its_tokenizer(model):
    assert found(model, inputs(prompt(user(Video(2), [30]))), tokenizer=Processor()) == [[30]]


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("what is this", [[30, 31, 32]] * 3),
        ([7, 8], [[7, 8]] * 3),
        (torch.tensor([7, 8]), [[7, 8]] * 3),
        (["what", "is this"], [[30], [31, 32], [31, 32]]),
        ([[7], [8, 9]], [[7], [8, 9], [8, 9]]),
        (torch.tensor([[7, 6], [8, 9]]), [[7, 6], [8, 9], [8, 9]]),
        ([torch.tensor([7]), "this"], [[7], [32], [32]]),
    ],
)
def test_a_given_question(model, given, wanted):
    batch = inputs(prompt(user(Video(2), [33])), prompt(user(Video(1), Video(1), [34])))
    assert found(model, batch, setup=lambda handle: handle.question(given)) == wanted


def test_a_given_question_lasts_until_it_is_taken_back(model):
    batch = inputs(prompt(user(Video(2), [33])))
    selector = Keep(every(2), needs_question=True)
    with qts_video.attach(model, selector, tokenizer=Tokenizer()) as handle, torch.no_grad():
        for question in ([7, 8], None):
            handle.question(question)
            model(**batch)
            model(**batch)
    assert [call.question_ids[0].tolist() for call in selector.calls] == [[7, 8], [7, 8], [33], [33]]


def test_given_questions_follow_their_samples_through_beams(model):
    batch = inputs(prompt(user(Video(2), [33])), prompt(user(Video(1), Video(1), [34])))
    selector = Keep(
        lambda videos: [torch.tensor([int(start)]) for start in videos.cu_seqlens[:-1]], needs_question=True
    )
    with qts_video.attach(model, selector) as handle:
        handle.question([[7], [8, 9]])
        model.generate(**batch, max_new_tokens=2, num_beams=2, do_sample=False)
    assert [ids.tolist() for ids in selector.calls[0].question_ids] == [[7], [8, 9], [8, 9]]


def test_wrong_questions_raise(model):
    batch = inputs(prompt(user(Video(2), [33])))
    with qts_video.attach(model, Keep(every(2), needs_question=True)) as handle, torch.no_grad():
        with pytest.raises(ValueError, match=r"as text needs attach\(\.\.\., tokenizer"):
            handle.question("what")
        for empty in ([], [[]], torch.tensor([], dtype=torch.int64)):
            with pytest.raises(ValueError, match="at least one token"):
                handle.question(empty)
        with pytest.raises(TypeError, match="integers"):
            handle.question(torch.tensor([0.5]))
        with pytest.raises(TypeError, match="text, token ids"):
            handle.question(7)
        handle.question([[1], [2]])
        with pytest.raises(ValueError, match="2 questions were given for a batch of 1"):
            model(**batch)


def test_without_a_tokenizer_another_vocabulary_needs_one(model):
    batch = inputs(prompt(user(Video(2), [33])))
    with qts_video.attach(model, Keep(every(2), needs_question=True)) as handle, torch.no_grad():
        with pytest.raises(ValueError, match=r"tokenizer=.*handle\.question"):
            model(**batch)
        handle.question([7])
        model(**batch)


def test_the_question_is_not_looked_for_where_it_is_not_needed(model):
    selector = Keep(every(2))
    with qts_video.attach(model, selector), torch.no_grad():
        model(**inputs([[40], Video(2), [41]]))  # no chat template at all
    assert selector.calls[0].question is None


def test_no_user_turn_and_an_empty_one_raise(model):
    with qts_video.attach(model, Keep(every(2), needs_question=True), tokenizer=Tokenizer()), torch.no_grad():
        with pytest.raises(ValueError, match="no user turn"):
            model(**inputs([[40], Video(2), [41]]))
        with pytest.raises(ValueError, match="holds no text"):
            model(**inputs(prompt(user([30]), assistant(31), user(Video(2)))))


def test_a_tokenizer_without_the_markers_raises(model):
    class Other(Tokenizer):
        words: ClassVar = {word: number for word, number in Tokenizer.words.items() if word != "<|im_end|>"}

    with pytest.raises(ValueError, match=r"no chat marker '<\|im_end\|>'"):
        qts_video.attach(model, Keep(every(2)), tokenizer=Other())


def test_markers_of_the_official_vocabulary_without_a_tokenizer():
    """The ids of Qwen2's published vocabulary: <|im_start|>user\\n ... <|im_end|>."""

    class Model:
        class config:
            vision_start_token_id, vision_end_token_id, image_token_id, video_token_id = 151652, 151653, 151655, 151656

    markers = ADAPTERS["qwen2_5_vl"].chat_markers(Model, None)
    assert markers == ChatMarkers(opening=((151644, 872, 198), (151644, 872)), closing=((151645,),))
    ids = torch.tensor(
        [151644, 8948, 198, 5, 151645, 198, 151644, 872, 198, 151652, 151656, 151653, 3838, 30, 151645, 198]
    )
    assert ids[find_question(ids, markers, ADAPTERS["qwen2_5_vl"].vision_token_ids(Model))].tolist() == [3838, 30]
    Model.config.video_token_id = 5
    assert ADAPTERS["qwen2_5_vl"].chat_markers(Model, None) is None


def test_markers_where_the_vocabulary_merges_the_role_with_the_newline():
    class Merging(Tokenizer):
        def encode(self, text, add_special_tokens=True):
            return [IM_START, 77] if text == "<|im_start|>user\n" else super().encode(text, add_special_tokens)

    markers = resolve_markers(Merging(), turn_start="<|im_start|>", user="user", newline="\n", turn_end="<|im_end|>")
    assert markers.opening == ((IM_START, 77), (IM_START, USER))
    assert find_question(torch.tensor([IM_START, 77, 5, IM_END]), markers, ()).tolist() == [2]


def test_a_turn_start_in_the_last_columns_is_no_match():
    markers = ChatMarkers(((IM_START, USER, NEWLINE), (IM_START, USER)), ((IM_END,),))
    ids = torch.tensor([IM_START, USER, NEWLINE, VISION_START, VISION_END, 5, IM_END, IM_START])
    assert ids[find_question(ids, markers, (VISION_START, VISION_END))].tolist() == [5]
    with pytest.raises(ValueError, match="no user turn"):
        find_question(torch.tensor([IM_START]), markers, ())


def test_reading_a_question_copies_no_text_template():
    assert [ids.tolist() for ids in read_question("what is", Tokenizer())] == [[30, 31]]
