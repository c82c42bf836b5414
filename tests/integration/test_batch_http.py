"""/v1/files and /v1/batches through the `openai` client; and whose batches a tenant sees."""

from __future__ import annotations

import io
import json

import openai
import pytest
from doors_helpers import Doors, open_doors

from gateway.access import Doorkeeper
from gateway.batch.opening import open_batches
from gateway.cli import main
from gateway.config import BatchSection


def lines(count: int, url: str = "/v1/completions") -> bytes:
    chat = {"messages": [{"role": "user", "content": "Say."}]}
    body = {"model": "toy", "max_tokens": 4} | ({"prompt": "Say"} if url == "/v1/completions" else chat)
    return b"".join(
        json.dumps({"custom_id": f"c-{i}", "method": "POST", "url": url, "body": body}).encode() + b"\n"
        for i in range(count)
    )


@pytest.fixture
async def doors(state_url):
    doors = Doors()
    batches = await open_batches(doors.frontend, BatchSection(state_url=state_url))
    async with open_doors(doors, batches=batches) as opened:
        yield opened
    await batches.stop()


def client_of(doors: Doors, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{doors.http}/v1", api_key=key, max_retries=0)


async def ended(client: openai.AsyncOpenAI, batch_id: str):
    while (batch := await client.batches.retrieve(batch_id)).status in ("in_progress", "cancelling"):
        pass
    return batch


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/chat/completions"])
async def test_a_batch_from_upload_to_answers(doors, url) -> None:
    name = doors.frontend.model.name
    data = lines(12, url).replace(b'"toy"', json.dumps(name).encode())
    async with client_of(doors) as client:
        file = await client.files.create(file=("in.jsonl", io.BytesIO(data + b"no JSON\n")), purpose="batch")
        assert (file.filename, file.bytes, file.purpose) == ("in.jsonl", len(data) + 8, "batch")
        assert (await client.files.content(file.id)).content == data + b"no JSON\n"
        batch = await client.batches.create(
            input_file_id=file.id, endpoint=url, completion_window="24h", metadata={"for": "test"}
        )
        assert batch.expires_at == batch.created_at + 86_400
        batch = await ended(client, batch.id)
        assert (batch.status, batch.metadata) == ("completed", {"for": "test"})
        counts = batch.request_counts
        assert (counts.total, counts.completed, counts.failed) == (13, 12, 1)
        answers = [json.loads(text) for text in (await client.files.content(batch.output_file_id)).text.splitlines()]
        assert [answer["custom_id"] for answer in answers] == [f"c-{i}" for i in range(12)]
        assert answers[0]["response"]["body"]["object"] == (
            "text_completion" if "chat" not in url else "chat.completion"
        )
        errors = (await client.files.content(batch.error_file_id)).text.splitlines()
        assert [json.loads(text)["error"]["code"] for text in errors] == ["line_not_json"]
        assert [one.id async for one in await client.batches.list(limit=1)] == [batch.id]
        assert [one.id async for one in await client.files.list()] == [file.id]
        assert (await client.files.delete(file.id)).deleted
        with pytest.raises(openai.NotFoundError):
            await client.files.retrieve(file.id)


async def test_cancel(doors) -> None:
    doors.engine.token_s = 0.05
    name = doors.frontend.model.name
    async with client_of(doors) as client:
        data = lines(300).replace(b'"toy"', json.dumps(name).encode())
        file = await client.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
        batch = await client.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        with pytest.raises(openai.BadRequestError, match="cancel that first"):
            await client.files.delete(file.id)
        assert (await client.batches.cancel(batch.id)).status in ("cancelling", "cancelled")
        assert (await ended(client, batch.id)).status == "cancelled"
        with pytest.raises(openai.NotFoundError):
            await client.batches.retrieve("batch_none")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"endpoint": "/v1/embeddings"}, "endpoint"),
        ({"completion_window": "1 day"}, "completion_window"),
        ({"input_file_id": "file-none"}, "file-none"),
        ({"metadata": {f"k{i}": "v" for i in range(17)}}, "16 pairs"),
    ],
)
async def test_wrong_batches(doors, change, word) -> None:
    async with client_of(doors) as client:
        file = await client.files.create(file=("in.jsonl", io.BytesIO(lines(1))), purpose="batch")
        given = {"input_file_id": file.id, "endpoint": "/v1/completions", "completion_window": "24h"} | change
        with pytest.raises(openai.APIStatusError, match=word) as error:
            await client.batches.create(**given)
        assert error.value.status_code in (400, 404)


async def test_a_server_without_state_says_so() -> None:
    async with open_doors(Doors()) as doors, client_of(doors) as client:
        with pytest.raises(openai.BadRequestError, match=r"batch\.state_url"):
            await client.batches.list()


async def test_a_tenant_sees_its_own(state_url, tmp_path, capsys) -> None:
    keys = {}
    for tenant in ("red", "blue"):
        assert main(["keys", "create", "--tenant", tenant, "--file", str(tmp_path / "keys.yaml")]) == 0
        keys[tenant] = next(word for word in capsys.readouterr().out.split() if word.startswith("sl-"))
    doors = Doors(doorkeeper=Doorkeeper(str(tmp_path / "keys.yaml")))
    batches = await open_batches(doors.frontend, BatchSection(state_url=state_url))
    async with open_doors(doors, batches=batches), client_of(doors, keys["red"]) as red:
        data = lines(2).replace(b'"toy"', json.dumps(doors.frontend.model.name).encode())
        file = await red.files.create(file=("in.jsonl", io.BytesIO(data)), purpose="batch")
        batch = await red.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h")
        batch = await ended(red, batch.id)
        assert batch.request_counts.completed == 2
        async with client_of(doors, keys["blue"]) as blue:
            assert [one async for one in await blue.batches.list()] == []
            assert [one async for one in await blue.files.list()] == []
            for call in (
                blue.batches.retrieve(batch.id), blue.batches.cancel(batch.id), blue.files.retrieve(file.id),
                blue.files.content(batch.output_file_id), blue.files.delete(file.id),
                blue.batches.create(input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"),
            ):  # fmt: skip
                with pytest.raises(openai.NotFoundError):
                    await call
    await batches.stop()
