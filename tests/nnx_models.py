"""Models and helpers for the tests of NNX."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def assert_same(want, got):
    """Equal trees, to the bit; keys of random streams by their data."""
    assert jax.tree.structure(want) == jax.tree.structure(got)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got)):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def module_list(modules):
    """``nnx.List(modules)``; before Flax 0.12, lists did."""
    return nnx.List(modules) if hasattr(nnx, "List") else list(modules)


def references():
    """Options under which a Variable holds a mutable reference, one for each kind."""
    new = hasattr(nnx.Variable, "hijax")
    return ({"ref": True}, {"hijax": True}) if new else ({"use_ref": True},)


def named(axes):
    """Metadata of a Variable that names its axes."""
    new = hasattr(nnx.Variable, "set_metadata")
    return (
        {"out_sharding": axes, "eager_sharding": False} if new else {"sharding": axes}
    )


def axis_names(variable):
    """What :func:`named` set."""
    metadata = variable.get_metadata()
    return metadata.get("out_sharding", metadata.get("sharding_names"))


class Stacked(nnx.Module):
    """Three blocks, stacked on an axis, and run in one of several ways."""

    def __init__(self, block, axis, run):
        self.run, self.axes = run, nnx.StateAxes({nnx.Param: axis, ...: None})
        self.blocks = nnx.vmap(
            lambda _: block(), in_axes=0, out_axes=self.axes, axis_size=3
        )(jnp.arange(3))

    def __call__(self, x):
        if self.run == "slice":
            for i in range(3):
                x = jax.tree.map(lambda a, i=i: a[i], self.blocks)(x)
            return x
        if self.run == "vmap":
            ins = (self.axes, None)
            return nnx.vmap(lambda m, x: m(x), in_axes=ins)(self.blocks, x)
        ins = (self.axes, nnx.Carry)
        return nnx.scan(lambda m, x: m(x), in_axes=ins, out_axes=nnx.Carry)(
            self.blocks, x
        )
