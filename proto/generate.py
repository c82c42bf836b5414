"""Generate the stubs beside their .proto files.

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
from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Write every stub below `out`. Raises SystemExit with protoc's status where it fails."""
    # protoc looks for its plugins on the PATH; they lie beside this interpreter, activated or not.
    os.environ["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.rglob("*.proto"))
    flags = [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    status = protoc.main(["protoc", f"-I{ROOT}", f"-I{well_known}", *flags, *sources])
    if status:
        raise SystemExit(status)


def stale() -> list[str]:
    """Paths of stubs that differ from what the .proto files give now."""
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        fresh = {path.relative_to(folder): path.read_bytes() for path in Path(folder).rglob("*_pb2*")}
    kept = {
        path.relative_to(ROOT): path.read_bytes() for path in ROOT.rglob("*_pb2*") if "__pycache__" not in str(path)
    }
    return sorted(str(name) for name in fresh.keys() | kept.keys() if fresh.get(name) != kept.get(name))


def main(argv: list[str]) -> int:
    """Command line: see the module's docstring."""
    if argv == ["--check"]:
        with contextlib.redirect_stderr(io.StringIO()):
            names = stale()
        for name in names:
            print(f"stale: proto/{name}; run `make proto`", file=sys.stderr)
        return 1 if names else 0
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
