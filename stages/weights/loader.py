"""Loads the tensors of a layer range, one by one, opening only the files that hold them."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open

from stageline.errors import CheckpointError
from stages.checkpoint import Checkpoint
from stages.gguf_container import read_gguf
from stages.gguf_file import dequantize, tensors_by_hf_name
from stages.partition import EMBEDDING, LM_HEAD, LayerRange, tensor_shapes
from stages.safetensors_header import read_header

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What was loaded: tensors, their bytes in the stage's dtype, the files opened (in order), and the time."""

    num_tensors: int
    num_bytes: int
    files: tuple[str, ...]
    seconds: float


def load_weights(
    checkpoint: Checkpoint,
    layers: LayerRange,
    load_tensor: Callable[[str, torch.Tensor], None],
    *,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> LoadReport:
    """Call `load_tensor(name, tensor)` once for every tensor of the stage, under its Hugging Face name.

    A tensor is on the CPU, in `dtype`, in the shape of `tensor_shapes`. It may be a view of the mapped file: it is to
    be copied (to the device or into a fused parameter) before `load_tensor` returns, and never written to. So one
    tensor at most is in memory besides what `load_tensor` keeps (from GGUF: in float32 and in `dtype`).
    `progress(done_bytes, total_bytes)` is called before the first tensor and after each, in bytes of `dtype`.

    The checkpoint is verified first. Raises CheckpointError (as `Checkpoint.verify_index`; SHARD_UNREADABLE;
    TIED_HEAD_DIFFERS), the hub's errors, and what `load_tensor` raises.
    """
    started_s = time.monotonic()
    checkpoint.verify_index(layers)
    shapes = tensor_shapes(checkpoint.config, layers)
    total_bytes = sum(map(math.prod, shapes.values())) * dtype.itemsize
    done_bytes = 0
    loaded: set[str] = set()
    if progress is not None:
        progress(0, total_bytes)
    stream = _from_gguf if checkpoint.kind == "gguf" else _from_safetensors
    for name, tensor in stream(checkpoint, layers, set(shapes)):
        assert name not in loaded, f"{name} came twice"
        assert tuple(tensor.shape) == shapes[name], f"{name} passed verification with another shape"
        load_tensor(name, tensor.to(dtype))
        loaded.add(name)
        done_bytes += tensor.numel() * dtype.itemsize
        if progress is not None:
            progress(done_bytes, total_bytes)
    assert loaded == shapes.keys(), f"not loaded: {sorted(shapes.keys() - loaded)}"
    report = LoadReport(len(loaded), done_bytes, checkpoint.shards_for(layers), time.monotonic() - started_s)
    _LOG.info(
        "layers %s: %d tensors, %d bytes from %s in %.1f s",
        layers,
        report.num_tensors,
        report.num_bytes,
        ", ".join(report.files),
        report.seconds,
    )
    return report


def _from_safetensors(
    checkpoint: Checkpoint, layers: LayerRange, wanted: set[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, mapped tensor), shard after shard, each in the order of its data, so that the disk reads forward."""
    if checkpoint.config.tie_word_embeddings and layers.is_last(checkpoint.config):
        _check_tied_head(checkpoint, layers)
    for shard in checkpoint.shards_for(layers):
        path = checkpoint.shard_path(shard)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name in file.offset_keys():
                    if name in wanted:
                        yield name, file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                "SHARD_UNREADABLE", f"shard {path} cannot be read: {error}", shard=shard, path=path
            ) from None


def _from_gguf(checkpoint: Checkpoint, layers: LayerRange, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, float32 tensor) in the order of the file's data."""
    file = read_gguf(checkpoint.path)
    tensors = tensors_by_hf_name(file)
    for name in sorted(wanted, key=lambda name: tensors[name].begin):
        yield name, torch.from_numpy(dequantize(file, checkpoint.config, tensors[name]))


def _check_tied_head(checkpoint: Checkpoint, layers: LayerRange) -> None:
    """Raise CheckpointError (TIED_HEAD_DIFFERS) if there is an lm_head and it is no copy of the embedding.

    transformers ties the two only where they are equal, and else keeps both whatever `tie_word_embeddings` says.
    """
    headers = [read_header(checkpoint.shard_path(shard)) for shard in checkpoint.shards_for(layers)]
    holders = {name: header.path for header in headers for name in (EMBEDDING, LM_HEAD) if name in header.tensors}
    if LM_HEAD not in holders:
        return
    with safe_open(holders[EMBEDDING], "pt") as embedding, safe_open(holders[LM_HEAD], "pt") as head:
        if torch.equal(embedding.get_tensor(EMBEDDING), head.get_tensor(LM_HEAD)):
            return
    raise CheckpointError(
        "TIED_HEAD_DIFFERS",
        f"{LM_HEAD} in {holders[LM_HEAD].name} differs from {EMBEDDING}, but "
        "config.json says tie_word_embeddings; set it to false to serve both",
        tensor=LM_HEAD,
        shard=holders[LM_HEAD].name,
    )
