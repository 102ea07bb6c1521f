import pytest

from fcconv_jax.files.strict_json import StrictJsonError, loads, whole_numbers
from fcconv_jax.messages.errors import PlanError
from fcconv_jax.plan import Plan


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, "{", '{"a": NaN}', '{"a": 1, "a": 2}', b"\xff", "", "1" * 9999],
)
def test_what_is_no_json_is_one_kind_of_error(text):
    with pytest.raises(StrictJsonError):
        loads(text)


@pytest.mark.parametrize(
    "value", ["ab", ["ab", 10**9], [1.0], [True], [-1], [10**19], [1] * 99, None, {}]
)
def test_what_is_no_shape_is_refused(value):
    with pytest.raises(StrictJsonError, match="whole numbers"):
        whole_numbers(value)


KERNEL = '"source": [8, 3], "split": [8, 3], "perm": [0, 1], "target": [2, 2, 2, 3]'
PLAN = (
    '{"format": "fcconv_jax.plan", "version": 3, "to": "conv", "skipped": {},'
    ' "options": {}, "layers": {"fc": {'
    '"base": "full_window", "layer": "Dense", "window": [2, 2], "order": "HWC",'
    ' "input_shape": [1, 8], "strides": [1, 1], "stack_axes": [],'
    ' "leaves": {"kernel": {' + KERNEL + "}}}}}"
)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"source": [8, 3]', '"source": ["ab", 1000000000]'),
        ('"source": [8, 3]', '"source": "ab"'),
        ('"split": [8, 3]', '"split": [1e999, 3]'),
        ('"stack_axes": []', '"stack_axes": [-9]'),
        ('"stack_axes": []', '"stack_axes": [7]'),
        ('"input_shape": [1, 8]', '"input_shape": ["x"]'),
        ('"layer": "Dense"', '"layer": ["Dense"]'),
        ('"skipped": {}', '"skipped": []'),
        (KERNEL, "[" * 100_000),
    ],
)
def test_a_plan_that_is_made_to_do_harm_is_refused(old, new):
    assert Plan.from_json(PLAN)["fc"].kernel.target == (2, 2, 2, 3)
    assert old in PLAN
    with pytest.raises(PlanError):
        Plan.from_json(PLAN.replace(old, new))
