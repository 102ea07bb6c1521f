"""Uses the package as it was installed: plan, convert, prove, and come back."""

import importlib.util
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

import fcconv_jax as fc

here = Path(fc.__file__).parent
assert "site-packages" in here.parts, f"expected an installed package, got {here}"
assert (here / "py.typed").exists()
assert list((here / "backends" / "targets").glob("*.txtpb")), "data files are missing"
assert importlib.util.find_spec("fcconv_jax.pytest_plugin")
for name in fc.__all__:  # pyright: ignore
    getattr(fc, name)

model, x = nn.Dense(3), np.ones((2, 4), np.float32)
variables = model.init(jax.random.key(0), x)
plan = fc.make_plan(model, x)
assert fc.verify(model, variables, x, plan=plan, progress=False).passed
back = fc.restore_params(fc.convert_params(variables, plan), plan)
jax.tree.map(np.testing.assert_array_equal, back, variables)
