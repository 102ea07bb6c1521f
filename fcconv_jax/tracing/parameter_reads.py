"""Follows parameters forward through a trace: which layers read them, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .jaxprs import Literal, call_body, opened, scan_parts

_MARK = "fcconv_jax parameter:"
# They keep shape and meaning, so a parameter of another shape passes through as well.
_TRANSPARENT = {"convert_element_type", "copy", "copy_p", "optimization_barrier"}
_WITH_RULES_OF_THEIR_OWN = {
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
}


@dataclasses.dataclass
class Uses:
    """What a trace does with one parameter.

    Args:
      layers: number and parameter name of each marked read, with the axes of the
        stored array that transforms had removed by then, outermost first.
      others: names of the primitives that read it without a mark.
    """

    layers: dict[tuple[int, str], set[tuple[int, ...]]] = dataclasses.field(
        default_factory=dict
    )
    others: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class _Track:
    """A parameter on its way: its number, and which of its axes are still there.

    ``axes`` names each axis of the array by its number in the stored one, None for a
    new axis of size 1; ``removed`` are the axes that scans took off, outermost first.
    """

    leaf: int
    axes: tuple[int | None, ...]
    removed: tuple[int, ...] = ()


def mark_parameter(array: Any, number: int, name: str) -> Any:
    """Names the array that a layer reads as its parameter ``name`` in call ``number``.

    The axis of size 1 makes ``vmap`` put its axes in front of it.
    """
    named = checkpoint_name(lax.expand_dims(array, (0,)), f"{_MARK}{number}:{name}")
    return lax.squeeze(named, (0,))


def find_uses(jaxpr: Any, leaves: Sequence[int]) -> Mapping[int, Uses]:
    """What a trace does with some of its inputs.

    Args:
      jaxpr: as ``jax.make_jaxpr`` returns it.
      leaves: numbers of the inputs to follow.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> def f(w, x):
      ...     return x @ mark_parameter(w, 7, "kernel") + w.sum()
      >>> uses = find_uses(jax.make_jaxpr(f)(jnp.ones((3, 3)), jnp.ones((2, 3))), [0])
      >>> uses[0].layers, uses[0].others
      ({(7, 'kernel'): {()}}, ['reduce_sum'])
    """
    body, _ = opened(jaxpr)
    found = {leaf: Uses() for leaf in leaves}
    tracked = {
        body.invars[leaf]: _Track(leaf, tuple(range(len(body.invars[leaf].aval.shape))))
        for leaf in leaves
    }
    _visit(body, tracked, found)
    return found


def _visit(body: Any, tracked: dict[Any, _Track], found: Mapping[int, Uses]) -> None:
    """Follows the tracked variables of a jaxpr; adds those that they become."""
    for eqn in body.eqns:
        tracks = [
            None if isinstance(v, Literal) else tracked.get(v) for v in eqn.invars
        ]
        if not any(tracks):
            continue
        outs = _through(eqn, tracks, found)
        if outs is None:
            for track in filter(None, tracks):
                found[track.leaf].others.append(eqn.primitive.name)
            continue
        tracked.update({v: t for v, t in zip(eqn.outvars, outs) if t is not None})


def _through(
    eqn: Any, tracks: Sequence[_Track | None], found: Mapping[int, Uses]
) -> Sequence[_Track | None] | None:
    """The tracks of an equation's outputs; None where it uses a parameter itself."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return _through_scan(eqn, tracks, found)
    if name == "while":
        return _through_while(eqn, tracks, found)
    if name == "cond":
        if tracks[0] is not None:
            return None
        outs = [_run(b, tracks[1:], found) for b in params["branches"]]
        return [ts[0] if len(set(ts)) == 1 else None for ts in zip(*outs)]
    if name in _WITH_RULES_OF_THEIR_OWN:
        return None
    if (inner := call_body(eqn)) is not None:
        return _run(inner, tracks, found)
    track = tracks[0]
    if track is None or len(tracks) > 1:
        return None
    if name == "name":
        if not params["name"].startswith(_MARK):
            return [track]
        return _read(track, params["name"].removeprefix(_MARK), found)
    if name in _TRANSPARENT:
        return [track]
    if name == "transpose":
        axes = tuple(track.axes[axis] for axis in params["permutation"])
        return [dataclasses.replace(track, axes=axes)]
    if name == "broadcast_in_dim":
        places = params["broadcast_dimensions"]
        before, after = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
        placed: list[int | None] = [None] * len(after)
        for axis, place in enumerate(places):
            placed[place] = track.axes[axis]
        kept = tuple(after[place] for place in places) == tuple(before)
        if kept and all(after[i] == 1 for i in range(len(after)) if i not in places):
            return [dataclasses.replace(track, axes=tuple(placed))]
    return None


def _read(
    track: _Track, mark: str, found: Mapping[int, Uses]
) -> Sequence[_Track | None] | None:
    """Notes a marked read; axes that ``vmap`` mapped stand in front of the new one."""
    number, _, name = mark.partition(":")
    new = track.axes.index(None)
    mapped, rest = track.axes[:new], track.axes[new + 1 :]
    if None in rest or list(rest) != sorted(a for a in rest if a is not None):
        return None
    removed = tuple(a for a in (*track.removed, *mapped) if a is not None)
    found[track.leaf].layers.setdefault((int(number), name), set()).add(removed)
    return [None]


def _run(
    inner: Any, tracks: Sequence[_Track | None], found: Mapping[int, Uses]
) -> list[_Track | None]:
    """The tracks of a sub-jaxpr's outputs, given those of its inputs."""
    body, _ = opened(inner)
    tracked = {v: t for v, t in zip(body.invars, tracks) if t is not None}
    _visit(body, tracked, found)
    return [None if isinstance(v, Literal) else tracked.get(v) for v in body.outvars]


def _through_scan(
    eqn: Any, tracks: Sequence[_Track | None], found: Mapping[int, Uses]
) -> Sequence[_Track | None] | None:
    consts, carry = scan_parts(eqn)
    inner = list(tracks)
    for i, track in enumerate(tracks):
        if i >= consts + carry and track is not None:
            if not track.axes or track.axes[0] is None:
                return None
            removed = (*track.removed, track.axes[0])
            inner[i] = _Track(track.leaf, track.axes[1:], removed)
    outs = _run(eqn.params["jaxpr"], inner, found)
    if outs[:carry] != inner[consts : consts + carry]:
        return None  # what the loop carries on is no longer the parameter
    stacked: list[_Track | None] = []
    for track in outs[carry:]:
        whole = None
        if track is not None and track.removed:
            axes = (track.removed[-1], *track.axes)
            whole = _Track(track.leaf, axes, track.removed[:-1])
        # The slice of the parameter itself, and not one of an outer loop's.
        stacked.append(whole if whole in tracks[consts + carry :] else None)
    return [*outs[:carry], *stacked]


def _through_while(
    eqn: Any, tracks: Sequence[_Track | None], found: Mapping[int, Uses]
) -> Sequence[_Track | None] | None:
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    carry = list(tracks[first + second :])
    _run(eqn.params["cond_jaxpr"], [*tracks[:first], *carry], found)
    outs = _run(eqn.params["body_jaxpr"], [*tracks[first:]], found)
    return outs if outs == carry else None
