"""A whole answer from the messages of a stream. Pure."""

from __future__ import annotations

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb


class Collector:
    """Puts deltas together to what the unary method answers."""

    def __init__(self) -> None:
        self._whole: dict[int, gen.ChoiceDelta] = {}
        self._answer = pb.GenerateResponse()

    def take(self, message: pb.StreamGenerateResponse) -> None:
        """The next message of the stream."""
        if message.HasField("start"):
            self._answer.start.CopyFrom(message.start)
        if message.HasField("usage"):
            self._answer.usage.CopyFrom(message.usage)
        for delta in message.choices:
            whole = self._whole.setdefault(delta.index, gen.ChoiceDelta())
            text = whole.text + delta.text
            whole.MergeFrom(delta)  # appends lists, replaces what is set
            whole.text, whole.index = text, delta.index

    def answer(self) -> pb.GenerateResponse:
        """Choices in order of their index."""
        for index in sorted(self._whole):
            self._answer.choices.add().CopyFrom(self._whole[index])
        return self._answer
