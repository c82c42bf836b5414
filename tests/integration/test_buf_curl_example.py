"""examples/buf_curl.sh against doors without keys and with them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path

from doors_helpers import Doors, open_doors
from test_doors_access import house

EXAMPLE = Path(__file__).parents[2] / "examples/buf_curl.sh"


async def ran(address: str, **environ: str) -> tuple[int, str, str]:
    """Exit code, output and errors."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    process = await asyncio.create_subprocess_exec(
        str(EXAMPLE), address, env={**os.environ, "PATH": path, **environ},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def objects(text: str) -> list[dict]:
    """JSON objects one after another."""
    found, decoder = [], json.JSONDecoder()
    while text := text.lstrip():
        value, end = decoder.raw_decode(text)
        found.append(value)
        text = text[end:]
    return found


async def test_it_shows_the_model_and_streams() -> None:
    async with open_doors(Doors()) as doors:
        code, out, err = await ran(doors.grpc)
    assert (code, err) == (0, "")
    model, tokens, start, *deltas, usage = objects(out)
    assert model["name"] == "tiny"
    assert len(tokens["tokenIds"]) == len("Why is the sky blue?")
    assert "start" in start
    assert usage["usage"]["completionTokens"] == 8
    assert deltas[-1]["choices"][0]["finishReason"] == "FINISH_REASON_LENGTH"


async def test_it_needs_the_key_where_there_are_keys(tmp_path) -> None:
    async with house(tmp_path, red={}) as here:
        code, out, err = await ran(here.doors.grpc)
        assert code != 0
        assert out == ""
        assert "failed to find service" in err  # reflection needs the key, too, and buf says no more
        code, out, err = await ran(here.doors.grpc, STAGELINE_API_KEY=here.keys["red"])
        assert (code, err) == (0, "")
        assert objects(out)[0]["name"] == "toy"
