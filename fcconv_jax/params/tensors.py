"""PyTorch tensors in a ``state_dict``: moved by their bits, whatever their dtype."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np


def is_tensor(leaf: object) -> bool:
    """Return whether a leaf is a ``torch.Tensor``; False if torch isn't imported."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(leaf, torch.Tensor)


def move_tensor(move: Callable[[Any], Any], tensor: Any) -> Any:
    """Return a tensor with another's entries, moved as those of an array."""
    torch: Any = sys.modules["torch"]
    # NumPy has no bfloat16 and no float8.
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().cpu().contiguous().view(sizes[tensor.element_size()])
    # A copy: the result of a reshape would share memory with the original tensor.
    moved = torch.from_numpy(np.array(move(bits.numpy())))
    return moved.view(tensor.dtype).to(tensor.device)
