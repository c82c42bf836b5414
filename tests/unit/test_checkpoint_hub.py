"""Hub ids: what is downloaded when, and what each failure becomes. The hub is a folder here."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors
from weights_helpers import TINY, random_tensors, whole, write_sharded, write_single

from stageline.errors import CheckpointError, NotFoundError, StagelineError, UnauthenticatedError, UnavailableError
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig
from stages.partition import LM_HEAD, LayerRange

CONFIG = ModelConfig.from_dict(TINY)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FolderHub:
    """Stands in for the two functions of huggingface_hub that are used, and for its cache."""

    def __init__(self, root: Path) -> None:
        self.origin, self.cache = root / "origin", root / "snapshots" / COMMIT
        self.downloads: list[str] = []

    def snapshot_download(self, repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        for path in self.origin.iterdir():
            if any(fnmatch(path.name, pattern) for pattern in allow_patterns):
                self.hf_hub_download(repo_id, path.name, revision=COMMIT)
        return str(self.cache)

    def hf_hub_download(self, repo_id: str, file_name: str, *, revision: str) -> str:
        assert (repo_id, revision) == ("org/tiny", COMMIT)
        if not (self.origin / file_name).exists():
            raise errors.EntryNotFoundError(f"404: {file_name}")
        self.cache.mkdir(parents=True, exist_ok=True)
        if not (self.cache / file_name).exists():
            shutil.copy(self.origin / file_name, self.cache)
            self.downloads.append(file_name)
        return str(self.cache / file_name)


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Iterator[FolderHub]:
    hub = FolderHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.hf_hub_download)
    monkeypatch.chdir(tmp_path)
    return hub


def test_a_stage_downloads_only_its_own_shards(hub) -> None:
    weight_map = write_sharded(hub.origin, TINY, random_tensors(CONFIG), 4)
    (hub.origin / "vocab.json").write_text("{}")
    (hub.origin / "README.md").write_text("not needed")
    checkpoint = open_checkpoint("org/tiny")
    assert sorted(hub.downloads) == ["config.json", "model.safetensors.index.json", "vocab.json"]
    assert (checkpoint.kind, checkpoint.path, checkpoint.config) == ("hub", hub.cache, CONFIG)
    hub.downloads.clear()
    checkpoint.verify_index(LayerRange(3, 4))
    assert tuple(sorted(hub.downloads)) == checkpoint.shards_for(LayerRange(3, 4))
    assert weight_map[LM_HEAD] in hub.downloads
    assert len(hub.downloads) < 4


def test_fingerprint_does_not_depend_on_what_was_downloaded(hub) -> None:
    write_sharded(hub.origin, TINY, random_tensors(CONFIG), 3)
    before = open_checkpoint("org/tiny")
    before.verify_index(whole(CONFIG))
    assert open_checkpoint("org/tiny").fingerprint == before.fingerprint


def test_a_hub_model_of_one_file_is_checked_when_a_stage_needs_it(hub) -> None:
    tensors = random_tensors(CONFIG)
    del tensors[LM_HEAD]
    write_single(hub.origin, TINY, tensors)
    checkpoint = open_checkpoint("org/tiny")
    assert hub.downloads == ["config.json"]
    checkpoint.verify_index(LayerRange(0, 1))
    with pytest.raises(CheckpointError, match=LM_HEAD):
        checkpoint.verify_index(LayerRange(3, 4))


def test_a_hub_model_without_safetensors(hub) -> None:
    write_single(hub.origin, TINY, random_tensors(CONFIG))
    (hub.origin / "model.safetensors").rename(hub.origin / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"safetensors only.*model\.safetensors") as error:
        open_checkpoint("org/tiny").verify_index(whole(CONFIG))
    assert error.value.reason == "HUB_FILE_MISSING"


def http_error(kind: type[errors.HfHubHTTPError]) -> errors.HfHubHTTPError:
    return kind("refused", response=httpx.Response(404, request=httpx.Request("GET", "https://hub.test")))


@pytest.mark.parametrize(("cause", "expected", "reason"), [
    (http_error(errors.RepositoryNotFoundError), NotFoundError, "HUB_MODEL_NOT_FOUND"),
    (http_error(errors.RevisionNotFoundError), NotFoundError, "HUB_REVISION_NOT_FOUND"),
    (http_error(errors.GatedRepoError), UnauthenticatedError, "HUB_MODEL_GATED"),
    (http_error(errors.HfHubHTTPError), UnavailableError, "HUB_UNREACHABLE"),
    (errors.LocalEntryNotFoundError("offline"), UnavailableError, "HUB_UNREACHABLE"),
    (httpx.ConnectError("no route"), UnavailableError, "HUB_UNREACHABLE"),
    (errors.HFValidationError("bad name"), NotFoundError, "HUB_MODEL_NOT_FOUND"),
])  # fmt: skip
def test_failures_of_the_hub_are_typed(hub, monkeypatch, cause, expected, reason) -> None:
    def fail(*args: object, **kwargs: object) -> str:
        raise cause

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(StagelineError, match="org/tiny") as error:
        open_checkpoint("org/tiny", revision="v1")
    assert (type(error.value), error.value.reason) == (expected, reason)


def test_offline_without_a_cache(tmp_path, monkeypatch) -> None:
    """The real client, told to stay offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnavailableError, match="no local folder 'org/tiny'") as error:
        open_checkpoint("org/tiny")
    assert error.value.reason == "HUB_UNREACHABLE"
