"""FlexSelect-Lite: a small language model that scores vision tokens in the place of the big one's layers."""

from qts_video.lite.config import LiteConfig
from qts_video.lite.model import LiteSelector

__all__ = ["LiteConfig", "LiteSelector"]
