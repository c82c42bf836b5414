"""The Hugging Face hub: a model's small files at once, a shard only when a stage asks for it. No torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import huggingface_hub
from huggingface_hub import errors as hub_errors

from stageline.errors import CheckpointError, NotFoundError, StagelineError, UnauthenticatedError, UnavailableError

METADATA_FILES = (
    "config.json", "generation_config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
    "chat_template.json",
)  # fmt: skip

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HubModel:
    """One commit of a hub model; `folder` is its snapshot in the local cache (`HF_HOME`)."""

    repo_id: str
    commit: str
    folder: Path

    def download(self, file_name: str) -> Path:
        """Local path of one file, downloaded unless the cache has it. Raises as `fetch_metadata` does."""
        return Path(
            typed(
                self.repo_id,
                self.commit,
                lambda: huggingface_hub.hf_hub_download(self.repo_id, file_name, revision=self.commit),
            )
        )


def fetch_metadata(repo_id: str, revision: str | None) -> HubModel:
    """Download what describes the model (METADATA_FILES), no weights. `revision`: branch, tag or commit.

    The commit is fixed here, so that a branch that moves later cannot mix two versions in one stage.

    Raises NotFoundError (model or revision), UnauthenticatedError (gated or private), UnavailableError (no connection,
    and not in the local cache), CheckpointError (the model lacks a file).
    """
    folder = Path(
        typed(
            repo_id,
            revision,
            lambda: huggingface_hub.snapshot_download(repo_id, revision=revision, allow_patterns=list(METADATA_FILES)),
        )
    )
    return HubModel(repo_id, folder.name, folder)  # the cache names a snapshot's folder after its commit


def typed(repo_id: str, revision: str | None, call: Callable[[], _T]) -> _T:
    """Run one hub call and turn its failures into ours; `fetch_metadata` lists them."""
    wanted = f"hub model {repo_id!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return call()
    except StagelineError:
        raise
    # From the most special to the most general: GatedRepoError is a RepositoryNotFoundError.
    except hub_errors.GatedRepoError:
        error: StagelineError = UnauthenticatedError(
            "HUB_MODEL_GATED", f"{wanted} is gated: accept its terms on huggingface.co and set HF_TOKEN", model=repo_id
        )
    except hub_errors.RevisionNotFoundError:
        error = NotFoundError(
            "HUB_REVISION_NOT_FOUND",
            f"{wanted} does not exist; leave the revision out for the latest",
            model=repo_id,
            revision=revision,
        )
    except hub_errors.RepositoryNotFoundError:
        error = NotFoundError(
            "HUB_MODEL_NOT_FOUND",
            f"{wanted} does not exist, or is private and HF_TOKEN is not set; "
            f"there is no local folder {repo_id!r} either",
            model=repo_id,
        )
    except hub_errors.LocalEntryNotFoundError as cause:
        error = _unreachable(wanted, repo_id, cause)
    except hub_errors.EntryNotFoundError as cause:
        error = CheckpointError(
            "HUB_FILE_MISSING",
            f"{wanted} lacks a file that is needed (weights are read from safetensors only): {cause}",
            model=repo_id,
        )
    except hub_errors.HFValidationError as cause:
        error = NotFoundError("HUB_MODEL_NOT_FOUND", f"{repo_id!r} is no hub id: {cause}", model=repo_id)
    # Connection errors and time-outs are those of the client's HTTP library, which differs between its versions.
    except Exception as cause:
        error = _unreachable(wanted, repo_id, cause)
    raise error from None


def _unreachable(wanted: str, repo_id: str, cause: Exception) -> UnavailableError:
    return UnavailableError(
        "HUB_UNREACHABLE",
        f"{wanted} cannot be downloaded and is not in the local cache ({type(cause).__name__}: "
        f"{str(cause).strip():.300}); check the connection, or give a local folder (there is no local folder {repo_id!r})",
        model=repo_id,
    )
