"""What a sample gets does not depend on its batch, on padding, or on the layout."""

import pytest
import torch
from selector_oracle import make_selector, select_one

from qts_kernels.testing import poisoned_memory, ragged_cu_seqlens

VISION, QUESTION = [37, 1, 64, 20], [5, 3, 1, 8]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def draw(lengths, seed, width=48):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, width, generator=generator) for length in lengths]


@pytest.fixture(scope="module", params=[{"scoring_layers": 1}, {"scoring_layers": 2, "reencode_layers": 2}], ids=str)
def module(request):
    return make_selector(**request.param)


@pytest.fixture(scope="module")
def samples():
    seconds = [torch.linspace(0, 90, length) for length in VISION]
    return list(zip(draw(VISION, 1), draw(QUESTION, 2), seconds, strict=True))


def packed(module, samples, **options):
    x, question, seconds = (torch.cat(parts) for parts in zip(*samples, strict=True))
    return module(
        x,
        question,
        timestamps=seconds,
        cu_seqlens=ragged_cu_seqlens([len(s[0]) for s in samples]),
        cu_seqlens_question=ragged_cu_seqlens([len(s[1]) for s in samples]),
        **options,
    )


def padded(samples, side, fill):
    """Dense x, question, seconds and the two masks, padded on one side or, in the middle, with holes."""
    out = []
    for part in range(3):
        rows = [s[part] for s in samples]
        width = max(len(r) for r in rows) + 3
        dense = torch.full((len(rows), width, *rows[0].shape[1:]), fill)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for i, r in enumerate(rows):
            free = torch.arange(width)
            place = {"left": free[width - len(r) :], "right": free[: len(r)]}.get(side)
            if place is None:
                place = torch.randperm(width, generator=torch.Generator().manual_seed(i + 10 * (part % 2)))[: len(r)]
                place = place.sort().values
            dense[i, place], mask[i, place] = r, True
        out.append((dense, mask))
    (x, vision_mask), (question, question_mask), (_, _) = out
    seconds = torch.full(vision_mask.shape, 0.0)
    for i, s in enumerate(samples):
        seconds[i, vision_mask[i]] = s[2]
    return x, question, seconds, vision_mask, question_mask


def check_against_oracle(module, samples, out, locate):
    """``locate(s, indices)``: the segment's own row numbers."""
    for s, (x, question, seconds) in enumerate(samples):
        expected = select_one(module.double(), x.double(), question.double(), seconds)
        rows = slice(int(out.cu_seqlens[s]), int(out.cu_seqlens[s + 1]))
        assert int(out.n[s]) == expected.n
        assert torch.equal(locate(s, out.indices[rows]), expected.indices)
        torch.testing.assert_close(out.rho[s].double(), expected.rho, **CLOSE)
        torch.testing.assert_close(out.entropy[s].double(), expected.entropy, **CLOSE)
        torch.testing.assert_close(out.tokens[rows].double(), expected.tokens, rtol=1e-4, atol=1e-4)
    module.float()


@torch.no_grad()
def test_packed_against_the_oracle(module, samples):
    with poisoned_memory():
        out = packed(module, samples)
    start = ragged_cu_seqlens(VISION)
    assert out.tokens.shape == (int(out.n.sum()), 48)
    assert out.scores.shape == (sum(VISION),)
    check_against_oracle(module, samples, out, lambda s, i: i - start[s])


@torch.no_grad()
@pytest.mark.parametrize("fill", [7.0, float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("side", ["left", "right", "anywhere"])
def test_padding_changes_nothing(module, samples, side, fill):
    x, question, seconds, vision_mask, question_mask = padded(samples, side, fill)
    with poisoned_memory():
        out = module(x, question, timestamps=seconds, vision_mask=vision_mask, question_mask=question_mask)
    reference = packed(module, samples)
    assert torch.equal(out.indices, vision_mask.flatten().nonzero()[:, 0][reference.indices])
    assert torch.equal(out.cu_seqlens, reference.cu_seqlens)
    assert (out.scores[~vision_mask] == 0).all()
    torch.testing.assert_close(out.scores[vision_mask], reference.scores, **CLOSE)
    torch.testing.assert_close(out.rho, reference.rho, **CLOSE)
    torch.testing.assert_close(out.tokens, reference.tokens, **CLOSE)


def test_hidden_rows_get_no_gradient_and_spoil_none(module, samples):
    x, question, seconds, vision_mask, question_mask = padded(samples, "anywhere", float("nan"))
    x.requires_grad_()
    question.requires_grad_()
    out = module(x, question, timestamps=seconds, vision_mask=vision_mask, question_mask=question_mask)
    module.zero_grad()
    (out.scores.square().sum() + out.rho.sum() + out.tokens.square().sum()).backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())
    assert (x.grad[~vision_mask] == 0).all()
    assert (question.grad[~question_mask] == 0).all()
    gradients = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    out = packed(module, samples)
    (out.scores.square().sum() + out.rho.sum() + out.tokens.square().sum()).backward()
    for name, p in module.named_parameters():
        torch.testing.assert_close(
            gradients[name], p.grad, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}"
        )


