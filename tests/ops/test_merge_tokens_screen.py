"""merge_tokens where AMX screens the similarities: the bits of the fp32 kernel, whatever the tokens are. Run as a
script it answers frames with results, for the instruction set that QTS_CPU_ISA names."""

import io
import os
import struct
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qts_kernels
from qts_kernels import _native

pytestmark = pytest.mark.skipif(_native.absent("_C") is not None, reason=str(_native.absent("_C")))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def write(pipe, value):
    held = io.BytesIO()
    torch.save(value, held)
    pipe.write(struct.pack("q", held.tell()) + held.getvalue())
    pipe.flush()


def read(pipe):
    size = pipe.read(8)
    return torch.load(io.BytesIO(pipe.read(*struct.unpack("q", size)))) if size else None


def serve():
    while (case := read(sys.stdin.buffer)) is not None:
        frames, counts, compat = case
        write(sys.stdout.buffer, qts_kernels.merge_tokens(frames, counts, compat=compat, with_rows=True))


class Worker:
    """merge_tokens in a process of its own, since the instruction set is chosen once, when the code is loaded."""

    def __init__(self, isa):
        environment = {**os.environ, "QTS_CPU_ISA": isa, "PYTHONPATH": os.pathsep.join(sys.path)}
        pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
        self.process = subprocess.Popen([sys.executable, __file__], env=environment, **pipes)

    def __call__(self, frames, counts, compat=False):
        write(self.process.stdin, (frames, torch.as_tensor(counts), compat))
        found = read(self.process.stdout)
        if found is not None:
            return found
        error = self.process.stderr.read().decode()
        if "but this CPU has no more than" in error:
            pytest.skip(error.strip().splitlines()[-1])
        raise AssertionError(error)

    def close(self):
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()
        self.process.stderr.close()


@pytest.fixture(scope="module")
def compare():
    """compare(frames, counts): fail unless the screened results are those of AVX-512, bit for bit; the rows."""
    workers = [Worker("amx_bf16"), Worker("avx512")]

    def run(*case):
        screened, plain = (worker(*case) for worker in workers)
        for a, b in zip(screened, plain, strict=True):
            assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        return plain[3]

    yield run
    for worker in workers:
        worker.close()


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def reversed_by_rounding(length, columns):
    """Some odd tokens are less similar to the even ones than the others, and rounded to bf16 more so. All are
    of one norm, a power of two, so that they are rounded as they stand: steps of 2^-7 beside a token on the grid."""
    sign = draw(columns).sign()
    grid = (torch.rand(columns, generator=torch.Generator().manual_seed(1)) * 0.9 + 1.05).bfloat16().float() * sign
    x = torch.linspace(0, 1, length // 2)[:, None]
    up = x < 0.15
    step = 0.48 * torch.where(up, x - 0.5, x).repeat(1, columns)
    step[:, ::2] = torch.where(up, 0.52, 0.48)
    frame = torch.zeros(length, columns + 1)
    frame[0::2, 1:] = sign * torch.linspace(0.5, 1.5, columns)
    frame[1::2, 1:] = grid + step * 2**-7 * sign
    norm = 2.0 ** torch.tensor(2.0 * columns**0.5).log2().ceil()
    frame[1::2, 0] = (norm**2 - frame[1::2].double().square().sum(1)).sqrt()
    return frame[None]


def near_ties(length, columns, scale):
    return draw(1, 1, columns) + scale * draw(1, length, columns, seed=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 15, 33, 1100])
def test_all_shapes(compare, dtype, columns):
    """Even and odd numbers of tokens, from too few to screen to several panels, and all rounds."""
    for length in (63, 64, 65, 67, 97, 160):
        frames = draw(4, length, columns, seed=length).to(dtype)
        counts = [length // 2, length - 1, 0, 1]
        compare(frames, counts)
        compare(frames, counts, True)


@pytest.mark.parametrize("scale", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6, 0.0])
def test_near_ties(compare, scale):
    rows = compare(near_ties(131, 200, scale), [66])
    if scale == 0:
        assert rows[0, :4].tolist() == [0, 0, 0, 1]


def test_bf16_orders_them_the_other_way(compare):
    frames = reversed_by_rounding(128, 256)
    unit = torch.nn.functional.normalize(frames[0], dim=1)
    exact = unit.double()[0] @ unit.double()[1::2].t()
    rounded = unit.bfloat16().double()[0] @ unit.bfloat16().double()[1::2].t()
    assert rounded.argmax() != exact.argmax()
    assert rounded[exact.argmax()] < rounded.max() - 1e-4
    for count in (127, 100, 64):
        compare(frames, [count])


@pytest.mark.parametrize("value", [0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, 1e-40, 1e-22, 1e18, 1e25, 3e38])
@pytest.mark.parametrize("where", ["a row", "an element", "many rows", "every row"])
def test_values_at_the_ends(compare, value, where):
    frames = draw(1, 140, 70)
    for even_or_odd in (10, 11):
        if where == "a row":
            frames[0, even_or_odd] = value
        elif where == "an element":
            frames[0, even_or_odd, 5] = value
        elif where == "many rows":
            frames[0, even_or_odd::6] = value * (1 if value != value else frames[0, even_or_odd::6].sign())
        else:
            frames = frames.sign() * value
    compare(frames, [75])
    compare(frames, [9], True)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_the_same_bits(compare, data):
    """Tokens with a few directions in common, of very different norms, with copies, and with odd values among them."""
    length, columns = data.draw(st.integers(60, 150)), data.draw(st.sampled_from([1, 2, 30, 32, 64, 250]))
    seed, rank = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 40))
    noise = data.draw(st.sampled_from([0.0, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0]))
    frame = draw(length, rank, seed=seed) @ draw(rank, columns, seed=seed + 1)
    frame = frame + noise * draw(length, columns, seed=seed + 2)
    scale = data.draw(st.sampled_from([0.0, 1.0, 20.0]))
    frame = frame * torch.exp2(scale * draw(length, 1, seed=seed + 3))
    for _ in range(data.draw(st.integers(0, 6))):
        i, j = data.draw(st.integers(0, length - 1)), data.draw(st.integers(0, length - 1))
        value = data.draw(st.sampled_from(["copy", 0.0, torch.nan, torch.inf, 1e-30, 1e30]))
        frame[i] = frame[j] if value == "copy" else frame[i] * value
    dtype, compat = data.draw(st.sampled_from(DTYPES)), data.draw(st.booleans())
    compare(frame[None].to(dtype), [data.draw(st.integers(1, length))], compat)


if __name__ == "__main__":
    serve()
