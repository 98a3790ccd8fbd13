"""Uniform and Random: exact counts, fixed choices."""

import pytest
import qts_video
import torch
from qts_video.methods import Random, Selector, Uniform
from qts_video.methods.base import Videos, resolve_budget
from tiny import Keep, Video, prompt, user
from tiny_qwen import inputs

from qts_kernels import Selection


def videos(*lengths):
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    grids = [(length, 1, 1) for length in lengths]
    tokens = torch.zeros(sum(lengths), 2)
    return Videos(tokens, cu_seqlens, list(lengths), grids, torch.zeros(sum(lengths)), [0] * len(lengths))


def split(selection: Selection, lengths):
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    bounds = selection.cu_seqlens.tolist()
    return [(selection.indices[a:b] - start).tolist() for a, b, start in zip(bounds, bounds[1:], starts, strict=False)]


METHODS = [Uniform, Random]
LENGTHS = (1, 2, 7, 100, 333, 1000)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "budget", [(None, None), (0.1, None), (0.5, None), (1.0, None), (None, 5), (0.37, 90), (1e-9, None)]
)
def test_counts_are_exact_and_indices_ascending_rows_of_their_video(method, budget):
    selector = method(*budget)
    assert isinstance(selector, Selector)
    assert not selector.needs_question
    selection = selector.select(videos(*LENGTHS))
    assert selection.indices.dtype == torch.int64
    assert selection.cu_seqlens.dtype == torch.int32
    assert selection.tokens is selection.scores is None
    counts = [resolve_budget(length, *budget) for length in LENGTHS]
    assert selection.n.tolist() == counts
    for kept, length, count in zip(split(selection, LENGTHS), LENGTHS, counts, strict=True):
        assert len(kept) == count
        assert kept == sorted(set(kept))
        assert kept[0] >= 0
        assert kept[-1] < length


def test_uniform_takes_the_middle_of_equal_stretches():
    assert split(Uniform(max_tokens=3).select(videos(9, 10)), (9, 10)) == [[1, 4, 7], [1, 5, 8]]
    assert split(Uniform(max_tokens=1).select(videos(7)), (7,)) == [[3]]
    assert split(Uniform(0.5).select(videos(8)), (8,)) == [[1, 3, 5, 7]]


@pytest.mark.parametrize("length", [2**20 + 7, 333])
def test_uniform_gaps_differ_by_one_at_most(length):
    (kept,) = split(Uniform(max_tokens=101).select(videos(length)), (length,))
    gaps = torch.tensor(kept).diff()
    assert gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("method", METHODS)
def test_the_choice_does_not_depend_on_the_rest_of_the_batch_or_on_the_call(method):
    selector = method(0.3)
    (alone,) = split(selector.select(videos(100)), (100,))
    torch.manual_seed(5)
    torch.rand(3)
    for lengths in ((100, 7), (7, 100), (333, 100, 100)):
        for kept, length in zip(split(selector.select(videos(*lengths)), lengths), lengths, strict=True):
            assert length != 100 or kept == alone


def test_random_follows_its_seed_alone_and_leaves_torchs_generator():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    choices = [split(Random(0.3, seed=seed).select(videos(100)), (100,))[0] for seed in (0, 0, 1)]
    assert choices[0] == choices[1] != choices[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_random_budgets_are_nested_and_every_token_is_as_likely():
    small, large = (set(split(Random(r).select(videos(100)), (100,))[0]) for r in (0.2, 0.6))
    assert small < large
    counts = torch.zeros(20)
    for seed in range(400):
        counts[Random(max_tokens=5, seed=seed).select(videos(20)).indices] += 1
    assert counts.min() > 60  # expected 100, standard deviation 8.7
    assert counts.max() < 140


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrong", [{"retention_ratio": 0}, {"retention_ratio": 1.1}, {"max_tokens": 0}])
def test_wrong_budgets_raise(method, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        method(**wrong)


@pytest.mark.parametrize("method", [Uniform(0.25), Random(max_tokens=3, seed=2)])
def test_in_a_model_with_beams(model, method):
    batch = inputs(prompt(user(Video(4), [30])), prompt(user(Video(2), [31], Video(1), [32])))
    options = {"max_new_tokens": 3, "do_sample": False, "num_beams": 3}
    wanted = method.select(videos(24, 12, 6))
    with qts_video.attach(model, method) as handle:
        ours = model.generate(**batch, **options)
    kept = [video.indices.tolist() for video in handle.last.videos]
    assert kept == split(wanted, (24, 12, 6))
    with qts_video.attach(model, Keep(lambda _: list(wanted.indices.split(wanted.n.tolist())))):
        assert torch.equal(model.generate(**batch, **options), ours)
