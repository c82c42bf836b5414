"""Shared fixtures. Extra checkpoints come from a folder named by STAGELINE_TEST_MODELS."""

from __future__ import annotations

import os
from pathlib import Path

import grpc.aio
import hypothesis
import pytest

# grpc.aio shuts down with its last object, and then waits for what is unfinished: what one test left behind stopped another,
# wherever the garbage collector came by. One user that stays keeps it up until the process ends.
grpc.aio.init_grpc_aio()

# Helpers that assert for the tests that use them: what they compared is shown.
pytest.register_assert_rewrite("simulated_pipeline", "simulated_stage")

# Time says nothing here: the tests share the machine with one another.
hypothesis.settings.register_profile("stageline", deadline=None)
hypothesis.settings.load_profile("stageline")

# One at a time, whatever else runs beside them: each starts a Ray cluster, and two of those do not fit on two cores.
RAY_FILES = {"test_batch_dataset_job.py", "test_chat_command.py", "test_scenarios.py", "test_serve.py",
             "test_serve_config_deploys.py", "test_serve_deploy.py",
             "test_serve_secure.py", "test_serve_spares.py"}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Under `pytest -n`, a file's tests stay together: they share what its fixtures start. The group of Ray's tests, which takes
    longest, comes first."""
    items.sort(key=lambda item: item.path.name not in RAY_FILES)
    for item in items:
        group = "ray" if item.path.name in RAY_FILES else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


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
