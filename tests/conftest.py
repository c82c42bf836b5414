"""Shared fixtures. Extra checkpoints come from a folder named by STAGELINE_TEST_MODELS."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_folder():
    """A function from a checkpoint's name (`smollm2`, `qwen-coder`) to its folder; skips where there is none."""

    def find(name: str) -> Path:
        root = os.environ.get("STAGELINE_TEST_MODELS")
        if not root:
            pytest.skip("STAGELINE_TEST_MODELS is not set: no real checkpoints to test with")
        path = Path(root) / name
        if not path.is_dir():
            pytest.skip(f"{name} is not in the folder that STAGELINE_TEST_MODELS names")
        return path

    return find
