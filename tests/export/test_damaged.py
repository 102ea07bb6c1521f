"""Damaged files: refused by name, or different; never a raw error, never proved."""

import errno
import importlib
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fcconv_jax as fc
from fcconv_jax.messages.errors import ExportError

from .models import normal
from .test_files import RUNTIMES, SUFFIX, needs

PARAMS = {"w": normal(6, 4), "b": normal(4, seed=2), "v": normal(4, 3, seed=3)}


def model(params, x):
    return jax.nn.relu(x @ params["w"] + params["b"]) @ params["v"]


@pytest.fixture(params=RUNTIMES)
def to(request):
    needs(request.param)
    return request.param


@pytest.fixture
def path(to, tmp_path):
    path = tmp_path / f"net.{SUFFIX[to]}"
    assert export(path).passed
    return path


def export(path, params=PARAMS, function=model, **options):
    x = normal(2, 6, seed=5)
    options = {"path": path, "to": "dense", "progress": False, **options}
    return fc.export(function, params, x, **options)


def mutated(content, rng):
    changed = bytearray(content)
    at = rng.randrange(len(content))
    how = rng.choice(["byte", "byte", "bytes", "bit", "cut", "zeros", "insert"])
    if how == "byte":
        changed[at] = rng.randrange(256)
    elif how == "bytes":
        changed[at : at + 4] = rng.randbytes(4)
    elif how == "bit":
        changed[at] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del changed[at:]
    elif how == "zeros":
        changed[at : at + 16] = bytes(len(changed[at : at + 16]))
    else:
        changed[at:at] = rng.randbytes(3)
    return bytes(changed)


def test_mutations(path):
    """A file that passes runs, and gives the outputs of the original."""
    reader = type(_opened(path))
    x = [np.asarray(normal(2, 6, seed=5))]
    want = reader(path).run(x)
    content = path.read_bytes()
    verdicts = set()
    for seed in range(80):
        path.write_bytes(mutated(content, random.Random(seed)))
        try:
            passed = fc.verify_file(path, PARAMS, progress=False).passed
        except ExportError as error:
            named = "net" in str(error)
            verdicts.add("refused" if named else str(error))
        else:
            verdicts.add(passed)
            if passed:
                np.testing.assert_array_equal(reader(path).run(x)[0], want[0])
    assert verdicts - {True} == {"refused", False}


def _opened(path):
    from fcconv_jax.export.runtimes import runtime_of

    return runtime_of(path).open(path)


def test_what_litert_refuses_to_load(tmp_path):
    """The reader accepts this byte; LiteRT does not."""
    needs("litert")
    path = tmp_path / "net.tflite"
    export(path)
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile
    from fcconv_jax.export.runtimes.litert.schema import pack

    file = LiteRTFile(path)
    file.graph.operators[0].intermediates = [10**6]
    file.graph.operators[0].inputs = [*file.graph.operators[0].inputs, 99]
    path.write_bytes(pack(file.model))
    with pytest.raises(ExportError, match=r"net\.tflite is damaged"):
        fc.verify_file(path, PARAMS, progress=False)


def test_a_different_file_does_not_replace_a_good_one(path, monkeypatch):
    from fcconv_jax.export import proof

    good = path.read_bytes()
    monkeypatch.setattr(proof, "_other_bits", lambda *_: "has other bits, planted")
    report = export(path)
    assert not report.passed
    assert path.read_bytes() == good
    assert report.path == str(path.with_name(f"net.different{path.suffix}"))
    assert f"{path} was there and stays" in str(report)
    monkeypatch.undo()
    # The files that belong to it have its new name, too.
    assert fc.verify_file(report.path, PARAMS, progress=False).passed
    assert fc.verify_file(path, PARAMS, progress=False).passed


def test_the_folder_of_a_killed_export_goes_with_the_next_one(path):
    left = path.with_name(f".{path.name}.fcconv-killed")
    left.mkdir()
    (left / path.name).write_bytes(b"half")
    export(path)
    assert not left.exists()
    assert {each.stem for each in path.parent.iterdir()} == {"net"}


def test_nothing_is_proved_from_nans(to, tmp_path):
    nans = jax.tree.map(lambda leaf: leaf * jnp.nan, PARAMS)
    report = export(tmp_path / f"net.{SUFFIX[to]}", nans)
    assert not report.passed
    assert "no number of the parameters is finite" in str(report)
    assert "no entry of 'output' is finite" in str(report)
    alone = fc.verify_file(report.path, nans, progress=False)
    assert "no number of the parameters is finite" in alone.failures[0]
    some = {**PARAMS, "b": PARAMS["b"].at[1].set(jnp.inf)}
    report = export(tmp_path / f"some.{SUFFIX[to]}", some)
    assert "1 of 40 numbers of the parameters are NaN or infinite" in str(report)


def test_a_resize_is_no_layer(to, tmp_path):
    def resized(params, x):
        image = (x @ params["w"]).reshape(1, 2, 4, 1)
        return jax.image.resize(image, (1, 5, 7, 1), "bilinear")

    report = export(tmp_path / f"net.{SUFFIX[to]}", PARAMS, resized, to="conv")
    assert report.passed, report.failures
    assert [layer.name for layer in report.layers] == ["w"]
    assert not report.left


