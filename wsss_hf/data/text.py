"""Text files as editors and spreadsheets write them, and values as messages show them."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's control characters, lone surrogates, breaks of lines and paragraphs
_SHOWN = 100  # characters of a value in a message


class DataError(ValueError):
    """The data have not the expected format; the message names the row or file, and what was expected."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, or in UTF-16 with a byte order mark, without that mark.

    Other encodings can't be told from one another: they are refused rather than guessed.

    Raises:
        DataError: there is no such file, or it is in another encoding; names the line.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: expected a file of text, got none ({error.strerror})") from error
    is_wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    wanted = "expected text in UTF-8, or in UTF-16 with a byte order mark"
    try:
        text = raw.decode("utf-16" if is_wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{raw[error.start]:02x}" if error.start < len(raw) else "a cut character"
        raise DataError(f"{path}, line {line}: {wanted}, got {got} (save it as UTF-8)") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}, line {line}: {wanted}, got a zero byte (save it as UTF-8)")
    return text


def is_line(text: str) -> bool:
    """Whether files, pages and terminals can show this as one line: no control characters, breaks, lone surrogates."""
    return not any(unicodedata.category(character) in _UNSEEN for character in text)


def brief(value: object) -> str:
    """A value for a message: in one line, and no more than its beginning."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
