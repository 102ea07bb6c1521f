"""Planning, converting params, running and verifying need nothing that Windows lacks.

Windows has no ``fcntl`` and no ``os.sysconf``; checkpoints are for Linux and macOS.
"""

import subprocess
import sys

# asyncio has another half on Windows; its Unix half needs them.
WITHOUT_POSIX = """
import asyncio, os, sys

for name in ("fcntl", "resource", "pwd", "grp", "termios"):
    sys.modules[name] = None
for name in ("sysconf", "posix_fallocate", "O_NOFOLLOW", "O_DIRECTORY", "getuid"):
    delattr(os, name)
"""
WORK = """
import flax.linen as nn, jax, jax.numpy as jnp, numpy as np
import fcconv_jax as fc

model, x = nn.Dense(3), jnp.arange(8.0).reshape(2, 4)
params = model.init(jax.random.key(0), x)
plan = fc.make_plan(model, x)
conv = fc.convert_params(params, plan)
got = fc.convert_model(model, plan).apply(conv, x)
np.testing.assert_array_equal(got, model.apply(params, x))
back = fc.restore_params(conv, plan)
jax.tree.map(np.testing.assert_array_equal, back, params)
assert fc.verify(model, params, x, plan=plan, progress=False).passed
options = {"objective": "memory", "budget": 0, "timings": "t.json"}
fc.tune(model, params, x, progress=False, **options)
"""
COMMAND = """
from typer.testing import CliRunner
from fcconv_jax.cli import app

done = CliRunner().invoke(app, "explain --input 7x7 --kernel 7x7".split())
assert done.exit_code == 0, done.output
"""


def test_what_needs_no_posix_works_without_it(tmp_path):
    for work in (WORK, COMMAND):
        done = subprocess.run(
            [sys.executable, "-c", WITHOUT_POSIX + work],
            capture_output=True,
            text=True,
            check=False,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
