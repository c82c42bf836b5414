"""Validation as the API server does it in strict mode: core kinds by kubernetes-validate, Ray kinds by their CRD schema."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import DeploymentSchema, RayActorOptionsSchema, ServeApplicationSchema, ServeDeploySchema

from gateway import config as configuration

# KubeRay's are whole (crds/vendor.py). The others are written by hand from the projects' references and hold only the fields
# that k8s/optional/ uses and their neighbours: stricter than the real ones.
CRDS = {
    ("ray.io/v1", "RayService"): "rayservices.v1.json",
    ("ray.io/v1", "RayJob"): "rayjobs.v1.json",
    ("monitoring.coreos.com/v1", "PodMonitor"): "podmonitors.v1.json",
    ("cert-manager.io/v1", "Issuer"): "issuers.v1.json",
    ("cert-manager.io/v1", "Certificate"): "certificates.v1.json",
    ("kueue.x-k8s.io/v1beta1", "ResourceFlavor"): "resourceflavors.v1beta1.json",
    ("kueue.x-k8s.io/v1beta1", "ClusterQueue"): "clusterqueues.v1beta1.json",
    ("kueue.x-k8s.io/v1beta1", "LocalQueue"): "localqueues.v1beta1.json",
}


def errors_of(manifest: dict[str, Any]) -> list[str]:
    """What the API server would refuse; empty for a valid object. Raises KeyError for a kind nobody knows."""
    kind = (manifest["apiVersion"], manifest["kind"])
    if kind in CRDS:
        found = _validator(CRDS[kind]).iter_errors(_without_nulls(manifest))
        return [f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}" for error in found]
    try:
        kubernetes_validate.validate(manifest, kubernetes_validate.latest_version(), strict=True)
    except kubernetes_validate.SchemaNotFoundError:
        raise KeyError(kind) from None
    except kubernetes_validate.ValidationError as error:
        return [f"{'.'.join(map(str, error.path))}: {error.message[:200]}"]
    return []


@functools.cache
def _validator(file_name: str) -> jsonschema.Draft202012Validator:
    schema = json.loads((Path(__file__).parent / "crds" / file_name).read_text())
    definitions = {name: _strict(part) for name, part in schema.pop("$defs").items()}
    schema = _strict(schema)
    schema["properties"]["metadata"] = {"type": "object"}  # ObjectMeta: the server's own, not the CRD's
    return jsonschema.Draft202012Validator({**schema, "$defs": definitions})


def _strict(schema: Any) -> Any:
    """A structural schema of Kubernetes as JSON Schema that refuses unknown fields."""
    if isinstance(schema, list):
        return [_strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: _strict(part) for name, part in value.items()}
        elif key in ("items", "additionalProperties"):
            out[key] = _strict(value)
        elif not key.startswith("x-kubernetes"):
            out[key] = value
    if "properties" in schema:
        # Defaults are set before validation, so a required field that has one may be left out.
        out["required"] = [name for name in schema.get("required", ()) if "default" not in schema["properties"][name]]
        open_ended = schema.get("x-kubernetes-preserve-unknown-fields") or schema.get("x-kubernetes-embedded-resource")
        out.setdefault("additionalProperties", bool(open_ended))
    if schema.get("x-kubernetes-int-or-string"):
        out.pop("type", None)
        out["anyOf"] = [{"type": "integer"}, {"type": "string"}]
    return out


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def serve_config_errors(data: dict[str, Any]) -> list[str]:
    """Ray's schema accepts misspelt fields in silence: compare the keys of every level as well."""
    ServeDeploySchema.model_validate(data)
    levels: list[tuple[str, dict[str, Any], Any]] = [("", data, ServeDeploySchema)]
    for application in data["applications"]:
        levels.append((application["name"], application, ServeApplicationSchema))
        levels.append(("autoscaling_policy", application["autoscaling_policy"], AutoscalingPolicy))
        for deployment in application.get("deployments", ()):
            levels.append((deployment["name"], deployment, DeploymentSchema))
            levels.append((deployment["name"], deployment.get("ray_actor_options", {}), RayActorOptionsSchema))
    found = [f"{where}: {key}" for where, level, schema in levels for key in level.keys() - schema.model_fields.keys()]
    for application in data["applications"]:
        configuration.from_mapping(application["args"], source="args")  # raises for an unknown key
    return found
