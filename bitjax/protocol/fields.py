"""Fields of a JSON object, each checked, with an error that names it."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from bitjax.tokenizer import utf8


class BadRequest(ValueError):
    """A request that cannot be done.

    Args:
        message: one sentence: got, wanted, where.
        param: the field, if it is one.
        code: a word for programs.
        status: of HTTP.
    """

    def __init__(
        self, message: str, param: str | None = None, code: str | None = None, status: int = 400
    ) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status

    def body(self) -> dict[str, Any]:
        """As OpenAI's interface says it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        fields = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


class Fields:
    """The fields of one object; null is a field left out.

    Args:
        value: what came.
        known: names that it may have.
        where: before the names in messages, such as `messages[0].`.

    Raises:
        BadRequest: no object, or an unknown field.
    """

    def __init__(self, value: object, known: Collection[str], where: str = "") -> None:
        self._where = where
        if not isinstance(value, Mapping):
            raise BadRequest(f"{where.rstrip('.') or 'the request'} is no object: {shown(value)}")
        self._values = {name: found for name, found in value.items() if found is not None}
        for name in self._values:
            if name not in known:
                raise BadRequest(
                    f"unknown field {shown(where + str(name))}", where + str(name)[:60]
                )

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def get(self, name: str) -> Any:
        """The value as it came; None without one."""
        return self._values.get(name)

    def names(self) -> list[str]:
        """Of all fields given."""
        return list(self._values)

    def refuse(self, name: str, wanted: str) -> BadRequest:
        """The error of a value that is not `wanted`."""
        return BadRequest(
            f"{self._where}{name}={shown(self.get(name))} is not {wanted}", f"{self._where}{name}"
        )

    def text(self, name: str, default: str = "") -> str:
        """A text of valid Unicode."""
        value = self._values.get(name, default)
        if not isinstance(value, str):
            raise self.refuse(name, "a text")
        return unicode(value, f"{self._where}{name}")

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self._values.get(name, default)
        if not isinstance(value, bool):
            raise self.refuse(name, "true or false")
        return value

    def integer(self, name: str, default: int, least: int, most: int) -> int:
        """An integer in `least`..`most`."""
        value = self._values.get(name, default)
        if isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refuse(name, f"an integer in {least}..{most}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number."""
        value = self._values.get(name, default)
        if not is_number(value):
            raise self.refuse(name, "a number")
        return float(value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A text, or a list of texts."""
        value = self._values.get(name, [])
        found = [value] if isinstance(value, str) else value
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            raise self.refuse(name, "a text or a list of texts")
        return tuple(unicode(text, f"{self._where}{name}") for text in found)


def is_number(value: object) -> bool:
    """Whether a JSON value is a number that float64 can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def unicode(text: str, where: str) -> str:
    """The text.

    Raises:
        BadRequest: lone surrogates, which UTF-8 cannot hold.
    """
    try:
        utf8(text)
    except ValueError as error:
        raise BadRequest(f"{where}: {error}", where) from None
    return text


def shown(value: object, most: int = 60) -> str:
    """A value in a message, cut short."""
    if isinstance(value, list | dict) and len(value) > most:
        return f"{type(value).__name__} of {len(value)}"
    said = repr(value[: most + 1] if isinstance(value, str) else value)
    return said if len(said) <= most else said[: most - 3] + "..."
