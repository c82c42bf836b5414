"""Check that a row of a product has the same bits in every position of a chunk and with any neighbours."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stages.layers.ops import CHUNK_ROWS


def rows_are_independent(function: Callable[[Tensor], Tensor], inputs: int, dtype: torch.dtype) -> bool:
    """Run `function`, [CHUNK_ROWS, inputs] → [CHUNK_ROWS, O], on the same rows in all positions and companies.

    Whether it holds depends on the library's choice of kernel for a shape, so it is tried rather than assumed.
    """
    generator = torch.Generator().manual_seed(0)

    def chunk(scale: float) -> Tensor:
        return (torch.randn(CHUNK_ROWS, inputs, generator=generator) * scale).to(dtype)

    rows = chunk(1.0)
    expected = function(rows)
    for shift in range(1, CHUNK_ROWS):  # every row in every position
        if not torch.equal(function(rows.roll(shift, 0)).roll(-shift, 0), expected):
            return False
    for number, neighbours in enumerate((torch.zeros_like(rows), chunk(1.0), chunk(1e-3), chunk(1e3))):
        for row in (number, CHUNK_ROWS - 1 - number):  # one row among strangers
            mixed = neighbours.clone()
            mixed[row] = rows[row]
            if not torch.equal(function(mixed)[row], expected[row]):
                return False
    return True
