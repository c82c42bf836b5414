"""Show the pipelines of a running server, their stages and the spares."""

from __future__ import annotations

import argparse
import json
from typing import Any

import grpc

from gateway.cli.connection import add_connection_arguments, connection_from
from gateway.cli.servers import failure
from stageline.inference.v1 import inference_service_pb2 as pb
from stageline.inference.v1 import inference_service_pb2_grpc as pb_grpc


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `stageline status`."""
    add_connection_arguments(parser)
    parser.add_argument("--output", choices=["table", "json"], default="table")


def run(args: argparse.Namespace) -> int:
    """Ask the server and print; exits 1 where it does not answer."""
    connection = connection_from(args)
    with connection.channel() as channel:
        try:
            model = pb_grpc.InferenceServiceStub(channel).GetModel(
                pb.GetModelRequest(), timeout=10, metadata=connection.metadata
            )
        except grpc.RpcError as error:
            raise failure(error, connection.address) from None
    data = to_dict(model)
    print(json.dumps(data, indent=2) if args.output == "json" else table(data))
    return 0


def to_dict(model: pb.GetModelResponse) -> dict[str, Any]:
    """The answer as `status --output json` prints it."""

    def replica(r: pb.StageReplicaStatus) -> dict[str, Any]:
        return {"pid": r.pid, "node": r.node, "address": r.address, "state": r.state}

    return {
        "model": model.name,
        "fingerprint": model.fingerprint,
        "pipelines": [
            {
                "id": p.id,
                "epoch": p.epoch,
                "state": p.state,
                "num_blocks": p.num_blocks,
                "num_free_blocks": p.num_free_blocks,
                "num_running_sequences": p.num_running_sequences,
                "num_waiting_sequences": p.num_waiting_sequences,
                "stages": [
                    {"index": s.index, "layers": s.layers, "replicas": [replica(r) for r in s.replicas]}
                    for s in p.stages
                ],
            }
            for p in model.pipelines
        ],
        "spares": [{**replica(r), "layers": r.layers} for r in model.spares],
    }


def table(data: dict[str, Any]) -> str:
    """The same for people."""
    lines = [f"model {data['model']}  fingerprint {data['fingerprint']}"]
    for pipeline in data["pipelines"]:
        lines.append(f"pipeline {pipeline['id']}  epoch {pipeline['epoch']}  {pipeline['state']}")
        for stage in pipeline["stages"]:
            for r in stage["replicas"]:
                lines.append(
                    f"  stage {stage['index']}  layers {stage['layers']:>7}  pid {r['pid']:>7}  "
                    f"{r['address']}  {r['state']}"
                )
    lines += [f"spare  layers {r['layers']:>7}  pid {r['pid']:>7}  {r['address']}" for r in data["spares"]]
    return "\n".join(lines)
