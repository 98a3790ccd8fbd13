"""QuoTA's ops at its own size, 160 frames of 27 x 27 tokens to 12,544 tokens, against a loop over the frames."""

import pytest
import qwen2_5_vl
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
def test_allocate_tokens(timed, device, who):
    weights = torch.rand(FRAMES, generator=torch.Generator().manual_seed(0)).square().to(device)

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
    assert torch.equal(runs[who]().cpu(), python())
    timed("allocate_tokens", f"T={FRAMES}", who, runs[who], graph=who == "qts_kernels")


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
        agrees = torch.isclose(runs[who](), released, rtol=1e-4, atol=1e-4).all(1).double().mean()
        # Among all frames some similarities tie but for rounding.
        assert agrees == 1 if some < FRAMES else agrees > 0.99
    timed("merge_tokens", f"{dtype} {some}x{SIDE * SIDE}x{COLUMNS}", who, runs[who], graph=False)


# (layers, width, heads, key heads, feed-forward, frames, side of a frame's grid, budget)
OVERHEAD = (28, 3584, 28, 4, 18944, 64, 14, 3136) if torch.cuda.is_available() else (8, 1024, 8, 2, 4096, 64, 14, 3136)
PREFIX, TEXT = 14, 64


@torch.inference_mode()
def test_overhead(timed, device, benchmark):
    """The method without its scorer: ``selection_share`` is the time of selection and shortening over that of the
    prefill of what they keep, the median of seven; the time is that of the whole forward. To be below 1 %."""
    import qts_video
    from qts_video.methods import QuoTA

    layers, *_, frames, side, budget = OVERHEAD
    model, total = qwen2_5_vl.build(*OVERHEAD[:5], device), frames * side * side
    ids = torch.tensor([[*range(1, PREFIX), 1002, *[1001] * total, 1003, *range(20, 19 + TEXT)]], device=device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": torch.randn(4 * total, 3 * 2 * 14 * 14, device=device, dtype=model.dtype),
        "video_grid_thw": torch.tensor([[frames, 2 * side, 2 * side]], device=device),
        "second_per_grid_ts": torch.ones(1),
        "mm_token_type_ids": (ids == 1001).long() * 2,
    }
    given = {}

    class Watch(QuoTA):
        def select(self, videos):
            given["videos"], given["selection"] = videos, super().select(videos)
            return given["selection"]

    scores = torch.rand(frames, generator=torch.Generator().manual_seed(0))
    with qts_video.attach(model, Watch(scores, total_tokens=budget)) as handle:
        output = model(**inputs, logits_to_keep=1)
        selection, videos = given["selection"], given["videos"]
        sizes = selection.extras[1]
        exact = loop(videos.tokens.view(frames, side, side, -1).double(), sizes, "bilinear")
        tolerance = 2e-2 if device == "cuda" else 1e-5
        torch.testing.assert_close(selection.tokens.double(), exact, rtol=tolerance, atol=tolerance)
        assert handle.last.kept + int(selection.extras[2].sum()) == budget
        assert output.past_key_values.get_seq_length() == PREFIX + TEXT + handle.last.kept
    with qts_video.attach(model, QuoTA(scores, total_tokens=budget)) as handle:
        run = lambda: model(**inputs, logits_to_keep=1)  # noqa: E731
        shares = []
        for _ in range(8):
            run()
            took = handle.last.timings
            shares.append(took["selection"] / took["prefill"])
        benchmark.extra_info["selection_share"] = round(sorted(shares[1:])[3], 5)
        shape = f"{str(model.dtype)[6:]} M={total} kept={handle.last.kept} layers={layers}"
        timed("QuoTA + prefill", shape, "qts_kernels", run, graph=False)
