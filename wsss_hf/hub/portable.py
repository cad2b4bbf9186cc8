"""Settings without local paths, for publication: paths mean nothing on other machines and may reveal private names."""

from __future__ import annotations

import os
from pathlib import Path


def portable_values(value):
    """`value`, a JSON-like structure, with every local path replaced by its last part; Hub ids stay as they are."""
    if isinstance(value, dict):
        return {key: portable_values(item) for key, item in value.items()}
    if isinstance(value, list):
        return [portable_values(item) for item in value]
    return Path(value).name if isinstance(value, str) and _is_path(value) else value


def _is_path(text: str) -> bool:
    if "/" not in text and os.sep not in text:
        return False
    return text.startswith((".", "/", "~")) or os.path.isabs(text) or text.count("/") > 1 or os.path.exists(text)
