"""Every wrong selection raises before the decoder runs, and says what was expected."""

import pytest
import qts_video
import torch
from tiny import HIDDEN, Keep, Video, every, keep_all, prompt, user
from tiny_qwen import inputs

from qts_kernels import Selection

BATCH = inputs(prompt(user(Video(2), [30], Video(1), [31])))  # 12 and 6 tokens


class Returns:
    name, needs_question = "wrong", False

    def __init__(self, indices, cu_seqlens, **fields):
        self.selection = Selection(indices, cu_seqlens, **fields)

    def select(self, videos):
        return self.selection


def ints(*values):
    return torch.tensor(values)


def cu(*values):
    return torch.tensor(values, dtype=torch.int32)


GOOD = (ints(0, 5, 12, 17), cu(0, 2, 4))
CASES = {
    "indices that fall": (ints(5, 0, 12, 17), GOOD[1], {}, ValueError, "strictly ascending"),
    "an index twice": (ints(5, 5, 12, 17), GOOD[1], {}, ValueError, "strictly ascending"),
    "an index behind the end": (ints(0, 5, 12, 18), GOOD[1], {}, ValueError, "own segment"),
    "a negative index": (ints(-1, 5, 12, 17), GOOD[1], {}, ValueError, "own segment"),
    "another video's index": (ints(0, 12, 13, 17), GOOD[1], {}, ValueError, "own segment"),
    "a tail that is not -1": (ints(0, 5, 12, 17), cu(0, 2, 3), {}, ValueError, "behind cu_seqlens.* must be -1"),
    "too large offsets": (GOOD[0], cu(0, 2, 5), {}, ValueError, "at most 4"),
    "falling offsets": (GOOD[0], cu(0, 3, 2), {}, ValueError, "rise from 0"),
    "offsets from 1": (GOOD[0], cu(1, 2, 4), {}, ValueError, "rise from 0"),
    "too few offsets": (GOOD[0], cu(0, 4), {}, ValueError, r"cu_seqlens must have shape \[3\], got \[2\]"),
    "nothing": (ints(), cu(0, 0, 0), {}, ValueError, "selected none of 18 video tokens"),
    "int32 indices": (GOOD[0].int(), GOOD[1], {}, TypeError, "indices must be a tensor of torch.int64"),
    "int64 offsets": (GOOD[0], GOOD[1].long(), {}, TypeError, "cu_seqlens must be a tensor of torch.int32"),
    "indices of two axes": (GOOD[0][None], GOOD[1], {}, ValueError, r"shape \['N'\], got \[1, 4\]"),
    "float32 tokens": (
        *GOOD,
        {"tokens": torch.zeros(4, HIDDEN)},
        TypeError,
        "tokens must be a tensor of torch.float64",
    ),
    "too few tokens": (*GOOD, {"tokens": torch.zeros(3, HIDDEN).double()}, ValueError, rf"shape \[4, {HIDDEN}\]"),
    "narrow tokens": (*GOOD, {"tokens": torch.zeros(4, 8).double()}, ValueError, rf"shape \[4, {HIDDEN}\]"),
    "too few scores": (*GOOD, {"scores": torch.zeros(4)}, ValueError, "one entry for each of 18 tokens"),
    "indices elsewhere": (GOOD[0].to("meta"), GOOD[1], {}, ValueError, "on cpu, where the tokens are, got meta"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_wrong_selection_raises(model, case):
    indices, cu_seqlens, fields, error, message = CASES[case]
    if indices.numel() == 0:
        indices = indices.long()
    selector, message = Returns(indices, cu_seqlens, **fields), f"wrong: .*{message}"
    with qts_video.attach(model, selector), torch.no_grad(), pytest.raises(error, match=message):
        model(**BATCH)


def test_the_good_one_passes_and_so_does_a_video_without_a_token(model):
    with torch.no_grad():
        with qts_video.attach(model, Returns(*GOOD)) as handle:
            model(**BATCH)
            assert [video.kept for video in handle.last.videos] == [2, 2]
        with qts_video.attach(model, Returns(ints(0, 5, -1), cu(0, 2, 2))) as handle:
            model(**BATCH)
            assert [video.kept for video in handle.last.videos] == [2, 0]
        with qts_video.attach(model, Returns(ints(12, -1), cu(0, 0, 1))) as handle:
            model(**BATCH)
            assert [video.kept for video in handle.last.videos] == [0, 1]


@pytest.mark.parametrize("case", CASES)
def test_it_raises_the_same_where_steps_are_dropped(model, case):
    indices, cu_seqlens, fields, error, message = CASES[case]
    selector = Returns(indices.long() if indices.numel() == 0 else indices, cu_seqlens, **fields)
    selector.drops_empty_steps = True
    with qts_video.attach(model, selector), torch.no_grad(), pytest.raises(error, match=f"wrong: .*{message}"):
        model(**BATCH)


def test_something_else_than_a_selection_raises(model):
    selector = Keep(keep_all)
    selector.select = lambda videos: torch.arange(3)
    with qts_video.attach(model, selector), torch.no_grad(), pytest.raises(TypeError, match="must return a Selection"):
        model(**BATCH)


@pytest.mark.parametrize("drops", [False, True])
def test_counts_are_read_in_one_synchronisation(model, monkeypatch, drops):
    """All that the host learns of a selection, it learns in one transfer; which time steps keep a token, too."""
    reads = []
    for name in ("tolist", "item", "__bool__", "__int__", "cpu", "numpy", "__index__", "__float__", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self, *args, _name=name, _original=original, **kwargs):
            # A subclass's methods are entered twice, the second time with the override switched off.
            if getattr(self, "from_selector", False) and torch._C._is_torch_function_enabled():
                reads.append(_name)
            return _original(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)

    class Tracked(torch.Tensor):
        """Whatever is computed from a selection stays tracked."""

        from_selector = True

    def choose(videos):
        return every(2)(videos)

    selector = Keep(choose)
    selector.drops_empty_steps = drops
    select = selector.select

    def tracked(videos):
        selection = select(videos)
        return Selection(selection.indices.as_subclass(Tracked), selection.cu_seqlens.as_subclass(Tracked))

    selector.select = tracked
    with qts_video.attach(model, selector), torch.no_grad():
        hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: reads.append("decoder"))
        model(**BATCH)
        hook.remove()
    assert reads[: reads.index("decoder")] == ["tolist"]
