"""Generate the stubs beside their .proto files, and the reference in docs/reference.

python proto/generate.py           write them
python proto/generate.py --check   exit 1 and name the files that are stale
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

import reference  # beside this script

ROOT = Path(__file__).resolve().parent
REFERENCE = ROOT.parent / "docs/reference"


def generate(out: Path, pages: Path) -> None:
    """Write every stub below `out`, and the reference into `pages`. Raises SystemExit with protoc's status where it fails."""
    # protoc looks for its plugins on the PATH; they lie beside this interpreter, activated or not.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    flags = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    with tempfile.NamedTemporaryFile() as described:
        flags += [f"--descriptor_set_out={described.name}", "--include_source_info"]
        status = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *flags, *sources])
        if status:
            raise SystemExit(status)
        files = FileDescriptorSet.FromString(Path(described.name).read_bytes())
    pages.mkdir(parents=True, exist_ok=True)
    for name, text in reference.pages(files, sources).items():
        (pages / f"{name}.md").write_text(text)


def stale() -> list[str]:
    """Paths of stubs and pages that differ from what the .proto files give now."""
    with tempfile.TemporaryDirectory() as folder:
        stubs, pages = Path(folder) / "stubs", Path(folder) / "pages"
        stubs.mkdir()
        generate(stubs, pages)
        fresh = _read(stubs, "proto", "*_pb2*") | _read(pages, "docs/reference", "*.md")
    kept = _read(ROOT, "proto", "*_pb2*") | _read(REFERENCE, "docs/reference", "*.md")
    return sorted(str(name) for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))


def _read(folder: Path, name: str, pattern: str) -> dict[Path, bytes]:
    found = (path for path in folder.rglob(pattern) if "__pycache__" not in path.parts)
    return {name / path.relative_to(folder): path.read_bytes() for path in found}


def main(argv: list[str]) -> int:
    """Command line: see the module's docstring."""
    if argv == ["--check"]:
        with contextlib.redirect_stderr(io.StringIO()):
            names = stale()
        for name in names:
            print(f"stale: {name}; run `make proto`", file=sys.stderr)
        return 1 if names else 0
    generate(ROOT, REFERENCE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
