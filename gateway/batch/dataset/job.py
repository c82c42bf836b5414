"""The Ray Data job: scan the shards, run those that are not done, write the results. The only module here that knows Ray."""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from gateway.batch.dataset.door import DoorSettings
from gateway.batch.dataset.journal import done_shards
from gateway.batch.dataset.names import absolute
from gateway.batch.dataset.plan import (
    Plan,
    duplicates,
    fingerprint_of,
    from_json,
    new_plan,
    next_step,
    to_json,
)
from gateway.batch.dataset.results import write_results
from gateway.batch.dataset.runner import Runner, RunnerSettings
from gateway.batch.dataset.shards import Scan, Shard, cut, read, scan, with_scans
from gateway.batch.dataset.storage import Place, expand
from gateway.batch.plan import MAX_NAMED_DUPLICATES
from stageline.errors import ConfigError, InvalidArgumentError, StagelineError, UnavailableError

SHARDS_A_WORKER = 2  # while the last requests of one end, the next one's begin
PROGRESS_EVERY_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetJob:
    """What to run, where the results go, and how: `concurrency` requests at once over `workers` processes."""

    input: str
    output: str
    errors: str
    door: DoorSettings
    concurrency: int = 64
    workers: int = 1

    @property
    def state(self) -> Place:
        """The folder from which a job that was killed goes on."""
        return Place(f"{absolute(self.output)}.stageline")


def run_dataset(job: DatasetJob, note: Callable[[str], None]) -> Plan:
    """Run what has no result yet, and return the plan of the job that has ended.

    Raises ConfigError for files that cannot be used and an input that changed, InvalidArgumentError for custom_ids that
    occur twice, UnavailableError where no server answers.
    """
    output, errors = Place(absolute(job.output)), Place(absolute(job.errors))
    files = tuple(expand(job.input, without=(output, errors)))
    where = job.state / "plan.json"
    with _only_one(job.state):
        data = where.read()
        plan = None if data is None else from_json(data, where.url)
        exist = output.exists() and errors.exists()
        step = next_step(plan, files, None, results_exist=exist)
        if step == "done":
            assert plan is not None
            return plan
        with _ray(job.workers):
            if step == "scan":
                note(f"reading {len(files)} files")
                shards, ids = _scanned(cut(files))
                found = new_plan(files, shards)
                step = next_step(plan, files, fingerprint_of(shards), results_exist=exist)
                if step == "begin":
                    _refuse_duplicates(shards, ids)
                    (job.state / "shards").remove()
                    plan = found
                elif plan is not None and plan.files != files:  # the same content, written again
                    plan = replace(plan, files=files)
                assert plan is not None
                where.write(to_json(plan))
                if step == "done":
                    return plan
            assert plan is not None
            _run(job, plan, note)
        completed, failed = write_results(plan, job.state / "shards", output, errors)
        plan = replace(plan, ended=True, completed=completed, failed=failed)
        where.write(to_json(plan))
        (job.state / "shards").remove()
        return plan


