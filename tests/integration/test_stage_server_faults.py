"""Steps that a stage cannot execute, over real sockets: bad ones, and good ones whose kernels fail."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine_helpers import NUM_LAYERS, VOCAB_SIZE
from stage_server_helpers import (
    FIRST,
    LAST,
    MIDDLE,
    WideRunner,
    int32,
    result,
    running,
    send,
    send_hidden,
    step,
    wire,
    write,
)

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.server.frames import StepFrame

MAX_UINT32 = (1 << 32) - 1
GREEDY = pb.Sampling(top_p=1.0, repetition_penalty=1.0)


def one_row(token_ids: bytes = int32(1), **row: Any) -> bytes:
    row = {"sequence_id": 1, "num_tokens": 1, "context_len": 1, "block_table": int32(0), "sampling": GREEDY, **row}
    return pb.Step(step_id=1, token_ids=token_ids, rows=[pb.Row(**row)]).SerializeToString()


MALFORMED_STEPS = {
    "garbage": b"\xff\xff\xff",
    "cut off": step(1, 8).SerializeToString()[:-3],
    "zero rows": pb.Step(step_id=1, token_ids=int32(1)).SerializeToString(),
    "empty": b"",
    "row of zero tokens": one_row(b"", num_tokens=0),
    "num_tokens 2**31": one_row(num_tokens=1 << 31, context_len=1 << 31),
    "num_tokens 2**32 - 1": one_row(num_tokens=MAX_UINT32, context_len=MAX_UINT32),
    "context 2**31 - 1, small table": pb.Step(
        step_id=1,
        token_ids=int32(*[1] * 64),
        rows=[pb.Row(sequence_id=i, num_tokens=1, context_len=(1 << 31) - 1) for i in range(64)],
    ).SerializeToString(),
    "context 2**32 - 1": one_row(context_len=MAX_UINT32),
    "context under num_tokens": one_row(int32(1, 2), num_tokens=2, context_len=1),
    "context of zero": one_row(context_len=0),
    "more context than the cache": one_row(context_len=257, block_table=int32(*range(64), 0)),
    "token -1": one_row(int32(-1)),
    "token out of the vocabulary": one_row(int32(VOCAB_SIZE)),
    "token -2**31": one_row(int32(-(1 << 31))),
    "fewer tokens than rows say": one_row(b""),
    "more tokens than rows say": one_row(int32(1, 2)),
    "tokens in half an int32": one_row(b"\x01\x00"),
    "block -1": one_row(block_table=int32(-1)),
    "block out of the cache": one_row(block_table=int32(64)),
    "block 2**31 - 1": one_row(block_table=int32((1 << 31) - 1)),
    "table too short": one_row(block_table=b""),
    "table too long": one_row(block_table=int32(0, 1)),
    "decode row after a prefill row": pb.Step(
        step_id=1,
        token_ids=int32(1, 2, 3),
        rows=[
            pb.Row(sequence_id=1, num_tokens=2, context_len=2, block_table=int32(0)),
            pb.Row(sequence_id=2, num_tokens=1, context_len=1, block_table=int32(1)),
        ],
    ).SerializeToString(),
}


@pytest.mark.parametrize("layers", [(0, NUM_LAYERS), (1, NUM_LAYERS)], ids=["whole", "last"])
async def test_malformed_steps_are_answered_and_the_epoch_goes_on(layers: tuple[int, int]) -> None:
    async with running(layers) as stage:
        epoch = await stage.start()
        forward, results = stage.forward(epoch), stage.results(epoch)
        payload = b"" if layers[0] == 0 else b"\0" * 4
        for number, (name, header) in enumerate(MALFORMED_STEPS.items()):
            await write(forward, StepFrame(epoch, 2 * number + 1, header, b"", 1 if payload else 0, payload))
            answer = await result(results)
            assert (answer.step_id, answer.error.reason, len(answer.rows)) == (2 * number + 1, "MALFORMED_STEP", 0), (
                name
            )
            assert answer.error.stage == f"{layers[0]}-{layers[1]}"
            assert answer.error.message
            await send(forward, epoch, step(2 * number + 2), payload, 1 if payload else 0)
            answer = await result(results)
            assert (answer.step_id, answer.HasField("error"), len(answer.rows)) == (2 * number + 2, False, 1), name
        assert stage.runner.executed == [2 * n + 2 for n in range(len(MALFORMED_STEPS))]
        assert (stage.server.failure, await stage.state(), await stage.health()) == (None, "CONNECTED", "SERVING")
        assert (await stage.renew(epoch)).last_executed_step == 2 * len(MALFORMED_STEPS)


async def test_hidden_states_of_another_size_or_type_are_answered() -> None:
    async with running(LAST, WideRunner) as last:
        epoch = await last.start()
        forward, results = last.forward(epoch), last.results(epoch)
        right = WideRunner.hidden(1, 2).numpy().tobytes()
        wrong = [
            (b"", pb.ELEMENT_TYPE_FLOAT32),
            (right[:-4], pb.ELEMENT_TYPE_FLOAT32),
            (right[:-1], pb.ELEMENT_TYPE_FLOAT32),
            (right + right, pb.ELEMENT_TYPE_FLOAT32),
            (right, pb.ELEMENT_TYPE_BFLOAT16),
            (right, pb.ELEMENT_TYPE_UNSPECIFIED),
            (right, 255),
        ]
        for number, (payload, element_type) in enumerate(wrong, 1):
            await send(forward, epoch, step(number, 2), payload, element_type)
            answer = await result(results)
            assert (answer.step_id, answer.error.reason) == (number, "HIDDEN_STATES_MISMATCH")
        good = len(wrong) + 1
        await send_hidden(forward, epoch, step(good, 2), WideRunner.hidden(good, 2))
        assert not (await result(results)).HasField("error")
        assert (last.runner.executed, last.runner.damaged) == ([good], [])


FAULTS = [ValueError, KeyError, MemoryError, IndexError, AssertionError, RecursionError]


@pytest.mark.parametrize("failing", range(3), ids=["first", "middle", "last"])
async def test_a_kernel_that_fails_is_answered_in_the_order_of_steps(failing: int) -> None:
    async with running(FIRST) as first, running(MIDDLE) as middle, running(LAST) as last:
        stages = (first, middle, last)
        epoch = await wire(*stages)
        forward, results = first.forward(epoch), last.results(epoch)
        stages[failing].runner.faults = {2 * n + 2: fault("f") for n, fault in enumerate(FAULTS)}
        for number in range(1, 2 * len(FAULTS) + 2):
            await send(forward, epoch, step(number))
        for number in range(1, 2 * len(FAULTS) + 2):
            answer = await result(results)
            assert answer.step_id == number
            if number % 2:
                assert (answer.HasField("error"), len(answer.rows)) == (False, 1)
            else:
                assert (answer.error.reason, len(answer.rows)) == ("STEP_FAILED", 0)
                assert FAULTS[number // 2 - 1].__name__ in answer.error.message
                assert answer.error.stage == str(stages[failing].runner.layers)
        for stage in stages:
            assert (stage.server.failure, await stage.health()) == (None, "SERVING")


async def test_sampling_that_makes_no_sense_is_answered() -> None:
    nan = float("nan")
    asked = [
        pb.Sampling(temperature=nan, top_p=1.0, repetition_penalty=1.0),
        pb.Sampling(temperature=1.0, top_p=nan, repetition_penalty=1.0),
        pb.Sampling(temperature=-1.0, top_p=1.0, repetition_penalty=1.0),
        pb.Sampling(temperature=1.0, top_p=1.0, repetition_penalty=0.0),
        pb.Sampling(temperature=1.0, top_k=MAX_UINT32, top_p=1.0, repetition_penalty=1.0),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, num_logprobs=MAX_UINT32, logprobs=True),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, suppressed_token_ids=[MAX_UINT32]),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, bias_token_ids=[1, 2], bias_values=[1.0]),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, bias_token_ids=[VOCAB_SIZE], bias_values=[1.0]),
        pb.Sampling(top_p=1.0, repetition_penalty=1.0, allowed_token_bitmask=b"\xff"),
        pb.Sampling(top_p=1.0, repetition_penalty=1.2, registration=pb.Registration(prompt_token_ids=b"\x01\x02")),
        pb.Sampling(top_p=1.0, repetition_penalty=1.2, registration=pb.Registration(prompt_token_ids=int32(-7))),
        pb.Sampling(top_p=1.0, repetition_penalty=1.2, registration=pb.Registration(output_token_ids=int32(1 << 30))),
    ]
    async with running() as stage:
        epoch = await stage.start()
        forward, results = stage.forward(epoch), stage.results(epoch)
        for number, sampling in enumerate(asked, 1):
            what = step(2 * number - 1)
            what.rows[0].sampling.CopyFrom(sampling)
            await send(forward, epoch, what)
            answer = await result(results)
            assert answer.step_id == 2 * number - 1
            assert answer.HasField("error") or len(answer.rows) == 1
            await send(forward, epoch, step(2 * number))
            assert len((await result(results)).rows) == 1
        assert stage.server.failure is None


async def test_scoring_that_makes_no_sense_is_refused() -> None:
    asked = [
        pb.Scoring(num_logprobs=1),
        pb.Scoring(target_ids=b"\x01\x02"),
        pb.Scoring(target_ids=int32(1, 2, 3)),
        pb.Scoring(target_ids=int32(1), first_token=2),
        pb.Scoring(target_ids=int32(1), first_token=MAX_UINT32),
        pb.Scoring(target_ids=int32(VOCAB_SIZE)),
        pb.Scoring(target_ids=int32(-1)),
        pb.Scoring(target_ids=int32(1), num_logprobs=MAX_UINT32),
        pb.Scoring(target_ids=int32(1), alternative_ids=b"\x01"),
        pb.Scoring(target_ids=int32(1), alternative_ids=int32(0, VOCAB_SIZE)),
        pb.Scoring(alternative_ids=int32(1)),
    ]
    async with running() as stage:
        epoch = await stage.start()
        forward, results = stage.forward(epoch), stage.results(epoch)
        for number, scoring in enumerate(asked, 1):
            what = step(2 * number - 1, 2)
            what.rows[0].scoring.CopyFrom(scoring)
            await send(forward, epoch, what)
            assert (await result(results)).error.reason == "MALFORMED_STEP"
            what = step(2 * number, 2)
            what.rows[0].scoring.CopyFrom(pb.Scoring(target_ids=int32(1, 2), num_logprobs=3))
            await send(forward, epoch, what)
            (row,) = (await result(results)).rows
            assert (len(row.scores.logprobs), len(row.scores.ranks), len(row.scores.top_ids)) == (8, 8, 24)
            assert row.candidate_ids  # and it was sampled too
        others = [*range(1, 40), 1]
        what = step(2 * len(asked) + 1, 2)
        what.rows[0].scoring.CopyFrom(
            pb.Scoring(target_ids=int32(1, 2), num_logprobs=3, alternative_ids=int32(*others))
        )
        await send(forward, epoch, what)
        scores = (await result(results)).rows[0].scores
        logprobs, ranks = np.frombuffer(scores.logprobs, "<f4"), np.frombuffer(scores.ranks, "<i4")
        assert (len(logprobs), len(ranks), len(scores.top_ids)) == (42, 42, 24)
        assert (logprobs[2], ranks[2]) == (logprobs[41], ranks[41]) == (logprobs[0], ranks[0])  # a token has one score
        assert (np.argsort(-logprobs[2:41]) == np.argsort(ranks[2:41])).all()
