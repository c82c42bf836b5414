"""Hidden states as bytes of the wire: as computed, or as 8-bit numbers with one scale a token.

The scale of a token is its largest magnitude over the largest number of the format (127; 448 for float8 e4m3), in float32,
so a token's bits do not depend on its neighbours. Both round to nearest, ties to even. A token that holds NaN or an
infinity has a scale that is not finite and comes out as NaN throughout: the last stage reports it, others are untouched.

    payload   float32 [T] scales, then [T, D] numbers of one byte; without a reduced type [T, D] elements as computed
"""

from __future__ import annotations

import torch
from torch import Tensor

from stageline.stage.v1 import stage_service_pb2 as pb

ELEMENT_TYPES: dict[torch.dtype, pb.ElementType.ValueType] = {
    torch.float32: pb.ELEMENT_TYPE_FLOAT32,
    torch.bfloat16: pb.ELEMENT_TYPE_BFLOAT16,
    torch.float16: pb.ELEMENT_TYPE_FLOAT16,
}
_REDUCED: dict[str, tuple[torch.dtype, float, pb.ElementType.ValueType]] = {
    "fp8": (torch.float8_e4m3fn, 448.0, pb.ELEMENT_TYPE_FLOAT8_E4M3),
    "int8": (torch.int8, 127.0, pb.ELEMENT_TYPE_INT8),
}
_SCALE_BYTES = 4


class HiddenStateCodec:
    """Bytes to tensors and back, for tokens of `width` elements of `dtype`; `reduced` is None, fp8 or int8."""

    def __init__(self, dtype: torch.dtype, width: int, reduced: str | None) -> None:
        self._dtype, self._width, self._reduced = dtype, width, None if reduced is None else _REDUCED[reduced]
        self.element_type = ELEMENT_TYPES[dtype] if self._reduced is None else self._reduced[2]

    def num_bytes(self, num_tokens: int) -> int:
        """Of a payload of so many tokens."""
        one = self._width * self._dtype.itemsize if self._reduced is None else self._width + _SCALE_BYTES
        return num_tokens * one

    def encode(self, hidden_TD: Tensor) -> Tensor:
        """[T, D] on the CPU → uint8 [num_bytes(T)]; without a reduced type a view of the same memory."""
        if self._reduced is None:
            return hidden_TD.reshape(-1).view(torch.uint8)  # flat: one row may have odd strides
        kind, largest, _ = self._reduced
        num_tokens = len(hidden_TD)
        payload = torch.empty(self.num_bytes(num_tokens), dtype=torch.uint8)
        wide_TD = hidden_TD.float()
        scale_T1 = wide_TD.abs().amax(1, keepdim=True).div_(largest).clamp_min_(torch.finfo(torch.float32).tiny)
        reduced_TD = wide_TD.div(scale_T1).clamp_(-largest, largest)
        if kind == torch.int8:
            reduced_TD = reduced_TD.round_().nan_to_num_(0.0)  # what NaN becomes as an integer is not defined
        payload[: _SCALE_BYTES * num_tokens].view(torch.float32).copy_(scale_T1[:, 0])
        payload[_SCALE_BYTES * num_tokens :].view(kind).view(num_tokens, self._width).copy_(reduced_TD)
        return payload

    def decode(self, payload: Tensor, num_tokens: int) -> Tensor:
        """uint8 [num_bytes(T)] → [T, D] in the stages' dtype; without a reduced type a view of the same memory."""
        if self._reduced is None:
            return payload.view(self._dtype).view(num_tokens, self._width)
        scale_T1 = payload[: _SCALE_BYTES * num_tokens].view(torch.float32).unsqueeze(1)
        reduced_TD = payload[_SCALE_BYTES * num_tokens :].view(self._reduced[0]).view(num_tokens, self._width)
        return reduced_TD.float().mul_(scale_T1).to(self._dtype)
