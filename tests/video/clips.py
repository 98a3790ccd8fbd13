"""Small video files whose frames are told apart: frame i is a flat colour that encodes i."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def level(number: int) -> int:
    """The grey value of frame ``number``: far enough apart to survive compression."""
    return 16 + 8 * (number % 28)


def write_clip(
    path: Path,
    *,
    times: list[float] | None = None,
    frames: int = 24,
    rate: int = 12,
    size: tuple[int, int] = (64, 48),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    aspect: Fraction = Fraction(1),
    quarters: bool = False,
    to: object = None,
    format: str | None = None,
    container_options: dict[str, str] | None = None,
    title: str | None = None,
    **options: str,
) -> Path:
    """Write frame i at ``times[i]`` seconds (default i / rate). Size is (width, height).

    ``quarters`` paints red | green over blue | white instead, to tell which way is up. ``to`` takes the bytes
    instead of a file at ``path``.
    """
    width, height = size
    times = [i / rate for i in range(frames)] if times is None else times
    with av.open(to or str(path), "w", format=format, options=container_options or {}) as container:
        if title:
            container.metadata["title"] = title
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.sample_aspect_ratio = aspect
        for number, at in enumerate(times):
            image = np.full((height, width, 3), level(number), np.uint8)
            if quarters:
                image[: height // 2, : width // 2] = (250, 0, 0)
                image[: height // 2, width // 2 :] = (0, 250, 0)
                image[height // 2 :, : width // 2] = (0, 0, 250)
                image[height // 2 :, width // 2 :] = (250, 250, 250)
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(at * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Write the matrix into the header of an mp4's first track (ISO/IEC 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    # 16.16 fixed point, the last column 2.30
    fixed = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    struct.pack_into(">9i", data, start, *fixed)
    path.write_bytes(data)


def write_sound(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000, layout="mono")
        for number in range(8):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, number * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


class Pipe:
    """A file that can be written but not rewound, as a live recording is: its header stays incomplete."""

    def __init__(self, path: Path) -> None:
        self.file = path.open("wb")

    def write(self, data: bytes) -> int:
        return self.file.write(data)

    def close(self) -> None:
        self.file.close()