def test_a_shared_weight_is_stored_once(to, tmp_path):
    params = {"w": normal(96, 64)}

    def towers(params, x):
        one, other = (
            jnp.tanh((k * x).reshape(1, 2, 6)[..., :1] * jnp.ones(48)) for k in (1, 2)
        )
        return sum(each.reshape(1, 96) @ params["w"] for each in (one, other))

    for form in ("dense", "conv"):
        path = tmp_path / f"{form}.{SUFFIX[to]}"
        report = export(path, params, towers, to=form)
        assert report.passed, report.failures
        sizes = [p.stat().st_size for p in tmp_path.glob(f"{form}.*")]
        assert max(sizes) < 1.8 * params["w"].nbytes


def test_arguments_in_the_wrong_place(tmp_path):
    import flax.linen as nn

    dense, x = nn.Dense(3), jnp.ones((2, 4))
    params = dense.init(jax.random.key(0), x)
    path = tmp_path / "net.onnx"
    with pytest.raises(TypeError, match=r"Pass the params before the inputs"):
        fc.export(dense, x, path=path)
    with pytest.raises(ExportError, match=r"got no input\. Call fc\.export\(model"):
        fc.export(dense, params, path=path)
    with pytest.raises(ExportError, match="Expected the params after the model"):
        fc.export(dense, None, x, path=path)
    with pytest.raises(ExportError, match=r"Expected calibrate= .* got int8="):
        fc.export(dense, params, x, path=path, int8=True)


def test_calibration_data_without_numbers(tmp_path):
    """The quantizer dies by a signal where a range is NaN."""
    needs("litert")
    x = np.ones((9, 6), np.float32)
    x[3, 2] = np.nan
    for data, message in (
        ([x], "finite numbers as calibration data"),
        (x, r"list of arrays, one for each input, got ndarray\. Pass calibrate="),
        ([x, x], "for 1 inputs, got 2"),
    ):
        with pytest.raises(ExportError, match=message):
            export(tmp_path / "net.tflite", calibrate=data)


@pytest.mark.parametrize("unroll", [-1, True, "8"])
def test_a_number_of_steps_that_is_none(unroll, tmp_path):
    with pytest.raises((TypeError, ExportError), match=r"unroll= as a number of steps"):
        export(tmp_path / "net.onnx", unroll=unroll)


def test_what_is_no_file_is_found_before_the_work(tmp_path):
    folder = tmp_path / "net.onnx"
    folder.mkdir()
    with pytest.raises(ExportError, match=r"net\.onnx can't be replaced"):
        export(folder, function=None)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("basic_ios::clear: iostream error"),  # OpenVINO
        ValueError("I/O error: No space left on device (os error 28)"),  # safetensors
    ],
)
def test_a_full_disk(error, path, monkeypatch):
    good = path.read_bytes()

    def full(*_):
        raise error

    # By its name: fcconv_jax.export is the function.
    module = importlib.import_module("fcconv_jax.export.export")
    monkeypatch.setattr(module, "seal", full)
    with pytest.raises(ExportError, match=r"net\.\w+ can't be written: .*Make room"):
        export(path)
    assert path.read_bytes() == good
    assert {each.stem for each in path.parent.iterdir()} == {"net"}


def test_abstract_params_and_inputs(tmp_path):
    path, x = tmp_path / "net.onnx", normal(2, 6, seed=5)
    with pytest.raises(ExportError, match="got abstract ones"):
        export(path, jax.eval_shape(lambda: PARAMS))
    with pytest.raises(ExportError, match="got abstract ones"):
        fc.export(model, PARAMS, jax.eval_shape(lambda: x), path=path)


def test_inputs_without_a_model(path):
    with pytest.raises(ExportError, match="got inputs without a model"):
        fc.verify_file(path, PARAMS, normal(2, 6, seed=5))
    with pytest.raises(ExportError, match="got modell= without a model"):
        fc.verify_file(path, PARAMS, modell=model)
    with pytest.raises(ExportError, match="got no params without a model"):
        fc.verify_file(path)
    with pytest.raises(ExportError, match="inputs of the model, got none"):
        fc.verify_file(path, PARAMS, model=model)
    with pytest.raises(ExportError, match=r"net\.\w+: layer 'w'"):
        fc.verify_file(path, {"other": PARAMS["w"]}, progress=False)


def test_changed_machine_code_is_never_loaded(tmp_path, monkeypatch):
    """One changed byte of it may do anything, such as end this process."""
    pytest.importorskip("iree.compiler", reason="needs: pip install -e '.[iree]'")
    from fcconv_jax.export.runtimes import iree

    path = tmp_path / "net.vmfb"
    export(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    monkeypatch.setattr(iree.IreeFile, "load", lambda self: pytest.fail("loaded"))
    monkeypatch.setattr(iree.IreeFile, "run", lambda *_: pytest.fail("run"))
    for given in ((), (normal(2, 6, seed=5),)):
        options = {"model": model} if given else {}
        found = fc.verify_file(path, PARAMS, *given, progress=False, **options)
        assert "the file has been changed since it was proved" in found.failures[0]


def test_a_shape_that_takes_all_memory(tmp_path):
    """LiteRT would allocate it, whatever it costs."""
    needs("litert")
    from fcconv_jax.export.runtimes.litert.reader import LiteRTFile
    from fcconv_jax.export.runtimes.litert.schema import pack

    path = tmp_path / "net.tflite"
    export(path)
    file = LiteRTFile(path)
    file.graph.tensors[file.graph.outputs[0]].shape = [2**30, 2**10]
    path.write_bytes(pack(file.model))
    with pytest.raises(ExportError, match="1,099,511,627,776 entries, and its layers"):
        fc.verify_file(path, PARAMS, progress=False)
