"""Batch jobs on a Kubernetes cluster: RayJobs, created, followed and deleted through the API server."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from gateway.batch.dataset.names import error_file
from gateway.cli.rayjobs import ClusterJob, RayJobs
from gateway.cluster_api import api_client
from gateway.planner.batch_job import ANNOTATIONS, BatchJob, batch_job, check_name
from gateway.planner.k8s import SERVE_ADDRESS, Deployment, check_names
from stageline.errors import ConfigError, NotFoundError, UnavailableError

POLL_S = 2.0
GIVE_UP_S = 600.0  # without any answer of the API server, while a job is followed

Note = Callable[[str], None]


def add_cluster_arguments(parser: argparse.ArgumentParser, *, submit: bool = False) -> None:
    """Flags of the verbs that can speak of a cluster."""
    group = parser.add_argument_group("--kubernetes")
    group.add_argument("--kubernetes", action="store_true", help="a RayJob on the current kubeconfig's cluster")
    group.add_argument("--namespace", help=f"default: {Deployment().namespace}")
    if submit:
        group.add_argument("--name", help="of the RayJob; default: one that follows from the files")
        group.add_argument("--image", help="without its tag, as in `stageline plan`")
        group.add_argument("--volume-claim", help="mounted at /data, for paths; default: stageline-batch")
        group.add_argument("--queue", help="Kueue's LocalQueue to wait in")
        group.add_argument("--workers", type=int, help="pods that send requests; default: 1")
        group.add_argument("--concurrency", type=int, help="requests at the server at once; default: 64")


_ONLY_HERE = ("namespace", "name", "image", "volume_claim", "queue", "workers", "concurrency")
_NOT_HERE = ("tls", "ca_file", "certificate_file", "key_file", "server_name", "api_key_file", "window_s")


def check_flags(args: argparse.Namespace) -> None:
    """Raises ConfigError for a flag that says nothing in this mode: none is dropped in silence."""
    on_cluster = getattr(args, "kubernetes", False)
    for name in _NOT_HERE if on_cluster else _ONLY_HERE:
        if getattr(args, name, None):
            flag = f"--{name.replace('_', '-')}"
            why = (
                f"{flag} does not go with --kubernetes; the job's API key is STAGELINE_API_KEY in the Secret stageline-batch"
                if on_cluster
                else f"{flag} belongs to --kubernetes"
            )
            raise ConfigError("CONFIG_INVALID", why, field=flag)


def run_on_cluster(args: argparse.Namespace, note: Note | None) -> tuple[int, list[ClusterJob]]:
    """One of submit, get, list, cancel; returns the exit code and the jobs to show."""
    deployment = Deployment(**{k: v for k in ("namespace", "image") if (v := getattr(args, k, None))})
    check_names(deployment)
    if args.batch_verb == "submit":
        job = _job(args, deployment)
        manifest = batch_job(job)  # before anybody is asked
        with api_client("--kubernetes") as api:
            shown = _submit(
                RayJobs(api, deployment.namespace), manifest, wait=args.wait, note=note or (lambda text: None)
            )
        return int(shown.state in ("failed", "cancelling")), [shown]
    if args.batch_verb != "list":
        check_name(args.id)
    with api_client("--kubernetes") as api:
        jobs = RayJobs(api, deployment.namespace)
        if args.batch_verb == "list":
            return 0, jobs.list(args.limit)
        found = jobs.get(args.id)
        if found is not None and args.batch_verb == "cancel":
            jobs.delete(args.id)
            found = jobs.get(args.id) or replace(found, state="cancelling")
    if found is None:
        raise NotFoundError("BATCH_NOT_FOUND", f"there is no batch job {args.id} in namespace {deployment.namespace}")
    return 0, [found]


def _job(args: argparse.Namespace, deployment: Deployment) -> BatchJob:
    given = {
        key: value
        for key in ("name", "volume_claim", "queue", "workers", "concurrency")
        if (value := getattr(args, key)) is not None
    }
    return BatchJob(
        input=args.input,
        output=args.output_file,
        errors=args.error_file or error_file(args.output_file),
        address=args.address or SERVE_ADDRESS,
        deployment=deployment,
        **given,
    )


def _submit(jobs: RayJobs, manifest: dict[str, Any], *, wait: bool, note: Note) -> ClusterJob:
    """Create the job, or find the one that the same command made; one that failed is made anew and goes on."""
    name = manifest["metadata"]["name"]
    places = {short: manifest["metadata"]["annotations"][key] for short, key in ANNOTATIONS.items()}
    found = jobs.get(name)
    if found is not None and found.places != places:
        raise ConfigError(
            "NAME_TAKEN", f"the RayJob {name} is another one, of {found.places.get('input', 'something else')}; "
            "give another --name", field="--name",
        )  # fmt: skip
    if found is not None and found.state in ("failed", "cancelling"):
        note(f"{name} {found.state}: it is made anew and goes on where it was\n")
        jobs.delete(name)
        _until(jobs, name, lambda now: now is None, note)
        found = None
    if found is None:
        found = jobs.create(manifest)
    if not wait:
        return found
    ended = _until(jobs, name, lambda now: now is None or now.state != "in_progress", note)
    return ended or replace(found, state="cancelling")


def _until(jobs: RayJobs, name: str, condition: Callable[[ClusterJob | None], bool], note: Note) -> ClusterJob | None:
    """Follow a job; an API server that is away for a while is waited for."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    heard_s = time.monotonic()
    while True:
        try:
            now = jobs.get(name)
            heard_s = time.monotonic()
            if condition(now):
                return now
            if now is not None:
                note(now.describe())
        except (ApiException, HTTPError, UnavailableError):
            if time.monotonic() - heard_s > GIVE_UP_S:
                raise
        time.sleep(POLL_S)
