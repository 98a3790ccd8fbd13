"""QuoTA's ops at its own size, 160 frames of 27 x 27 tokens to 12,544 tokens, against a loop over the frames."""

import pytest
import torch
import torch.nn.functional as F

import qts_kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
FRAMES, SIDE, COLUMNS, TOKENS = 160, 27, 3584, 12_544


def frames_of(dtype, device):
    x = torch.empty(FRAMES, SIDE, SIDE, COLUMNS, device=device, dtype=DTYPES[dtype])
    return x.normal_(generator=torch.Generator(device).manual_seed(0))


def counts_of():
    weights = torch.rand(FRAMES, generator=torch.Generator().manual_seed(0)).square()
    return qts_kernels.allocate_tokens(weights, TOKENS, cap=SIDE * SIDE)


def sizes_of(counts):
    """The largest grid of (a, a), (a + 1, a) that fits."""
    side = counts.double().sqrt().long()
    return torch.stack([side + (side * (side + 1) <= counts), side], 1)


def loop(frames, sizes, mode):
    out = []
    for frame, size in zip(frames, sizes.tolist(), strict=True):
        if 0 in size:
            continue
        image = frame.permute(2, 0, 1)[None]
        if mode == "bilinear":
            image = F.interpolate(image, size=size, mode="bilinear", align_corners=False)
        else:
            image = F.adaptive_avg_pool2d(image, size)
        out.append(image[0].permute(1, 2, 0).reshape(-1, frame.shape[2]))
    return torch.cat(out)


@pytest.mark.parametrize("who", ["qts_kernels", "largest remainder in Python"])
def test_allocate_tokens(timed, who):
    weights = torch.rand(FRAMES, generator=torch.Generator().manual_seed(0)).square()

    def python():
        total = weights.double().sum().item()
        shares = [w * TOKENS / total for w in weights.tolist()]
        counts = [int(share) for share in shares]
        order = sorted(range(FRAMES), key=lambda i: (counts[i] - shares[i], i))
        for i in order[: TOKENS - sum(counts)]:
            counts[i] += 1
        return torch.tensor(counts)

    runs = {
        "qts_kernels": lambda: qts_kernels.allocate_tokens(weights, TOKENS),
        "largest remainder in Python": python,
    }
    assert torch.equal(runs[who](), python())
    timed("allocate_tokens", f"T={FRAMES}", who, runs[who])


@pytest.mark.parametrize("who", ["qts_kernels", "one call a frame"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["bilinear", "adaptive_avg"])
def test_resize_frames(timed, device, mode, dtype, who):
    frames, sizes = frames_of(dtype, device), sizes_of(counts_of())
    device_sizes, rows = sizes.to(device), int(sizes.prod(1).sum())
    runs = {
        "qts_kernels": lambda: qts_kernels.resize_frames(frames, device_sizes, mode, max_tokens=rows)[0],
        "one call a frame": lambda: loop(frames, sizes, mode),
    }
    some = slice(0, 8)
    exact = loop(frames[some].double(), sizes[some], mode)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    torch.testing.assert_close(runs[who]()[: exact.shape[0]].double(), exact, rtol=tolerance, atol=tolerance)
    timed("resize_frames", f"{mode} {dtype} {FRAMES}x{SIDE}x{SIDE}x{COLUMNS}", who, runs[who])


def tome(x, r):
    """One step of ToMe, as QuoTA's release runs it: sizes start at one each time, and the order is not restored."""
    metric = x / x.norm(dim=-1, keepdim=True)
    best, target = (metric[:, ::2] @ metric[:, 1::2].transpose(1, 2)).max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    stay, go = order[:, r:], order[:, :r]
    target = target[..., None].gather(1, go)

    def merged(x):
        even, odd = x[:, ::2], x[:, 1::2]
        kept, gone = (even.gather(1, i.expand(-1, -1, x.shape[2])) for i in (stay, go))
        odd = odd.scatter_reduce(1, target.expand(-1, -1, x.shape[2]), gone, reduce="sum")
        return torch.cat([kept, odd], 1)

    return merged(x) / merged(torch.ones_like(x[:, :, :1]))


def tome_loop(frames, counts):
    out = []
    for frame, count in zip(frames, counts.tolist(), strict=True):
        x = frame[None]
        while x.shape[1] > max(count, 1):
            x = tome(x, min(x.shape[1] // 2, x.shape[1] - count))
        out.append(x[0, :count])
    return torch.cat(out)


@pytest.mark.parametrize("who", ["qts_kernels", "ToMe, a frame at a time"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_tokens(timed, device, dtype, who):
    """On a CPU 16 of the 160 frames: the loop takes minutes for all."""
    some = FRAMES if device == "cuda" else 16
    frames, counts = frames_of(dtype, device).flatten(1, 2)[:some], counts_of()[:some]
    device_counts, rows = counts.to(device), int(counts.sum())
    runs = {
        "qts_kernels": lambda: qts_kernels.merge_tokens(frames, device_counts, max_tokens=rows)[0],
        "ToMe, a frame at a time": lambda: tome_loop(frames, counts),
    }
    if who == "qts_kernels":
        for t in (counts.argmin(), counts.argmax()):
            exact = qts_kernels.merge_tokens(frames[t, None].double(), counts[t, None], with_rows=True)
            found = qts_kernels.merge_tokens(frames[t, None], counts[t, None], with_rows=True)
            assert torch.equal(found[3], exact[3])
            tolerance = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
            torch.testing.assert_close(found[0].double(), exact[0], rtol=tolerance, atol=tolerance)
    elif dtype == "fp32":
        released = qts_kernels.merge_tokens(frames, device_counts, max_tokens=rows, compat=True)[0]
        torch.testing.assert_close(runs[who](), released, rtol=1e-4, atol=1e-4)
    timed("merge_tokens", f"{dtype} {some}x{SIDE * SIDE}x{COLUMNS}", who, runs[who], graph=False)
