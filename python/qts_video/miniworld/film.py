"""A film of the world as an mp4 file."""

from pathlib import Path

import av
import numpy as np

from .render import render
from .world import SIDE, Scene

RATE = 8
"""Frames a second: those that are sampled at 2 a second are the ones that the model was trained on."""


def write_film(path: str | Path, scene: Scene) -> Path:
    """Write ``scene`` at ``RATE`` frames a second: H.264 at high quality where PyAV can encode it, else MPEG-4."""
    path = Path(path)
    frames = render(scene, np.arange(scene.seconds * RATE) / RATE)
    with av.open(str(path), "w") as container:
        h264 = "libx264" in av.codecs_available
        stream = container.add_stream(
            "libx264" if h264 else "mpeg4", rate=RATE, options={"crf": "12"} if h264 else {"qscale": "2"}
        )
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path
