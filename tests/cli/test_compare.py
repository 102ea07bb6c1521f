"""``fcconv compare``: two models of any kind."""

import json

from .commands import OTHER_KINDS, run


def test_two_models_are_compared(folder):
    (folder / "kinds.py").write_text(OTHER_KINDS)
    same = "compare kinds.py:Linen kinds.py:Linen --input 2,4"
    assert run(same).stdout.startswith("THE SAME BITS, to 16.0 digits")
    result = run("compare kinds.py:Linen kinds.py:other --input 2,4", 1)
    assert "they first differ at 'LayerNorm_0'" in result.stdout
    result = run("compare kinds.py:function kinds.py:doubled --input 2,4 --json", 1)
    assert json.loads(result.stdout)["verdict"] == "different functions"
