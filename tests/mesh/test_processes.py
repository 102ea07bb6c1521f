"""Arrays spread over processes: each converts its own parts, and saves them."""

import json
import pathlib
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

import fcconv_jax as fc
from fcconv_jax.checkpoints import convert_checkpoint, verify_checkpoint

sys.path.append(str(pathlib.Path(__file__).parent))
import processes
from started import free_port, outputs

PROGRAM = pathlib.Path(processes.__file__)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What two processes with four devices each found, and what they saved."""
    folder = tmp_path_factory.mktemp("processes")
    lines = outputs([str(PROGRAM)], 2, 4, free_port(), str(folder))
    return folder, [json.loads(line) for line in lines]


@pytest.mark.slow
def test_no_process_holds_a_whole_array(run):
    size = processes.ROWS * processes.COLUMNS * 4
    for found in run[1]:
        assert found["before"] == size // 2
        assert found["jitted"]["local"] == size // 2
        assert found["state"]["local"] == size // 2
        assert found["step"] == size // 2
        # A gathered array is seen as what it is: whole on each of four devices.
        assert found["gathered"] > 2 * size / processes.MIB
        # Two arrays, then six: of each its own half, and no more than one half beside.
        half = size / 2 / processes.MIB
        assert found["jitted"]["MiB"] < 3 * half
        assert found["state"]["MiB"] < 7 * half


@pytest.mark.slow
def test_they_save_what_one_process_would(run):
    folder, _ = run
    here = ocp.RestoreArgs(restore_type=np.ndarray)
    with ocp.PyTreeCheckpointer() as checkpointer:
        described = checkpointer.metadata(folder / "conv").item_metadata.tree
        args = jax.tree.map(lambda _: here, described)
        state = checkpointer.restore(folder / "conv", restore_args=args)
    for tree, scale in (
        (state["params"], 1),
        (state["opt_state"][0]["mu"], 2),
        (state["opt_state"][0]["nu"], 3),
    ):
        want = fc.convert_params(processes.whole(scale), processes.PLAN)
        jax.tree.map(np.testing.assert_array_equal, tree, want)


@pytest.mark.slow
def test_one_process_converts_what_they_saved(run, tmp_path):
    folder, _ = run
    convert_checkpoint(folder / "dense", tmp_path / "conv", processes.PLAN)
    assert verify_checkpoint(tmp_path / "conv", folder / "dense").passed
    report = verify_checkpoint(folder / "dense", folder / "conv", processes.PLAN)
    assert report.passed, str(report)
