"""A chain of StageRunners in this process, driven with hand-made steps."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from stageline.stage.v1 import stage_service_pb2 as pb
from stages.batch import StepBatch
from stages.checkpoint import open_checkpoint
from stages.partition import LayerRange
from stages.runner import StageRunner
from stages.weights import load_weights

BLOCK = 16
NUM_BLOCKS = 128


class Chain:
    """Stages over `cuts`; sequences take their blocks scattered over the cache, so block tables matter."""

    def __init__(
        self, folder: Path | str, cuts: Sequence[int], *, dtype=torch.float32, num_blocks: int = NUM_BLOCKS, **options
    ) -> None:
        """`options` are StageRunner's. KV tags are checked on every read unless they say otherwise."""
        options = {"debug_kv": True, **options}
        checkpoint = open_checkpoint(str(folder))
        self.vocab_size = checkpoint.config.vocab_size
        self.stages = []
        for start, end in itertools.pairwise(cuts):
            layers = LayerRange(start, end)
            runner = StageRunner(
                checkpoint.config, layers, dtype=dtype, device=torch.device("cpu"), block_size_tokens=BLOCK, **options,
            )  # fmt: skip
            load_weights(checkpoint, layers, runner.model, dtype=dtype)
            assert not runner.model.missing()
            runner.allocate_kv(num_blocks)
            self.stages.append(runner)
        self._free = list(np.random.default_rng(0).permutation(num_blocks))
        self._tables: dict[int, list[int]] = {}
        self._steps, self._num_blocks = 0, num_blocks

    def step(self, rows: Sequence[tuple[int, Sequence[int], int]]) -> dict[int, torch.Tensor]:
        """rows of (sequence, new tokens, context length after them) → float32 logits [V] by sequence."""
        rows = sorted(rows, key=lambda row: len(row[1]) != 1)
        self._steps += 1
        step = pb.Step(step_id=self._steps)
        step.token_ids = np.array([t for _, tokens, _ in rows for t in tokens], dtype="<i4").tobytes()
        for sequence, tokens, context in rows:
            table = self._tables.setdefault(sequence, [])
            while len(table) * BLOCK < context:
                table.append(int(self._free.pop()))
            row = step.rows.add(sequence_id=sequence, num_tokens=len(tokens), context_len=context)
            row.block_table = np.array(table[: -(-context // BLOCK)], dtype="<i4").tobytes()
            row.sampling.SetInParent()
        out = None
        for stage in self.stages:
            batch = StepBatch.from_step(
                step, vocab_size=self.vocab_size, num_blocks=self._num_blocks, block_size_tokens=BLOCK
            )
            out = stage.execute(batch, out)
        assert out is not None
        return {sequence: out[i].clone() for i, (sequence, _, _) in enumerate(rows)}

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Greedy continuations of all prompts in one batch."""
        outputs: list[list[int]] = [[] for _ in prompts]
        first = len(self._tables)
        pending = [list(prompt) for prompt in prompts]
        for _ in range(num_tokens):
            rows = [(first + i, pending[i], len(prompts[i]) + len(outputs[i])) for i in range(len(prompts))]
            for sequence, logits_V in self.step(rows).items():
                token = int(logits_V.argmax())
                outputs[sequence - first].append(token)
                pending[sequence - first] = [token]
        return outputs
