"""Where methods are registered."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

METHODS: dict[str, tuple[Any, Any]] = {}
"""Name of a method → (the dataclass of its options, its module). The name is that of its options in `CamConfig`."""


def register_method(name: str, config_class: type) -> Callable[[type], type]:
    """Class decorator: from now on `CamConfig(name=config_class(...))` trains with the decorated method.

    Args:
        config_class: a dataclass of [`Options`].

    Raises:
        TypeError: `config_class` is something else.
        ValueError: another class has the name.
    """
    if not hasattr(config_class, "from_dict"):
        raise TypeError(f"{name}: expected a dataclass that inherits from wsss_hf.Options, got {config_class!r}")

    def register(module_class: type) -> type:
        other = METHODS.get(name, (None, module_class))[1]
        # A notebook may run its cell again.
        if (other.__module__, other.__qualname__) != (module_class.__module__, module_class.__qualname__):
            raise ValueError(
                f"method {name!r}: expected a new name, got that of {other.__module__}.{other.__qualname__}"
            )
        METHODS[name] = (config_class, module_class)
        return module_class

    return register
