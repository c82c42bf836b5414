"""One step, from the bytes that came in to the bytes that go out. No gRPC here; runs on the compute thread."""

from __future__ import annotations

import time
from typing import Any

import torch
from google.protobuf.message import DecodeError

from stageline.errors import InvalidArgumentError, ResourceExhaustedError, StagelineError
from stageline.stage.v1 import stage_service_pb2 as pb
from stages.batch import StepBatch
from stages.hidden_states import ELEMENT_TYPES, HiddenStateCodec
from stages.logits import LogitsProcessor, Scorer, check_sampling, check_scoring
from stages.runner import StageRunner
from stages.server.frames import MAX_PAYLOAD_BYTES, StepFrame


class StageExecutor:
    """Decodes a step, runs the layers, and on the last stage turns logits into candidates."""

    def __init__(self, runner: StageRunner, *, hidden_dtype: str | None = None) -> None:
        """`hidden_dtype` is what hidden states are reduced to on the wire: None, fp8 or int8."""
        self.runner = runner
        self.element_type = ELEMENT_TYPES[runner.dtype]
        self.hidden_states = HiddenStateCodec(runner.dtype, runner.config.hidden_size, hidden_dtype)
        self._name = str(runner.layers)
        self._logits = LogitsProcessor(runner.config.vocab_size, runner.device) if runner.model.is_last else None

    def allocate_kv(self, num_blocks: int) -> None:
        """Make the KV cache of the pipeline's size. Raises ResourceExhaustedError where the memory is not there."""
        try:
            self.runner.allocate_kv(num_blocks)
        except (RuntimeError, MemoryError) as error:  # torch says RuntimeError on the CPU, a subclass of it on CUDA
            raise ResourceExhaustedError(
                "KV_OUT_OF_MEMORY", f"layers {self._name}: no memory for {num_blocks} KV blocks: {error}; "
                "set kv_cache.memory_bytes lower", num_blocks=num_blocks,
            ) from error  # fmt: skip

    def max_payload_bytes(self) -> int:
        """Hidden states of the most tokens a step can have: one for every slot. None come to the first stage."""
        runner = self.runner
        if runner.model.is_first:
            return 0
        slots = runner.num_blocks * runner.block_size_tokens
        return min(MAX_PAYLOAD_BYTES, self.hidden_states.num_bytes(slots))

    def reset(self) -> None:
        """A new epoch: what the last stage remembered of sequences is registered again."""
        if self._logits is not None:
            self._logits.reset()

    def execute(self, frame: StepFrame, received_ns: int) -> StepFrame:
        """The frame for the next stage; from the last stage its header is a serialized StepResult.

        A step that cannot be executed becomes a FAILED frame with the reason: the epoch and other steps go on. Only a
        device that is lost (torch.AcceleratorError: every later step would fail too) is raised.
        """
        trace = pb.StepResult()
        released: list[int] = []
        cpu_ns = time.thread_time_ns()
        try:
            trace.ParseFromString(frame.trace)
            timing = trace.timings.add(stage=self._name, received_ns=received_ns, started_ns=time.monotonic_ns())
            if frame.failed:
                return self._answer_failed(frame, pb.StepError.FromString(frame.header), trace)
            step = pb.Step.FromString(frame.header)
            released.extend(step.released_sequence_ids)
            out = self._run(frame, step)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            failure = self._failure(error)
            failure.released_sequence_ids.extend(released)
            return self._answer_failed(frame, failure, trace)
        timing.finished_ns = time.monotonic_ns()
        timing.cpu_ns = time.thread_time_ns() - cpu_ns
        if isinstance(out, list):
            result = pb.StepResult(step_id=frame.step_id, rows=out, timings=trace.timings)
            return StepFrame(frame.epoch, frame.step_id, result.SerializeToString())
        raw: Any = out.numpy()
        return StepFrame(
            frame.epoch, frame.step_id, frame.header, trace.SerializeToString(), self.hidden_states.element_type,
            memoryview(raw).cast("B"),
        )  # fmt: skip

    def _failure(self, error: Exception) -> pb.StepError:
        reason, message = "STEP_FAILED", f"{type(error).__name__}: {error}"
        if isinstance(error, StagelineError):
            reason, message = error.reason, error.message
        elif isinstance(error, DecodeError):
            reason, message = "MALFORMED_STEP", f"malformed step: {error}"
        return pb.StepError(stage=self._name, reason=reason, message=message)

    def _answer_failed(self, frame: StepFrame, failure: pb.StepError, trace: pb.StepResult) -> StepFrame:
        if self._logits is None:
            return StepFrame(
                frame.epoch, frame.step_id, failure.SerializeToString(), trace.SerializeToString(), failed=True
            )
        self._logits.release(failure.released_sequence_ids)
        result = pb.StepResult(step_id=frame.step_id, timings=trace.timings, error=failure)
        return StepFrame(frame.epoch, frame.step_id, result.SerializeToString())

    def _run(self, frame: StepFrame, step: pb.Step) -> torch.Tensor | list[pb.RowResult]:
        runner = self.runner
        batch = StepBatch.from_step(
            step,
            vocab_size=runner.config.vocab_size,
            num_blocks=runner.num_blocks,
            block_size_tokens=runner.block_size_tokens,
        )
        scorer = None
        if self._logits is not None:
            for index in batch.output_rows:
                check_sampling(step.rows[index].sampling, runner.config.vocab_size)
            scored = [row.scoring for row in step.rows if row.HasField("scoring")]
            for scoring in scored:
                check_scoring(scoring)
            if scored:
                most = max(scoring.num_logprobs for scoring in scored)
                scorer = Scorer(batch.target_ids, most, runner.device, batch.alternatives)
        hidden_TD = None if runner.model.is_first else self._hidden(frame, len(batch.token_ids))
        out = runner.execute(batch, hidden_TD, None if scorer is None else scorer.add)
        if self._logits is None:
            out = runner.transfers.to_host(out)()
            # Layers that work in place: memory of the input is written again while the output is being sent.
            borrowed = frame.give_back is not None and hidden_TD is not None and _same_memory(out, hidden_TD)
            return self.hidden_states.encode(out.clone() if borrowed else out)
        self._logits.release(step.released_sequence_ids)
        rows = []
        for index in batch.output_rows:
            row = step.rows[index]
            tokens = batch.token_ids[batch.query_starts[index] : batch.query_starts[index + 1]]
            rows.append((row.sequence_id, tokens, row.context_len, row.sampling))
        results = self._logits.process(out, rows)
        return results if scorer is None else _with_scores(step, results, scorer)

    def _hidden(self, frame: StepFrame, num_tokens: int) -> torch.Tensor:
        codec, width = self.hidden_states, self.runner.config.hidden_size
        expected = codec.num_bytes(num_tokens)
        if frame.element_type != codec.element_type or len(frame.payload) != expected:
            raise InvalidArgumentError(
                "HIDDEN_STATES_MISMATCH",
                f"hidden states have element type {frame.element_type} and {len(frame.payload)} bytes, expected "
                f"type {codec.element_type} and {expected} bytes for {num_tokens} tokens of {width} elements",
            )
        return codec.decode(torch.frombuffer(frame.payload, dtype=torch.uint8), num_tokens)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _with_scores(step: pb.Step, results: list[pb.RowResult], scorer: Scorer) -> list[pb.RowResult]:
    """The results of sampled rows with the scores in them, and results of their own for rows that only score."""
    scored = [row for row in step.rows if row.HasField("scoring")]
    counts = [(len(row.scoring.target_ids) // 4, row.scoring.num_logprobs) for row in scored]
    scores, sampled = iter(scorer.results(counts)), iter(results)
    merged = []
    for row in step.rows:
        if row.HasField("sampling"):
            merged.append(next(sampled))
        elif row.HasField("scoring"):
            merged.append(pb.RowResult(sequence_id=row.sequence_id))
        if row.HasField("scoring"):
            found = next(scores)
            if found is None:
                merged[-1] = pb.RowResult(sequence_id=row.sequence_id, non_finite=True)
            else:
                merged[-1].scores.CopyFrom(found)
    return merged