@torch.no_grad()
@pytest.mark.parametrize("one_mask", ["vision_mask", "question_mask"])
def test_one_mask_alone(module, one_mask):
    x, question = torch.stack(draw([30, 30], 3)), torch.stack(draw([6, 6], 4))
    size = x.shape[:2] if one_mask == "vision_mask" else question.shape[:2]
    mask = torch.rand(size, generator=torch.Generator().manual_seed(5)) > 0.4
    out = module(x, question, **{one_mask: mask})
    for b in range(2):
        rows = mask[b] if one_mask == "vision_mask" else slice(None)
        words = mask[b] if one_mask == "question_mask" else slice(None)
        alone = module(x[b, rows][None], question[b, words][None])
        kept = slice(int(out.cu_seqlens[b]), int(out.cu_seqlens[b + 1]))
        torch.testing.assert_close(out.tokens[kept], alone.tokens, **CLOSE)
        torch.testing.assert_close(out.scores[b, rows], alone.scores[0], **CLOSE)


@torch.no_grad()
def test_batch_equals_single_runs(module):
    x, question = torch.stack(draw([64] * 3, 5)), torch.stack(draw([6] * 3, 6))
    seconds = torch.rand(3, 64, generator=torch.Generator().manual_seed(7)) * 60
    out = module(x, question, timestamps=seconds)
    for b in range(3):
        alone = module(x[b : b + 1], question[b : b + 1], timestamps=seconds[b : b + 1])
        rows = slice(int(out.cu_seqlens[b]), int(out.cu_seqlens[b + 1]))
        assert torch.equal(out.indices[rows] - 64 * b, alone.indices)
        torch.testing.assert_close(out.scores[b], alone.scores[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.rho[b], alone.rho[0], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(out.tokens[rows], alone.tokens, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_packed_equals_dense(module):
    x, question = torch.stack(draw([40] * 2, 8)), torch.stack(draw([6] * 2, 9))
    dense = module(x, question)
    flat = module(
        x.flatten(0, 1),
        question.flatten(0, 1),
        cu_seqlens=ragged_cu_seqlens([40, 40]),
        cu_seqlens_question=ragged_cu_seqlens([6, 6]),
    )
    assert dense.scores.shape == (2, 40)
    assert torch.equal(dense.scores.flatten(), flat.scores)
    for name in ("tokens", "indices", "cu_seqlens", "rho", "n", "entropy"):
        assert torch.equal(getattr(dense, name), getattr(flat, name)), name


@torch.no_grad()
def test_empty_segments(module):
    x, question = torch.stack(draw([20] * 3, 10)), torch.stack(draw([6] * 3, 11))
    vision_mask, question_mask = torch.ones(3, 20, dtype=torch.bool), torch.ones(3, 6, dtype=torch.bool)
    vision_mask[0], question_mask[2] = False, False
    out = module(x, question, vision_mask=vision_mask, question_mask=question_mask)
    assert out.n[0] == 0
    assert (out.scores[[0, 2]] == 0).all()
    assert torch.equal(out.entropy[[0, 2]], torch.zeros(2))
    assert out.rho.isfinite().all()
    assert out.tokens.isfinite().all()
    assert torch.equal(out.indices[out.cu_seqlens[2] :], torch.arange(40, 40 + int(out.n[2])))  # ties: its first tokens
    alone = module(x[1:2], question[1:2])
    torch.testing.assert_close(out.tokens[: out.cu_seqlens[2]], alone.tokens, **CLOSE)

    for m, length in ((0, 4), (5, 0), (0, 0)):
        out = module(torch.randn(2, m, 48), torch.randn(2, length, 48), timestamps=torch.zeros(2, m))
        assert out.scores.shape == (2, m)
        assert out.tokens.shape == (int(out.n.sum()), 48)
        assert out.rho.isfinite().all()
        assert (out.n == 0).all() if m == 0 else (out.n >= 1).all()


@torch.no_grad()
def test_nan_in_one_sample_stays_there(module):
    x, question = torch.stack(draw([40] * 2, 12)), torch.stack(draw([6] * 2, 13))
    clean = module(x, question)
    x[1, 3] = float("nan")
    out = module(x, question)
    assert out.rho[1].isnan()
    assert out.n[1] == 1
    first = slice(0, int(clean.n[0]))
    assert torch.equal(out.indices[first], clean.indices[first])
    torch.testing.assert_close(out.tokens[first], clean.tokens[first], **CLOSE)
