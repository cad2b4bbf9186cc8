"""Where methods are registered."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, tuple[Any, Any]] = {}
"""Name of a method → (the dataclass of its options, its module). The name is that of its options in `CamConfig`."""