def _run(job: DatasetJob, plan: Plan, note: Callable[[str], None]) -> None:
    """Returns when every shard is done."""
    journals = job.state / "shards"
    counts = {index: (completed, failed) for index, (_, completed, failed) in done_shards(journals).items()}
    todo = [(i, shard) for i, shard in enumerate(plan.shards) if i not in counts and shard.num_requests]
    settings = RunnerSettings(
        door=job.door,
        folder=journals,
        batch_id=plan.batch_id,
        concurrency=-(-job.concurrency // job.workers),
        named=len(plan.files) > 1,
    )
    progress = _Progress(plan.total, sum(map(sum, counts.values())), note)
    progress.say(counts.values())
    for row in _mapped(todo, _RunShards, (settings,), workers=job.workers, concurrency=SHARDS_A_WORKER):
        counts[row["index"]] = row["value"]
        progress.say(counts.values())


def _scanned(shards: Sequence[Shard]) -> tuple[list[Shard], list[bytes]]:
    """The shards with what stands in them, and their custom_ids' digests."""
    scans: dict[int, Scan] = {row["index"]: row["value"] for row in _mapped(list(enumerate(shards)), _scan_shards)}
    ordered = [scans[index] for index in range(len(shards))]
    return with_scans(shards, ordered), [found.ids for found in ordered]


def _refuse_duplicates(shards: Sequence[Shard], ids: Sequence[bytes]) -> None:
    count, places = duplicates(ids, MAX_NAMED_DUPLICATES)
    if not count:
        return
    ends = np.cumsum([len(one) // 16 for one in ids])

    def name(place: int) -> tuple[str, str]:
        index = int(np.searchsorted(ends, place, side="right"))
        inside = place - (int(ends[index - 1]) if index else 0)
        rows = [(line, what.custom_id) for line, what in read(shards[index]) if what.custom_id is not None]
        line, custom_id = rows[inside]
        return f"{shards[index].url.rpartition('/')[2]} line {line}", str(custom_id)[:64]

    named = "; ".join(f"{name(again)[1]!r} in {name(first)[0]} and {name(again)[0]}" for first, again in places)
    more = f" and {count - len(places)} more" if count > len(places) else ""
    raise InvalidArgumentError(
        "CUSTOM_ID_DUPLICATE", f"every custom_id may occur once: {named}{more}", field="custom_id", count=count
    )


class _Progress:
    """Says how far it is, and when it may end."""

    def __init__(self, total: int, done_before: int, note: Callable[[str], None]) -> None:
        self._total, self._before, self._note = total, done_before, note
        self._began_s, self._said_s = time.monotonic(), -PROGRESS_EVERY_S

    def say(self, counts: Any) -> None:
        now_s = time.monotonic()
        completed, failed = (sum(column) for column in zip((0, 0), *counts, strict=True))
        done = completed + failed
        if now_s - self._said_s < PROGRESS_EVERY_S and done < self._total:
            return
        self._said_s = now_s
        text = f"{completed} of {self._total} completed, {failed} failed"
        if self._before < done < self._total:
            left_s = (self._total - done) * (now_s - self._began_s) / (done - self._before)
            text += f", about {left_s:.0f} s left"
        self._note(text)


@contextmanager
def _only_one(state: Place) -> Iterator[None]:
    """Hold the state of a local output: two jobs would run every request twice. On object stores nothing can be held; there
    the name of the RayJob is what keeps a second one out."""
    if "://" in state.url:
        yield
        return
    folder = Path(state.url)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(
            "OUTPUT_NOT_WRITABLE", f"cannot write {folder}: {error.strerror}", field="--output-file"
        ) from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        raise ConfigError(
            "OUTPUT_IN_USE", f"another job writes {state.url.removesuffix('.stageline')}; wait for it, or name another file",
            field="--output-file",
        ) from None  # fmt: skip
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def _ray(workers: int) -> Iterator[None]:
    """Ray for the block: the cluster that RAY_ADDRESS names (a RayJob's entrypoint has it), else one of this process."""
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {}
    if not address:
        # A local cluster has no strangers to keep out, and a token file in the home directory would outlive it.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        local = {
            "include_dashboard": False,
            "num_cpus": max(os.cpu_count() or 1, workers + 1),
            "object_store_memory": 256 << 20,
        }
    import ray
    from ray.data import DataContext

    try:
        ray.init(address=address or "local", logging_level=logging.WARNING, log_to_driver=False, **local)
    except Exception as error:  # Ray has no class of its own for it
        where = f"the cluster at RAY_ADDRESS={address} cannot be reached" if address else "Ray cannot start here"
        raise UnavailableError("RAY_UNAVAILABLE", f"{where}: {error}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def _mapped(
    todo: Sequence[tuple[int, Shard]],
    function: Any,
    arguments: tuple[Any, ...] = (),
    *,
    workers: int | None = None,
    concurrency: int = 1,
) -> Iterator[dict[str, Any]]:
    """{"index", "value"} of every shard as it is done. Raises the first error that one meets."""
    import ray.data

    if not todo:
        return
    rows = ray.data.from_items(
        [{"index": index, "shard": pickle.dumps(shard)} for index, shard in todo], override_num_blocks=len(todo)
    )
    how: dict[str, Any] = {"batch_size": 1, "num_cpus": 1}
    if workers is not None:
        how |= {
            "fn_constructor_args": arguments,
            "compute": ray.data.ActorPoolStrategy(
                size=workers,
                max_tasks_in_flight_per_actor=concurrency,
                max_concurrent_calls_per_actor=concurrency,
                enable_true_multi_threading=True,
            ),
        }
    for row in rows.map_batches(function, **how).iter_rows():
        if row["failure"]:
            error: StagelineError = pickle.loads(row["failure"])
            raise error
        yield {"index": int(row["index"]), "value": pickle.loads(row["value"])}


def _guarded(batch: dict[str, Any], action: Callable[[int, Shard], Any]) -> dict[str, Any]:
    """A typed error as a value: raised, Ray would wrap it in its own."""
    [index], [shard] = batch["index"], batch["shard"]
    failure = value = b""
    try:
        value = pickle.dumps(action(int(index), pickle.loads(shard)))
    except StagelineError as error:
        failure = pickle.dumps(error)
    return {"index": [int(index)], "value": [value], "failure": [failure]}


def _scan_shards(batch: dict[str, Any]) -> dict[str, Any]:
    return _guarded(batch, lambda _, shard: scan(shard))


class _RunShards:
    """An actor of Ray Data's pool: where it dies, its shards go to another, which begins with what is durable."""

    def __init__(self, settings: RunnerSettings) -> None:
        self._runner = Runner(settings)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        return _guarded(batch, self._runner.run)
