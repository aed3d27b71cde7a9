"""Checks of users' values, with the same message from Python, command line and files.

`name` is the user's name of the value: "steps" in Python, "--steps" on a command line. Every
function returns the value and raises UsageError if it is not acceptable.
"""

import operator
from collections.abc import Sequence
from numbers import Real
from typing import NoReturn, TypeVar

from .errors import UsageError
from .files import printable

LARGEST_SEED = 2**64 - 1

T = TypeVar("T")


def whole(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An integer of any type but bool, from `low` to `high` (None: no bounds)."""
    if isinstance(value, bool) or not hasattr(type(value), "__index__"):
        refuse(name, "a whole number", value)
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:  # an array of more than one element
        refuse(name, "a whole number", value)
    return _within(name, number, low, high)


def real(
    name: str,
    value: object,
    low: float | int,
    high: float | int,
    *,
    above: bool = False,
    unit: str = "",
) -> float:
    """A finite number from `low` to `high`; with `above`, `low` itself is refused. `unit` follows
    the bounds in the message."""
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse(name, "a number", value)
    return float(_within(name, value, low, high, above=above, unit=unit))


def text(name: str, value: object) -> str:
    """A str that UTF-8 can encode."""
    if not isinstance(value, str):
        refuse(name, "text", value)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise UsageError(
            f"{name} is not Unicode text: half a surrogate pair at character {fault.start}"
        ) from None
    return value


def one_of(name: str, value: object, choices: Sequence[str]) -> str:
    """One of the `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise UsageError(f"{name} {shown(value)}: expected one of {', '.join(choices)}")
    return value


def instance(name: str, value: object, kind: type[T]) -> T:
    """An instance of `kind`."""
    if not isinstance(value, kind):
        refuse(name, f"a {kind.__name__}", value)
    return value


def refuse(name: str, expected: str, value: object) -> NoReturn:
    """Raises UsageError: "`name` must be `expected`, got …"."""
    raise UsageError(f"{name} must be {expected}, got {shown(value)}")


def shown(value: object) -> str:
    """A number or text shortened for a message, on one line; of other values the type's name."""
    if isinstance(value, int) and value.bit_length() > 256:  # Python prints at most 4,300 digits
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, str):
        return repr(printable(value, 40))
    return printable(value, 40) if isinstance(value, Real) else type(value).__name__


def _within(name, value, low, high, *, above: bool = False, unit: str = ""):
    # comparisons with NaN are False; those of large integers with floats are exact
    is_high_enough = low is None or (low < value if above else low <= value)
    is_low_enough = high is None or value <= high
    if is_high_enough and is_low_enough:
        return value
    span = f"above {low:g}{unit}, at most" if above else f"from {low}{unit} to"
    raise UsageError(f"{name} must be {span} {high}{unit}, got {shown(value)}")
