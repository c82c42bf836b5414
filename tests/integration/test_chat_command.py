"""`stageline chat` as a process, over a pipe and on a terminal, against a gRPC door."""

from __future__ import annotations

import asyncio
import os
import pty
import signal
import sys

from doors_helpers import Doors, open_doors, until


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "gateway.cli", "chat", "--max-tokens", "6", *args]


async def chat(*args: str, says: bytes) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a chat that is told all at once."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command(*args), stdin=pipe, stdout=pipe, stderr=pipe)
    out, err = await asyncio.wait_for(process.communicate(says), 30)
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


def prompts(doors: Doors) -> list[str]:
    return [doors.tokenizer.decode(r.prompt_token_ids, skip_special_tokens=False) for r in doors.engine.requests]


async def test_turns_over_a_pipe_until_its_end(doors):
    assert await chat("--address", doors.grpc, "--system", "be", says="hé\n\nthere\n".encode()) == (
        0, "hé ll\nhé ll\n", "",
    )  # fmt: skip
    first, second = prompts(doors)
    assert first == "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\nhé<|im_end|>\n<|im_start|>assistant\n"
    assert second == f"{first}hé ll<|im_end|>\n<|im_start|>user\nthere<|im_end|>\n<|im_start|>assistant\n"


async def test_exit_ends_it_whatever_follows(doors):
    assert await chat("--address", doors.grpc, says=b"a\n /exit \nb\n") == (0, "hé ll\n", "")
    assert len(doors.engine.requests) == 1


async def test_a_server_that_is_gone_is_named(doors):
    assert await chat("--address", "127.0.0.1:9", says=b"a\n") == (
        1, "\n", "stageline chat: the server at 127.0.0.1:9 does not answer [SERVER_UNREACHABLE]\n",
    )  # fmt: skip


async def test_a_server_that_goes_in_the_middle_of_an_answer():
    pipe = asyncio.subprocess.PIPE
    async with open_doors(Doors()) as doors:
        doors.engine.token_s = 0.05
        process = await asyncio.create_subprocess_exec(
            *command("--address", doors.grpc, "--max-tokens", "400"), stdin=pipe, stdout=pipe, stderr=pipe
        )
        process.stdin.write(b"a\n")
        assert await asyncio.wait_for(process.stdout.readexactly(1), 30) == b"h"  # streamed, not all at the end
    out, err = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 1
    assert out.endswith(b"\n")
    assert b"Traceback" not in err
    assert err.startswith(b"stageline chat: ")


async def test_a_wrong_value_is_told_and_exits_2(doors):
    code, _, err = await chat("--address", doors.grpc, "--temperature", "-1", says=b"a\n")
    assert (code, "generation.sampling.temperature" in err, "Traceback" in err) == (2, True, False)


async def test_on_a_terminal_with_a_prompt_and_ctrl_c(doors):
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *command("--address", doors.grpc), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    seen = bytearray()
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            seen.extend(os.read(master, 4096))
        except OSError:  # the process has closed its end
            loop.remove_reader(master)

    loop.add_reader(master, read)
    async with asyncio.timeout(30):
        await until(lambda: b"> " in seen)
        os.write(master, b"hello\n")
        await until(lambda: seen.count(b"> ") == 2)
        assert "hé ll\r\n" in seen.decode()
        doors.engine.token_s = 30.0
        os.write(master, b"more\n")
        await until(lambda: len(doors.engine.requests) == 2)
        process.send_signal(signal.SIGINT)
        assert await process.wait() == 130
    await doors.until_cancelled(1)
    loop.remove_reader(master)
    os.close(master)
    assert b"Traceback" not in seen
