"""One way to follow long work: ``progress=``, the same on every function."""

import inspect

import numpy as np
import optax
import pytest
from flax import serialization

import fcconv_jax as fc
from fcconv_jax.messages.progress import ProgressOption, shown


@pytest.mark.parametrize("progress", [None, True, False, lambda *step: None])
def test_every_choice_gives_a_function_of_what_done_and_total(progress):
    with shown(progress) as show:
        show("row: step", 1, 2)


def test_a_pipe_shows_no_bars_even_where_colors_are_forced(monkeypatch, capfd):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as Jupyter does for its commands
    with shown(None) as show:
        show("tiles", 1, 2)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("progress", [0, 1, "bars"])
def test_anything_else_is_refused(progress):
    with (
        pytest.raises(TypeError, match=r"^Expected progress=True, .* got "),
        shown(progress),
    ):
        pass


def test_every_public_function_takes_the_same_choices():
    takers = []
    for name in fc.__all__:  # pyright: ignore
        value = getattr(fc, name)
        functions = [value] if inspect.isfunction(value) else vars(value).values()
        for function in filter(inspect.isfunction, functions):
            # optax is imported for type checkers only.
            parameters = inspect.signature(
                function, eval_str=True, locals={"optax": optax}
            ).parameters
            if "progress" in parameters:
                takers.append(name)
                assert parameters["progress"].annotation == ProgressOption, name
                # A call of a test shows no bars.
                quiet = False if name == "assert_same" else None
                assert parameters["progress"].default is quiet, name
    assert {"Slide", "compare", "convert_checkpoint", "tune", "verify"} < set(takers)


@pytest.mark.parametrize("progress", [True, False, None])
def test_a_checkpoint_is_converted_with_every_choice(tmp_path, capfd, progress):
    tree = {"fc": {"kernel": np.ones((4, 3), np.float32)}}
    plan = fc.plan_from_params(tree, ["fc=2x2:HWC"])
    src, dst = tmp_path / "src.msgpack", tmp_path / "dst.msgpack"
    src.write_bytes(serialization.msgpack_serialize(tree))
    fc.convert_checkpoint(src, dst, plan, progress=progress)
    fc.restore_checkpoint(dst, tmp_path / "back.msgpack", progress=progress)
    assert not capfd.readouterr().out
