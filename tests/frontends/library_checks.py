"""What every library's models are asked, whatever their adapter."""

import copy
import pickle

import jax.numpy as jnp
import numpy as np

import fcconv_jax as fc


def check_model(model, x, path, order, params=None):
    """One layer of a model converts, and nothing else changes."""
    plan = fc.make_plan(model, x)
    assert list(plan) == [path]
    assert plan[path].case == "full_window"
    assert plan[path].order == order
    report = fc.verify(model, params, x, progress=False)
    assert report.passed
    assert report.digits is not None
    assert report.digits > 12
    tuned = fc.tune(model, params, x, budget=0.1, objective="memory", progress=False)
    assert tuned.tuning.ratio <= 1
    return plan


def check_held(model, x, plan, y):
    """A converted model of a library whose models hold their params."""
    converted = fc.convert_model(model, plan)
    np.testing.assert_allclose(np.asarray(converted(x)), y, atol=1e-5)
    back = fc.restore_params(converted.params, plan)
    assert not fc.make_plan(converted, x)
    # Used or not, it is pickled and copied as the model is.
    for made in (converted, fc.convert_model(model, plan)):
        for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
            np.testing.assert_array_equal(again(x), converted(x))
    return back


def check_slide(model, x, axes, y):
    """Crops of a larger image, of which the first is the model's own input."""
    pads = [(0, 4 if axis in axes else 0) for axis in range(x.ndim)]
    image = jnp.pad(jnp.asarray(x), pads)
    window = tuple(x.shape[axis] for axis in axes)
    scores = fc.slide(model, window=window, stride=2)(image)
    assert scores.shape == (len(x), 3, 3, *y.shape[1:])
    np.testing.assert_allclose(scores[:, 0, 0], y, atol=1e-5)
