"""Does a checkpoint hold the model's tensors, all of them and nothing else? No torch here."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stageline.errors import CheckpointError
from stages.config import ModelConfig
from stages.partition import LM_HEAD, LayerRange, tensor_shapes
from stages.safetensors_header import SafetensorsHeader, read_header

WEIGHT_DTYPES = frozenset({"F32", "F16", "BF16"})
# Buffers that old transformers versions saved; they follow from rope_theta.
_HARMLESS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


def read_json(path: Path) -> dict[str, Any]:
    """A file that must hold one JSON object. Raises CheckpointError (METADATA_UNREADABLE)."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise CheckpointError("METADATA_UNREADABLE", f"{path} cannot be read as JSON: {error}", path=path) from None
    if not isinstance(data, dict):
        raise CheckpointError(
            "METADATA_UNREADABLE", f"{path} must hold a JSON object, got {type(data).__name__}", path=path
        )
    return data


def read_weight_map(path: Path) -> dict[str, str]:
    """Tensor name → shard name of a `model.safetensors.index.json`.

    Raises CheckpointError (METADATA_UNREADABLE), also where a shard is not a plain file name: the index of somebody
    else's model must not make us open files outside its folder.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("METADATA_UNREADABLE", f"{path} has no weight_map (tensor name → shard)", path=path)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or "/" in shard or "\\" in shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                "METADATA_UNREADABLE",
                f"{path}: weight_map sends {tensor} to {shard!r}, expected the "
                "name of a .safetensors file in the same folder",
                path=path,
                tensor=tensor,
                shard=shard,
            )
    return weight_map


def check_names(weight_map: Mapping[str, str], config: ModelConfig, source: str) -> None:
    """Raise CheckpointError unless `weight_map` names the model's tensors: all, and no other but harmless ones.

    TENSOR_MISSING or TENSOR_UNEXPECTED; `source` (the file that gave the names) is in the message.
    """
    wanted = tensor_shapes(config, LayerRange(0, config.num_layers))
    if missing := sorted(wanted.keys() - weight_map.keys()):
        more = f" and {len(missing) - 1} more tensors are" if len(missing) > 1 else " is"
        raise CheckpointError(
            "TENSOR_MISSING",
            f"{source}: {missing[0]}{more} missing; the model of config.json "
            f"({config.num_layers} layers) needs {len(wanted)} tensors",
            tensor=missing[0],
            shard=source,
            missing=len(missing),
        )
    for name in sorted(weight_map.keys() - wanted.keys()):
        if not _is_harmless(name, config):
            raise _unexpected(name, weight_map[name], config)


def verify_shards(
    config: ModelConfig,
    expected: Mapping[str, tuple[int, ...]],
    weight_map: Mapping[str, str],
    headers: Mapping[str, SafetensorsHeader],
    others: Iterable[Path],
) -> None:
    """Compare what a stage reads (`expected`: name → shape) with the headers of its shards (by file name).

    `others` are the files to look into when a tensor is not where `weight_map` says, to name its place. Raises
    CheckpointError as `Checkpoint.verify_index` documents.
    """
    for tensor, shape in expected.items():
        shard = weight_map[tensor]
        info = headers[shard].tensors.get(tensor)
        if info is None:
            raise _absent(tensor, shard, headers, others)
        if info.shape != shape:
            raise CheckpointError(
                "TENSOR_SHAPE_WRONG",
                f"{tensor} in {shard} has shape {list(info.shape)}, config.json asks for {list(shape)}",
                tensor=tensor,
                shard=shard,
                expected=list(shape),
                actual=list(info.shape),
            )
        if info.dtype not in WEIGHT_DTYPES:
            raise CheckpointError(
                "TENSOR_DTYPE_NOT_SERVED",
                f"{tensor} in {shard} is {info.dtype}, expected one of "
                f"{', '.join(sorted(WEIGHT_DTYPES))}; quantized checkpoints are not served",
                tensor=tensor,
                shard=shard,
                actual=info.dtype,
            )
    for shard, header in headers.items():
        for tensor in header.tensors:
            if weight_map.get(tensor) == shard or _is_harmless(tensor, config):
                continue
            if tensor in weight_map:
                raise _mislabelled(tensor, weight_map[tensor], shard)
            raise _unexpected(tensor, shard, config)


def _is_harmless(name: str, config: ModelConfig) -> bool:
    # A tied model may carry a copy of its embedding as lm_head; the stage that holds the head compares the two.
    return _HARMLESS.fullmatch(name) is not None or (config.tie_word_embeddings and name == LM_HEAD)


def _absent(
    tensor: str, shard: str, headers: Mapping[str, SafetensorsHeader], others: Iterable[Path]
) -> CheckpointError:
    for name, header in headers.items():
        if tensor in header.tensors:
            return _mislabelled(tensor, shard, name)
    for path in others:
        if path.name not in headers and tensor in read_header(path).tensors:
            return _mislabelled(tensor, shard, path.name)
    return CheckpointError(
        "TENSOR_MISSING",
        f"{tensor} is missing: the index says it is in {shard}, whose header does not "
        "list it; download that shard and the index again",
        tensor=tensor,
        shard=shard,
    )


def _mislabelled(tensor: str, claimed: str, found: str) -> CheckpointError:
    return CheckpointError(
        "TENSOR_MISLABELLED",
        f"{tensor} is in {found}, but the index says it is in {claimed}; the "
        "index and the shards do not belong together, download them again",
        tensor=tensor,
        shard=found,
        expected=claimed,
    )


def _unexpected(tensor: str, shard: str, config: ModelConfig) -> CheckpointError:
    return CheckpointError(
        "TENSOR_UNEXPECTED",
        f"{tensor} in {shard} is not part of a {config.architecture} model with "
        f"{config.num_layers} layers; it would be left out, so config.json does not describe these "
        "weights",
        tensor=tensor,
        shard=shard,
    )
