"""Trained JAX/Flax models from Dense to Conv and back: same code, same numbers."""

# The public names are listed in __init__.pyi. Each is imported when it is first asked
# for: what needs none of JAX, such as `fcconv --help`, does not wait for it.

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
