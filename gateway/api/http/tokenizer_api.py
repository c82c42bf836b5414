"""/tokenize, /detokenize and /tokenizer_info, with vLLM's fields: what evaluation harnesses ask a server for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar

from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Discriminator, Tag

from gateway.api.aside import aside
from gateway.api.http import openapi
from gateway.api.http.body import Body, NoOps
from gateway.api.http.chat_body import ChatMessage, Tool
from gateway.api.http.schema import says
from gateway.api.raw import ChatPrompt, Prompt, RawRequest, TextPrompt
from gateway.api.service import Frontend
from gateway.api.validate import check_served


class TokenizeBody(Body):
    """What both forms take. The tokenizers served add no special tokens, whatever `add_special_tokens` says."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeText(TokenizeBody):
    """Plain text."""

    prompt: str

    def what(self) -> Prompt:
        """The prompt."""
        return TextPrompt(self.prompt)


class TokenizeChat(TokenizeBody):
    """A conversation, rendered with the model's chat template."""

    no_ops: ClassVar[NoOps] = {"chat_template": (), "chat_template_kwargs": ({},)}
    messages: Annotated[list[ChatMessage], says(minItems=1)]
    tools: list[Tool] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    def what(self) -> Prompt:
        """The prompt."""
        return ChatPrompt(
            [message.turn(place) for place, message in enumerate(self.messages)],
            tools=[tool.for_template() for tool in self.tools or ()],
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
        )


def _form(data: Any) -> str:
    return "chat" if isinstance(data, TokenizeChat) or (isinstance(data, dict) and "messages" in data) else "text"


TokenizeEither = Annotated[
    Annotated[TokenizeText, Tag("text")] | Annotated[TokenizeChat, Tag("chat")], Discriminator(_form)
]


class Detokenize(Body):
    """Token ids."""

    model: str | None = None
    tokens: list[Annotated[int, says(minimum=0)]]


class Tokenized(BaseModel):
    """`count` token ids; `token_strs` only where asked."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The text; special tokens are in it, bytes that are not UTF-8 become U+FFFD."""

    prompt: str


class TokenizerInfo(BaseModel):
    """tokenizer_config.json's fields, as far as the served tokenizer knows them."""

    model_config = ConfigDict(extra="allow")
    tokenizer_class: str
    model_max_length: int
    vocab_size: int
    chat_template: str | None
    add_bos_token: bool


def router(frontend_getter: Callable[[], Frontend]) -> APIRouter:
    """The three paths."""
    paths = APIRouter()

    @paths.post("/tokenize", response_model=Tokenized, responses=openapi.errors(404, 413))
    async def tokenize(body: TokenizeEither) -> Response:
        """Token ids of a text, or of a conversation as the model would see it."""
        frontend = frontend_getter()
        prompt = body.what()
        check_served(RawRequest(prompt=prompt, model=body.model), frontend.model)
        token_ids, _ = await frontend.encode(prompt)

        def answer() -> str:
            strings = (frontend.tokenizer.token_bytes(i).decode("utf-8", errors="replace") for i in token_ids)
            return Tokenized(
                count=len(token_ids),
                max_model_len=frontend.model.max_context_tokens,
                tokens=list(token_ids),
                token_strs=list(strings) if body.return_token_strs else None,
            ).model_dump_json()

        return Response(await aside(answer, len(token_ids)), media_type="application/json")

    @paths.post("/detokenize", responses=openapi.errors(404, 413))
    async def detokenize(body: Detokenize) -> Detokenized:
        """Text of token ids."""
        frontend = frontend_getter()
        check_served(RawRequest(prompt=TextPrompt(""), model=body.model), frontend.model)
        return Detokenized(prompt=await frontend.decode(body.tokens, skip_special_tokens=False, field="tokens"))

    @paths.get("/tokenizer_info", responses=openapi.errors())
    async def tokenizer_info() -> TokenizerInfo:
        """What a client needs to render templates itself."""
        frontend = frontend_getter()
        return TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",  # what transformers calls any tokenizer.json
            model_max_length=frontend.model.max_context_tokens,
            vocab_size=frontend.tokenizer.vocab_size,
            chat_template=frontend.tokenizer.chat_template,
            add_bos_token=False,
            **frontend.tokenizer.special_tokens,
        )

    return paths
