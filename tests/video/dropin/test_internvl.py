"""What is peculiar to InternVL: frames among images, and tiles that generate() repeats."""

import re
from types import SimpleNamespace
from typing import ClassVar

import pytest
import qts_video
import torch
from qts_video.adapters.internvl import InternVL
from qts_video.adapters.numbered_frames import find_frames
from qts_video.dropin.question import find_question
from tiny import (
    ASSISTANT,
    IM_END,
    IM_START,
    IMAGE,
    NEWLINE,
    SYSTEM,
    USER,
    VISION_END,
    VISION_START,
    Image,
    Keep,
    Video,
    every,
    keep_all,
    prompt,
    user,
)
from tiny_internvl import COLON, DIGITS, FAMILY, FRAME, TILE, build_model, inputs


class Tokenizer:
    """Words with the ids of ``tiny_internvl``; every digit is a token, and a colon takes the space behind it."""

    words: ClassVar = {
        "<|im_start|>": IM_START, "<|im_end|>": IM_END, "<img>": VISION_START, "</img>": VISION_END,
        "<IMG_CONTEXT>": IMAGE, "user": USER, "assistant": ASSISTANT, "system": SYSTEM, "\n": NEWLINE, "Frame": FRAME,
        ": ": COLON, "Image": 482, "-": 483, " ": 484, ":": 485, "what": 30, "is": 31, "this": 32, "and": 33,
    } | {str(value): token for value, token in enumerate(DIGITS)}  # fmt: skip
    pattern = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)))
    unk_token_id = None

    def convert_tokens_to_ids(self, token):
        return self.words.get(token)

    def encode(self, text, add_special_tokens=True):
        assert not add_special_tokens
        pieces = self.pattern.findall(text)
        assert "".join(pieces) == text
        return [self.words[piece] for piece in pieces]

    def decode(self, ids):
        names = {token: word for word, token in self.words.items()}
        return "".join(names.get(token, f"<{token}>") for token in ids)


TOKENIZER = Tokenizer()
TURN = "<|im_end|>\n<|im_start|>user\n"


def encode(text: str) -> torch.Tensor:
    """Ids of ``text``, in which a star is a tile."""
    text = re.sub(r"\*+", lambda stars: f"<img>{'<IMG_CONTEXT>' * TILE * len(stars[0])}</img>", text)
    return torch.tensor(TOKENIZER.encode(text, add_special_tokens=False))


def find(text: str, tokenizer=None, turn_start: int | None = None) -> list[str]:
    """Of each video that is found in ``text``, the label and the numbers of its images, counted from 0."""
    ids = encode(text)
    found = find_frames(ids, IMAGE, TILE, tokenizer, turn_start)
    opened = (ids == VISION_START).nonzero().flatten().tolist()
    return [
        TOKENIZER.decode(ids[video.label : video.starts[0] - 1].tolist())
        + " ".join(str(opened.index(start - 1)) for start in video.starts)
        for video in found
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Frame1: *\nFrame2: *\nwhat", ["Frame1: 0 1"]),
        ("what Frame-1: *\nFrame-2: *", ["Frame-1: 0 1"]),
        ("Frame 0: *\nFrame 1: *", ["Frame 0: 0 1"]),
        ("Frame1:*Frame2:*", ["Frame1:0 1"]),
        ("Frame1 :  *\nFrame2 :  *", ["Frame1 :  0 1"]),
        ("Frame1: *", ["Frame1: 0"]),
        ("Frame9: *\nFrame10: *\nFrame11: *", ["Frame9: 0 1 2"]),
        ("*\nFrame1: *\nFrame2: *\n**\nwhat", ["Frame1: 1 2"]),
        ("Frame1: *\nFrame2: *\n*\nFrame3: *", ["Frame1: 0 1 3"]),
        ("Frame1: *\nwhat is this what is this what is this what is this\nFrame2: *", ["Frame1: 0 1"]),
        ("Frame1: *\nFrame2: *\nFrame1: *\nwhat", ["Frame1: 0 1", "Frame1: 2"]),
        ("Frame1: *\nFrame1: *", ["Frame1: 0", "Frame1: 1"]),
        (f"Frame1: *\nwhat{TURN}Frame2: *", ["Frame1: 0", "Frame2: 1"]),
        ("*\n*\nwhat", []),
        ("Image-1: *\nImage-2: *\nwhat", []),
        ("Frame1 *\nFrame: *\nFrame2: and *", []),
        ("what is this", []),
    ],
)
def test_frames_by_their_labels(text, wanted):
    assert find(text, TOKENIZER, IM_START) == wanted


