"""/v1/files and /v1/batches, as OpenAI's clients call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, Query, UploadFile
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from gateway.access.visit import tenant
from gateway.api.http import documents, openapi
from gateway.batch.lines import ENDPOINTS
from gateway.batch.plan import window_s
from gateway.batch.records import UNLIMITED, batch_object, file_object
from gateway.batch.service import BatchService
from stageline.errors import FailedPreconditionError, InvalidArgumentError

UPLOAD_PATH = "/v1/files"
MAX_UPLOAD_BYTES = 1 << 30
CHUNK_BYTES = 1 << 20
CONTENT = {"description": "The file's bytes.", "content": {"application/jsonl": {"schema": {"type": "string"}}}}
FILE_LINKS = openapi.linked("retrieve_file", "file_content", "delete_file", file_id="$response.body#/id")
BATCH_LINKS = openapi.linked("retrieve_batch", "cancel_batch", batch_id="$response.body#/id")
# Bounds for the OpenAPI document; the checks are below and in gateway.batch, with our own words.
Purpose = Annotated[str, Form(json_schema_extra={"enum": ["batch"]})]
Endpoint = Annotated[str, Field(json_schema_extra={"enum": list(ENDPOINTS)})]
Window = Annotated[str, Field(json_schema_extra={"pattern": f"^([0-9]{{1,4}}h|{UNLIMITED})$"})]


class BatchBody(BaseModel):
    """The body of POST /v1/batches."""

    model_config = ConfigDict(extra="forbid", strict=True)
    input_file_id: str
    endpoint: Endpoint
    completion_window: Window
    metadata: dict[str, str] | None = None


def router(batches_getter: Callable[[], BatchService | None]) -> APIRouter:
    """The paths; without a batch service each of them says so."""
    api = APIRouter()
    wrong = openapi.errors(404)

    def batches() -> BatchService:
        service = batches_getter()
        if service is None:
            raise FailedPreconditionError(
                "BATCHES_OFF", "this server keeps no batches; start it with batch.state_url", field="batch.state_url"
            )
        return service

    @api.post(UPLOAD_PATH, response_model=documents.FileObject, responses={**openapi.errors(413), **FILE_LINKS})
    async def upload_file(file: Annotated[UploadFile, File()], purpose: Purpose) -> dict[str, Any]:
        """Upload the input of a batch."""
        if purpose != "batch":
            raise InvalidArgumentError(
                "PURPOSE_NOT_SERVED", f"purpose must be batch, got {purpose[:32]!r}", field="purpose"
            )
        service, owner = batches(), tenant()
        file_id, offset = await service.create_file(owner, file.filename or "input.jsonl"), 0
        while chunk := await file.read(CHUNK_BYTES):
            offset = await service.write_file(owner, file_id, offset, chunk)
        return file_object(await service.complete_file(owner, file_id))

    @api.get("/v1/files", response_model=documents.FileList, responses=openapi.errors())
    async def list_files() -> dict[str, Any]:
        """Uploaded files, the newest first."""
        data = [file_object(file) for file in await batches().list_files(tenant())]
        return {"object": "list", "data": data, "has_more": False}

    @api.get("/v1/files/{file_id}", response_model=documents.FileObject, responses=wrong)
    async def retrieve_file(file_id: str) -> dict[str, Any]:
        """One file."""
        return file_object(await batches().get_file(tenant(), file_id))

    @api.get("/v1/files/{file_id}/content", response_class=StreamingResponse, responses={200: CONTENT, **wrong})
    async def file_content(file_id: str) -> StreamingResponse:
        """A file's bytes."""
        service, owner = batches(), tenant()
        await service.get_file(owner, file_id)  # an error has to come before the first byte
        return StreamingResponse(service.read_file(owner, file_id), media_type="application/jsonl")

    @api.delete("/v1/files/{file_id}", responses=wrong)
    async def delete_file(file_id: str) -> documents.Deleted:
        """Forget a file that no running batch needs."""
        await batches().delete_file(tenant(), file_id)
        return documents.Deleted(id=file_id)

    @api.post(
        "/v1/batches", response_model=documents.BatchObject, responses={**openapi.errors(404, 413), **BATCH_LINKS}
    )
    async def create_batch(body: BatchBody) -> dict[str, Any]:
        """Run a file."""
        window = None if body.completion_window == UNLIMITED else window_s(body.completion_window)
        if not body.endpoint:
            raise InvalidArgumentError("ENDPOINT_UNKNOWN", "endpoint is required", field="endpoint")
        batch = await batches().create_batch(
            tenant(), body.input_file_id, endpoint=body.endpoint, window_s=window, metadata=body.metadata
        )
        return batch_object(batch)

    @api.get("/v1/batches", response_model=documents.BatchList, responses=wrong)
    async def list_batches(after: str = "", limit: Annotated[int, Query(ge=1, le=100)] = 20) -> dict[str, Any]:
        """Batches, the newest first."""
        found, more = await batches().list_batches(tenant(), after, limit)
        data = [batch_object(batch) for batch in found]
        ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": None, "last_id": None}
        return {"object": "list", "data": data, **ends, "has_more": more}

    @api.get("/v1/batches/{batch_id}", response_model=documents.BatchObject, responses=wrong)
    async def retrieve_batch(batch_id: str) -> dict[str, Any]:
        """One batch, as it is now."""
        return batch_object(await batches().get_batch(tenant(), batch_id))

    @api.post("/v1/batches/{batch_id}/cancel", response_model=documents.BatchObject, responses=wrong)
    async def cancel_batch(batch_id: str) -> dict[str, Any]:
        """Stop a batch; results that are there stay."""
        return batch_object(await batches().cancel_batch(tenant(), batch_id))

    return api
