"""The letters of captions in pictures."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from PIL import ImageFont

# Of Linux, macOS and Windows: first those with Chinese, Japanese and Korean letters, which have Latin ones, too.
_OF_SYSTEMS = ("NotoSansCJK-Regular.ttc", "Arial Unicode.ttf", "msyh.ttc", "DejaVuSans.ttf", "arial.ttf")


def font_for(words: str, size: int) -> Any:
    """Pillow's own font, which is everywhere but has little more than ASCII; for other letters one of the system's
    fonts, where there is one."""
    return ImageFont.load_default(size) if words.isascii() else _system_font(size)


@lru_cache
def _system_font(size: int) -> Any:
    for name in _OF_SYSTEMS:
        try:
            return ImageFont.truetype(name, size)
        except OSError:  # not on this machine
            continue
    return ImageFont.load_default(size)
