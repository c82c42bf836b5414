"""The planner's activation bytes against the tensors that the 72B's own code makes on a fake CUDA device, summed up."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gateway.planner.catalogue import Host, find_model_config, gpus
from gateway.planner.cost import Workload, activation_bytes, weight_bytes
from stages.attention.varlen import VarlenAttention
from stages.kv_cache import KVCache
from stages.models.qwen2 import Qwen2Stage
from stages.partition import LayerRange, kv_bytes_per_token, num_parameters
from tests.unit.test_fake_72b import BLOCK, CUDA, context

CONFIG = find_model_config("qwen2-72b")
WORKLOAD = Workload()


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that are alive on the device, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.device.type == "cuda":
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._seen:
            self._seen[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.live -= self._seen.pop(key)


@contextlib.contextmanager
def stage(layers: LayerRange) -> Iterator[tuple[Qwen2Stage, KVCache, LiveBytes]]:
    with FakeTensorMode(), LiveBytes() as bytes_:
        attention = VarlenAttention(block_size_tokens=BLOCK, dtype=torch.bfloat16, device=CUDA)
        model = Qwen2Stage(CONFIG, layers, dtype=torch.bfloat16, device=CUDA, attention=attention)
        cache = KVCache(CONFIG, layers, num_blocks=32, block_size_tokens=BLOCK, dtype=torch.bfloat16, device=CUDA)
        yield model, cache, bytes_


@pytest.mark.parametrize("layers", [LayerRange(0, 3), LayerRange(40, 43), LayerRange(77, 80)])
def test_weights_and_cache_are_as_planned(layers: LayerRange) -> None:
    with stage(layers) as (_, _, bytes_):
        expected = 2 * num_parameters(CONFIG, layers) + 32 * BLOCK * kv_bytes_per_token(CONFIG, layers, 2)
        # Besides, the table of rotary frequencies.
        assert 0 <= bytes_.live - expected < 1 << 20


@pytest.mark.parametrize("layers", [LayerRange(0, 3), LayerRange(40, 43), LayerRange(77, 80)])
@pytest.mark.parametrize("rows", [((2048, 2048),), ((2048, 1),) * 128 + ((1920, 1920),)])
def test_a_full_micro_batch_stays_within_the_planned_activations(layers: LayerRange, rows) -> None:
    with stage(layers) as (model, cache, bytes_):
        before = bytes_.live
        total = sum(count for _, count in rows)
        assert total == WORKLOAD.max_step_tokens
        input_T = torch.empty(total, dtype=torch.int64, device=CUDA)
        hidden_TD = torch.empty(total, CONFIG.hidden_size, dtype=torch.bfloat16, device=CUDA)
        out_TD = model(input_T if model.is_first else hidden_TD, context(rows), cache)
        del hidden_TD
        planned = activation_bytes(CONFIG, WORKLOAD, 2, last=model.is_last)
        used = bytes_.peak - before
        assert planned == pytest.approx(used, rel=0.01)
        if model.is_last:
            bytes_.peak = 0
            count = WORKLOAD.max_step_sequences
            logits_RV = model.compute_logits(out_TD.narrow(0, 0, count))
            assert logits_RV.shape == (count, CONFIG.vocab_size)
            torch.logsumexp(logits_RV, dim=-1)
            assert bytes_.peak - before <= planned, (bytes_.peak - before, planned)


def test_tied_embeddings_are_there_twice_where_the_host_packs_them() -> None:
    config = find_model_config("qwen2-0.5b")
    assert config.tie_word_embeddings
    gpu = gpus()["a100-80g"]
    cpu = replace(gpu, host=Host(cores=2, busy=None))
    whole, half = LayerRange(0, config.num_layers), LayerRange(0, config.num_layers // 2)
    table = 2 * config.vocab_size * config.hidden_size
    assert weight_bytes(config, whole, gpu, 2) == 2 * num_parameters(config, whole)
    assert weight_bytes(config, whole, cpu, 2) == 2 * num_parameters(config, whole) + table
    assert weight_bytes(config, half, cpu, 2) == 2 * num_parameters(config, half)
    assert weight_bytes(CONFIG, LayerRange(0, CONFIG.num_layers), cpu, 2) == 2 * num_parameters(
        CONFIG, LayerRange(0, CONFIG.num_layers)
    )
