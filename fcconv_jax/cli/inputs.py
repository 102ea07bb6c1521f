"""Parses arguments of the command line: models, inputs, keyword arguments, sizes."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import importlib.util
import inspect
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax
    from jaxtyping import PyTree


class ArgumentError(ValueError):
    """A command's argument is invalid; names it, its value and a fix."""


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model as ``MODULE:NAME`` names it."""

    model: Any
    params: PyTree = None
    # Its class was called with random numbers, most likely for its params.
    drawn: bool = False


def load_model(text: str) -> LoadedModel:
    """Import the model that ``MODULE:NAME`` names.

    Args:
      text: a module (``pkg.mod:NAME``, looked for in the current directory first) or
        a file (``path/to/file.py:NAME``). NAME is a linen or NNX Module, a class of
        one that needs no arguments (but ``rngs``), or a function without arguments
        that makes one, or makes a function of params and inputs and its params.

    Raises:
      ArgumentError: the module or name doesn't exist, or isn't a model. What
        the module's own code raises comes through as it is.
    """
    from ..frontends.bind import frontend_of_class, is_model

    where, _, name = text.rpartition(":")
    if not where or not name:
        raise ArgumentError(
            "Expected MODULE:NAME, such as 'pkg.model:Net' or 'path/to/model.py:Net', "
            f"got {text!r}. Pass the file and, behind a colon, the model's name."
        )
    module = _import(where)
    value: Any = module
    for part in name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:
            raise ArgumentError(
                f"{where} has no {name!r}. Pass one of its names: "
                f"{', '.join(_offers(module)) or '-'}."
            ) from None
    if is_model(value):
        return LoadedModel(value)
    if not callable(value) or is_model(_inside(value)):
        wanted = _WANTED_OF_A_WRAPPER if is_model(_inside(value)) else _WANTED
        raise ArgumentError(
            f"Expected a model, got {text}, a {type(value).__name__}. {wanted}"
        )
    frontend = frontend_of_class(value)
    kind: Any = value
    options = {} if frontend is None else frontend.class_options(kind)
    try:
        inspect.signature(value).bind(**options)
    except TypeError as error:
        raise ArgumentError(
            f"{text} can't be called without arguments: {error}. {_WANTED}"
        ) from None
    model = value(**options)
    if isinstance(model, tuple) and len(model) == 2 and callable(model[0]):
        return LoadedModel(*model)
    if not is_model(model):
        wanted = _WANTED_OF_A_WRAPPER if is_model(_inside(model)) else _WANTED
        raise ArgumentError(
            f"Expected a model, got {text}, which returns a {type(model).__name__}. "
            f"{wanted}"
        )
    return LoadedModel(model, drawn=bool(options))


_WANTED = (
    "Pass a linen or NNX Module, a Module class without required arguments (except "
    "rngs), or a function without arguments that returns a Module or (function, "
    "params)."
)
# Hugging Face's Flax models take keyword arguments of their own and return objects.
_WANTED_OF_A_WRAPPER = (
    "It wraps a Module and its params: pass a function that returns its call and its "
    "params, def make(): m = ...; return (lambda params, ids: m(ids, "
    "params=params).last_hidden_state), m.params"
)


def _inside(value: Any) -> Any:
    """Return the Module in a wrapper that has params, too; None for anything else."""
    whole = hasattr(value, "params") and not isinstance(value, type)
    return getattr(value, "module", None) if whole else None


def _import(where: str) -> ModuleType:
    """Import a module or a file, with the current directory on the path."""
    file = Path(where) if where.endswith(".py") else None
    folders = [os.getcwd(), *([str(file.resolve().parent)] if file else [])]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    if file is None:
        try:
            module = importlib.import_module(where)
            if getattr(module, "__file__", "") is None:  # of a folder without code
                raise ArgumentError(
                    f"Expected a module or a file, got the folder {where}. Pass the "
                    "file of the model, as in 'path/to/model.py:Net'."
                )
            return module
        except ModuleNotFoundError as error:
            missing = error.name or ""
            # The model's own import failed: its error says more than ours would.
            if where != missing and not where.startswith(f"{missing}."):
                raise
            raise ArgumentError(
                f"No module {missing!r} in {os.getcwd()} or among the installed ones. "
                "Pass a file with its suffix, as in 'path/to/model.py:Net'."
            ) from None
    if not file.is_file():
        raise ArgumentError(
            f"{file}: no such file. Pass the path of the model's file, as in "
            "'path/to/model.py:Net'."
        )
    # A name of its own: model.py must not pass for an installed module "model".
    spec = importlib.util.spec_from_file_location(f"fcconv_file_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, linen Modules among them, look their own module up here.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _offers(module: ModuleType) -> list[str]:
    """Return the names in a module that may be or make a model."""
    from ..frontends.bind import frontend_of_class, is_model

    def makes_one(value: object) -> bool:
        # Imported there from elsewhere, such as nn.Dense.
        if getattr(value, "__module__", None) != module.__name__:
            return False
        return inspect.isfunction(value) or frontend_of_class(value) is not None

    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and (is_model(value) or makes_one(value))
    ]


def parse_input(text: str) -> jax.ShapeDtypeStruct:
    """Read ``SHAPE[:DTYPE]``.

    Raises:
      ArgumentError: the text has another form, or the dtype needs 64-bit JAX.

    Example:
      >>> parse_input("2,16:int32")
      ShapeDtypeStruct(shape=(2, 16), dtype=int32)
      >>> parse_input("").shape
      ()
    """
    import jax
    import numpy as np

    sizes, _, name = text.partition(":")
    try:
        shape = tuple(map(int, re.split("[x,]", sizes))) if sizes else ()
        dtype = np.dtype(name or "float32")
        if min(shape, default=0) < 0 or dtype.kind not in "biufcV":
            raise ValueError("a negative size, or no numbers")
    except (ValueError, TypeError):
        raise ArgumentError(
            "--input: expected SHAPE[:DTYPE], such as '1,28,28,1' or '2,16:int32', got "
            f"{text!r}. Pass sizes separated by commas, the batch first."
        ) from None
    # JAX would cut them to 32 bits, with a warning at most.
    wide = dtype.name in ("float64", "int64", "uint64", "complex128")
    if wide and not jax.config.read("jax_enable_x64"):
        raise ArgumentError(
            f"--input: expected a dtype of 32 bits or fewer, got {text!r}. Set "
            "JAX_ENABLE_X64=1 to enable 64-bit types."
        )
    return jax.ShapeDtypeStruct(shape, dtype)


def random_inputs(specs: Sequence[jax.ShapeDtypeStruct], seed: int) -> list[jax.Array]:
    """Return arrays of these shapes: normal floats, integers from 0 to 3, booleans.

    Example:
      >>> [x.shape for x in random_inputs([parse_input("2,3")], seed=0)]
      [(2, 3)]
    """
    import jax.numpy as jnp
    import numpy as np

    rng = np.random.default_rng(seed)

    def draw(spec: jax.ShapeDtypeStruct) -> PyTree:
        if jnp.issubdtype(spec.dtype, jnp.complexfloating):
            return rng.normal(size=spec.shape) + 1j * rng.normal(size=spec.shape)
        if jnp.issubdtype(spec.dtype, jnp.floating):
            return rng.normal(size=spec.shape)
        # Small: an integer may be an index into a table.
        high = 2 if spec.dtype == np.bool_ else 4
        return rng.integers(0, high, size=spec.shape)

    return [jnp.asarray(np.asarray(draw(spec)).astype(spec.dtype)) for spec in specs]


def parse_kwargs(texts: Sequence[str]) -> dict[str, Any]:
    """Read ``NAME=VALUE`` texts; a value is JSON, else Python, else the text itself.

    Raises:
      ArgumentError: a text has no name or no ``=``.

    Example:
      >>> parse_kwargs(["train=false", "axes=(0, 1)", "mode=mean"])
      {'train': False, 'axes': (0, 1), 'mode': 'mean'}
    """
    kwargs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name.isidentifier() or not equals:
            raise ArgumentError(
                f"--kwarg: expected NAME=VALUE, such as 'train=false', got {text!r}. "
                "Pass one --kwarg for each argument."
            )
        kwargs[name] = _value(value)
    return kwargs


def _value(text: str) -> Any:
    for read in (json.loads, ast.literal_eval):
        try:
            return read(text)
        except (ValueError, SyntaxError):
            continue
    return text


def parse_sizes(option: str, text: str) -> int | tuple[int, ...]:
    """Read ``7`` or ``7x7``.

    Raises:
      ArgumentError: the text is malformed.

    Example:
      >>> parse_sizes("--kernel", "3x5"), parse_sizes("--stride", "2")
      ((3, 5), 2)
    """
    if not re.fullmatch(r"\d+([x,]\d+)*", text):
        raise ArgumentError(
            f"{option}: expected a size such as 7 or 7x7, got {text!r}. Pass whole "
            "numbers."
        )
    return int(text) if text.isdigit() else tuple(map(int, re.split("[x,]", text)))


def parse_padding(text: str) -> Any:
    """Read ``SAME``, ``1``, ``1,2`` (per dimension) or ``0:1,0:1`` (low:high).

    Raises:
      ArgumentError: the text is malformed.

    Example:
      >>> parse_padding("valid"), parse_padding("1"), parse_padding("0:1,2")
      ('VALID', 1, [(0, 1), 2])
    """
    if re.fullmatch("[A-Za-z_]+", text):
        return text.upper()
    number = r"-?\d+(:-?\d+)?"
    if not re.fullmatch(f"{number}([x,]{number})*", text):
        raise ArgumentError(
            "--padding: expected a name such as VALID or SAME, or numbers such as 1, "
            f"1,2 (per dimension) or 0:1,0:1 (low:high per dimension), got {text!r}. "
            "Pass one of these."
        )
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    return [
        tuple(map(int, entry.split(":"))) if ":" in entry else int(entry)
        for entry in re.split("[x,]", text)
    ]
