import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fcconv_jax.checkpoints import Checkpoint, read_checkpoint
from fcconv_jax.checkpoints.files import write_one
from fcconv_jax.checkpoints.formats import FORMATS
from fcconv_jax.geometry.kernels import Rearrangement
from fcconv_jax.plan import LayerPlan, Plan


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model's parameters, and the plan that converts two of its layers.

    The head sees a window of 3x2 with 4 channels, flattened channels first.
    """

    plan: Plan
    dense: Mapping[str, Any]

    def conv_head(self, kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(4, 3, 2, 5).transpose(1, 2, 0, 3)


@pytest.fixture
def case() -> Case:
    head = Rearrangement((24, 5), (4, 3, 2, 5), (1, 2, 0, 3), (3, 2, 4, 5))
    mix = Rearrangement.reshape((6, 4), (1, 1, 6, 4))
    bias = Rearrangement.reshape((5,), (5,))
    plan = Plan(
        "conv",
        (
            (
                "head",
                LayerPlan(
                    "full_window",
                    "Dense",
                    (3, 2),
                    "CHW",
                    (("kernel", head), ("bias", bias)),
                    (1, 24),
                    (1, 1),
                ),
            ),
            (
                "block/mix",
                LayerPlan(
                    "pointwise",
                    "Dense",
                    (1, 1),
                    "C",
                    (("kernel", mix),),
                    (1, 3, 2, 6),
                    (1, 1),
                ),
            ),
        ),
    )
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    dense = {
        "head": {"kernel": normal(24, 5), "bias": normal(5)},
        "block": {
            "mix": {"kernel": normal(6, 4)},
            "norm": {"scale": normal(6)},
            # The same last names as a planned layer's, and not planned.
            "head": {"kernel": normal(24, 5)},
        },
    }
    return Case(plan, dense)


def flat(tree: Any, separator: str = ".", path: str = "") -> dict[str, Any]:
    out = {}
    for key, value in tree.items():
        name = f"{path}{separator}{key}" if path else key
        if isinstance(value, Mapping):
            out |= flat(value, separator, name)
        else:
            out[name] = value
    return out


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """Saves a tree of params as users do, with each format's own library."""

    def save(tree: Mapping[str, Any], format: str, name: str = "dense") -> Path:
        path = tmp_path / name
        if format == "orbax":
            import orbax.checkpoint as ocp

            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(path, {"params": tree})
        elif format == "msgpack":
            from flax import serialization

            path.write_bytes(serialization.to_bytes({"params": tree}))
        elif format == "safetensors":
            from safetensors.numpy import save_file

            save_file(flat(tree), path, metadata={"format": "flax"})
        else:
            pytest.fail(f"Expected a known format, got {format!r}. Save it here, too.")
        return path

    return save


@pytest.fixture
def leaves() -> Callable[[Path], dict[str, np.ndarray]]:
    """Every leaf of a checkpoint by its name, without the ``params`` level."""

    def leaves(path: Path) -> dict[str, np.ndarray]:
        tree = read_checkpoint(path).tree
        tree = tree.get("params", tree)
        return {key.replace("/", "."): value for key, value in flat(tree).items()}

    return leaves


@pytest.fixture
def assert_same_bits() -> Callable[[Any, Any], None]:
    def assert_same_bits(got: Any, want: Any) -> None:
        got, want = np.asarray(got), np.asarray(want)
        assert got.dtype == want.dtype
        assert got.shape == want.shape
        assert got.tobytes() == want.tobytes()

    return assert_same_bits


@pytest.fixture
def listing(tmp_path) -> Callable[[], dict[str, bytes]]:
    """Every file under the test's folder, hidden ones too, and its content."""

    def listing() -> dict[str, bytes]:
        return {
            str(p.relative_to(tmp_path)): p.read_bytes() if p.is_file() else b""
            for p in sorted(tmp_path.rglob("*"))
        }

    return listing


@pytest.fixture
def write() -> Callable[..., Any]:
    def write(path: Path, tree: Any, format: Any, separator: str = ".") -> Path:
        tree = flat(tree, separator) if FORMATS[format].flat else tree
        write_one(path, Checkpoint(format, tree))
        return path

    return write
