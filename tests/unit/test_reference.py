"""The API reference: every link leads somewhere, and a field without a comment is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto, FileDescriptorSet

from reference import pages

REFERENCE = Path(__file__).parents[2] / "docs/reference"


def test_every_link_leads_to_a_heading() -> None:
    texts = {path.name: path.read_text() for path in REFERENCE.glob("*.md")}
    assert len(texts) == 5, "four packages and the index"
    anchors = {
        name: {head.lower().replace(".", "") for head in re.findall(r"^### (\S+)$", text, re.MULTILINE)}
        for name, text in texts.items()
    }
    links = [(name, *link) for name, text in texts.items() for link in re.findall(r"\]\(([\w.]*)#(\w+)\)", text)]
    assert len(links) > 100
    assert {one for one in links if one[2] not in anchors[one[1] or one[0]]} == set()


def test_what_has_no_comment_is_named() -> None:
    file = FileDescriptorProto(name="a.proto", package="a")
    file.message_type.add(name="M").field.add(name="f", number=1, type=9, label=1)
    said = file.source_code_info.location
    said.add(path=[4, 0], leading_comments=" M is a message.")
    with pytest.raises(ValueError, match=r"a\.proto: M\.f has no comment"):
        pages(FileDescriptorSet(file=[file]), ["a.proto"])
    said.add(path=[4, 0, 2, 0], leading_comments=" Its\n field | of text.")
    page = pages(FileDescriptorSet(file=[file]), ["a.proto"])["a"]
    assert "| `f` | 1 | string | Its field \\| of text. |" in page
    assert "M is a message." in page
