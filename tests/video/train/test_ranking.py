"""Losses that see the order of scores and not their scale, against definitions written with all pairs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qts_video.train.ranking import l1_loss, mean_ranks, rank_loss, recall, soft_ranks, spearman, standardise

TRANSFORMS = {
    "itself": lambda t: t,
    "exp": torch.exp,
    "affine": lambda t: 3 * t - 20,
    "cube": lambda t: t**3,
    "attention weights": lambda t: 1e-5 * t,
    "minute": lambda t: 1e-300 * t,
    "vast": lambda t: 1e200 * t,
}


def numbers(n, seed=0, dtype=torch.float64):
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradient(loss, x, *rest, **options):
    x = x.clone().requires_grad_()
    loss(x, *rest, **options).sum().backward()
    return x.grad


def ranks_by_pairs(x):
    """[N] float64: how many are smaller, ties half."""
    return ((x[None] < x[:, None]).double() + (x[None] == x[:, None]).double() / 2).sum(1) - 0.5


def soft_ranks_by_pairs(x):
    difference = x[:, None] - x[None]
    below = (-difference.abs()).exp() / 2
    return torch.where(difference < 0, below, 1 - below).sum(1) - 0.5


def spearman_by_pairs(x, t):
    a, b = ranks_by_pairs(x), ranks_by_pairs(t)
    a, b = a - a.mean(), b - b.mean()
    return (a * b).sum() / (a.norm() * b.norm())


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_student_that_keeps_the_order_costs_nothing_and_stays(transform):
    teacher = numbers(501)
    student = TRANSFORMS[transform](teacher)
    assert rank_loss(student, teacher).item() == pytest.approx(0, abs=1e-14)
    assert gradient(rank_loss, student, teacher).abs().max() == 0
    assert rank_loss(-student, teacher).item() == pytest.approx(2, abs=1e-14)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_scale_of_the_teacher_changes_nothing(transform):
    teacher, student = numbers(101), numbers(101, 1)
    other = TRANSFORMS[transform](teacher)
    assert torch.equal(rank_loss(student, other), rank_loss(student, teacher))
    assert torch.equal(gradient(rank_loss, student, other), gradient(rank_loss, student, teacher))


def test_the_value_is_spearman_and_random_orders_cost_one():
    teacher, student = numbers(3001), numbers(3001, 1)
    wanted = 1 - spearman_by_pairs(student, teacher)
    torch.testing.assert_close(rank_loss(student, teacher)[0], wanted, rtol=1e-12, atol=0)
    assert abs(wanted - 1) < 0.1


@pytest.mark.parametrize("n", [1, 2, 3, 17, 300])
def test_soft_ranks_are_sums_over_pairs(n):
    for scale in (1e-3, 1.0, 50.0):
        x = scale * numbers(n)
        torch.testing.assert_close(soft_ranks(x), soft_ranks_by_pairs(x), rtol=1e-12, atol=1e-12)
        weights = numbers(n, 3)
        ours = gradient(lambda v, w=weights: soft_ranks(v) * w, x)
        theirs = gradient(lambda v, w=weights: soft_ranks_by_pairs(v) * w, x)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_soft_ranks_survive_scores_far_apart():
    x = torch.tensor([1e6, -1e6, 0.0, 1e6], dtype=torch.float64, requires_grad=True)
    ranks = soft_ranks(x)
    assert ranks.tolist() == pytest.approx([2.5, 0, 1, 2.5], abs=1e-9)  # 1e6 has ten digits behind the point
    ranks.square().sum().backward()
    assert bool(x.grad.isfinite().all())


def test_gradcheck_of_what_is_smooth():
    x = numbers(12).requires_grad_()
    assert torch.autograd.gradcheck(soft_ranks, x)
    assert torch.autograd.gradcheck(standardise, x)
    assert torch.autograd.gradcheck(lambda v: l1_loss(v, numbers(12, 1)), x)


@pytest.mark.parametrize("tied", [False, True])
def test_the_gradient_is_that_of_soft_ranks(tied):
    """Of |R' - T|^2 / (2 |T - m|^2) by the chain rule, with the exact R' - T and soft ranks summed over pairs."""
    n, temperature = 40, 0.3
    student, teacher = numbers(n), numbers(n, 1)
    if tied:
        teacher = teacher.mul(2).round()
    wanted = ranks_by_pairs(teacher)
    same = (teacher[None] == teacher[:, None]).double()
    error = same @ ranks_by_pairs(student) / same.sum(1) - wanted
    norm = (wanted - wanted.mean()).square().sum()

    def surrogate(x):
        z = (x - x.mean()) / x.std(correction=0)
        return (error * soft_ranks_by_pairs(z / temperature)).sum() / norm

    ours = gradient(rank_loss, student, teacher, temperature=temperature)
    torch.testing.assert_close(ours, gradient(surrogate, student), rtol=1e-9, atol=1e-13)
    assert abs(ours.sum()) < 1e-12
    assert abs((ours * student).sum()) < 1e-12  # neither shift nor scale


def test_steps_along_the_gradient_lead_to_the_teachers_order():
    teacher, student = numbers(64), numbers(64, 1).requires_grad_()
    optimizer = torch.optim.Adam([student], lr=0.05)
    for _ in range(300):
        optimizer.zero_grad()
        rank_loss(student, teacher).sum().backward()
        optimizer.step()
    assert spearman(student.detach(), teacher).item() > 0.999


def test_ties_of_the_teacher_carry_no_preference():
    teacher = torch.tensor([0.0, 0, 1, 1, 1, 2], dtype=torch.float64)
    kept = [torch.tensor(order, dtype=torch.float64) for order in ([0, 1, 2, 3, 4, 5], [1, 0, 4, 2, 3, 9])]
    for student in kept:
        assert rank_loss(student, teacher).item() == pytest.approx(0, abs=1e-15)
        assert gradient(rank_loss, student, teacher).abs().max() < 1e-15
    assert rank_loss(torch.tensor([0.0, 2, 1, 3, 4, 5]), teacher).item() > 0.01
    # Beyond its neighbours on both sides at once: ties' mean ranks are right, their order is not.
    astray = torch.tensor([1.0, 2, 0, 5, 3, 4], dtype=torch.float64)
    assert rank_loss(astray, torch.tensor([0.0, 0, 1, 1, 2, 2])).item() > 0.1


@pytest.mark.parametrize("loss", [rank_loss, l1_loss])
@pytest.mark.parametrize("teacher", [[], [3.0], [2.0, 2, 2]])
def test_without_a_preference_nothing_is_lost(loss, teacher):
    student = numbers(len(teacher))
    teacher = torch.tensor(teacher, dtype=torch.float64)
    assert loss(student, teacher).tolist() == [0]
    assert gradient(loss, student, teacher).tolist() == [0] * len(teacher)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30])
def test_a_constant_student_costs_one_and_learns(value):
    student, teacher = torch.full((9,), value, dtype=torch.float64), numbers(9)
    assert rank_loss(student, teacher).item() == pytest.approx(1)
    found = gradient(rank_loss, student, teacher)
    assert bool(found.isfinite().all())
    assert torch.equal((-found).argsort(), teacher.argsort())
    assert bool(gradient(l1_loss, student, teacher).isfinite().all())


@pytest.mark.parametrize("loss", [rank_loss, l1_loss])
def test_segments_are_alone(loss):
    lengths = [5, 0, 1, 30, 2]
    student, teacher = numbers(38), numbers(38, 1)
    borders = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    alone = [loss(x, t)[0] for x, t in zip(student.split(lengths), teacher.split(lengths), strict=True)]
    assert torch.equal(loss(student, teacher, borders), torch.stack(alone))
    grads = [gradient(loss, x, t) for x, t in zip(student.split(lengths), teacher.split(lengths), strict=True)]
    assert torch.equal(gradient(loss, student, teacher, borders), torch.cat(grads))
    assert loss(student[:0], teacher[:0], torch.tensor([0])).shape == (0,)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=2, max_size=30),
    st.integers(0, 100),
)
def test_permutations_and_ties(pairs, seed):
    student, teacher = torch.tensor(pairs, dtype=torch.float64).unbind(1)
    assert torch.equal(mean_ranks(student), ranks_by_pairs(student))
    order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed))
    for loss in (rank_loss, l1_loss):
        torch.testing.assert_close(loss(student[order], teacher[order]), loss(student, teacher), rtol=1e-9, atol=1e-12)
    found, plain = gradient(rank_loss, student[order], teacher[order]), gradient(rank_loss, student, teacher)[order]
    torch.testing.assert_close(found, plain, rtol=1e-7, atol=1e-10)
    value = rank_loss(student, teacher).item()
    assert -1e-12 <= value <= 2 + 1e-12
    strict = teacher[:, None] > teacher[None]
    if len(teacher.unique()) > 1:
        assert (value < 1e-12) == bool((student[:, None] > student[None])[strict].all())
    if len(teacher.unique()) > 1 and len(student.unique()) > 1:
        torch.testing.assert_close(
            spearman(student, teacher)[0], spearman_by_pairs(student, teacher), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("loss", [rank_loss, l1_loss])
def test_bfloat16_loses_nothing_but_its_own_digits(loss):
    student, teacher = numbers(200, 0, torch.bfloat16), numbers(200, 1, torch.bfloat16)
    found = loss(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, loss(student.float(), teacher.float()))
    assert torch.equal(found, loss(student.double(), teacher.double()).float())
    assert gradient(loss, student, teacher).dtype == torch.bfloat16
    assert loss(student.double(), teacher).dtype == torch.float64


def test_two_hundred_thousand_tokens():
    """A matrix of all pairs would have 320 GB."""
    n = 200_000
    student, teacher = numbers(n, 0, torch.float32), numbers(n, 1, torch.float32)
    assert rank_loss(student, teacher).item() == pytest.approx(1, abs=0.02)
    assert bool(gradient(rank_loss, student, teacher).isfinite().all())
    assert rank_loss(teacher.exp().double(), teacher).item() < 1e-9


def test_l1_is_of_standardised_scores():
    student, teacher = numbers(50), numbers(50, 1)
    z = [(x - x.mean()) / x.std(correction=0) for x in (student, teacher)]
    torch.testing.assert_close(l1_loss(student, teacher)[0], (z[0] - z[1]).abs().mean(), rtol=1e-12, atol=0)
    assert l1_loss(7 * teacher - 3, teacher).item() < 1e-14
    assert l1_loss(teacher.exp(), teacher).item() > 0.1
    torch.testing.assert_close(standardise(1e-200 * student), z[0], rtol=1e-12, atol=1e-14)


def test_nan_in_the_student_is_seen():
    student = numbers(5)
    student[2] = torch.nan
    assert bool(rank_loss(student, numbers(5, 1)).isnan())
    assert bool(l1_loss(student, numbers(5, 1)).isnan())


def test_metrics_of_segments():
    student = torch.tensor([5.0, 1, 2, 4, 3, 0, 0, 7])
    teacher = torch.tensor([9.0, 8, 1, 2, 0, 1, 2, 3])
    borders = torch.tensor([0, 5, 7, 8])
    found = spearman(student, teacher, borders)
    torch.testing.assert_close(found[0], spearman_by_pairs(student[:5], teacher[:5]))
    assert bool(found[1:].isnan().all())  # constant, and one token
    assert recall(student, teacher, [2, 1, 0], borders)[:2].tolist() == [0.5, 0]
    assert bool(recall(student, teacher, [2, 1, 0], borders)[2].isnan())
    assert recall(student, teacher, [5, 2, 1], borders).tolist() == [1, 1, 1]
    assert spearman(student[:0], teacher[:0], torch.tensor([0])).shape == (0,)


@pytest.mark.parametrize(
    "student, teacher, borders, message",
    [
        (torch.zeros(2, 2), torch.zeros(4), None, r"student must be \[N\] floating point, got \[2, 2\] torch.float32"),
        (torch.zeros(2), torch.zeros(2).long(), None, r"teacher must be \[N\] floating point, got \[2\] torch.int64"),
        (torch.zeros(2), torch.zeros(3), None, "a score of the teacher for each of the student's 2, got 3"),
        (torch.zeros(2), torch.zeros(2), torch.tensor([0, 1]), r"cu_seqlens must rise from 0 to 2, got \[0, 1\]"),
        (torch.zeros(2), torch.zeros(2), torch.tensor([0, 2, 1, 2]), "cu_seqlens must rise from 0 to 2"),
        (torch.zeros(2), torch.tensor([0, torch.nan]), None, "the teacher's scores hold NaN"),
    ],
)
def test_bad_input(student, teacher, borders, message):
    with pytest.raises(ValueError, match=message):
        rank_loss(student, teacher, borders)


def test_bad_options():
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        rank_loss(torch.zeros(2), torch.zeros(2), temperature=0)
    with pytest.raises(ValueError, match="a count for each of 1 segments, got 2"):
        recall(torch.zeros(2), torch.zeros(2), [1, 1])
    with pytest.raises(ValueError, match=r"a count of 0 .. 2, the tokens of the segment, got 3"):
        recall(torch.zeros(2), torch.zeros(2), [3])
