"""Video-token selection dropped into the models people run: attach a method, ask, see what was kept."""

from qts_video import methods
from qts_video.attach import Handle, attach
from qts_video.cache import VideoCache
from qts_video.dropin.report import Report, VideoReport

__all__ = ["Handle", "Report", "VideoCache", "VideoReport", "attach", "methods"]
