"""Video files through PyAV: one pass over the packets for the times, one decoding pass for the samples."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import av
import numpy as np
import torch
from av.stream import Disposition
from tqdm import tqdm

from .video import Limits, Samples, Video, VideoError, sample, sampled_seconds

# FFmpeg "decodes" text files as pictures of a terminal.
_TEXT_CODECS = {"ansi", "bintext", "idf", "xbin"}
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67


@dataclass
class _Index:
    times: np.ndarray
    """[N] seconds from the first frame, ascending, one for each frame."""
    duration: float
    first_pts: int | None
    """Time stamp of the first frame in units of the stream's time base. None: the stream carries no time
    stamps, and the times are frame numbers over the stated frame rate."""


def read_file(
    path: str,
    fps: float,
    min_frames: int,
    max_frames: int,
    limits: Limits,
    progress: bool = False,
    within_step: Callable[[int], np.ndarray] | None = None,
) -> Video:
    """See ``video.read_video``."""
    try:
        with _open(path) as container:
            index = _scan(container, _video_stream(container, path), path)
        samples = sample(index.times, fps, min_frames, max_frames, within_step)
        with _open(path) as container:
            stream = _video_stream(container, path)
            picture = _Picture(limits, len(samples.indices), stream)
            promised = float((stream.duration or 0) * stream.time_base)
            if promised > 1.05 * index.duration + 0.5:
                picture.notes.append(f"damaged: {index.duration:.1f} s of {promised:.1f} s are in the file")
            frames, times = _decode(container, stream, index, samples, picture, progress)
    except av.FFmpegError as error:
        raise VideoError(f"{path}: not a video that FFmpeg can read ({error.strerror})") from error
    if not times:
        raise VideoError(f"{path}: no frame could be decoded")

    if len(frames) < len(samples.indices):
        picture.notes.append(f"damaged: nothing decodes after {times[-1]:.1f} s of {index.duration:.1f} s")
        samples = samples.first(len(frames))
    index.times[np.unique(samples.indices)] = times
    return Video(
        frames=frames,
        seconds=sampled_seconds(index.times, samples),
        sampled_fps=samples.fps,
        frame_indices=samples.indices.tolist(),
        total_frames=len(index.times),
        duration=index.duration,
        source=path,
        backend="pyav",
        notes=picture.notes,
    )


def _open(path: str) -> av.container.InputContainer:
    return av.open(path, metadata_errors="replace")  # a title in another encoding is no reason to fail


def _video_stream(container: av.container.InputContainer, path: str) -> av.VideoStream:
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams})
        raise VideoError(f"{path}: no video in this file (it holds {', '.join(kinds) or 'nothing'})")
    streams = [s for s in streams if s.codec_context is not None]
    if not streams:
        raise VideoError(f"{path}: FFmpeg has no decoder for the video in it")
    stream = max(streams, key=_prominence)
    if stream.codec_context.name in _TEXT_CODECS:
        raise VideoError(f"{path}: not a video (a text file)")
    stream.thread_type = "AUTO"
    return stream


def _packets(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.Packet]:
    """The stream's packets up to where the file is broken, if it is."""
    got_any = False
    while True:
        try:
            for packet in container.demux(stream):
                got_any = True
                yield packet
            return
        except IndexError:
            continue  # PyAV trips over the packets of streams that appear midway, as they do in broadcasts
        except av.FFmpegError:
            if not got_any:
                raise
            return


def _prominence(stream: av.VideoStream) -> tuple[bool, int]:
    return bool(stream.disposition & Disposition.default), stream.width * stream.height


def _scan(container: av.container.InputContainer, stream: av.VideoStream, path: str) -> _Index:
    """The time of every frame from the packets alone: headers often lack counts and durations."""
    packets = [
        (p.pts, p.duration or 0, p.is_keyframe) for p in _packets(container, stream) if p.size and not p.is_discard
    ]
    if not packets:
        raise VideoError(f"{path}: the video stream is empty")
    # A stream cut from a live one may begin between keyframes; what precedes the first does not decode.
    start = next((i for i, (_, _, keyframe) in enumerate(packets) if keyframe), 0)
    packets = packets[start:]
    if any(pts is None for pts, _, _ in packets):
        rate = float(stream.average_rate or stream.guessed_rate or stream.base_rate or 25)
        return _Index(np.arange(len(packets)) / rate, len(packets) / rate, None)
    first = packets[0][0] if start else min(pts for pts, _, _ in packets)
    packets = sorted(packet for packet in packets if packet[0] >= first)
    times = np.array([pts - first for pts, _, _ in packets]) * float(stream.time_base)
    shown_last = packets[-1][1] * float(stream.time_base) or times[-1] / max(1, len(times) - 1)
    return _Index(times, float(times[-1] + shown_last), first)