@pytest.mark.parametrize("text", ["Frame1: **", "Frame1: *\nFrame2: ***"])
def test_a_frame_of_several_tiles_is_refused(text):
    with pytest.raises(ValueError, match=rf"expected {TILE} placeholders behind 'Frame\d: <img>', one tile a frame"):
        find(text, TOKENIZER)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("what\nFrame1: *\nFrame2: *\nwhat", ["\nFrame1: 0 1"]),
        ("what Frame1: *\nFrame2: *\nwhat", ["Frame1: 0 1"]),
        ("Frame8: *\nFrame9: *\nFrame10: *\nFrame11: *", ["Frame8: 0 1 2 3"]),
        ("Frame98: *\nFrame99: *\nFrame100: *\nFrame101: *", ["Frame98: 0 1 2 3"]),
        ("and Frame 1: *\n and Frame 2: *\n and Frame 3: *", ["and Frame 1: 0 1 2"]),
        ("*\nFrame1: *\nFrame2: *\n**\nwhat", ["\nFrame1: 1 2"]),
        ("***Frame1: *\nFrame2: *", ["Frame1: 1 2"]),
        ("Frame1: *\nFrame2: *\nFrame3: *\nFrame1: *\nFrame2: *", ["Frame1: 0 1 2", "\nFrame1: 3 4"]),
        ("Frame1: *\nFrame2: *\nFrame1: *\nwhat", ["Frame1: 0 1"]),  # one frame: nothing to tell it by
        ("Frame1: *\nFrame2: *\nwhat is this Frame3: *\nFrame4: *", ["Frame1: 0 1", "Frame3: 2 3"]),
        ("Frame1: *", []),
        ("Frame1: **\nFrame2: **", []),
        ("*\n*\n*\nwhat", []),
        ("what *\nand *\nwhat", []),
        ("what is *\nwhat is *\nwhat", []),
        ("Frame1: *\nwhat is this what is this\nFrame2: *", []),  # too far apart
        ("Image-1: *\nImage-2: *\nwhat", ["Image-1: 0 1"]),  # what only a tokenizer can tell
        ("what is this", []),
    ],
)
def test_frames_by_structure(text, wanted):
    assert find(text) == wanted


def test_a_turn_ends_a_video():
    text = f"Frame1: *{TURN}Frame2: *"
    assert find(text) == ["Frame1: 0 1"]
    assert find(text, turn_start=IM_START) == []


@pytest.fixture(scope="module")
def model():
    return build_model()


def numbered(*frames: int) -> list[int]:
    """Images that are numbered like frames, but called images."""
    return [token for frame in frames for token in [*encode(f"Image-{frame}: *").tolist(), NEWLINE]]


def test_a_tokenizer_tells_numbered_images_from_frames(model):
    batch = inputs(prompt(user(Image(1), [30])))
    ids = torch.tensor([[IM_START, USER, NEWLINE, *numbered(1, 2), 30, IM_END]])
    pixels = torch.cat([batch["pixel_values"]] * 2)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    for tokenizer, calls in ((None, 1), (TOKENIZER, 0)):
        selector = Keep(every(2))
        with qts_video.attach(model, selector, tokenizer=tokenizer):
            model.generate(**batch, max_new_tokens=2, do_sample=False)
        assert len(selector.calls) == calls


def test_a_video_of_one_frame_needs_a_tokenizer(model):
    batch = inputs(prompt(user(Video(1), [30])), prompt(user([31], Video(1), Image(2), Image(1), [30])))
    for tokenizer, grids in ((None, []), (TOKENIZER, [(1, 2, 2)] * 2)):
        selector = Keep(every(2))
        with qts_video.attach(model, selector, tokenizer=tokenizer), torch.no_grad():
            model(**batch)
        assert [call.grids for call in selector.calls] == ([grids] if grids else [])


