"""Tells where in a trace the input of each call of a layer is: by a mark, or known."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from .jaxprs import opened, subjaxprs

_MARK = "fcconv_jax:"
_INPUT = "fcconv_jax.input:"
_OUTPUT = "fcconv_jax.output:"


@dataclasses.dataclass(frozen=True, eq=False)
class Frame:
    """A jaxpr in the context of the equation that calls it.

    One jaxpr may be called from several places (``nn.relu`` is traced once), so
    frames, not jaxprs, tell places apart.
    """

    jaxpr: Any
    parent: Frame | None = None
    call: Any = None
    inner: dict[tuple[int, int], Frame] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def producers(self) -> Mapping[Any, tuple[Any, int]]:
        """What makes each variable: the equation and the number of its output."""
        return {
            var: (eqn, index)
            for eqn in self.jaxpr.eqns
            for index, var in enumerate(eqn.outvars)
        }

    @classmethod
    def of(cls, jaxpr: Any) -> Frame:
        """The frame of a whole trace, as ``jax.make_jaxpr`` returns it."""
        return cls(opened(jaxpr)[0])

    def enter(self, eqn: Any, body: Any) -> Frame:
        """The frame of a jaxpr that an equation of this frame runs."""
        key = (id(eqn), id(body))
        if key not in self.inner:
            self.inner[key] = Frame(opened(body)[0], self, eqn)
        return self.inner[key]


@dataclasses.dataclass(frozen=True, eq=False)
class LayerInput:
    """The input of one call of a layer, as it is in a trace.

    Args:
      number: the call's.
      frame: where the array is.
      var: the array, the axes that the layer saw being its last.
      source: the array that ``var`` is made of; other than ``var`` where it is marked.
    """

    number: int
    frame: Frame
    var: Any
    source: Any


def mark(x: Any, number: int) -> Any:
    """Names an array in the trace, to be found again by its number.

    The axis of size 1 around the name makes ``vmap`` put its axes in front of it,
    wherever the mapped axis was.
    """
    named = checkpoint_name(lax.expand_dims(x, (0,)), f"{_MARK}{number}")
    return lax.squeeze(named, (0,))


def marked(jaxpr: Any) -> Iterator[LayerInput]:
    """Every marked array of a trace, as ``jax.make_jaxpr`` returns it."""
    return _marks(Frame.of(jaxpr))


def _marks(frame: Frame) -> Iterator[LayerInput]:
    for eqn in frame.jaxpr.eqns:
        if is_mark(eqn):
            number = int(eqn.params["name"].removeprefix(_MARK))
            (var,) = eqn.invars
            yield LayerInput(number, frame, var, marked_array(frame, var))
        for _, body in subjaxprs(eqn):
            yield from _marks(frame.enter(eqn, body))


def name_input(path: str, x: Any) -> None:
    """Names a layer's input in the trace; the name is found where the trace is run."""
    _name(f"{_INPUT}{path}", x)


def name_output(path: str, out: Any) -> Any:
    """The output of a module, each of its arrays under the module's name."""
    return jax.tree.map(lambda leaf: _name(f"{_OUTPUT}{path}", leaf), out)


def _name(name: str, x: Any) -> Any:
    return checkpoint_name(x, name) if isinstance(x, jax.Array) else x


def named_inputs(named: Mapping[str, Any]) -> dict[str, Any]:
    """By path, what :func:`name_input` named, of all names in a trace."""
    return _with_prefix(named, _INPUT)


def named_outputs(named: Mapping[str, Any]) -> dict[str, Any]:
    """By path, what :func:`name_output` named, of all names in a trace."""
    return _with_prefix(named, _OUTPUT)


def _with_prefix(named: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        name.removeprefix(prefix): value
        for name, value in named.items()
        if name.startswith(prefix)
    }


def is_mark(eqn: Any) -> bool:
    """Whether an equation names a marked array."""
    return eqn.primitive.name == "name" and eqn.params["name"].startswith(_MARK)


def marked_array(frame: Frame, var: Any) -> Any:
    """The array that went into a mark, given the named one inside."""
    return frame.producers[var][0].invars[0]
