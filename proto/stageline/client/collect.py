"""A whole answer from the messages of a stream. Pure."""

from __future__ import annotations

from stageline.inference.v1 import generation_pb2 as gen
from stageline.inference.v1 import inference_service_pb2 as pb


class Collector:
    """Puts deltas together to what the unary method answers."""

    def __init__(self) -> None:
        self._whole: dict[int, gen.ChoiceDelta] = {}
        self._texts: dict[int, list[str]] = {}
        self._answer = pb.GenerateResponse()

    def take(self, message: pb.StreamGenerateResponse) -> None:
        """The next message of the stream."""
        if message.HasField("start"):
            self._answer.start.CopyFrom(message.start)
        if message.HasField("usage"):
            self._answer.usage.CopyFrom(message.usage)
        for delta in message.choices:
            whole = self._whole.setdefault(delta.index, gen.ChoiceDelta())
            whole.MergeFrom(delta)  # appends lists, replaces what is set
            self._texts.setdefault(delta.index, []).append(delta.text)

    def answer(self) -> pb.GenerateResponse:
        """Choices in order of their index, each of their tool calls whole."""
        for index in sorted(self._whole):
            choice = self._answer.choices.add()
            choice.CopyFrom(self._whole[index])
            choice.index, choice.text = index, "".join(self._texts[index])
            del choice.tool_calls[:]
            choice.tool_calls.extend(_whole_calls(self._whole[index]))
        return self._answer


def _whole_calls(choice: gen.ChoiceDelta) -> list[gen.ToolCallDelta]:
    calls: dict[int, gen.ToolCallDelta] = {}
    for part in choice.tool_calls:
        call = calls.setdefault(part.index, gen.ToolCallDelta())
        arguments = call.arguments + part.arguments
        call.MergeFrom(part)  # id and name are set in the first part only
        call.arguments = arguments
    return list(calls.values())
