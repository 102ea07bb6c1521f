"""Whether torchax computes of a Module what PyTorch does, within rounding."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

from ..messages.errors import PlanError
from ..params.leaves import flatten_with_path

torch: Any = import_module("torch")

# How far beyond PyTorch's own rounding another order of the same operations may be:
# one draw of it bounds nothing, and XLA approximates functions to a few ulps.
_BEYOND = 32.0
_ULPS = 256.0
# Indices, such as those of the largest, may differ at ties.
_TIES = 0.01

Outputs = Mapping[str, Any]  # of the Module at "", and of submodules by their paths
# Runs the Module and returns its outputs; with True, those of submodules, too.
Run = Callable[[bool], Outputs]


def require_agreement(
    model: Any, by_torchax: Run, by_torch: Callable[..., Run]
) -> None:
    """Compare a Module's outputs by torchax with PyTorch's in float64.

    PyTorch's own rounding, between float64 and the Module's dtypes, measures what
    rounding may do to the outputs.

    Args:
      model: the Module.
      by_torchax: runs it in its own dtypes.
      by_torch: given whether to widen to float64, what runs it by PyTorch.

    Raises:
      PlanError: they part; names the first submodule that does.
    """
    name = type(model).__name__

    def difference(record: bool) -> tuple[str, str] | None:
        got, own = by_torchax(record), by_torch(False)(record)
        try:
            want = by_torch(True)(record)
        except Exception:  # such as for float32 tensors in a list, which stay
            want = None
        return _first_difference(got, own, want)

    try:
        by_torch(False)(False)
    except Exception as error:
        warnings.warn(
            f"PyTorch itself can't run {name} on these inputs, so torchax's result was "
            f"not compared with it: {type(error).__name__}: {error}",
            stacklevel=2,
        )
        return
    if (found := difference(False)) is None:
        return
    path, far = difference(True) or found
    if path:
        part = model.get_submodule(path)
        path = f" at {path!r} ({type(part).__name__})"
    raise PlanError(
        f"Expected torchax to compute {name} as PyTorch does, got another "
        f"result{path}: {far}. Rewrite that part with other operations, or export the "
        "Module to simpler ones first, and pass the result: torch.export.export(model, "
        "(x,)).run_decompositions().module()."
    )


@contextlib.contextmanager
def after_submodules(
    model: Any, run: Callable[[str, Any], Any], wanted: Callable[[str], bool]
) -> Iterator[None]:
    """Call ``run(path, out)`` on each tensor that a wanted submodule returns.

    Its result takes the place of the tensor, unless it is None.
    """

    def hook(path: str) -> Callable[..., Any]:
        def after(module: Any, args: PyTree, out: Any) -> Any:
            del module, args
            return run(path, out) if isinstance(out, torch.Tensor) else None

        return after

    hooks = [
        each.register_forward_hook(hook(path))
        for path, each in model.named_modules()
        if path and wanted(path)
    ]
    try:
        yield
    finally:
        for each in hooks:
            each.remove()


@contextlib.contextmanager
def recording(model: Any, record: bool) -> Iterator[dict[str, Any]]:
    """Collect the first output of each submodule, in the order of their ends."""
    found: dict[str, Any] = {}

    def keep(path: str, out: Any) -> None:
        if path not in found:
            # What follows may write into it, as ReLU(inplace=True) does.
            found[path] = out.clone()

    with after_submodules(model, keep, lambda path: record):
        yield found


def as_tensors(tree: PyTree, wide: bool) -> PyTree:
    """Return arrays as PyTorch's tensors, integers in its 64 bits.

    Args:
      tree: of arrays and other values.
      wide: whether real numbers become float64, and complex ones complex128.
    """

    def as_tensor(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array | np.ndarray):
            return leaf
        array, dtype = np.asarray(leaf), str(leaf.dtype)
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.complexfloating):
            return torch.tensor(array).to(torch.complex128 if wide else None)
        if jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
            # NumPy's bfloat16 is unknown to PyTorch.
            tensor = torch.tensor(array.astype(np.float64))
            return tensor if wide else tensor.to(getattr(torch, dtype))
        if dtype in ("int32", "uint32"):
            return torch.tensor(array.astype(np.int64))
        return torch.tensor(array)

    return jax.tree.map(as_tensor, tree)


def as_numpy(tensor: Any) -> np.ndarray:
    """Return a tensor as an array: of float64 where it is floating."""
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.double()
    return tensor.resolve_conj().resolve_neg().numpy()


def _first_difference(
    got: Outputs, own: Outputs, want: Outputs | None
) -> tuple[str, str] | None:
    """Return the first path at which outputs differ, and how."""
    for path in own:
        if path not in got:
            continue
        trees = got[path], own[path], own[path] if want is None else want.get(path)
        (mine, _), (theirs, _), (wide, _) = map(flatten_with_path, trees)
        for (at, a), (_, b), (_, c) in zip(mine, theirs, wide):
            if far := _difference(a, np.asarray(b), np.asarray(c), want is None):
                return path, f"{far}{f' in {at}' if at else ''}"
    return None


def _difference(got: Any, own: np.ndarray, want: np.ndarray, narrow: bool) -> str:
    """Return how an array differs beyond rounding; empty where it does not."""
    if got.shape != want.shape:
        return f"the shape {got.shape} instead of {want.shape}"
    dtype = got.dtype
    inexact = jax.numpy.issubdtype(dtype, jax.numpy.inexact)
    if not inexact or not want.size:
        off = np.asarray(got) != want
        ties = (own != want).mean() if want.size else 0.0
        share = off.mean() if want.size else 0.0
        return "" if share <= ties + _TIES else f"{share:.0%} of the entries differ"
    wide = np.complex128 if np.iscomplexobj(want) else np.float64
    got, own = np.asarray(got).astype(wide), own.astype(wide)

    def error(x: np.ndarray) -> float:
        same = (x == want) | (np.isnan(x) & np.isnan(want))
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.abs(np.where(same, 0, x - want)).max()
        # A NaN that PyTorch doesn't compute is farther off than any number.
        return float(np.nan_to_num(far, nan=np.inf))

    # Infinities and NaN must not be the scale that rounding is measured by.
    finite = np.abs(want[np.isfinite(want)])
    scale = float(finite.max()) if finite.size else 0.0
    unit = float(jax.numpy.finfo(dtype).eps)
    # Without float64 nothing measures how the Module magnifies rounding.
    floor = (unit**0.5 if narrow else min(_ULPS * unit, unit**0.5)) * scale
    if (far := error(got)) <= _BEYOND * error(own) + floor:
        return ""
    return f"off by {far:.1e} where values are up to {scale:.1e}"
