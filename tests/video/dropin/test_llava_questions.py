"""The question in the prompts of LLaVA's chat templates, by tokenizers that split them as the real ones do."""

from types import SimpleNamespace

import pytest
import qts_video
import torch
from qts_video.adapters import ADAPTERS
from qts_video.dropin.question import ChatMarkers, find_question, resolve_text_markers
from qts_video.embedded.tokenizer import build_llama_tokenizer, build_qwen_tokenizer
from tiny import Keep, Video, every, prompt, user
from tiny_llava import NEXT

VISION = ("<image>", "<video>")
ASKED = "Which shape moves?\nThe red circle, or  the star?"
CHATML = (
    "<|im_start|>user <video>\n{}<|im_end|><|im_start|>assistant\n",
    "<|im_start|>user \n{}<|im_end|><|im_start|>assistant\n",
    "<|im_start|>user\n<video>\n{}<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user <image><video>\n{}<|im_end|>",
    "<|im_start|>user {}<video>\n<|im_end|>",
    "<|im_start|>system \nYou are helpful.<|im_end|><|im_start|>user <video>\nWhat?<|im_end|><|im_start|>assistant \nA"
    " star.<|im_end|><|im_start|>user \n{}<|im_end|><|im_start|>assistant\n",
)
VICUNA = (
    "USER: <video>\n{} ASSISTANT:",
    "A chat between a user and an assistant. USER: <image>\n<video>\n{} ASSISTANT:",
    "USER: <video>\nWhat? ASSISTANT: A star. USER: {} ASSISTANT:",
    "USER: <video>\nWhat? ASSISTANT: A star.</s>USER: {} ASSISTANT:",
    "USER: <video>\nWhat? ASSISTANT: A star.\nUSER: {}\nASSISTANT:",
    "USER: <video>\n{}",
)
MISTRAL = ("[INST] <video>\n{} [/INST]", "[INST] <video>\nWhat? [/INST] A star.</s> [INST] {} [/INST]")


@pytest.fixture(scope="module")
def tokenizers():
    return {"qwen": build_qwen_tokenizer(VISION), "llama": build_llama_tokenizer(VISION)}


def question(family, tokenizer, text):
    """The question in ``text``, as tokens; 5 placeholders stand for a video or an image."""
    for token in VISION:
        text = text.replace(token, 5 * token)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    markers = ADAPTERS[family].chat_markers(None, tokenizer)
    return ids[find_question(ids, markers, tokenizer.convert_tokens_to_ids(list(VISION)))]


CASES = [
    *(("llava_onevision", "qwen", template) for template in CHATML),
    *(("llava_next_video", "qwen", template) for template in CHATML),
    *(("llava_next_video", "llama", template) for template in (*VICUNA, *MISTRAL)),
]


@pytest.mark.parametrize(("family", "vocabulary", "template"), CASES)
def test_the_question_and_nothing_of_the_template(tokenizers, family, vocabulary, template):
    tokenizer = tokenizers[vocabulary]
    found = question(family, tokenizer, template.format(ASKED))
    text = tokenizer.decode(found)
    assert text.lstrip(" ") == ASKED  # a space may be merged into the first word
    assert tokenizer.decode(found[:1]).strip()
    assert tokenizer.decode(found[-1:]).strip()


@pytest.mark.parametrize("before", ["", " ", "\n", "A star. "])
def test_markers_in_text_whose_space_the_vocabulary_merges(tokenizers, before):
    tokenizer = tokenizers["qwen"]
    assert tokenizer.encode(" A") != tokenizer.encode(" ") + tokenizer.encode("A")
    markers = resolve_text_markers(tokenizer, opening=("AQ:",), closing=("AA:",), blanks=(" ", "\n"))
    ids = torch.tensor(tokenizer.encode(f"{before}AQ: {ASKED} AA:"))
    assert tokenizer.decode(ids[find_question(ids, markers, ())]).lstrip(" ") == ASKED


@pytest.mark.parametrize(("family", "vocabulary"), [("llava_onevision", "qwen"), ("llava_next_video", "llama")])
def test_no_turn_and_no_text_raise(tokenizers, family, vocabulary):
    with pytest.raises(ValueError, match="no user turn"):
        question(family, tokenizers[vocabulary], f"<video>\n{ASKED}")
    empty = {"qwen": CHATML, "llama": VICUNA}[vocabulary][0].format(" \n")
    with pytest.raises(ValueError, match="holds no text"):
        question(family, tokenizers[vocabulary], empty)


def test_a_tokenizer_without_the_markers_raises(tokenizers):
    with pytest.raises(ValueError, match=r"no chat marker '<\|im_start\|>'"):
        ADAPTERS["llava_onevision"].chat_markers(None, tokenizers["llama"])


def test_the_official_vocabulary_without_a_tokenizer():
    """The prompt that transformers' own tests expect of LLaVA-OneVision's template: "What is shown in this video?"."""
    model = SimpleNamespace(config=SimpleNamespace(image_token_id=151646, video_token_id=151647))
    adapter = ADAPTERS["llava_onevision"]
    markers = adapter.chat_markers(model, None)
    asked = [3838, 374, 6839, 304, 419, 2766, 30]
    ids = torch.tensor([151644, 872, 220, *[151647] * 4, 198, *asked, 151645, 151644, 77091, 198])
    assert ids[find_question(ids, markers, adapter.vision_token_ids(model))].tolist() == asked
    ids = torch.cat([ids, torch.tensor([5, 151645, 151644, 872, 715, 3838, 198, 30, 151645, 151644, 77091, 198])])
    assert ids[find_question(ids, markers, adapter.vision_token_ids(model))].tolist() == [3838, 198, 30]
    model.config.image_token_id = 5
    assert adapter.chat_markers(model, None) is None
    assert ADAPTERS["llava_next_video"].chat_markers(model, None) is None


def test_without_either_the_question_must_be_given():
    model, batch = NEXT.build_model(), NEXT.inputs(prompt(user(Video(2), [30])))
    with qts_video.attach(model, Keep(every(2), needs_question=True)) as handle, torch.no_grad():
        with pytest.raises(ValueError, match=r"tokenizer=.*handle\.question"):
            model(**batch)
        handle.question([7])
        model(**batch)


def test_markers_of_several_tokens():
    """The last opening that is there, read as long as it goes; the first closing behind it."""
    markers = ChatMarkers(opening=((1, 2), (1, 2, 3), (9,)), closing=((4, 5), (6,)), blanks=(3,))
    found = [
        ([1, 2, 3, 7, 8, 4, 5], [7, 8]),
        ([1, 2, 7, 1, 2, 8, 4, 6], [8, 4]),
        ([9, 7, 6, 1, 2, 3, 3, 8, 3, 7, 3, 4, 5, 6], [8, 3, 7]),
        ([1, 2, 7, 6, 9, 8], [8]),
        ([1, 2, 3, 0, 0, 3, 7, 3, 0, 3, 8, 4, 4, 5], [7, 8, 4]),
        ([1, 2, 7, 4], [7, 4]),
    ]
    for ids, wanted in found:
        ids = torch.tensor(ids)
        assert ids[find_question(ids, markers, (0,))].tolist() == wanted
    for ids in ([], [1], [4, 5], [2, 1, 3]):
        with pytest.raises(ValueError, match="no user turn"):
            find_question(torch.tensor(ids, dtype=torch.int64), markers, (0,))
    for ids in ([1, 2], [1, 2, 3, 0, 3, 4, 5, 7], [9, 6, 7]):
        with pytest.raises(ValueError, match="holds no text"):
            find_question(torch.tensor(ids), markers, (0,))
