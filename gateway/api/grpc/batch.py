"""BatchService over gateway.batch. Methods raise typed errors; `interceptor.TypedErrors` turns them into statuses."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from gateway.access.visit import tenant
from gateway.batch.messages import to_message
from gateway.batch.service import BatchService
from gateway.batch.types import ResultKind
from stageline.batch.v1 import batch_service_pb2 as pb
from stageline.batch.v1 import batch_service_pb2_grpc as pb_grpc
from stageline.errors import InvalidArgumentError

_KINDS: dict[int, ResultKind] = {pb.RESULT_KIND_OUTPUT: "output", pb.RESULT_KIND_ERROR: "error"}
DEFAULT_LIMIT = 20


class BatchServicer(pb_grpc.BatchServiceServicer):
    """See batch_service.proto for what each method promises."""

    def __init__(self, batches: BatchService) -> None:
        self._batches = batches

    async def CreateFile(self, request: pb.CreateFileRequest, context: Any) -> pb.CreateFileResponse:
        """Begin an upload."""
        return pb.CreateFileResponse(file_id=await self._batches.create_file(tenant(), request.filename))

    async def WriteFile(self, request: pb.WriteFileRequest, context: Any) -> pb.WriteFileResponse:
        """Add bytes."""
        length = await self._batches.write_file(tenant(), request.file_id, request.offset_bytes, request.data)
        return pb.WriteFileResponse(num_bytes=length)

    async def CompleteFile(self, request: pb.CompleteFileRequest, context: Any) -> pb.CompleteFileResponse:
        """End an upload."""
        stored = await self._batches.complete_file(tenant(), request.file_id)
        return pb.CompleteFileResponse(num_bytes=stored.num_bytes)

    async def CreateBatch(self, request: pb.CreateBatchRequest, context: Any) -> pb.CreateBatchResponse:
        """Begin to run, or find what the key began."""
        batch = await self._batches.create_batch(
            tenant(),
            request.input_file_id,
            endpoint=request.endpoint,
            window_s=request.window_s or None,
            metadata=dict(request.metadata),
            key=request.idempotency_key or None,
        )
        return pb.CreateBatchResponse(batch=to_message(batch))

    async def GetBatch(self, request: pb.GetBatchRequest, context: Any) -> pb.GetBatchResponse:
        """By id or key."""
        if request.WhichOneof("name") == "idempotency_key":
            batch = await self._batches.find_batch(tenant(), request.idempotency_key)
        else:
            batch = await self._batches.get_batch(tenant(), request.batch_id)
        return pb.GetBatchResponse(batch=to_message(batch))

    async def ListBatches(self, request: pb.ListBatchesRequest, context: Any) -> pb.ListBatchesResponse:
        """A page."""
        limit = request.limit or DEFAULT_LIMIT
        batches, more = await self._batches.list_batches(tenant(), request.after_batch_id, limit)
        return pb.ListBatchesResponse(batches=map(to_message, batches), has_more=more)

    async def CancelBatch(self, request: pb.CancelBatchRequest, context: Any) -> pb.CancelBatchResponse:
        """Stop."""
        return pb.CancelBatchResponse(batch=to_message(await self._batches.cancel_batch(tenant(), request.batch_id)))

    async def DeleteBatch(self, request: pb.DeleteBatchRequest, context: Any) -> pb.DeleteBatchResponse:
        """Forget."""
        await self._batches.delete_batch(tenant(), request.batch_id)
        return pb.DeleteBatchResponse()

    async def ReadResults(self, request: pb.ReadResultsRequest, context: Any) -> AsyncIterator[pb.ReadResultsResponse]:
        """What is there now."""
        kind = _KINDS.get(request.kind)
        if kind is None:
            raise InvalidArgumentError(
                "RESULT_KIND_INVALID", f"kind must be RESULT_KIND_OUTPUT or RESULT_KIND_ERROR, got {request.kind}",
                field="kind", value=request.kind,
            )  # fmt: skip
        pages = self._batches.results(tenant(), request.batch_id, kind, request.after_line)
        async with aclosing(pages):
            async for data, last_line in pages:
                yield pb.ReadResultsResponse(data=data, last_line=last_line)
