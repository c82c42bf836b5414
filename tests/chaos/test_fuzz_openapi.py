"""A short version of fuzz_openapi.py: a few bodies an operation, and links followed."""

from __future__ import annotations

import re

from tests.chaos.fuzz_openapi import run


async def test_the_http_door_does_what_its_document_says() -> None:
    code, report = await run(4, 3, "--phases", "fuzzing,stateful")
    assert code == 0, report
    [tested] = re.findall(r"Tested: (\d+)", report)
    assert int(tested) == 19, report
    [cases] = re.findall(r"(\d+) generated", report)
    assert int(cases) > 80, report
