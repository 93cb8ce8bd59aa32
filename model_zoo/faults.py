"""What is wrong with a configuration, one line for each fault, and how several of them are said at once."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any, NamedTuple

from model_zoo.errors import ConfigError

#: where something stands in a config: a key, and in its value the numbers of entries and the keys inside
Place = tuple[str | int, ...]

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60
_short.maxlist = _short.maxdict = 6
_short.maxlevel = 3


class Fault(NamedTuple):
    """One thing that is wrong.

    Attributes:
        place: where it stands.
        text: key, value, what is wrong with it, and the fix; one line.
    """

    place: Place
    text: str


def refusal(lines: Iterable[str], subject: str = "") -> ConfigError:
    """The error that says every line: one after the subject, several each on a line of its own, none twice."""
    said = list(dict.fromkeys(lines))
    title = f"{subject}: " if subject else ""
    return ConfigError(f"{title}{said[0]}" if len(said) == 1 else "\n  ".join([f"{title}{len(said)} mistakes:", *said]))


def shown(value: Any) -> str:
    """A value in a message: as yaml has it, cut to one line of moderate length."""
    return "null" if value is None else _short.repr(value).replace("\n", " ")


def nearest(name: object, known: Iterable[str]) -> str:
    """A clause with the known name that looks most like this one; empty if none does."""
    by_lower = {each.lower(): each for each in known}
    found = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f"; did you mean '{by_lower[found[0]]}'?" if found else ""
