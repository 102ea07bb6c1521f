"""Compiles one function for a backend, whether or not such a device is present."""

from fcconv_jax.backends.compilation import (
    TIMEOUT,
    Compilation,
    Compiling,
    Program,
    compile_present,
)
from fcconv_jax.backends.resolution import resolve
from fcconv_jax.messages.errors import BackendError


def compile_for(function, args, backend, timeout=TIMEOUT) -> Compilation:
    """Return the compiled program; the lowered one without a compiler here."""
    chosen = resolve(backend)
    program = Program(function, tuple(args))
    if chosen.how == "executed":
        return compile_present(program, chosen)
    with Compiling({"program": program}, [chosen], timeout=timeout) as compiling:
        (found,) = compiling.results().values()
    if isinstance(found, BackendError):
        raise found
    return found["program"]
