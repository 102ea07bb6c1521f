"""Images of any size, tile by tile: reading, computing and writing overlap."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from ..backends.options import correct_options, pool_options
from ..messages.errors import ImageError
from ..messages.progress import ProgressOption, shown
from ..tracing import arguments
from .mapped import release
from .mask import Mask, check_holds_nan
from .program import AllCrops
from .resume import FinishedTiles, identity
from .tiles import Place, Sliced, dtype_of, one_window, read_part, shard_of, tiles_of

# Tiles that are read ahead, and tiles that wait to be written.
_AHEAD = 2


class TilesWritten(NamedTuple):
    """Counts of the tiles of a run of :meth:`fcconv_jax.Slide.write`.

    Attributes:
      tiles: how many this process wrote, or found written.
      skipped: those in which the mask has no pixel; they hold NaN.
      resumed: those that an earlier run had finished.
    """

    tiles: int
    skipped: int
    resumed: int


@dataclasses.dataclass(frozen=True)
class WriteOptions:
    """Options of :meth:`fcconv_jax.Slide.write`, which describes them."""

    memory: int
    resume: str | Path | None = None
    progress: ProgressOption = None
    mask: Sliced | None = None
    whole_windows: bool = False
    mesh: Mesh | None = None

    def check(self) -> None:
        """Refuse values of another type, before any work.

        Raises:
          ValueError: names the option.
        """
        kinds = {
            "memory": (int, np.integer),
            "resume": (str, os.PathLike, type(None)),
            "mesh": (Mesh, type(None)),
        }
        meant = {
            "memory": "a number of bytes, such as 2**30",
            "resume": "the path of a file",
            "mesh": "a jax.sharding.Mesh",
        }
        for name, kind in kinds.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise ValueError(
                    f"{name}: expected {meant[name]}, got {value!r:.60}. Pass that, or "
                    f"drop {name}=."
                )


class _Read(NamedTuple):
    """A tile as it was read: no pixels where the mask has none."""

    number: int
    place: Place
    wanted: np.ndarray[Any, Any] | None
    pixels: Any

    @property
    def evidence(self) -> list[Any]:
        """What decides its result, for the record."""
        return [self.pixels] if self.wanted is None else [self.pixels, self.wanted]


def write_tiles(
    grid: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    out: PyTree,
    options: WriteOptions,
) -> TilesWritten:
    """Write the result of :meth:`fcconv_jax.Slide.write`, whose arguments these are."""
    *before, images = args
    if grid.padding != "crops":
        raise ValueError(
            "Expected padding='crops' to write tiles, got padding='image', which would "
            "pad each tile. Pass padding='crops', which is exact."
        )
    if not hasattr(images, "shape") or not hasattr(images, "dtype"):
        raise TypeError(
            "Expected images with a shape and a dtype as the last positional argument, "
            f"got {type(images).__name__}. Pass numpy.asarray(images)."
        )
    program = grid._program([*before, one_window(grid, images)], kwargs)
    stride = program.stride
    grid = type(grid)(grid.function, grid.window, stride, grid.axes, grid.padding)
    tiles = tiles_of(program, images, out, options.memory)
    mask = None
    if options.mask is not None:
        sizes = [images.shape[axis] for axis in grid.axes]
        mask = Mask(options.mask, sizes, tiles, options.whole_windows)
        check_holds_nan(out)
    devices, rank, hosts = _workers(options.mesh)
    mine = tiles.of_writer(shard_of(out, len(stride)), rank, hosts)
    record = None
    if options.resume is not None:
        run = identity(program, (before, kwargs), images, tiles.tile)
        # Which mask it is, the tiles tell.
        run["mask"] = "none" if mask is None else "given"
        file = Path(options.resume)
        if hosts > 1:  # each has its own record
            run["processes"] = f"{rank} of {hosts}"
            file = file.with_name(f"{file.name}.{rank}")
        record = FinishedTiles(file, run, len(tiles.starts))

    def read(number: int) -> _Read:
        place = tiles.place(number)
        wanted = None if mask is None else mask.wanted(place)
        if wanted is not None and not wanted.any():
            return _Read(number, place, wanted, None)
        return _Read(number, place, wanted, read_part(images, place.read))

    with shown(options.progress) as show:
        # Finished tiles are compared with the record before any other is computed.
        finished = [] if record is None else sorted(set(record.tiles) & set(mine))
        for number in finished:
            assert record is not None
            done = read(number)
            record.check(number, done.evidence, _written(out, done.place.new))
        todo = [number for number in mine if number not in set(finished)]
        tile = dataclasses.replace(program, images=tiles.image(images))
        compute = _compute(grid, before, kwargs, devices, tile)
        writer = _Writer(out, record)
        count, skipped = len(finished), 0
        show("tiles", count, len(mine))
        with _Ahead(read, todo) as parts:
            for tile in _written_behind(compute(parts), writer):
                count += 1
                skipped += tile.pixels is None
                show("tiles", count, len(mine))
    if hosts > 1:
        # When any process returns, all have written their tiles: the output is
        # complete.
        multihost_utils.sync_global_devices("fcconv_jax.slide")
    if record is not None:
        record.remove()
    return TilesWritten(len(mine), skipped, len(finished))


def _workers(mesh: Mesh | None) -> tuple[list[Any], int, int]:
    """Return this process's devices in a mesh, its number, and of how many.

    Raises:
      ValueError: it has none, or some process of the program has none.
    """
    if mesh is None:
        return [], 0, 1
    devices = list(mesh.devices.flat)
    hosts = sorted({device.process_index for device in devices})
    here = jax.process_index()
    if here not in hosts or (len(hosts) > 1 and len(hosts) < jax.process_count()):
        raise ValueError(
            f"mesh: expected devices of this process alone or of all "
            f"{jax.process_count()} processes, got devices of {hosts}. Pass "
            "jax.sharding.Mesh(jax.devices(), ('tiles',)) in every process."
        )
    mine = [device for device in devices if device.process_index == here]
    return mine, hosts.index(here), len(hosts)


class _Ahead:
    """Read tiles in a thread, a few before they are needed.

    Args:
      read: reads one.
      numbers: of the tiles.
    """

    def __init__(self, read: Callable[[int], _Read], numbers: Iterable[int]):
        self._read, self._numbers = read, iter(numbers)
        self._pool = ThreadPoolExecutor(1, "fcconv-read")

    def __enter__(self) -> Iterator[_Read]:
        return self._parts()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def _parts(self) -> Iterator[_Read]:
        waiting: collections.deque[Any] = collections.deque()
        for number in self._numbers:
            waiting.append(self._pool.submit(self._read, number))
            if len(waiting) >= _AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


_Computed = tuple[list[_Read], Any]


def _compute(
    grid: Any,
    before: Sequence[Any],
    kwargs: Mapping[str, Any],
    devices: Sequence[Any],
    program: AllCrops,
) -> Callable[[Iterator[_Read]], Iterator[_Computed]]:
    """Return what computes tiles, in groups of one for each device.

    One program runs at a time, so that ``memory`` bounds it; the next tiles are on the
    device by then. What it yields may still be computed.
    """
    size = max(len(devices), 1)
    if size > 1:
        guarded = program.needs_guard
        put, call = _on_devices(grid, before, kwargs, devices, guarded)
    else:
        put, call = _on_one_device(grid, before, kwargs, devices)

    def computed(parts: Iterator[_Read]) -> Iterator[_Computed]:
        running: _Computed | None = None
        for group in _grouped(parts, size):
            if group[0].pixels is None:
                yield group, None
                continue
            pixels = [each.pixels for each in group]
            # The last group may be smaller; one program serves all.
            placed = put(pixels + pixels[:1] * (size - len(pixels)))
            if running is not None:
                jax.block_until_ready(running[1])
            ready, running = running, (group, call(placed))
            if ready is not None:
                yield ready
        if running is not None:
            yield running

    return computed


def _grouped(parts: Iterator[_Read], size: int) -> Iterator[list[_Read]]:
    """Yield groups of tiles to compute, and those without pixels alone."""
    group = []
    for part in parts:
        if part.pixels is None:
            yield [part]
            continue
        group.append(part)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _on_one_device(
    grid: Any, before: Sequence[Any], kwargs: Mapping[str, Any], devices: Sequence[Any]
) -> tuple[Callable[[Sequence[Any]], Any], Callable[[Any], Any]]:
    to = devices[0] if devices else None
    leaves, static = arguments.split((tuple(before), dict(kwargs)))
    before, kwargs = static.merge(jax.device_put(leaves, to))  # once, not by the tile

    def put(pixels: Sequence[Any]) -> Any:
        return jax.device_put(pixels[0], to)

    def call(pixels: Any) -> Any:
        return [jax.tree.leaves(grid(*before, pixels, **kwargs))]

    return put, call


def _on_devices(
    grid: Any,
    before: Sequence[Any],
    kwargs: Mapping[str, Any],
    devices: Sequence[Any],
    guarded: bool,
) -> tuple[Callable[[Sequence[Any]], Any], Callable[[Any], Any]]:
    """Return what places tiles on devices, and what computes them, one on each.

    Each device runs the program of one tile, so the results are those of one device,
    and nothing is exchanged.
    """
    mesh = Mesh(np.array(devices), ("tiles",))
    one_each = PartitionSpec("tiles")
    leaves, static = arguments.split((tuple(before), dict(kwargs)))
    leaves = jax.device_put(leaves, NamedSharding(mesh, PartitionSpec()))

    def run(leaves: PyTree, pixels: Any) -> Any:
        before, kwargs = static.merge(leaves)
        out = grid._run(*before, pixels[0], **kwargs)
        return [leaf[None] for leaf in jax.tree.leaves(out)]

    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(PartitionSpec(), one_each),
        out_specs=one_each,
        check_vma=False,
    )
    options = (pool_options if guarded else correct_options)(devices[0].platform)
    jitted = jax.jit(sharded, compiler_options=options or None)

    def put(pixels: Sequence[Any]) -> Any:
        shape = (len(devices), *pixels[0].shape)
        parts = [jax.device_put(x[None], d) for x, d in zip(pixels, devices)]
        return jax.make_array_from_single_device_arrays(
            shape, NamedSharding(mesh, one_each), parts
        )

    def call(pixels: Any) -> Any:
        outs = [_by_device(leaf) for leaf in jitted(leaves, pixels)]
        return list(zip(*outs))

    return put, call


def _by_device(out: PyTree) -> list[Any]:
    """Return the part of an array on each device, in the order of the tiles."""
    shards = sorted(out.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [shard.data for shard in shards]


class _Writer:
    """Writes tiles as they come.

    Args:
      out: the targets.
      record: of the finished tiles, if there is one.
    """

    def __init__(self, out: PyTree, record: FinishedTiles | None):
        self._targets, self._record = jax.tree.leaves(out), record

    def write(self, tile: _Read, values: Sequence[Any] | None) -> _Read:
        """Write a tile's values; None for NaN everywhere."""
        for number, target in enumerate(self._targets):
            if values is None:
                target[tile.place.new] = np.full(
                    _shape(target, tile), np.nan, dtype_of(target)
                )
                release(target)
                continue
            # A tile of several devices has an axis for them.
            found = np.asarray(values[number])
            found = found.reshape(found.shape[found.ndim - len(target.shape) :])
            if tile.wanted is not None:
                free = found.ndim - 1 - tile.wanted.ndim
                where = tile.wanted.reshape(1, *tile.wanted.shape, *(1,) * free)
                found = np.where(where, found, np.asarray(np.nan, found.dtype))
            target[tile.place.new] = found[tile.place.inner]
            release(target)
        # The record follows the pixels: after a crash it must name no tile whose result
        # isn't on disk.
        if self._record is not None and values is not None:
            for target in self._targets:
                if hasattr(target, "flush"):
                    target.flush()
            written = _written(self._targets, tile.place.new)
            self._record.add(tile.number, tile.evidence, written)
        return tile


def _written_behind(computed: Iterator[_Computed], writer: _Writer) -> Iterator[_Read]:
    """Write in a thread; yield each tile once it is written."""
    pool = ThreadPoolExecutor(1, "fcconv-write")
    waiting: collections.deque[Any] = collections.deque()
    try:
        for group, outs in computed:
            for number, tile in enumerate(group):
                values = None if outs is None else outs[number]
                waiting.append(pool.submit(writer.write, tile, values))
            while len(waiting) > _AHEAD * len(group):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _shape(target: Any, tile: _Read) -> tuple[int, ...]:
    new = [
        len(range(*each.indices(size)))
        for each, size in zip(tile.place.new, target.shape)
    ]
    return (*new, *target.shape[len(new) :])


def _written(out: PyTree, where: tuple[slice, ...]) -> list[Any]:
    try:
        return [read_part(target, where) for target in jax.tree.leaves(out)]
    except Exception as error:  # libraries raise what they like for damaged chunks
        said = (str(error) or type(error).__name__).splitlines()[0]
        raise ImageError(
            f"out: the output can't be read back ({said}). Remove the record of the "
            "stopped run, and pass a new output."
        ) from error
