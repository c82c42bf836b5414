"""What no socket can be made to show reliably: a call that is cancelled while a message is being written."""

from __future__ import annotations

import asyncio

import pytest

from gateway.api.grpc.interceptor import _stream


async def test_cancelled_in_a_write_closes_the_generator_at_once():
    closed, writing = [], asyncio.Event()

    async def method(request, context):
        try:
            yield "first"
        finally:
            closed.append(True)

    class Context:
        def invocation_metadata(self):
            return ()

        async def send_initial_metadata(self, metadata):
            pass

        async def write(self, message):
            writing.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(_stream(method, "/x", 60.0)(object(), Context()))
    await writing.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed == [True]