def test_spans_of_frames_hold_their_labels_and_tags(model):
    batch = inputs(prompt(user([30], Video(11), Image(1), [31], Video(2))))
    ids, valid = batch["input_ids"], batch["attention_mask"].bool()
    for tokenizer in (None, TOKENIZER):
        layout = InternVL().locate(model, ids, valid, batch, tokenizer)
        assert layout.grids == [(11, 2, 2), (2, 2, 2)]
        for video in layout.frame_spans:
            texts = [TOKENIZER.decode(ids[0, start:stop].tolist()) for start, stop in video.tolist()]
            tile = "<IMG_CONTEXT>" * TILE
            wanted = [f"\nFrame{number + 1}: <img>{tile}</img>" for number in range(len(video))]
            assert texts == [wanted[0][1:], *wanted[1:]]


def test_masked_frames_are_refused(model):
    batch = inputs(*FAMILY.prompts["one"])
    batch["attention_mask"][0, (batch["input_ids"][0] == IMAGE).nonzero()[0]] = 0
    with qts_video.attach(model, Keep(every(2))), pytest.raises(ValueError, match="attention_mask is 0 on video"):
        model(**batch)


def test_the_side_of_a_tile_comes_from_the_config():
    for size, ratio, side in ((448, 0.5, 16), (84, 0.5, 3), (224, 0.25, 4)):
        vision = SimpleNamespace(image_size=[size, size], patch_size=[14, 14])
        config = SimpleNamespace(vision_config=vision, downsample_ratio=ratio)
        assert InternVL().tile_grid(SimpleNamespace(config=config)) == (side, side)


def test_labels_and_tags_are_not_the_question(model):
    batch = inputs(prompt(user(Image(2), [30], Video(3), [31, 32], Video(1), Image(1), [30, 33])))
    selector = Keep(every(2), needs_question=True)
    with qts_video.attach(model, selector, tokenizer=TOKENIZER), torch.no_grad():
        model(**batch)
    assert [ids.tolist() for ids in selector.calls[0].question_ids] == [[30, 31, 32, 30, 33]] * 2


def test_the_official_vocabulary_needs_no_tokenizer():
    """<|im_start|>user\\nFrame1: <img>...</img>\\nFrame2: <img>...</img>\\nWhat?<|im_end|> in InternVL3's ids."""
    vision = SimpleNamespace(image_size=[56, 56], patch_size=[14, 14])
    config = SimpleNamespace(vision_config=vision, downsample_ratio=0.5, image_token_id=151667)
    tiny, adapter = SimpleNamespace(config=config), InternVL()
    frames = [token for number in (16, 17) for token in (4369, number, 25, 220, 151665, *[151667] * 4, 151666, 198)]
    image = [151665, *[151667] * 4, 151666, 198]
    ids = torch.tensor([[151644, 8948, 198, 5, 151645, 198, 151644, 872, 198, *image, *frames, 3838, 30, 151645, 198]])
    layout = adapter.locate(tiny, ids, torch.ones_like(ids, dtype=torch.bool), {}, None)
    assert layout.grids == [(2, 2, 2)]
    markers, vision_ids = adapter.chat_markers(tiny, None), adapter.vision_token_ids(tiny)
    outside = ids[0].masked_fill(layout.in_steps(0), 151667)
    assert ids[0, find_question(outside, markers, vision_ids)].tolist() == [3838, 30]
    config.image_token_id = 5
    assert adapter.chat_markers(tiny, None) is None
    assert adapter.vision_token_ids(tiny) == (5,)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_repeated_samples_keep_the_order_of_their_tiles(model, options):
    batch = inputs(*FAMILY.prompts["several"])
    seen = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
    try:
        with torch.no_grad():
            model(**batch)
            with qts_video.attach(model, Keep(keep_all)):
                model.generate(**batch, max_new_tokens=1, **options)
    finally:
        hook.remove()
    once, repeated = (call["inputs_embeds"] for call in seen)
    assert torch.equal(repeated, once.repeat_interleave(len(repeated) // len(once), 0))


def test_a_question_needs_markers_where_the_vocabulary_is_unknown(model):
    with (
        qts_video.attach(model, Keep(every(2), needs_question=True)),
        pytest.raises(ValueError, match=r"give attach\(..., tokenizer=...\)"),
    ):
        model(**inputs(*FAMILY.prompts["one"]))


def test_another_model_of_this_type_is_refused(model):
    with pytest.raises(TypeError, match="expected an InternVLForConditionalGeneration, got InternVLModel"):
        qts_video.attach(model.model, Keep(every(2)))
