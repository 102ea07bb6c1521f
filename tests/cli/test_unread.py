"""Leaves of a checkpoint that the call does not read are listed."""

import jax.numpy as jnp
import numpy as np
import pytest

from fcconv_jax.messages.extras import install_command

from .commands import fails, run, save

COMMANDS = [
    "verify model.py:Net --input 2,8,8,1 --params ckpt",
    "tune model.py:Net --input 2,8,8,1 --budget 0 --objective memory --params ckpt",
    "slide model.py:Net in.npy --window 8x8 --out out.npy --params ckpt",
    "export model.py:Net --input 1,8,8,1 --out m.stablehlo --params ckpt",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_lists_them(command, params, verified):
    np.save("in.npy", np.zeros((16, 8, 1), np.float32))
    if "stablehlo" in command:
        pytest.importorskip("flatbuffers", reason=install_command("stablehlo"))
    save("ckpt", {"params": params})
    assert "note: the call" not in run(command).stderr
    average = {"fc1": params["fc1"], "fc2": {"bias": np.ones(5)}}
    save("ckpt", {"params": params, "average": average, "step": np.int32(3)})
    told = run(command.replace("out.npy", "o2.npy").replace("m.st", "m2.st")).stderr
    assert "use these leaves of ckpt: average (3 leaves), step" in told


def test_nnx_modules_that_the_call_does_not_use(folder):
    (folder / "nets.py").write_text(
        "from flax import nnx\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, rngs):\n"
        "        self.fc = nnx.Linear(6, 3, rngs=rngs)\n"
        "        self.aux = nnx.Linear(6, 2, rngs=rngs)\n"
        "    def __call__(self, x):\n"
        "        return self.fc(x)\n"
    )
    fc = {"kernel": jnp.ones((6, 3)), "bias": jnp.ones(3)}
    aux = {"kernel": jnp.ones((6, 2)), "bias": jnp.ones(2)}
    command = "tune nets.py:Net --input 2,6 --budget 0 --objective memory --params c"
    save("c", {"fc": fc, "aux": aux})
    assert "use these leaves of c: aux (2 leaves)" in run(command).stderr
    save("c", {"fc": {**fc, "sown": jnp.ones(4)}, "aux": aux})
    assert "leaves of c: aux (2 leaves), fc/sown" in run(command).stderr
    save("c", {"fc": {**fc, "scale": jnp.ones(3)}, "aux": aux})
    fails(command, "the leaf 'fc/scale', which the model lacks. Pass the model of")
    save("c", {"fc": fc, "aux": aux, "head": fc})
    fails(command, "the leaf 'head/bias', which the model lacks")
