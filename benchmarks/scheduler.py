"""What one step costs in the scheduler: `schedule` and `complete`, in milliseconds.

python benchmarks/scheduler.py

Every sequence has its own prompt; `mixed` adds a new prompt whenever one ends, so that steps carry decode rows, prefill
chunks, admissions and ends. All rows return at once, as in a pipeline that is never slow.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections import deque

from gateway.scheduler import MicroBatch, Scheduler, SchedulerLimits, Sequence

BLOCK_SIZE = 16


def measure(
    num_sequences: int, num_in_flight: int, context: int, num_output: int, num_tenants: int, steps: int
) -> dict[str, float]:
    """One row of the table; medians and maxima over `steps` steps after everybody decodes."""
    scheduler = Scheduler(
        num_blocks=2 * num_sequences * ((context + num_output) // BLOCK_SIZE + 2),
        block_size_tokens=BLOCK_SIZE,
        max_in_flight=num_in_flight,
        limits=SchedulerLimits(
            max_step_tokens=8192, max_step_sequences=num_sequences, max_waiting_tokens=1 << 40, min_prefill_tokens=64
        ),
    )
    number = 0

    def add() -> None:
        nonlocal number
        number += 1
        scheduler.add(
            Sequence(
                sequence_id=number,
                prompt_token_ids=tuple(range(number, number + context)),
                max_total_tokens=context + 1 + (number * 7919) % (2 * num_output),
                tenant=str(number % num_tenants),
            )
        )

    for _ in range(num_sequences):
        add()
    warm = False
    flying: deque[MicroBatch] = deque()
    schedule_s: list[float] = []
    complete_s: list[float] = []
    rows: list[int] = []
    while len(schedule_s) < steps:
        warm = warm or scheduler.num_waiting == 0
        begun_s = time.perf_counter()
        step = scheduler.schedule()
        took_s = time.perf_counter() - begun_s
        if step is not None:
            flying.append(step)
            if warm:
                schedule_s.append(took_s)
                rows.append(len(step.rows))
            continue
        step = flying.popleft()
        tokens = {row.sequence.sequence_id: 1 for row in step.rows if row.wants_output}
        begun_s = time.perf_counter()
        scheduler.complete(step.step_id, tokens)
        if warm:
            complete_s.append(time.perf_counter() - begun_s)
        while scheduler.num_running + scheduler.num_waiting < num_sequences:
            add()
    return {
        "sequences": num_sequences,
        "in_flight": num_in_flight,
        "context": context,
        "output": num_output,
        "tenants": num_tenants,
        "rows": statistics.median(rows),
        "schedule_ms": round(1e3 * statistics.median(schedule_s), 3),
        "schedule_max_ms": round(1e3 * max(schedule_s), 3),
        "complete_ms": round(1e3 * statistics.median(complete_s), 3),
        "complete_max_ms": round(1e3 * max(complete_s), 3),
    }


def main() -> None:
    """Print a table, or JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--steps", type=int, default=400, help="steps measured for each row (default: 400)")
    args = parser.parse_args()
    print(f"# {platform.python_implementation()} {platform.python_version()}, {platform.machine()}")
    for index, shape in enumerate(
        [
            (256, 1, 500, 500, 1),
            (256, 4, 500, 500, 1),
            (1024, 4, 500, 500, 1),
            (256, 1, 8000, 500, 1),
            (256, 1, 100, 20, 1),
            (256, 1, 100, 20, 200),
        ]
    ):
        row = measure(*shape, steps=args.steps)
        if args.json:
            print(json.dumps(row))
            continue
        if index == 0:
            print("  ".join(row))
        print("  ".join(f"{value:>{len(name)}}" for name, value in row.items()))


if __name__ == "__main__":
    main()