def _decode(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    index: _Index,
    samples: Samples,
    picture: "_Picture",
    progress: bool,
) -> tuple[torch.Tensor, list[float]]:
    """The sampled frames [T, 3, H, W], and the time of each different one from the first decoded frame.

    Where decoding ends early, the samples that never came are left out, not made up.
    """
    wanted, repeats = np.unique(samples.indices, return_counts=True)
    times, ends = index.times[wanted], np.cumsum(repeats)
    slack = index.duration / len(index.times) / 2
    frames = torch.empty(0, dtype=torch.uint8)
    taken: list[float] = []
    previous: tuple[av.VideoFrame, float] | None = None
    start = 0.0

    def take(frame: av.VideoFrame, at: float) -> None:
        nonlocal frames
        rgb = torch.from_numpy(picture.convert(frame)).permute(2, 0, 1)
        if not taken:
            frames = torch.empty((int(ends[-1]), *rgb.shape), dtype=torch.uint8)
        end = ends[len(taken)]
        frames[end - repeats[len(taken)] : end] = rgb
        taken.append(at - start)
        bar.update()

    bar = tqdm(
        total=len(wanted), desc="decoding", unit="frame", disable=None if progress else True, delay=1, leave=False
    )
    with bar:
        for number, frame in enumerate(_frames(container, stream, picture)):
            if index.first_pts is None or frame.pts is None:
                at = number * index.duration / len(index.times)
            else:
                at = (frame.pts - index.first_pts) * float(stream.time_base)
            if previous is None:
                start = at
            # Packets and frames differ in damaged streams: then the frame that is on the screen at that time.
            while len(taken) < len(times) and at > times[len(taken)] + slack:
                take(*(previous or (frame, at)))
            if len(taken) < len(times) and abs(at - times[len(taken)]) <= slack / 64:
                take(frame, at)
            if len(taken) == len(times):
                break
            previous = frame, at
        while previous and len(taken) < len(times) and times[len(taken)] <= previous[1] + 2 * slack:
            take(*previous)
    return frames[: int(ends[len(taken) - 1]) if taken else 0], taken


def _frames(
    container: av.container.InputContainer, stream: av.VideoStream, picture: "_Picture"
) -> Iterator[av.VideoFrame]:
    damaged = 0
    for packet in _packets(container, stream):
        try:
            yield from packet.decode()
        except av.InvalidDataError:
            damaged += 1
    if damaged:
        picture.notes.append(f"damaged: {damaged} packets did not decode")


class _Picture:
    """Turns decoded frames into upright 8-bit RGB of one size."""

    def __init__(self, limits: Limits, num_frames: int, stream: av.VideoStream) -> None:
        self.limits = limits
        self.num_frames = num_frames
        self.codec = stream.codec_context
        self.aspect = float(stream.sample_aspect_ratio or 1.0)
        """Width over height of a pixel."""
        self.notes: list[str] = []
        self.size: tuple[int, int] | None = None
        """(height, width) of every upright frame, decided by the first."""

    def convert(self, frame: av.VideoFrame) -> np.ndarray:
        """[H, W, 3] uint8."""
        matrix = _display_matrix(frame)
        turned = matrix is not None and abs(matrix[1]) > abs(matrix[0])
        if self.size is None:
            self.size = self._decide_size(frame, turned)
            self._describe(frame, matrix)
        height, width = self.size[::-1] if turned else self.size
        if (height, width) == (frame.height, frame.width):
            rgb = frame.reformat(format="rgb24")
        else:
            rgb = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC")
        return _upright(rgb.to_ndarray(), matrix)

    def _decide_size(self, frame: av.VideoFrame, turned: bool) -> tuple[int, int]:
        height, width = frame.height, frame.width
        if self.aspect != 1.0 and 1 / 8 < self.aspect < 8:
            width = round(width * self.aspect)
        if turned:
            height, width = width, height
        return self.limits.fit(height, width, self.num_frames)

    def _describe(self, frame: av.VideoFrame, matrix: tuple[int, ...] | None) -> None:
        bits = max(c.bits for c in frame.format.components)
        transfer = _HDR_TRANSFERS.get(int(self.codec.color_trc))
        if transfer:
            self.notes.append(f"{frame.format.name}, HDR ({transfer}): rounded to 8 bits, no tone mapping")
        elif bits > 8:
            self.notes.append(f"{frame.format.name}: rounded from {bits} to 8 bits")
        if matrix is not None:
            self.notes.append(f"turned upright (display matrix, {frame.rotation} degrees)")
        if self.aspect != 1.0:
            self.notes.append(f"pixels are not square ({self.aspect:.3f}): stretched to the display shape")
        height, width = frame.height, frame.width
        if self.size not in ((height, width), (width, height)):
            self.notes.append(f"resized from {width}x{height} to {self.size[1]}x{self.size[0]}")


def _display_matrix(frame: av.VideoFrame) -> tuple[int, int, int, int] | None:
    """(a, b, c, d) of x' = a x + c y, y' = b x + d y in 16.16 fixed point; None where nothing turns."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].tolist()
    return None if a > 0 and d > 0 and abs(b) <= abs(a) else (a, b, c, d)


def _upright(image: np.ndarray, matrix: tuple[int, int, int, int] | None) -> np.ndarray:
    """Apply a display matrix to [H, W, 3], to the nearest quarter turn, with its mirroring."""
    if matrix is None:
        return image
    a, b, c, d = matrix
    if abs(b) > abs(a):
        image, right, down = image.transpose(1, 0, 2), c, b
    else:
        right, down = a, d
    if right < 0:
        image = image[:, ::-1]
    if down < 0:
        image = image[::-1]
    return np.ascontiguousarray(image)
