"""A traced program with its matmuls of activations and parameters, and rewriting it.

Every value of the trace gets a tag: it holds the entries of one parameter
(:class:`Weight`), or it is something else (:class:`Other`). A matmul counts as a
layer where one operand is a weight and the other depends on the program's inputs.
:mod:`fcconv_jax.planning.find` finds them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

from jax.ad_checkpoint import checkpoint_name

from ..tracing.jaxprs import AnyJaxpr, bind, evaluate, opened, policy_of, rerun
from ..tracing.protocols import Equation
from .factors import Axis, Factor, axes_of

_SAVED = "fcconv_jax.saved:"


@dataclasses.dataclass(frozen=True)
class Weight:
    """A value that holds entries of one parameter, each once, perhaps scaled.

    Args:
      path: the parameter's path.
      shape: the parameter's shape.
      axes: where each axis of the value steps in the parameter's flat index, see
        :mod:`fcconv_jax.planning.factors`.
      stack: the factors of which a scan or an index took one step.
      sliced: whether the model's own code indexed it, which its other shape may break.
      reader: path of the layer that reads it, if one named it
        (:func:`fcconv_jax.tracing.marks.name_parameter`).
    """

    path: str
    shape: tuple[int, ...]
    axes: tuple[Axis, ...]
    stack: tuple[Factor, ...] = ()
    sliced: bool = False
    reader: str | None = None

    @classmethod
    def leaf(cls, path: str, shape: Sequence[int]) -> Weight:
        """Return the tag of a parameter itself."""
        return cls(path, tuple(shape), axes_of(shape))

    def drop(self, axis: int) -> Weight:
        """Return one step of the axis, without the axis."""
        rest = (*self.axes[:axis], *self.axes[axis + 1 :])
        return dataclasses.replace(
            self, axes=rest, stack=(*self.stack, *self.axes[axis])
        )

    def renamed(self, names: Mapping[str, str]) -> Weight:
        """Return the same entries of a parameter of another name."""
        return dataclasses.replace(self, path=names[self.path])


@dataclasses.dataclass(frozen=True)
class Other:
    """A value that is not a weight.

    Args:
      active: whether it depends on the program's inputs.
      made_of: if it does not: the parameters it is made of, with the equation that
        changed each.
      uniform: whether it is one number everywhere, known from the program alone.
    """

    active: bool = False
    made_of: frozenset[tuple[str, str]] = frozenset()
    uniform: bool = False

    def renamed(self, names: Mapping[str, str]) -> Other:
        """Return the same, of parameters of other names."""
        if not self.made_of:
            return self
        made_of = frozenset((names[path], how) for path, how in self.made_of)
        return dataclasses.replace(self, made_of=made_of)


Tag = Weight | Other
ACTIVE = Other(active=True)
NUMBER = Other(uniform=True)


@dataclasses.dataclass(frozen=True, eq=False)
class Matmul:
    """A ``dot_general`` or convolution whose operand ``side`` is a weight.

    Args:
      eqn: the equation.
      weight: the operand.
      side: its number.
      obstacle: why the matmul cannot take the other form, if so.
      backward: whether it is in the backward pass of a gradient inside the program.
    """

    eqn: Equation
    weight: Weight
    side: int
    obstacle: str | None = None
    backward: bool = False


@dataclasses.dataclass(frozen=True)
class Use:
    """What else happens to a parameter.

    Args:
      path: the parameter.
      reason: what happens, to be read after "it is".
      reported: whether a user would miss the parameter in the plan.
      how: name of the primitive.
      named: whether its layer does it.
      gradient: whether it is a part of a gradient inside the program, or of an update
        with one: it sees the parameter as the program knows it, whatever its form.
    """

    path: str
    reason: str
    reported: bool
    how: str
    named: bool = False
    gradient: bool = False


@dataclasses.dataclass(eq=False)
class Analysis:
    """A jaxpr in the context of one call, with what was found in it.

    Args:
      jaxpr: open or closed.
      outs: the tags of its outputs.
      matmuls: by identity of the equation.
      unweighted: matmuls of no weight with the reason, by identity of the equation.
      inner: the analyses of the bodies of an equation, by its identity.
      uses: other uses of parameters, here and below.
    """

    jaxpr: AnyJaxpr
    outs: list[Tag] = dataclasses.field(default_factory=list)
    matmuls: dict[int, Matmul] = dataclasses.field(default_factory=dict)
    unweighted: dict[int, str] = dataclasses.field(default_factory=dict)
    inner: dict[int, list[Analysis]] = dataclasses.field(default_factory=dict)
    uses: list[Use] = dataclasses.field(default_factory=list)

    def walk(self) -> Iterator[tuple[Equation, Matmul | str]]:
        """Yield every matmul in program order: the equation, and what was found."""
        for eqn in opened(self.jaxpr)[0].eqns:
            # Equations don't compare; the jaxpr keeps them, so identities stay theirs.
            key = id(eqn)
            if key in self.matmuls:
                yield eqn, self.matmuls[key]
            elif key in self.unweighted:
                yield eqn, self.unweighted[key]
            for analysis in self.inner.get(key, ()):
                yield from analysis.walk()

    def renamed(self, names: Mapping[str, str]) -> Analysis:
        """Return the same analysis on parameters of other names."""
        if not names:
            return self
        return Analysis(
            self.jaxpr,
            [tag.renamed(names) for tag in self.outs],
            {
                key: dataclasses.replace(p, weight=p.weight.renamed(names))
                for key, p in self.matmuls.items()
            },
            self.unweighted,
            {key: [p.renamed(names) for p in each] for key, each in self.inner.items()},
            [dataclasses.replace(use, path=names[use.path]) for use in self.uses],
        )


def rewrite(
    analysis: Analysis,
    operands: Sequence[Any],
    wanted: Callable[[Matmul], bool],
    replace: Callable[[Matmul, Sequence[Any]], Any],
    alike: Callable[[Matmul], Hashable] = id,
    bodies: dict[Hashable, Callable[[Sequence[Any]], list[Any]]] | None = None,
    saved: dict[str, Equation] | None = None,
) -> list[Any]:
    """Run a program with other code in place of some of its matmuls.

    Args:
      analysis: what :func:`analyse` found.
      operands: one value for each input.
      wanted: whether to replace a matmul.
      replace: gives the result of a matmul from its operands.
      alike: what ``replace`` looks at in a matmul. A body that is run several times
        with alike matmuls is the same function each time, so that JAX traces it once,
        as it did the original.
      bodies: the functions made so far.
      saved: below a remat with a policy, what takes the replaced matmuls by name: the
        policy is asked about each as it was.

    Returns:
      The outputs. Calls, loops and branches that hold no wanted matmul run as they
      are.
    """
    made = {} if bodies is None else bodies

    def body(
        inner: Analysis, names: dict[str, Equation] | None
    ) -> Callable[[Sequence[Any]], list[Any]]:
        found = tuple(
            (id(eqn), alike(matmul))
            for eqn, matmul in inner.walk()
            if isinstance(matmul, Matmul) and wanted(matmul)
        )

        def run(operands: Sequence[Any]) -> list[Any]:
            return rewrite(inner, operands, wanted, replace, alike, made, names)

        return made.setdefault((id(inner.jaxpr), found, id(names)), run)

    def visit(eqn: Equation, ins: list[Any]) -> Sequence[Any]:
        matmul = analysis.matmuls.get(id(eqn))
        if matmul is not None and wanted(matmul):
            y = replace(matmul, ins)
            if saved is not None:
                name = f"{_SAVED}{id(eqn)}"
                saved[name] = eqn
                y = checkpoint_name(y, name)
            return [y]
        inner = analysis.inner.get(id(eqn), [])
        if any(_holds(each, wanted) for each in inner):
            policy = policy_of(eqn)
            if policy is None:
                return rerun(eqn, ins, [body(each, saved) for each in inner])
            # A policy of its own for each remat: it is asked about its own matmuls.
            names: dict[str, Equation] = {}
            runs = [body(each, names) for each in inner]
            return rerun(eqn, ins, runs, _asking_about(names, policy))
        return bind(eqn, ins)

    return evaluate(analysis.jaxpr, operands, visit)


def _asking_about(
    saved: Mapping[str, Equation], policy: Callable[..., Any]
) -> Callable[..., Any]:
    """Return a remat's policy that is asked about a replaced matmul as it was.

    Policies such as ``dots_saveable`` look for dots. A replaced one is named, and what
    has that name is saved if the policy would have saved the matmul.
    """

    @functools.wraps(policy)
    def ask(primitive: Any, *avals: Any, **params: Any) -> Any:
        eqn = saved.get(params.get("name", "")) if primitive.name == "name" else None
        if eqn is None:
            return policy(primitive, *avals, **params)
        return policy(eqn.primitive, *(v.aval for v in eqn.invars), **eqn.params)

    return ask


def _holds(analysis: Analysis, wanted: Callable[[Matmul], bool]) -> bool:
    return any(
        isinstance(found, Matmul) and wanted(found) for _, found in analysis.walk()
    )
