"""Computes the interactive page's data: `explain` and windows of small geometries.

To keep the file small, sentences that differ only in their numbers are stored once,
and each number as the name of a quantity that equals it in every geometry with that
sentence. Every text is reassembled and compared before the file is written.
"""

from __future__ import annotations

import collections
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import fcconv_jax as fc
from fcconv_jax.geometry.convolution import resolve_geometry

# Upper limits of the sliders. The lower limit is 1, and 0 for the padding.
LIMITS = {
    1: {"input": 8, "kernel": 8, "stride": 4, "padding": 3, "dilation": 3, "groups": 3},
    2: {"input": 7, "kernel": 7, "stride": 3, "padding": 3, "dilation": 2, "groups": 2},
}
PRESETS = (
    ("kernel = input", 2, "2,2", "2,2", 1, 0, 1, 1),
    ("kernel 1x1", 2, "2,2", "1,1", 1, 0, 1, 1),
    ("exercise 12-1: a stride", 2, "2,2", "2,2", 2, 0, 1, 1),
    ("exercise 12-2: padding", 2, "2,2", "2,2", 1, 1, 1, 1),
    ("both at once", 2, "2,2", "2,2", 2, 1, 1, 1),
    ("a 7x7 map, as in VGG16", 2, "7,7", "7,7", 1, 0, 1, 1),
    ("kernel = stride: patches", 2, "4,4", "2,2", 2, 0, 1, 1),
    ("two groups", 2, "2,2", "2,2", 1, 0, 1, 2),
    ("an ordinary 3x3", 2, "5,5", "3,3", 1, 1, 1, 1),
    ("1-D, padded", 1, "6", "3", 1, 2, 1, 1),
)
Key = tuple[int, ...]
# A dimension's number selects the other quantities, so it stays in the sentence.
_NUMBER = re.compile(r"(?<!dimension )(?<!\d)\d+")


def keys(rank: int) -> Iterator[Key]:
    """Yield the page's geometries: input and kernel sizes, then the four others."""
    limits = LIMITS[rank]
    sizes = [range(1, limits["input"] + 1)] * rank
    kernels = [range(1, limits["kernel"] + 1)] * rank
    rest = [
        range(0 if name == "padding" else 1, limits[name] + 1)
        for name in ("stride", "padding", "dilation", "groups")
    ]
    return itertools.product(*sizes, *kernels, *rest)


def text_of(rank: int, key: Key) -> str:
    """Return the text of `explain` for a geometry, or of the error."""
    size, kernel = key[:rank], key[rank : 2 * rank]
    stride, padding, dilation, groups = key[2 * rank :]
    try:
        return fc.explain(
            fc.classify(size, kernel, stride, padding, 1, dilation, groups)
        )
    except ValueError as error:
        return str(error)


def quantities(rank: int, key: Key) -> dict[str, int]:
    """Return the named quantities of a geometry, which chapter.js computes, too."""
    size, kernel = key[:rank], key[rank : 2 * rank]
    stride, padding, dilation, groups = key[2 * rank :]
    found = {
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    found["offset"] = padding // stride
    totals = {"inputs": 1, "taps": 1, "outputs": 1}
    for axis, (n, k) in enumerate(zip(size, kernel)):
        padded, extent = n + 2 * padding, (k - 1) * dilation + 1
        output = max((padded - extent) // stride + 1, 0)
        mine = {
            "size": n,
            "kernel": k,
            "output": output,
            "unpadded": max((n - extent) // stride + 1, 0),
            "padded": padded,
            "extent": extent,
            "covered": output * k,
        }
        found |= {f"{name}{axis}": value for name, value in mine.items()}
        for total, value in zip(totals, (n, k, output)):
            totals[total] *= value
    return {**found, **totals}


def slots(texts: Mapping[Key, str], rank: int) -> tuple[list[list[Any]], list[int]]:
    """Return the sentences with named numbers, and the sentence of each geometry.

    Raises:
      ValueError: No quantity equals a number in all geometries of its sentence.
    """
    alike: dict[str, list[Key]] = collections.defaultdict(list)
    for key, text in texts.items():
        alike[_NUMBER.sub("#", text)].append(key)
    known = {key: quantities(rank, key) for key in texts}
    sentences: list[list[Any]] = []
    for pattern, members in alike.items():
        numbers = [list(map(int, _NUMBER.findall(texts[key]))) for key in members]
        names: list[str | int] = []
        for column in zip(*numbers):
            if len(set(column)) == 1:
                names.append(column[0])
                continue
            equal = (
                name
                for name in known[members[0]]
                if all(known[k][name] == n for k, n in zip(members, column))
            )
            name = next(equal, None)
            if name is None:
                raise ValueError(f"no quantity is number {len(names)} of {pattern!r}")
            names.append(name)
        sentences.append([pattern, *names])
    places = {pattern: number for number, pattern in enumerate(alike)}
    which = [places[_NUMBER.sub("#", text)] for text in texts.values()]
    for (key, text), number in zip(texts.items(), which):
        assert filled(sentences[number], known[key]) == text, (key, text)
    return sentences, which


def filled(sentence: list[Any], numbers: Mapping[str, int]) -> str:
    """Return a sentence with its numbers, as chapter.js assembles it."""
    pattern, *names = sentence
    parts = pattern.split("#")
    values = [n if isinstance(n, int) else numbers[n] for n in names]
    return parts[0] + "".join(f"{v}{part}" for v, part in zip(values, parts[1:]))


def windows() -> dict[str, str]:
    """Map "size,kernel,stride,padding,dilation" to the input that each tap reads.

    A window is a word with one letter per tap: the number of the input, or ``.`` for
    padding.
    """
    limits = {n: max(LIMITS[1][n], LIMITS[2][n]) for n in LIMITS[1]}
    found = {}
    for size, kernel, stride, padding, dilation in itertools.product(
        range(1, limits["input"] + 1),
        range(1, limits["kernel"] + 1),
        range(1, limits["stride"] + 1),
        range(limits["padding"] + 1),
        range(1, limits["dilation"] + 1),
    ):
        try:
            geometry = resolve_geometry(size, kernel, stride, padding, 1, dilation)
        except ValueError:
            continue
        words = (
            "".join("." if i is None else str(i) for i in w) for w in geometry.reads(0)
        )
        found[f"{size},{kernel},{stride},{padding},{dilation}"] = " ".join(words)
    return found


def as_script() -> str:
    """Return the data as a script: a page opened from a file can't load JSON."""
    content: dict[str, Any] = {"limits": LIMITS, "windows": windows(), "ranks": {}}
    content["presets"] = [
        {
            "name": name,
            "rank": rank,
            "key": [*map(int, size.split(",")), *map(int, kernel.split(",")), *rest],
        }
        for name, rank, size, kernel, *rest in PRESETS
    ]
    for rank in LIMITS:
        texts = {key: text_of(rank, key) for key in keys(rank)}
        sentences, which = slots(texts, rank)
        assert len(sentences) < 36**2
        assert len(which) == math.prod(len(set(column)) for column in zip(*texts))
        content["ranks"][rank] = {
            "sentences": sentences,
            "which": "".join(_base36(number) for number in which),
        }
    return f"window.FCCONV_CHAPTER = {json.dumps(content, separators=(',', ':'))};\n"


def _base36(number: int) -> str:
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"
    return digits[number // 36] + digits[number % 36]
