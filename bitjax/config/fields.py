"""What every configuration class shares: checks of fields, typed overrides, a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

C = TypeVar("C")


def to_json(config: Any) -> str:
    """Serialise a configuration; `from_json` restores an equal one."""
    return json.dumps(dataclasses.asdict(config), indent=2)


def from_json(kind: type[C], text: str) -> C:
    """Restore a configuration of class `kind`.

    Raises:
        ValueError: not JSON, an unknown or missing key, or a value of the wrong type or range.
    """
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{kind.__name__} is not valid JSON: {error}") from None
    return from_dict(kind, data)


def from_dict(kind: type[C], data: Any, where: str = "") -> C:
    """Build `kind` from nested mappings; keys left out take their defaults.

    Raises:
        ValueError: an unknown key, or a value of the wrong type or range.
    """
    name = where.rstrip(".") or kind.__name__
    require(isinstance(data, Mapping), f"{name} is not an object of settings: {data!r:.60}")
    hints = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind)]  # type: ignore[arg-type]
    for key in data:
        shown = key if str(key).isprintable() else repr(key)
        require(key in known, f"unknown setting {where}{shown}; {name} has {', '.join(known)}")

    def value_of(key: str, value: Any) -> Any:
        if dataclasses.is_dataclass(hints[key]):
            return from_dict(hints[key], value, f"{where}{key}.")
        return tuple(value) if isinstance(value, list) else value  # JSON has no tuples

    return kind(**{key: value_of(key, value) for key, value in data.items()})


def override(config: C, settings: Iterable[str]) -> C:
    """Apply `"section.key=value"` settings, each typed by the field it names.

    Raises:
        ValueError: a setting without `=`, an unknown key, or a value of the wrong type or range.
    """
    data = dataclasses.asdict(config)  # type: ignore[call-overload]
    for setting in settings:
        path, separator, text = setting.partition("=")
        require(bool(separator), f"setting {setting!r} is not of the form section.key=value")
        *sections, key = path.strip().split(".")
        kind: Any = type(config)
        target = data
        for section in sections:
            kind = typing.get_type_hints(kind).get(section)
            require(
                dataclasses.is_dataclass(kind), f"unknown setting {path}: no section {section!r}"
            )
            target = target[section]
        known = [f.name for f in dataclasses.fields(kind)]
        require(key in known, f"unknown setting {path}; known here: {', '.join(known)}")
        target[key] = _parse(path, text.strip(), typing.get_type_hints(kind)[key])
    return from_dict(type(config), data)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _section(config: Any) -> str:
    """Name of a configuration's class as a section: OptimizerConfig -> optimizer."""
    name = type(config).__name__.removesuffix("Config")
    return "".join(f"_{c.lower()}" if c.isupper() else c for c in name).removeprefix("_")


def require_positive(config: Any, *names: str) -> None:
    section = _section(config)
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{section}.{name}={value} must be above 0")


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a field's type: `float | None` -> (float, NoneType)."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if union else (hint,)


def _fits(value: Any, hint: Any) -> bool:
    if typing.get_origin(hint) is Literal:
        return value in typing.get_args(hint)
    if hint is float:  # an int that float64 can hold is a fine float; a bool, NaN, infinity is not
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and abs(value) <= sys.float_info.max
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(hint) is tuple:  # of strings
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    return isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) is tuple:
        return "a list of strings"
    return "None" if hint is type(None) else f"of type {hint.__name__}"


def check_fields(config: Any) -> None:
    """Raise ValueError for a field whose value is not of its declared type.

    For a float field a large integer becomes a float: JAX would take it for one of 32 bits.
    """
    section = _section(config)
    for name, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, name)
        require(
            any(_fits(value, option) for option in _options(hint)),
            f"{section}.{name}={value!r} is not {' or '.join(map(_describe, _options(hint)))}",
        )
        if type(value) is int and float in _options(hint) and abs(value) >= 2**31:
            object.__setattr__(config, name, float(value))


def _parse(path: str, text: str, hint: Any) -> Any:
    """The value that `text` spells for a field of type `hint`."""
    for option in _options(hint):
        if option is type(None) and text.lower() in ("none", "null"):
            return None
        if option is bool and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if option is str or (typing.get_origin(option) is Literal and _fits(text, option)):
            return text
        if typing.get_origin(option) is tuple:
            return tuple(filter(None, text.split(",")))
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    wanted = " or ".join(map(_describe, _options(hint)))
    raise ValueError(f"{path}={text} is not {wanted}")
