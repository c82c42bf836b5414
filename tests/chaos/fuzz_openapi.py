"""The OpenAPI document against what the HTTP door does: schemathesis over every operation, `make fuzz`.

The gateway of fuzz_gateway.py, in a process of its own, has real doors, a real engine and batches. Exit code 1 where an answer
is not as the document says: an undocumented status, header or form, a 5xx, a body that fits no schema and is accepted.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from tests.chaos.fuzz_gateway import served

# It expects 2xx for every body that fits the schema; docs/api.md says which rules a schema cannot have.
EXCLUDED = "positive_data_acceptance"
CONFIG = Path(__file__).with_name("schemathesis.toml")


async def run(max_examples: int, seed: int, *options: str) -> tuple[int, str]:
    """Schemathesis' exit code and report."""
    async with served() as (gateway, _, url):
        command = [
            str(Path(sys.executable).parent / "schemathesis"), "--config-file", str(CONFIG),
            "run", f"{url}/openapi.json", "--no-color",
            "--max-examples", str(max_examples), "--seed", str(seed), "--exclude-checks", EXCLUDED,
            "--continue-on-failure", "--generation-database", "none", *options,
        ]  # fmt: skip
        process = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            report, _ = await process.communicate()
        except asyncio.CancelledError:
            process.kill()
            raise
        if gateway.returncode is not None:
            return 1, f"the gateway died with code {gateway.returncode}\n{report.decode()}"
        return process.returncode or 0, report.decode()


def main() -> None:
    """Prints the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--max-examples", type=int, default=100, help="cases an operation")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    code, report = asyncio.run(run(args.max_examples, args.seed))
    print(report)
    sys.exit(code)


if __name__ == "__main__":
    main()
