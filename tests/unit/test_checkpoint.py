"""Opening a checkpoint, and every way in which one can be damaged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from weights_helpers import TINY, edit_shard, random_tensors, whole, write_index, write_sharded, write_single

from stageline.errors import CheckpointError
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig
from stages.partition import LM_HEAD, LayerRange
from stages.safetensors_header import read_header

CONFIG = ModelConfig.from_dict(TINY)
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    write_sharded(tmp_path, TINY, random_tensors(CONFIG), 3)
    return tmp_path


def weight_map_of(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def fault(folder: Path, layers: LayerRange | None = None) -> CheckpointError:
    """The error of opening and verifying."""
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(str(folder)).verify_index(layers or whole(CONFIG))
    return error.value


def test_a_folder_without_faults(folder) -> None:
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    checkpoint = open_checkpoint(str(folder))
    checkpoint.verify_index(whole(CONFIG))
    assert (checkpoint.kind, checkpoint.path, checkpoint.config) == ("folder", folder, CONFIG)
    assert checkpoint.generation_config == {"temperature": 0.7}
    assert checkpoint.weight_map == weight_map_of(folder)


def test_a_single_file(tmp_path) -> None:
    write_single(tmp_path, TINY, random_tensors(CONFIG))
    checkpoint = open_checkpoint(str(tmp_path))
    checkpoint.verify_index(LayerRange(1, 2))
    assert checkpoint.shards_for(LayerRange(1, 2)) == ("model.safetensors",)
    assert checkpoint.generation_config == {}


def test_a_tensor_missing_from_the_index(folder) -> None:
    weight_map = weight_map_of(folder)
    del weight_map[Q_PROJ]
    write_index(folder, weight_map)
    error = fault(folder)
    assert (error.reason, error.metadata["tensor"]) == ("TENSOR_MISSING", Q_PROJ)


def test_a_tensor_missing_from_a_single_file(tmp_path) -> None:
    tensors = random_tensors(CONFIG)
    del tensors[Q_PROJ]
    write_single(tmp_path, TINY, tensors)
    assert (fault(tmp_path).reason, fault(tmp_path).metadata["tensor"]) == ("TENSOR_MISSING", Q_PROJ)


def test_a_tensor_missing_from_its_shard(folder) -> None:
    shard = weight_map_of(folder)[Q_PROJ]
    edit_shard(folder / shard, lambda tensors: tensors.pop(Q_PROJ))
    error = fault(folder)
    assert (error.reason, error.metadata) == ("TENSOR_MISSING", {"tensor": Q_PROJ, "shard": shard})
    open_checkpoint(str(folder)).verify_index(LayerRange(0, 1))  # reads the same shard, but not that tensor


@pytest.mark.parametrize("layers", [LayerRange(0, 2), LayerRange(0, 4), LayerRange(3, 4)])
def test_an_index_that_names_the_wrong_shard(folder, layers) -> None:
    """Found by the stage that misses the tensor, by the one that has both shards, and by the one that has it extra."""
    name = "model.layers.0.mlp.up_proj.weight"
    weight_map = weight_map_of(folder)
    right, wrong = weight_map[name], weight_map[LM_HEAD]
    assert right != wrong
    write_index(folder, weight_map | {name: wrong})
    if layers == LayerRange(3, 4):
        edit_shard(folder / wrong, lambda tensors: tensors.update({name: torch.zeros(64, 32, dtype=torch.bfloat16)}))
        write_index(folder, weight_map)
        right, wrong = wrong, right
    error = fault(folder, layers)
    assert error.reason == "TENSOR_MISLABELLED"
    assert error.metadata == {"tensor": name, "shard": right, "expected": wrong}


def test_an_extra_tensor_in_the_index(folder) -> None:
    write_index(folder, weight_map_of(folder) | {"model.layers.4.mlp.up_proj.weight": "x.safetensors"})
    error = fault(folder)
    assert (error.reason, error.metadata["tensor"]) == ("TENSOR_UNEXPECTED", "model.layers.4.mlp.up_proj.weight")


def test_an_extra_tensor_in_a_shard(folder) -> None:
    shard = weight_map_of(folder)[Q_PROJ]
    edit_shard(folder / shard, lambda tensors: tensors.update(extra=torch.zeros(1)))
    error = fault(folder)
    assert (error.reason, error.metadata) == ("TENSOR_UNEXPECTED", {"tensor": "extra", "shard": shard})


def test_an_extra_tensor_in_a_single_file(tmp_path) -> None:
    write_single(tmp_path, TINY, random_tensors(CONFIG) | {"model.layers.0.self_attn.o_proj.bias": torch.zeros(32)})
    assert fault(tmp_path).metadata["tensor"] == "model.layers.0.self_attn.o_proj.bias"


def test_rotary_buffers_of_old_files_are_harmless(tmp_path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    write_single(tmp_path, TINY, random_tensors(CONFIG) | {name: torch.zeros(4)})
    open_checkpoint(str(tmp_path)).verify_index(whole(CONFIG))


def test_a_wrong_shape(folder) -> None:
    shard = weight_map_of(folder)[Q_PROJ]
    edit_shard(folder / shard, lambda tensors: tensors.update({Q_PROJ: torch.zeros(32, 31, dtype=torch.bfloat16)}))
    error = fault(folder)
    assert error.reason == "TENSOR_SHAPE_WRONG"
    assert error.metadata == {"tensor": Q_PROJ, "shard": shard, "expected": "[32, 32]", "actual": "[32, 31]"}


def test_a_quantized_tensor(folder) -> None:
    shard = weight_map_of(folder)[Q_PROJ]
    edit_shard(folder / shard, lambda tensors: tensors.update({Q_PROJ: tensors[Q_PROJ].to(torch.float8_e4m3fn)}))
    error = fault(folder)
    assert (error.reason, error.metadata["actual"]) == ("TENSOR_DTYPE_NOT_SERVED", "F8_E4M3")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard(folder, keep) -> None:
    shard = weight_map_of(folder)[Q_PROJ]
    path = folder / shard
    path.write_bytes(path.read_bytes()[:keep])
    error = fault(folder)
    assert (error.reason, error.metadata["shard"]) == ("SHARD_TRUNCATED", shard)


def test_bytes_after_the_end_of_a_shard(folder) -> None:
    shard = weight_map_of(folder)[Q_PROJ]
    with (folder / shard).open("ab") as file:
        file.write(b"\0")
    assert fault(folder).reason == "SHARD_TRUNCATED"


def test_a_missing_shard_hurts_only_the_stages_that_need_it(folder) -> None:
    shard = weight_map_of(folder)[LM_HEAD]
    (folder / shard).unlink()
    open_checkpoint(str(folder)).verify_index(LayerRange(0, 1))
    error = fault(folder, LayerRange(3, 4))
    assert (error.reason, error.metadata["shard"]) == ("SHARD_MISSING", shard)


@pytest.mark.parametrize(("header", "match"), [
    (b"{nope", "not JSON"),
    (b"[]", "not a JSON object"),
    (b'{"a": 1}', "entry of a"),
    (b'{"a": {"dtype": "F33", "shape": [1], "data_offsets": [0, 4]}}', "unknown dtype 'F33'"),
    (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "has 4 bytes, expected 8"),
    (b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}', "starts at byte"),
    (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}}', "entry of a"),
    (b"\xff\xfe\x00", "not JSON"),
])  # fmt: skip
def test_a_corrupt_header(tmp_path, header, match) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(CheckpointError, match=match) as error:
        read_header(path)
    assert (error.value.reason, error.value.metadata["shard"]) == ("SHARD_CORRUPT", "model.safetensors")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": 1}}',
        '{"weight_map": {"a": "../secret.safetensors"}}',
        '{"weight_map": {"a": "b.bin"}}',
        "\udcff",
        "[" * 100_000,
    ],
)
def test_a_bad_index(folder, text) -> None:
    (folder / "model.safetensors.index.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    error = fault(folder)
    assert error.reason == "METADATA_UNREADABLE"
    assert "model.safetensors.index.json" in error.message


def test_a_bad_generation_config(folder) -> None:
    (folder / "generation_config.json").write_text("nope")
    assert fault(folder).reason == "METADATA_UNREADABLE"


@pytest.mark.parametrize(("model", "reason"), [
    ("/no/such/folder", "MODEL_NOT_FOUND"), ("./nothing", "MODEL_NOT_FOUND"), ("nothing", "MODEL_NOT_FOUND"),
    ("org/model.gguf", "MODEL_NOT_FOUND"), ("a/b/c", "MODEL_NOT_FOUND"), (__file__, "MODEL_NOT_SERVED"),
    (str(Path(__file__).parent), "CONFIG_MISSING"),
])  # fmt: skip
def test_a_model_that_is_not_there(model, reason) -> None:
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(model)
    assert error.value.reason == reason
    if reason == "MODEL_NOT_FOUND":
        assert "Qwen/Qwen2-72B-Instruct" in error.value.message


def test_a_folder_without_weights_and_a_revision_of_a_folder(folder) -> None:
    with pytest.raises(CheckpointError, match="revision 'main' belongs to a hub id"):
        open_checkpoint(str(folder), revision="main")
    (folder / "model.safetensors.index.json").unlink()
    assert fault(folder).reason == "WEIGHTS_MISSING"


def test_fingerprint_is_the_models_not_the_places(tmp_path) -> None:
    """Equal for another copy of which most shards are absent; another for another configuration or index."""
    tensors = random_tensors(CONFIG)
    write_sharded(tmp_path / "a", TINY, tensors, 3)
    write_sharded(tmp_path / "b", TINY, tensors, 3)
    for path in (tmp_path / "b").glob("*.safetensors"):
        path.unlink()
    write_sharded(tmp_path / "c", TINY, tensors, 4)
    write_sharded(tmp_path / "d", TINY | {"eos_token_id": 4}, tensors, 3)
    a, b, c, d = (open_checkpoint(str(tmp_path / name)).fingerprint for name in "abcd")
    assert a == b
    assert len({a, c, d}) == 3
    assert int(a, 16) > 0


def test_fingerprint_of_one_file_sees_other_weights(tmp_path) -> None:
    tensors = random_tensors(CONFIG)
    write_single(tmp_path / "a", TINY, tensors)
    write_single(tmp_path / "b", TINY, tensors)
    write_single(tmp_path / "c", TINY, {name: tensor * 2 for name, tensor in tensors.items()})
    a, b, c = (open_checkpoint(str(tmp_path / name)).fingerprint for name in "abc")
    assert a == b != c


def test_the_gateway_can_import_this_without_torch() -> None:
    code = "import sys, stages.checkpoint, stages.gguf_file; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )
