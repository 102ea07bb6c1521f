"""``fcconv explain``."""

import json

import pytest

from .commands import fails, run


def test_the_chapters_exercises():
    out = run("explain --input 7x7 --kernel 7x7 --stride 2 --padding VALID").stdout
    assert "case: full_window" in out
    assert "Strides 2x2 change nothing" in out
    out = run("explain --input 7x7 --kernel 7x7 --padding 1").stdout
    assert "case: unrolled" in out
    assert "position (1, 1) of it is the Dense's value" in out
    out = run("explain --input 8x8 --kernel 1 --stride 2").stdout
    assert "case: pointwise" in out
    assert "equals the Dense on the strided subsample x[:, ::2, ::2]" in out


@pytest.mark.parametrize(
    ("options", "case"),
    [
        ("--input 8 --kernel 4 --stride 4", "patchify"),
        ("--input 4x6 --kernel 4x6 --padding 0:0,0:0", "full_window"),
        ("--input 4x6 --kernel 4x6 --padding 0,1", "unrolled"),
        ("--input 4x6 --kernel 3 --padding same", "unrolled"),
        ("--input 4x6 --kernel 1x1 --groups 2", "grouped"),
        ("--input 3 --kernel 3 --kernel-dilation 2 --padding 1", "unrolled"),
        ("--input 3 --kernel 3 --input-dilation 2", "unrolled"),
        ("--input 3,4,5 --kernel 3,4,5 --padding -0:0,0,0", "full_window"),
    ],
)
def test_json(options, case):
    found = json.loads(run(f"explain {options} --json").stdout)
    assert found["case"] == case
    text = run(f"explain {options}").stdout
    assert f"case: {case}" in text
    assert found["reason"] in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--input 7x --kernel 7", "--input: expected a size .* got '7x'"),
        ("--input 7x7 --kernel 0", "kernel_size: expected every entry"),
        ("--input 7x7 --kernel 9", "span 9 inputs"),
        ("--input 7x7 --kernel 1x1x1", "kernel_size.*entries"),
        ("--input 7x7 --kernel 7 --padding 1:", "--padding: expected .* got '1:'"),
        ("--input 7x7 --kernel 7 --padding SOME", "padding.*SOME"),
        ("--input 7x7 --kernel 7 --groups 0", "groups: expected at least 1"),
    ],
)
def test_wrong_arguments(options, message):
    fails(f"explain {options}", message, status=2)


def test_needs_both_sizes():
    assert "--kernel" in run("explain --input 7x7", 2).stderr
