"""A runtime that lowers the precision without being asked is caught, and named."""

import numpy as np
import pytest

from fcconv_jax.export.layers import Layer, compute
from fcconv_jax.export.probes import probes
from fcconv_jax.export.proof import prove

from .models import MODELS
from .test_files import needs, write


def _kept(array, bits):
    """Floats with this many significant bits, as a lower precision keeps them."""
    mantissa, exponent = np.frexp(array.astype(np.float64))
    return np.ldexp(np.round(mantissa * 2.0**bits), exponent - bits)


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 8), ("TF32, float16", 11)])
@pytest.mark.parametrize("terms", [6, 40, 5000, 30000])
@pytest.mark.parametrize("side", ["input", "kernel"])
def test_draws_that_a_lower_precision_changes(name, bits, terms, side):
    shapes = (terms, 4), None, True, (3, terms), (3, 4)
    layer = Layer("fc", "dense", None, *shapes, ())
    wrong = 0
    for probe in probes(layer):
        want = compute(layer, probe.x, probe.kernel, probe.bias)
        assert abs(want).max() < 2**24
        x, kernel = probe.x, probe.kernel
        if side == "input":
            x = _kept(x, bits)
        else:
            kernel = _kept(kernel, bits)
        wrong += not np.array_equal(compute(layer, x, kernel, probe.bias), want)
    assert wrong, name


def test_openvinos_bfloat16(tmp_path):
    needs("openvino")
    from fcconv_jax import convert_params
    from fcconv_jax.export.proof import parameter_leaves
    from fcconv_jax.export.runtimes.openvino import OpenVinoFile, _openvino

    capabilities = _openvino().Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in capabilities:
        pytest.skip("this processor has no bfloat16")
    report = write("digits", "openvino", tmp_path, "conv")
    assert report.passed
    assert "OpenVINO by default computes in bf16 here" in str(report)
    _, params, _ = MODELS["digits"]()
    leaves = parameter_leaves(convert_params(params, report.plan))
    own = OpenVinoFile(tmp_path / "model.xml", hint=None)
    record = own.record()
    assert record is not None
    proof = prove(own, record, leaves, lambda *_: None)
    assert any(
        "small integers are exact and those of 12 bits are not: OpenVINO lowers" in why
        for why in proof.all_failures
    )
