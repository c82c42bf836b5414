"""`model.chat_template_file` takes the place of the model's own chat template."""

from __future__ import annotations

import pytest

from gateway.config import from_mapping
from gateway.model import load_model
from stageline.errors import CheckpointError, ConfigError
from tests.tiny import save_tiny

MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("template") / "tiny")


def load(folder, template):
    return load_model(
        from_mapping({"model": {"path": str(folder), "chat_template_file": str(template)}}, source="test")
    )[2]


def test_the_file_is_used_instead_of_the_models(folder, tmp_path, monkeypatch) -> None:
    (tmp_path / "own.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tools }}", "utf-8")
    template = load(folder, tmp_path / "own.jinja")
    assert template is not None
    assert template.render(MESSAGES, tools=[]).startswith("[hello]")
    assert template.takes_tools
    monkeypatch.chdir(tmp_path)
    config = from_mapping({"model": {"path": "hub/id", "chat_template_file": "own.jinja"}}, source="test")
    model = config.model.absolute()
    assert (model.path, model.chat_template_file) == ("hub/id", str(tmp_path / "own.jinja"))


def test_an_empty_file_is_a_template_too(folder, tmp_path) -> None:
    (tmp_path / "empty.jinja").write_text("")
    template = load(folder, tmp_path / "empty.jinja")
    assert template is not None
    assert template.render(MESSAGES) == ""


def test_files_that_are_no_template_are_named(folder, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.jinja") as missing:
        load(folder, tmp_path / "missing.jinja")
    assert missing.value.reason == "CHAT_TEMPLATE_UNREADABLE"
    (tmp_path / "bytes.jinja").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="UTF-8"):
        load(folder, tmp_path / "bytes.jinja")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        load(folder, tmp_path / "broken.jinja")
