"""Options as dataclasses: what a field may hold is said once, and checked wherever its value comes from."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


class OptionError(ValueError):
    """An unknown option, or a value that it can't have; the message names the option and says what was expected."""


def option(
    default: Any,
    text: str = "",
    *,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    length: int | None = None,
    ascending: bool = False,
) -> Any:
    """A field of [`Options`]; the limits hold for every number in it, also inside a list.

    Args:
        default: a list or dict is copied for every instance.
        text: one sentence, with the unit.
        at_least, above, at_most, below: limits of the numbers.
        length: of a list; 0 is any, and without it a list must not be empty.
        ascending: of a list, no number is below the one before it.
    """
    limits = {"at_least": at_least, "above": above, "at_most": at_most, "below": below, "length": length}
    metadata = {"text": text} | {key: value for key, value in limits.items() if value is not None}
    metadata |= {"ascending": True} if ascending else {}
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Options:
    """Base of dataclasses whose fields are checked: types by their annotations, limits by [`option`].

    Whole numbers will do for broken ones, and text such as "1e-3" (which YAML takes for text) for numbers.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        fields, where = self.__dataclass_fields__, type(self).__name__  # type: ignore[attr-defined]
        if name not in fields:
            raise OptionError(unknown_name(_path(where, name), name, fields, _path(where, "")))
        super().__setattr__(name, _checked(type(self), fields[name], value, where))

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Conditions on several fields together.

        Raises:
            ValueError: they do not fit each other; the message begins with the name of one.
        """

    @classmethod
    def from_dict(cls, values: Mapping | None, where: str):
        """The options that `values` has, the defaults of all others.

        Args:
            where: what they belong to; begins the messages.

        Raises:
            OptionError: an unknown name or an unfit value.
        """
        if not isinstance(values, Mapping) and values is not None:
            raise OptionError(f"{where}: expected a mapping of options, got {values!r}")
        fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
        given = {}
        for name, value in (values or {}).items():
            if name not in fields:
                raise OptionError(unknown_name(_path(where, name), name, fields, _path(where, "")))
            given[name] = _checked(cls, fields[name], value, where)
        try:
            return cls(**given)
        except OptionError:
            raise
        except ValueError as error:
            raise OptionError(_path(where, error)) from error


def unknown_name(shown: str, name: object, known: Iterable[str], prefix: str = "") -> str:
    """The message about `name`, shown as `shown`, which is not among `known`: the nearest of them, or all."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    hint = f"did you mean {prefix}{near[0]}?" if near else f"expected {either(known) or 'none'}"
    return f"{shown}: unknown; {hint}"


def either(names: Iterable[str]) -> str:
    """a, b or c."""
    *first, last = list(names) or [""]
    return f"{', '.join(first)} or {last}" if first else last


def _checked(cls: type, field: dataclasses.Field, value: Any, where: str) -> Any:
    kind, limits, name = _kinds(cls)[field.name], field.metadata, _path(where, field.name)
    try:
        return _fit(kind, limits, value, name)
    except TypeError:
        raise OptionError(f"{name}: expected {_expected(kind, limits)}, got {value!r}") from None


_kinds = functools.cache(get_type_hints)


def _path(where: str, name: object) -> str:
    return f"{where}.{name}" if where else str(name)


def _fit(kind: Any, limits: Mapping, value: Any, where: str) -> Any:
    """`value` as one of `kind`; a TypeError says that it is none."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        for part in get_args(kind):
            try:
                return _fit(part, limits, value, where)
            except TypeError:
                continue
    elif origin is Literal:
        if value is False and "no" in get_args(kind):
            value = "no"  # which YAML takes, without quotes, for false
        if isinstance(value, str) and value in get_args(kind):
            return value
    elif kind is Any or (kind is type(None) and value is None):
        return value
    elif origin is list and isinstance(value, list | tuple):
        fitted = [_fit(get_args(kind)[0], limits, item, where) for item in value]
        fits = len(fitted) == limits.get("length", len(fitted) or -1) or limits.get("length") == 0
        if fits and (not limits.get("ascending") or fitted == sorted(fitted)):
            return fitted
    elif origin is dict and isinstance(value, Mapping):
        return dict(value)
    elif isinstance(kind, type) and issubclass(kind, Options):
        return value if isinstance(value, kind) else kind.from_dict(value, where)
    elif kind is float and not isinstance(value, bool):
        number = _number(value)
        if math.isfinite(number) and _within(number, limits):
            return number
    elif kind in (int, str, bool) and type(value) is kind and (kind is not int or _within(value, limits)):
        return value
    raise TypeError


def _number(value: Any) -> float:
    if isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    raise TypeError


def _within(number: float, limits: Mapping) -> bool:
    return (
        number >= limits.get("at_least", -math.inf)
        and number > limits.get("above", -math.inf)
        and number <= limits.get("at_most", math.inf)
        and number < limits.get("below", math.inf)
    )


def _expected(kind: Any, limits: Mapping) -> str:
    """What a field may hold, in words."""
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_expected(part, limits) for part in get_args(kind))
    if origin is Literal:
        return either(get_args(kind))
    if origin is list:
        count = f"{limits['length']} " if limits.get("length") else ""
        item = get_args(kind)[0]
        plural = {int: "whole numbers", float: "numbers", str: "names"}.get(item, "items")
        order = ", ascending" if limits.get("ascending") else ""
        return f"a list of {count}{plural}{_limits_in_words(limits)}{order}"
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
    name = names.get(kind, "a mapping")
    return name + _limits_in_words(limits) if kind in (int, float) else name


def _limits_in_words(limits: Mapping) -> str:
    low, high = limits.get("at_least", limits.get("above")), limits.get("at_most", limits.get("below"))
    if low is not None and high is not None:
        left, right = "[" if "at_least" in limits else "(", "]" if "at_most" in limits else ")"
        return f" in {left}{low:.10g}, {high:.10g}{right}"
    if low is not None:
        return f" {'>=' if 'at_least' in limits else '>'} {low:.10g}"
    if high is not None:
        return f" {'<=' if 'at_most' in limits else '<'} {high:.10g}"
    return ""
