"""A model on disk or on the hub: its configuration, and which file holds which tensor. No torch here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from stageline.errors import CheckpointError
from stages import gguf_file
from stages.config import ModelConfig
from stages.fingerprint import content_identity, digest
from stages.gguf_container import read_gguf
from stages.hub import HubModel, fetch_metadata
from stages.partition import LM_HEAD, LayerRange, tensor_shapes
from stages.safetensors_header import read_header
from stages.tensor_index import check_names, read_json, read_weight_map, verify_shards

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A model's metadata. Opening one reads no weights.

    `path` is the folder of the metadata files, or the `.gguf` file. `weight_map` says for every tensor of the model
    which file holds it, under its Hugging Face name. `fingerprint` is equal for every process that opened the same
    model, whichever shards are present there; only stages with the same one are chained.
    """

    kind: Literal["folder", "hub", "gguf"]
    path: Path
    config: ModelConfig
    generation_config: Mapping[str, Any]
    weight_map: Mapping[str, str]
    fingerprint: str
    hub: HubModel | None = field(default=None, repr=False)

    def shards_for(self, layers: LayerRange) -> tuple[str, ...]:
        """Names of the files a stage reads, in order; no other is opened or downloaded."""
        names = set(tensor_shapes(self.config, layers))
        if LM_HEAD in self.weight_map and layers.is_last(self.config):
            names.add(LM_HEAD)  # with tied embeddings, a copy that is compared with the embedding
        return tuple(sorted({self.weight_map[name] for name in names}))

    def shard_path(self, file_name: str) -> Path:
        """Where a file lies; a hub model's is downloaded first. Raises as `stages.hub.HubModel.download`."""
        if self.kind == "gguf":
            return self.path
        return self.hub.download(file_name) if self.hub else self.path / file_name

    def verify_index(self, layers: LayerRange) -> None:
        """Check every tensor a stage reads against the headers of its shards (a hub model's are downloaded).

        Raises CheckpointError naming tensor, shard and what was expected: TENSOR_MISLABELLED (the index names another
        shard), TENSOR_MISSING, TENSOR_UNEXPECTED, TENSOR_SHAPE_WRONG, TENSOR_DTYPE_NOT_SERVED, and those of
        `read_header`.
        """
        expected = tensor_shapes(self.config, layers)
        if self.kind == "gguf":
            gguf_file.verify_tensors(read_gguf(self.path), expected)
            return
        headers = {name: read_header(self.shard_path(name)) for name in self.shards_for(layers)}
        # On the hub, looking into the other shards for a misplaced tensor would mean downloading them.
        others = sorted(self.path.glob("*.safetensors")) if self.kind == "folder" else []
        verify_shards(self.config, expected, self.weight_map, headers, others)


def open_checkpoint(model: str, *, revision: str | None = None) -> Checkpoint:
    """Open a folder in the Hugging Face layout, a `.gguf` file, or a hub id `org/name` (at `revision`).

    Raises CheckpointError where the model is missing, damaged, or not served; for a hub id also the errors of
    `stages.hub.fetch_metadata`.
    """
    path = Path(model).expanduser()
    if revision and path.exists():
        raise CheckpointError(
            "REVISION_OF_LOCAL_MODEL",
            f"revision {revision!r} belongs to a hub id, but {model} is a local path; leave the revision out",
            field="model.revision",
            value=revision,
        )
    if path.is_dir():
        return _open_folder(path, None)
    if path.is_file() and path.suffix.lower() == ".gguf":
        return _open_gguf(path)
    if path.exists():
        raise CheckpointError(
            "MODEL_NOT_SERVED",
            f"{model} is neither a folder nor a .gguf file; give the folder that holds config.json",
            field="model.path",
            value=model,
        )
    if path.suffix.lower() != ".gguf" and _HUB_ID.fullmatch(model):
        hub = fetch_metadata(model, revision or None)
        return _open_folder(hub.folder, hub)
    raise CheckpointError(
        "MODEL_NOT_FOUND",
        f"model {model!r}: no such folder or file, and not a hub id (those look like Qwen/Qwen2-72B-Instruct)",
        field="model.path",
        value=model,
    )


def _open_folder(path: Path, hub: HubModel | None) -> Checkpoint:
    config = ModelConfig.from_file(path / "config.json")
    identity: dict[str, Any] = {"config": read_json(path / "config.json"), "commit": hub.commit if hub else None}
    if (path / INDEX_FILE).exists():
        weight_map = read_weight_map(path / INDEX_FILE)
        # Not the shards themselves: a process may have only those of its own layers, the gateway none.
        identity["index"] = weight_map
    elif hub is not None:
        # One file: what it holds is known only when a stage downloads it; `verify_index` checks it then.
        weight_map = dict.fromkeys(tensor_shapes(config, LayerRange(0, config.num_layers)), SINGLE_FILE)
    elif (path / SINGLE_FILE).exists():
        weight_map = dict.fromkeys(read_header(path / SINGLE_FILE).tensors, SINGLE_FILE)
        identity["content"] = content_identity(path / SINGLE_FILE)
    else:
        raise CheckpointError(
            "WEIGHTS_MISSING",
            f"{path} has neither {INDEX_FILE} nor {SINGLE_FILE}; weights are read from safetensors only",
            path=path,
        )
    source = INDEX_FILE if (path / INDEX_FILE).exists() else SINGLE_FILE
    check_names(weight_map, config, source)
    generation = path / "generation_config.json"
    return Checkpoint(
        kind="hub" if hub else "folder",
        path=path,
        config=config,
        generation_config=read_json(generation) if generation.exists() else {},
        weight_map=weight_map,
        fingerprint=digest(identity),
        hub=hub,
    )


def _open_gguf(path: Path) -> Checkpoint:
    file = read_gguf(path)
    config = gguf_file.config_of(file)
    weight_map = dict.fromkeys(gguf_file.tensors_by_hf_name(file), path.name)
    check_names(weight_map, config, path.name)
    return Checkpoint(
        kind="gguf",
        path=path,
        config=config,
        generation_config={},
        weight_map=weight_map,
        fingerprint=digest({"content": content_identity(path)}),
    )
