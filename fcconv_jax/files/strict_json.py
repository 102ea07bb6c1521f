"""JSON from files that may be damaged, or made to do harm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

# No array has more axes, or more entries along one.
_AXES, _LONGEST = 64, 1 << 48


class StrictJsonError(ValueError):
    """Text is not the JSON that it should be."""


def loads(text: bytes | bytearray | str) -> Any:
    """Read JSON as its standard has it: each key once, no NaN, not too deep.

    Raises:
      StrictJsonError: it is not that.

    Example:
      >>> loads('{"a": 1, "a": 2}')
      Traceback (most recent call last):
      fcconv_jax.files.strict_json.StrictJsonError: the key 'a' occurs twice
    """
    try:
        return json.loads(
            text, object_pairs_hook=_each_once, parse_constant=_no_constant
        )
    except StrictJsonError:
        raise
    except (ValueError, RecursionError) as error:
        raise StrictJsonError(f"not JSON: {error}") from None


def whole_numbers(value: Any) -> tuple[int, ...]:
    """Return a list of sizes or places.

    Raises:
      StrictJsonError: it isn't a list, is too long, or holds anything but whole numbers
        from 0 to 2**48.

    Example:
      >>> whole_numbers([2, 3])
      (2, 3)
    """
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise StrictJsonError(f"expected a list of whole numbers, got {value!r:.80}")
    if len(value) > _AXES or not all(
        type(n) is int and 0 <= n <= _LONGEST for n in value
    ):
        raise StrictJsonError(f"expected a few whole numbers, got {value!r:.80}")
    return tuple(value)


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = {}
    for key, value in pairs:
        if key in content:
            raise StrictJsonError(f"the key {key!r:.80} occurs twice")
        content[key] = value
    return content


def _no_constant(name: str) -> Any:
    raise StrictJsonError(f"{name} is not JSON")
