"""Streaming a stage's weights: the right tensors, once each, from the right files, in the right dtype."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

import pytest
import torch
from weights_helpers import (
    CONFIG_72B,
    TINY,
    Collector,
    edit_shard,
    pack,
    random_tensors,
    shard_name,
    whole,
    write_metadata,
    write_sharded,
    write_single,
    write_sparse_shard,
)  # fmt: skip

from stageline.errors import CheckpointError
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig
from stages.partition import EMBEDDING, LM_HEAD, LayerRange, tensor_shapes
from stages.weights import load_weights, reading
from stages.weights.loader import reading_order

CONFIG = ModelConfig.from_dict(TINY)


def load(folder: Path, layers: LayerRange, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(str(folder))
    load_weights(checkpoint, layers, sink := Collector(checkpoint.config, dtype), dtype=dtype)
    return sink.tensors


@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.float32),
    ],
)
def test_every_stage_gets_its_tensors_cast_to_the_dtype(tmp_path, sharded, stored, dtype) -> None:
    tensors = random_tensors(CONFIG, stored)
    if sharded:
        write_sharded(tmp_path, TINY, tensors, 3)
    else:
        write_single(tmp_path, TINY, tensors)
    union: dict[str, torch.Tensor] = {}
    for layers in (LayerRange(0, 1), LayerRange(1, 3), LayerRange(3, 4)):
        loaded = load(tmp_path, layers, dtype)
        assert loaded.keys() == tensor_shapes(CONFIG, layers).keys()
        assert not loaded.keys() & union.keys()
        union |= loaded
    assert union.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert union[name].dtype == dtype
        assert torch.equal(union[name], tensor.to(dtype)), name


def test_progress_and_report_count_bytes_of_the_target_dtype(tmp_path) -> None:
    weight_map = write_sharded(tmp_path, TINY, random_tensors(CONFIG), 3)
    layers = LayerRange(3, 4)
    shapes = tensor_shapes(CONFIG, layers)
    calls: list[tuple[int, int]] = []
    report = load_weights(
        open_checkpoint(str(tmp_path)),
        layers,
        Collector(CONFIG, torch.float32),
        dtype=torch.float32,
        progress=lambda done, total: calls.append((done, total)),
    )
    total = sum(4 * torch.Size(shape).numel() for shape in shapes.values())
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})
    assert len(calls) == 1 + len(shapes) == 1 + report.num_tensors
    assert report.num_bytes == total
    assert set(report.files) == {weight_map[name] for name in shapes}


def test_an_error_of_the_model_passes_through(tmp_path) -> None:
    write_single(tmp_path, TINY, random_tensors(CONFIG))
    refusing = Collector(CONFIG, torch.float32, refuse=MemoryError("no room"))
    with pytest.raises(MemoryError, match="no room"):
        load_weights(open_checkpoint(str(tmp_path)), whole(CONFIG), refusing, dtype=torch.float32)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


@pytest.mark.parametrize("readers", [1, 2, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_of_readers_brings_the_same(tmp_path, dtype, readers, monkeypatch) -> None:
    monkeypatch.setattr(reading, "CHUNK_BYTES", 96)  # chunks that do not divide the tensors
    monkeypatch.setattr(reading, "DIRECT_BYTES", 1000)
    tensors = random_tensors(CONFIG)
    write_sharded(tmp_path, TINY, tensors, 3)
    sink = Collector(CONFIG, dtype)
    load_weights(open_checkpoint(str(tmp_path)), whole(CONFIG), sink, dtype=dtype, num_readers=readers)
    assert sink.tensors.keys() == tensors.keys()
    assert all(torch.equal(sink.tensors[name], tensor.to(dtype)) for name, tensor in tensors.items())


def test_a_shard_that_shrinks_while_it_is_read_is_named(tmp_path) -> None:
    weight_map = write_sharded(tmp_path, TINY, random_tensors(CONFIG), 3)
    last = tmp_path / weight_map[LM_HEAD]

    class Shrinking(Collector):
        def target(self, name: str) -> torch.Tensor:
            with last.open("r+b") as file:
                file.truncate(last.stat().st_size // 2)
            return super().target(name)

    with pytest.raises(CheckpointError, match=r"ends at byte \d+, .* goes on to \d+") as error:
        load_weights(
            open_checkpoint(str(tmp_path)), whole(CONFIG), Shrinking(CONFIG, torch.bfloat16), dtype=torch.bfloat16
        )
    assert (error.value.reason, error.value.metadata["shard"]) == ("SHARD_UNREADABLE", last.name)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("weights")]


def test_stages_that_share_files_begin_at_different_ones(tmp_path) -> None:
    write_sharded(tmp_path, TINY, random_tensors(CONFIG), 3)
    paths = sorted(tmp_path.glob("*.safetensors"))
    parts = reading.find_parts(paths, set(tensor_shapes(CONFIG, whole(CONFIG))))
    assert len(parts) == len(tensor_shapes(CONFIG, whole(CONFIG)))
    firsts = []
    for start in range(4):
        order = reading_order(parts, LayerRange(start, 4), 4)
        assert {id(part) for part in order} == {id(part) for part in parts}
        firsts.append(order[0].path)
        for path in paths:  # forward in every file
            begins = [part.begin for part in order if part.path == path]
            assert begins == sorted(begins)
    assert set(firsts) == set(paths)


def test_the_last_stage_of_a_tied_model_reads_the_embedding(tmp_path) -> None:
    config = ModelConfig.from_dict(TINY | {"tie_word_embeddings": True})
    write_sharded(tmp_path, TINY | {"tie_word_embeddings": True}, random_tensors(config), 3)
    assert torch.equal(load(tmp_path, LayerRange(0, 2))[EMBEDDING], load(tmp_path, LayerRange(2, 4))[EMBEDDING])
    assert EMBEDDING not in load(tmp_path, LayerRange(1, 3))


def test_a_stored_copy_of_a_tied_head_is_left_out_and_another_head_is_refused(tmp_path) -> None:
    data = TINY | {"tie_word_embeddings": True}
    config = ModelConfig.from_dict(data)
    tensors = random_tensors(config)
    tensors[LM_HEAD] = tensors[EMBEDDING].clone()
    weight_map = write_sharded(tmp_path, data, tensors, 3)
    assert weight_map[LM_HEAD] != weight_map[EMBEDDING]
    assert LM_HEAD not in load(tmp_path, LayerRange(2, 4))
    edit_shard(tmp_path / weight_map[LM_HEAD], lambda shard: shard[LM_HEAD].mul_(2))
    load(tmp_path, LayerRange(0, 2))  # does not compute logits
    with pytest.raises(CheckpointError, match=f"{LM_HEAD} in {weight_map[LM_HEAD]} differs") as error:
        load(tmp_path, LayerRange(2, 4))
    assert error.value.reason == "TIED_HEAD_DIFFERS"


def test_a_stage_is_checked_before_its_first_tensor_is_loaded(tmp_path) -> None:
    weight_map = write_sharded(tmp_path, TINY, random_tensors(CONFIG), 3)
    last = tmp_path / weight_map[LM_HEAD]
    last.write_bytes(last.read_bytes()[:-1])
    sink = Collector(CONFIG, torch.float32)
    with pytest.raises(CheckpointError) as error:
        load_weights(open_checkpoint(str(tmp_path)), whole(CONFIG), sink, dtype=torch.float32)
    assert (error.value.reason, error.value.metadata["shard"]) == ("SHARD_TRUNCATED", last.name)
    assert not sink.tensors


def only(folder: Path, shards: tuple[str, ...], source: Path) -> Path:
    """A folder with the metadata of `source` and links to nothing but `shards`."""
    folder.mkdir()
    for name in ("config.json", "model.safetensors.index.json", *shards):
        (folder / name).symlink_to(source / name)
    return folder


def even_split(num_layers: int, num_stages: int) -> list[LayerRange]:
    bounds = [num_layers * i // num_stages for i in range(num_stages + 1)]
    return [LayerRange(a, b) for a, b in itertools.pairwise(bounds)]


def test_72b_each_stage_needs_only_its_own_of_the_37_shards(tmp_path) -> None:
    """The published layout at full size (145 GB, sparse): headers of other shards are not even there."""
    config = ModelConfig.from_dict(CONFIG_72B)
    shapes = tensor_shapes(config, whole(config))
    shards = pack({name: 2 * torch.Size(shape).numel() for name, shape in shapes.items()}, 4_000_000_000)
    assert len(shards) == 37
    full = tmp_path / "full"
    write_metadata(full, CONFIG_72B, {name: shard_name(i, 37) for i, names in enumerate(shards) for name in names})
    for i, names in enumerate(shards):
        write_sparse_shard(full / shard_name(i, 37), {name: shapes[name] for name in names})
    checkpoint = open_checkpoint(str(full))
    for num_stages in (4, 8, 10, 80):
        seen: list[str] = []
        opened: set[str] = set()
        for index, layers in enumerate(even_split(80, num_stages)):
            needed = checkpoint.shards_for(layers)
            stage = open_checkpoint(str(only(tmp_path / f"{num_stages}-{index}", needed, full)))
            stage.verify_index(layers)
            assert stage.fingerprint == checkpoint.fingerprint
            assert set(needed) == {checkpoint.weight_map[name] for name in tensor_shapes(config, layers)}
            assert len(needed) <= 37 // num_stages + 2
            seen += tensor_shapes(config, layers)
            opened |= set(needed)
        assert sorted(seen) == sorted(shapes)
        assert len(opened) == 37


@pytest.mark.parametrize("num_stages", [4, 8, 10])
def test_80_layers_load_with_only_the_needed_shards_present(tmp_path, num_stages) -> None:
    data = TINY | {"num_hidden_layers": 80, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    config = ModelConfig.from_dict(data)
    tensors = random_tensors(config)
    full = tmp_path / "full"
    write_sharded(full, data, tensors, 37)
    checkpoint = open_checkpoint(str(full))
    union: dict[str, torch.Tensor] = {}
    for index, layers in enumerate(even_split(80, num_stages)):
        needed = checkpoint.shards_for(layers)
        folder = only(tmp_path / str(index), needed, full)
        loaded = load(folder, layers)
        assert not loaded.keys() & union.keys()
        union |= loaded
        (folder / needed[0]).unlink()
        with pytest.raises(CheckpointError, match=needed[0]):
            load(folder, layers)
    assert union.keys() == tensors.keys()
    assert all(torch.equal(union[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("name", ["smollm2", "qwen-coder"])
def test_real_checkpoints_load_whole_and_in_halves(model_folder, name) -> None:
    from safetensors.torch import load_file

    folder = model_folder(name)
    checkpoint = open_checkpoint(str(folder))
    middle = checkpoint.config.num_layers // 2
    stored = {key: value for shard in sorted(folder.glob("*.safetensors")) for key, value in load_file(shard).items()}
    for layers in (LayerRange(0, middle), LayerRange(middle, checkpoint.config.num_layers)):
        loaded = load(folder, layers)
        assert loaded.keys() == tensor_shapes(checkpoint.config, layers).keys()
        assert all(torch.equal(tensor, stored[key]) for key, tensor in loaded.items())
