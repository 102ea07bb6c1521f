"""Trained JAX/Flax models from Dense to Conv and back: same code, same numbers."""

# The public names are listed in __init__.pyi. Each is imported when it is first asked
# for: what needs none of JAX, such as `fcconv --help`, does not wait for it.

import sys
import types

import lazy_loader

_attach, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name in __all__:
        return _attach(name)
    import difflib

    near = difflib.get_close_matches(name, __all__, 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise AttributeError(f"module 'fcconv_jax' has no attribute {name!r}.{hint}")


class _Package(types.ModuleType):
    """Keeps the function ``export`` where Python would bind the folder of that name.

    lazy_loader does so from 0.6; Colab has 0.5.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in __all__ and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
