"""The OpenAPI document's models: what each path answers. They describe; the writers build the objects themselves."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class Status(BaseModel):
    """A word about the server."""

    status: str


class Model(BaseModel):
    """The model served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["stageline"] = "stageline"
    max_model_len: int


class ModelList(BaseModel):
    """The models served."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorObject(BaseModel):
    """`code` is stable, for programs; `message` is for people."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    """Every error."""

    error: ErrorObject


class PromptTokensDetails(BaseModel):
    """Tokens of the prompts that came from the prefix cache."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(BaseModel):
    """One token and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class ChatLogprob(TopLogprob):
    """The chosen token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[ChatLogprob]
    refusal: None


class CompletionLogprobs(BaseModel):
    """One entry for each token, in four lists."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class FunctionCall(BaseModel):
    """`arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call the model makes."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Message
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class PromptLogprob(BaseModel):
    """One token that could stand in the prompt; `rank` is 1 for the most probable."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionChoice(BaseModel):
    """One continuation. `prompt_logprobs` where asked: for each token of the prompt, by token id; null for the first."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class _Envelope(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str
    seed: int


class Completion(_Envelope):
    """Whole continuations."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class ChatCompletion(_Envelope):
    """Whole answers. `prompt_logprobs` where asked, as in CompletionChoice."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = None


class CompletionChunkChoice(CompletionChoice):
    """What is new of one continuation."""

    finish_reason: FinishReason | None  # type: ignore[assignment]


class CompletionChunk(_Envelope):
    """Data of one event."""

    object: Literal["text_completion"]
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class FunctionDelta(BaseModel):
    """The name comes first, then the arguments in pieces."""

    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """What is new of one call."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """What is new of one answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(_Envelope):
    """Data of one event."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class FileObject(BaseModel):
    """An uploaded file, or one that a batch wrote. Times are seconds since the epoch."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    filename: str
    purpose: Literal["batch", "batch_output"]
    status: Literal["processed"]
    expires_at: None


class FileList(BaseModel):
    """Files."""

    object: Literal["list"]
    data: list[FileObject]
    has_more: Literal[False]


class Deleted(BaseModel):
    """What is gone."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class RequestCounts(BaseModel):
    """Lines of a batch."""

    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    """A batch as it is now. Times are seconds since the epoch, null where it did not happen."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: None
    input_file_id: str
    completion_window: str
    status: Literal["in_progress", "completed", "cancelling", "cancelled", "expired"]
    output_file_id: str | None
    error_file_id: str | None
    created_at: int
    in_progress_at: int
    expires_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None


class BatchList(BaseModel):
    """Batches, the newest first."""

    object: Literal["list"]
    data: list[BatchObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
