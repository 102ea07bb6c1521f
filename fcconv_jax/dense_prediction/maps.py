"""Index maps: which entry of a shared axis each crop sees, and how windows share.

A map is an integer array ``(P, n)``: entry ``[p, i]`` is the place, in an axis that
all crops share, of what crop ``p`` has at its own coordinate ``i``. Everything here is
NumPy on small arrays, done once while a program is traced.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

Map = np.ndarray[Any, np.dtype[np.int64]]
PADDING = -1


def crops(size: int, window: int, stride: int) -> Map:
    """Return the map of an image's axis: every crop sees a stretch of it.

    Example:
      >>> crops(6, 4, 2)
      array([[0, 1, 2, 3],
             [2, 3, 4, 5]])
    """
    starts = np.arange(0, size - window + 1, stride)
    return starts[:, None] + np.arange(window)


def lie_apart(map_: Map, size: int) -> bool:
    """Return whether crops see an axis in stretches that follow one another.

    Example:
      >>> lie_apart(crops(6, 3, 3), 6), lie_apart(crops(6, 4, 2), 6)
      (True, False)
    """
    return map_.size == size and bool((map_.reshape(-1) == np.arange(size)).all())


def distinct(rows: Map) -> tuple[Map, Map]:
    """Return the different rows of a matrix, and for each row which of them it is.

    Example:
      >>> distinct(np.array([[3, 4], [1, 2], [3, 4]]))
      (array([[1, 2],
             [3, 4]]), array([1, 0, 1]))
    """
    # Rows without entries are all the same.
    if rows.shape[1] == 0:
        return rows[:1], np.zeros(len(rows), np.int64)
    ids = np.unique(rows[:, 0], return_inverse=True)[1].reshape(-1)
    for column in rows.T[1:]:
        codes = np.unique(column, return_inverse=True)[1].reshape(-1)
        # Numbered again for each column, so that the products stay small.
        ids = ids * (int(codes.max()) + 1) + codes
        ids = np.unique(ids, return_inverse=True)[1].reshape(-1)
    _, first = np.unique(ids, return_index=True)
    return rows[first], ids


def whole_rows(map_: Map, size: int, length: int) -> tuple[Map, Map]:
    """Cut an axis into rows from its begin on, as a reshape of the whole image does.

    Returns:
      The rows, and for each that a crop sees which of them it is.

    Raises:
      ValueError: crops do not begin where a row does.

    Example:
      >>> rows, ids = whole_rows(crops(9, 4, 2), 9, 2)
      >>> rows.tolist(), ids.tolist()
      ([[0, 1], [2, 3], [4, 5], [6, 7]], [0, 1, 1, 2, 2, 3])
    """
    seen = map_.reshape(-1, length)
    if (np.diff(seen, axis=1) != 1).any() or (seen[:, 0] % length).any():
        raise ValueError(
            f"expected crops a multiple of a reshape's {length} entries apart. Pass a "
            "larger stride."
        )
    count = size // length
    return np.arange(count * length).reshape(count, length), seen[:, 0] // length


@dataclasses.dataclass(frozen=True)
class WindowPasses:
    """An axis laid out so that passes of a window compute all of its outputs.

    Args:
      segments: places of the old axis to read, ``(m, length)`` each: a pass over a
        batch of ``m`` stretches; ``PADDING`` for padding.
      map: for each crop and output, its place in the results of all passes, which are
        set side by side.
      outputs: how many there are.
      stride: of the window in these passes.
    """

    segments: tuple[Map, ...]
    map: Map
    outputs: int
    stride: int

    @functools.cached_property
    def in_place(self) -> int:
        """How much is read as it is: the longest stretch, if it is of the axis."""
        first = self.segments[0]
        inside = first[first != PADDING]
        return inside.size if (np.diff(inside) == 1).all() else 0


def window_passes(
    map_: Map,
    size: int,
    window: int,
    stride: int,
    padding: tuple[int, int],
    holes: int = 1,
) -> list[WindowPasses]:
    """Return ways to lay out an axis for a convolution or pool that all crops share.

    Windows with the same entries are computed once. Windows that follow one another in
    some crop are chained where they can be. The first way sets all chains side by side
    for one pass, which also computes what lies across two chains; another makes a batch
    of the chains of each length. Where windows are stretches of the axis as it is, and
    most of those that there are, the first way is to read it once, with stride 1.

    Args:
      map_: of the axis.
      size: its length.
      window: entries from the first tap to the last.
      stride: between outputs.
      padding: low and high, in each crop; negative numbers cut.
      holes: dilation of the input.

    Example:
      >>> for layout in window_passes(crops(6, 4, 1), 6, 3, 1, (1, 0)):
      ...     print([read.tolist() for read in layout.segments])
      [[[-1, 0, 1, 2, 3, 4, 5, -1, 1, 2, -1, 2, 3]]]
      [[[-1, 0, 1, 2, 3, 4, 5]], [[-1, 1, 2], [-1, 2, 3]]]
    """
    read = _padded(map_, padding, holes)
    count = (read.shape[1] - window) // stride + 1
    starts = np.arange(count) * stride
    windows = read[:, starts[:, None] + np.arange(window)]
    found, ids = distinct(windows.reshape(-1, window))
    ids = ids.reshape(len(map_), count)
    chains = _chains(ids, found, stride)
    # What no window reads may be anything that is there: nothing of it is used.
    fill = int(map_.max()) if map_.size else size - 1
    ways = _ways(found, ids, chains, stride, fill)
    if stride > 1 and (np.diff(found, axis=1) == 1).all() and (found >= 0).all():
        ways.insert(0, _as_it_is(found, ids))
    return ways


def _as_it_is(found: Map, ids: Map) -> WindowPasses:
    first, last = int(found[:, 0].min()), int(found[:, -1].max())
    places = found[:, 0] - first
    take = np.arange(first, last + 1)
    return WindowPasses((take[None],), places[ids], int(places.max()) + 1, 1)


def _ways(
    found: Map, ids: Map, chains: _Chains, stride: int, fill: int
) -> list[WindowPasses]:
    lengths = np.bincount(chains.chain)
    ways = [_side_by_side(found, ids, chains, lengths, stride, fill)]
    # Each length is a pass more, which costs some 0.2 ms on CPU (costs.PASS).
    if len(lengths) > 1 and len(np.unique(lengths)) <= _MOST_SEGMENTS:
        ways.append(_by_length(found, ids, chains, lengths, stride, fill))
    return ways


_MOST_SEGMENTS = 4


def whole_layout(
    map_: Map,
    size: int,
    window: int,
    stride: int,
    padding: tuple[int, int],
    holes: int = 1,
) -> WindowPasses:
    """Lay out an axis for one pass over the whole image, padded around the image.

    Arguments are those of :func:`window_passes`.

    Raises:
      ValueError: crops do not begin where the window's stride leads to.

    Example:
      >>> whole_layout(crops(6, 4, 2), 6, 3, 1, (1, 1)).map
      array([[0, 1, 2, 3],
             [2, 3, 4, 5]])
    """
    low, high = padding
    starts = map_[:, 0] * holes
    length = (map_.shape[1] - 1) * holes + 1
    if (np.diff(map_, axis=1) != 1).any():
        raise ValueError(
            "expected layers that read neighbors in the image, got one behind entries "
            "that were skipped, repeated or reversed. Pass padding='crops'."
        )
    # Other crops see outputs that the sweep over the whole image skips.
    if (starts % stride).any():
        raise ValueError(
            f"expected crops a multiple of a layer's stride {stride} apart. Pass a "
            "larger stride."
        )
    if low < 0 or high < 0:
        raise ValueError(
            f"expected padding of 0 or more, got {padding}. Pass padding='crops'."
        )
    spread = np.full((size - 1) * holes + 1, PADDING)
    spread[::holes] = np.arange(size)
    take = np.pad(spread, (low, high), constant_values=PADDING)
    count = (length + low + high - window) // stride + 1
    places = (starts // stride)[:, None] + np.arange(count)
    outputs = (len(take) - window) // stride + 1
    return WindowPasses((take[None],), places, outputs, stride)


def full_window_layouts(map_: Map) -> list[WindowPasses]:
    """Return ways to lay out an axis for a window over all that a crop sees of it.

    Returns:
      The ways, as of :func:`window_passes`, whose maps have one output for each crop;
      none where no windows overlap.

    Example:
      >>> (layout,) = full_window_layouts(crops(7, 5, 1))
      >>> layout.segments[0].tolist(), layout.map.tolist(), layout.stride
      ([[0, 1, 2, 3, 4, 5, 6]], [[0], [1], [2]], 1)
    """
    found, ids = distinct(map_)
    window = map_.shape[1]
    # The least shift at which a window begins within another one.
    shifts = np.unique(np.nonzero(np.isin(found[:, 1:], found[:, 0]))[1]) + 1
    for stride in shifts.tolist():
        first = {row.tobytes(): i for i, row in enumerate(found[:, : window - stride])}
        follows = np.full(len(found), -1)
        precedes = np.full(len(found), -1)
        for i, row in enumerate(found[:, stride:]):
            after = first.get(row.tobytes(), -1)
            if after not in (-1, i) and precedes[after] < 0:
                follows[i], precedes[after] = after, i
        if (follows >= 0).any():
            _break_cycles(follows, precedes)
            chains = _ranked(precedes, ids)
            return _ways(found, ids[:, None], chains, stride, int(map_.max()))
    return []


@dataclasses.dataclass(frozen=True)
class _Chains:
    """For each window, the chain that it is in and its rank there."""

    chain: Map
    rank: Map


def _side_by_side(
    found: Map, ids: Map, chains: _Chains, lengths: Map, stride: int, fill: int
) -> WindowPasses:
    window = found.shape[1]
    # Rank r of a chain that begins at b reads b + r * stride, ..., + window - 1.
    extents = -(-((lengths - 1) * stride + window) // stride) * stride
    begin = np.concatenate([[0], np.cumsum(extents)[:-1]])
    place = begin[chains.chain] + chains.rank * stride
    total = int(begin[-1] + (lengths[-1] - 1) * stride + window)
    take = np.full(total, _UNREAD, np.int64)
    take[place[:, None] + np.arange(window)] = found
    take = _filled(take[None], fill)[0]
    outputs = (total - window) // stride + 1
    return WindowPasses((take[None],), (place // stride)[ids], outputs, stride)


def _by_length(
    found: Map, ids: Map, chains: _Chains, lengths: Map, stride: int, fill: int
) -> WindowPasses:
    window = found.shape[1]
    heads = np.empty(len(lengths), np.int64)
    heads[chains.chain[chains.rank == 0]] = np.flatnonzero(chains.rank == 0)
    segments, place, offset = [], np.empty(len(found), np.int64), 0
    for length in np.unique(lengths)[::-1]:
        members = np.flatnonzero(lengths == length)
        # Alike strips of all crops lie together, so that they are read by slices.
        members = members[np.lexsort(found[heads[members]].T[::-1])]
        row = np.full(len(lengths), -1)
        row[members] = np.arange(len(members))
        mine = np.flatnonzero(lengths[chains.chain] == length)
        rows, ranks = row[chains.chain[mine]], chains.rank[mine]
        size = (length - 1) * stride + window
        read = np.full((len(members), size), _UNREAD, np.int64)
        read[rows[:, None], (ranks * stride)[:, None] + np.arange(window)] = found[mine]
        segments.append(_filled(read, fill))
        place[mine] = offset + rows * length + ranks
        offset += len(members) * int(length)
    return WindowPasses(tuple(segments), place[ids], offset, stride)


_UNREAD = -2


def _filled(read: Map, fill: int) -> Map:
    """Let what no window reads go on from what is in front of it."""
    for column in range(read.shape[1]):
        after = np.minimum(read[:, column - 1] + 1, fill) if column else fill
        unread = read[:, column] == _UNREAD
        read[:, column] = np.where(unread, after, read[:, column])
    return read


def _padded(map_: Map, padding: tuple[int, int], holes: int) -> Map:
    low, high = padding
    if holes > 1:
        spread = np.full((len(map_), (map_.shape[1] - 1) * holes + 1), PADDING)
        spread[:, ::holes] = map_
        map_ = spread
    map_ = map_[:, max(-low, 0) : map_.shape[1] - max(-high, 0)]
    return np.pad(map_, ((0, 0), (max(low, 0), max(high, 0))), constant_values=PADDING)


def _chains(ids: Map, found: Map, stride: int) -> _Chains:
    """Join windows that follow one another, greedily: first those next to each other.

    What lies in a row already stays in a row, so that what is special to one crop is
    in short chains, of the same lengths for all crops.
    """
    count = len(found)
    pairs = ids[:, :-1].reshape(-1) * count + ids[:, 1:].reshape(-1)
    pairs, often = np.unique(pairs, return_counts=True)
    before, after = pairs // count, pairs % count
    in_a_row = (found[after] - found[before] == stride).all(1)
    in_a_row &= (found[before] >= 0).all(1) & (found[after] >= 0).all(1)
    # Those in a row first, then the most frequent.
    order = np.lexsort((-often, ~in_a_row))
    before, after = before[order], after[order]
    # A window that follows itself, in an axis of one value, would be a cycle.
    keep = before != after
    before, after = before[keep], after[keep]
    follows = np.full(count, -1)
    precedes = np.full(count, -1)
    while len(before):
        first = np.zeros(len(before), bool)
        first[np.unique(before, return_index=True)[1]] = True
        mine = np.flatnonzero(first)
        # Each window has at most one successor and one predecessor.
        mine = mine[np.unique(after[mine], return_index=True)[1]]
        follows[before[mine]], precedes[after[mine]] = after[mine], before[mine]
        left = (follows[before] < 0) & (precedes[after] < 0)
        before, after = before[left], after[left]
    _break_cycles(follows, precedes)
    return _ranked(precedes, ids)


def _break_cycles(follows: Map, precedes: Map) -> None:
    """Cut one link of each cycle."""
    reached = np.zeros(len(follows), bool)
    here = np.flatnonzero(precedes < 0)
    while len(here):
        reached[here] = True
        here = follows[here]
        here = here[here >= 0]
    for start in np.flatnonzero(~reached):
        if reached[start]:
            continue
        node = start
        while not reached[node]:
            reached[node] = True
            node = follows[node]
        last = precedes[start]
        follows[last], precedes[start] = -1, -1


def _ranked(precedes: Map, ids: Map) -> _Chains:
    """Ranks by doubling: in step k each window knows the one 2^k before it."""
    count = len(precedes)
    nodes = np.arange(count)
    rank = (precedes >= 0).astype(np.int64)
    head = np.where(precedes >= 0, precedes, nodes)
    while True:
        further = head[head]
        if (further == head).all():
            break
        rank = rank + rank[head]
        head = further
    # Chains in the order in which the crops first meet them keep neighbours close.
    flat = ids.reshape(-1)
    seen = np.full(count, flat.size)
    np.minimum.at(seen, flat, np.arange(flat.size))
    first = np.full(count, flat.size)
    np.minimum.at(first, head, seen)
    heads = np.flatnonzero(head == nodes)
    order = np.argsort(first[heads], kind="stable")
    number = np.empty(count, np.int64)
    number[heads[order]] = np.arange(len(heads))
    return _Chains(number[head], rank)


def join(maps: list[Map]) -> tuple[Map, list[Map]]:
    """Return one map for values that are combined entry by entry.

    Args:
      maps: of each, ``(P, n)``.

    Returns:
      The map into the combinations that occur, and for each value the places of its
      entries in them. Where one value's entries tell those of all others, its own
      order stays.

    Example:
      >>> map_, places = join([np.array([[0, 1], [1, 2]]), np.array([[0, 0], [1, 1]])])
      >>> map_.tolist(), [p.tolist() for p in places]
      ([[0, 1], [2, 3]], [[0, 1, 1, 2], [0, 0, 1, 1]])
    """
    first = maps[0]
    if all(other is first or np.array_equal(other, first) for other in maps[1:]):
        places = np.arange(int(first.max()) + 1)
        return first, [places] * len(maps)
    flat = np.stack([m.reshape(-1) for m in maps], 1)
    found, ids = distinct(flat)
    for index in range(len(maps)):
        # Every entry of this one goes with one entry of each other.
        if len(np.unique(found[:, index])) == len(found):
            size = int(found[:, index].max()) + 1
            places = []
            for column in found.T:
                place = np.zeros(size, np.int64)
                place[found[:, index]] = column
                places.append(place)
            places[index] = np.arange(size)
            return maps[index], places
    return ids.reshape(first.shape), [found[:, i] for i in range(len(maps))]


def join_whole(maps: list[Map], sizes: list[int]) -> tuple[Map, list[Map]] | None:
    """Return what :func:`join` does, with the entries that no crop sees.

    Layers that are padded around the image read them.

    Args:
      maps: of each, ``(P, n)``.
      sizes: of the axis of each.

    Returns:
      None where crops see one of the axes in another order than the others, or none.

    Example:
      >>> map_, places = join_whole([crops(7, 3, 3), crops(7, 3, 3) + 1], [7, 8])
      >>> map_.tolist(), [p.tolist() for p in places]
      ([[0, 1, 2], [3, 4, 5]], [[0, 1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6, 7]])
    """
    first = maps[0]
    if not first.size:
        return None
    shifts = [int((other - first).min()) for other in maps]
    if any((other - first != shift).any() for other, shift in zip(maps, shifts)):
        return None
    low = max(-shift for shift in shifts)
    high = min(size - shift for size, shift in zip(sizes, shifts))
    places = np.arange(low, high)
    return first - low, [places + shift for shift in shifts]
