"""Small results from the device, in one transfer."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def fetch(*tensors: Tensor) -> list[NDArray[Any]]:
    """The tensors as arrays on the host: int32 for integers and booleans, float32 for float32 and float64."""
    if tensors[0].device.type == "cpu":
        return [(t.float() if t.is_floating_point() else t.int()).numpy() for t in tensors]
    parts = [(t.float().view(torch.int32) if t.is_floating_point() else t.int()).reshape(-1) for t in tensors]
    host, arrays, start = torch.cat(parts).cpu().numpy(), [], 0
    for tensor in tensors:
        words = host[start : start + tensor.numel()].reshape(tensor.shape)
        arrays.append(words.view(np.float32) if tensor.is_floating_point() else words)
        start += tensor.numel()
    return arrays
