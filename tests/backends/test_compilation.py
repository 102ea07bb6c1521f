"""Compiled programs where no extra is needed: on a present device, and lowered."""

import dataclasses
import os
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilers import compile_for

import fcconv_jax as fc
from fcconv_jax.backends import processes
from fcconv_jax.backends.census import count_hlo
from fcconv_jax.backends.name import Backend
from fcconv_jax.messages.errors import BackendError


@pytest.fixture(scope="module")
def forms():
    model, x = nn.Dense(16), jax.ShapeDtypeStruct((4, 8), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    plan = fc.make_plan(model, x)
    return {
        "dense": (model.apply, (variables, x)),
        "conv": (
            fc.convert_model(model, plan).apply,
            (fc.convert_params(variables, plan), x),
        ),
    }


def test_on_a_present_device(forms):
    found = {name: compile_for(*form, "cpu") for name, form in forms.items()}
    counts = [(c.stablehlo.dots, c.stablehlo.convolutions) for c in found.values()]
    assert counts == [(1, 0), (0, 1)]
    x = np.ones((4, 8), np.float32)
    for name, form in forms.items():
        variables, got = form[1][0], found[name]
        ones = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), variables)
        assert got.how == "compiled"
        assert (got.executable(ones, x) == 9).all()
        assert got.hlo == count_hlo(got.text)
        assert got.flops >= 2 * 4 * 8 * 16
        assert got.temp_bytes is not None
        assert got.seconds > 0
        assert got.cycles is None


def test_only_lowered(forms):
    found = {name: compile_for(*form, "rocm") for name, form in forms.items()}
    counts = [(c.stablehlo.dots, c.stablehlo.convolutions) for c in found.values()]
    assert counts == [(1, 0), (0, 1)]
    for got in found.values():
        assert (got.how, got.hlo, got.flops, got.seconds) == ("lowered", *[None] * 3)
        assert "stablehlo." in got.text
        assert "rocm" in got.reason


def test_what_cannot_be_lowered_names_the_backend():
    def fails(x):
        return jax.pure_callback(lambda x: x, x, x)

    with pytest.raises(BackendError, match=r"^rocm: .*can't be lowered"):
        compile_for(fails, [jnp.ones(2)], "rocm")


def test_structures_that_jax_export_does_not_know(forms):
    @jax.tree_util.register_dataclass
    @dataclasses.dataclass
    class Own:
        x: jax.Array

    found = compile_for(lambda own: Own(own.x @ own.x), [Own(jnp.ones((2, 2)))], "rocm")
    assert found.stablehlo.dots == 1


def _pool(tmp_path, monkeypatch, script, timeout=30.0):
    worker = tmp_path / "worker.py"
    worker.write_text(script)
    monkeypatch.setattr(processes.worker, "__file__", str(worker))
    backend = Backend.parse("tpu:v4")
    job = processes.CompileJob(backend, {"program": b""}, None)
    return backend, processes.Pool({backend: job}, timeout=timeout)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import os; print('boom'); os._exit(3)", r"tpu:v4: .* died \(3\): boom"),
        (
            "import pathlib, sys; p = pathlib.Path(sys.argv[1]) / 'error.txt'; "
            "p.write_text('ValueError: no'); sys.exit(1)",
            "tpu:v4: .*: ValueError: no",
        ),
        ("import time; time.sleep(60)", "tpu:v4: .*: no end after .* longer timeout"),
    ],
)
def test_a_failing_compiler_becomes_an_error(tmp_path, monkeypatch, script, message):
    timeout = 1.0 if "sleep" in script else 30.0
    backend, pool = _pool(tmp_path, monkeypatch, script, timeout)
    pool.start()
    error = pool.wait()[backend]
    assert isinstance(error, BackendError)
    with pytest.raises(BackendError, match=message):
        raise error


@pytest.mark.parametrize("failing", [None, "conv"])
def test_cores_that_are_free_share_a_job(tmp_path, monkeypatch, failing):
    """Each writes its process as the program that it compiled."""
    (tmp_path / "worker.py").write_text(f"""
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
for name in json.loads((folder / "job.json").read_text())["programs"]:
    if name == {failing!r}:
        (folder / "error.txt").write_text("no")
        sys.exit(1)
    (folder / f"{{name}}.json").write_text("{{}}")
    (folder / f"{{name}}.hlo").write_text(str(os.getpid()))
""")
    monkeypatch.setattr(processes.worker, "__file__", str(tmp_path / "worker.py"))
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 2)
    job = processes.CompileJob(
        Backend.parse("tpu:v4"), {"dense": b"", "conv": b""}, None
    )
    said = []
    for backends, workers in ((["tpu:v4"], 2), (["tpu:v4", "tpu:v5e"], 1)):
        pool = processes.Pool(
            {Backend.parse(name): job for name in backends},
            timeout=30.0,
            progress=lambda *step: said.append(step),
        )
        pool.start()
        found = pool.wait()
        assert {str(backend) for backend in found} == set(backends)
        assert said[-1] == ("done", 2, 2)
        for result in found.values():
            if failing:
                assert isinstance(result, BackendError)
            else:
                pids = {text for _, text in result.values()}
                assert (set(result), len(pids)) == ({"dense", "conv"}, workers)


def test_stopping_ends_the_process_and_removes_its_folder(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    script = f"""
import os, sys, time
open({str(folder)!r}, "w").write(sys.argv[1] + "\\n" + str(os.getpid()) + "\\n.")
time.sleep(60)
"""
    _, pool = _pool(tmp_path, monkeypatch, script)
    pool.start()
    while not (folder.exists() and folder.read_text().endswith(".")):
        pass
    used, pid, _ = folder.read_text().split("\n")
    pool.stop()
    assert not Path(used).exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
