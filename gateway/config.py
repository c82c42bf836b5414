"""Configuration: one YAML file, sections by owner, units in the names; flag > environment > file > default.

A field has one spelling in three alphabets: `kv_cache.block_size_tokens` in the file, `--kv-cache.block-size-tokens`
on the command line, `STAGELINE_KV_CACHE__BLOCK_SIZE_TOKENS` in the environment. An unknown key is an error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stageline.errors import ConfigError

ENV_PREFIX = "STAGELINE_"

# The only short names; every other field is spelled section.field.
SHORT_NAMES = {
    "model": "model.path",
    "dtype": "model.dtype",
    "quantization": "model.quantization",
    "stages": "stages.count",
    "layers": "stages.layers",
    "grpc_port": "server.grpc_port",
    "http_port": "server.http_port",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(_Section):
    """Which weights, and how they are computed."""

    path: str = Field("", description="folder in the Hugging Face layout, .gguf file, or hub id")
    name: str = Field("", description="name clients use; default: the last part of the path")
    revision: str | None = Field(None, description="hub revision")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="element type of weights and hidden states")
    quantization: Literal["int8", "int4"] | None = Field(
        None, description="quantize weights while loading (CPU); int4 keeps lm_head in int8"
    )
    batch_invariant: bool = Field(False, description="a sequence's bits do not depend on its neighbours (slower)")
    max_context_tokens: int | None = Field(None, ge=2, description="longest prompt plus answer; default: the model's")


class StagesSection(_Section):
    """How the layers are cut and where stages run."""

    count: int | None = Field(None, ge=1, description="stages of a pipeline; default: 1, or as many as `layers` names")
    layers: str | None = Field(None, description="half-open ranges, one a stage: 0-9,9-18; default: by cost model")
    replicas: int = Field(1, ge=1, description="replicas of every stage: pipelines, or spares")
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where stages compute; the CUDA path has not run on a GPU"
    )
    num_threads: int | None = Field(None, ge=1, description="CPU threads of a stage; default: cores / stages")
    num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray reserves for a stage")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for a stage")
    host: str | None = Field(None, description="address stage servers listen on; default: the node's")


class KvCacheSection(_Section):
    """Paged keys and values."""

    block_size_tokens: int | None = Field(None, ge=1, description="tokens of a block; default: 16, on CUDA 256")
    memory_bytes: int | None = Field(None, ge=1, description="bytes of a stage's cache; default: 1 GiB on the CPU")
    num_blocks: int | None = Field(None, ge=2, description="blocks of the cache, instead of memory_bytes")
    debug: bool = Field(False, description="stages check on every read what a slot holds (slow)")
    prefix_caching: bool = Field(True, description="compute the common beginnings of prompts once")


class SchedulerSection(_Section):
    """Micro-batches and queues."""

    max_step_tokens: int = Field(2048, ge=1, description="tokens of a micro-batch")
    max_step_sequences: int = Field(256, ge=1, description="sequences of a micro-batch")
    min_prefill_tokens: int = Field(16, ge=1, description="least prefill of a micro-batch while prompts wait")
    max_waiting_sequences: int = Field(1024, ge=1, description="sequences that wait; more are refused")
    max_waiting_tokens: int = Field(1 << 20, ge=1, description="tokens of the sequences that wait; more are refused")
    max_request_kv_fraction: float = Field(
        0.5, gt=0, le=1, description="share of the KV cache that one request gets while others wait"
    )


class PipelinesSection(_Section):
    """How many there are; claims and leases. Without `max` there are as many as `stages.replicas`."""

    max: int | None = Field(None, ge=1, description="most pipelines; demand decides how many, up to these")
    min: int = Field(1, ge=0, description="fewest pipelines, with `max`; 0: none while idle (batch-only deployments)")
    target_sequences: int = Field(64, ge=1, description="requests that one more pipeline is started for, with `max`")
    scale_up_delay_s: float = Field(5.0, ge=0, description="seconds of more demand before pipelines are added")
    idle_s: float = Field(300.0, ge=0, description="seconds of less demand before pipelines are taken away")

    lease_s: float = Field(10.0, gt=0, description="seconds a claim of a stage lasts without a renewal")
    stall_timeout_s: float = Field(
        60.0, gt=0, description="seconds without a returned step after which a stage that answers calls counts as hung"
    )

    @model_validator(mode="after")
    def _in_order(self) -> PipelinesSection:
        if self.max is not None and self.min > self.max:
            raise ValueError(f"pipelines.min ({self.min}) is more than pipelines.max ({self.max})")
        return self


class ServerSection(_Section):
    """The doors."""

    host: str = Field("127.0.0.1", description="address both doors listen on")
    grpc_port: int = Field(9000, ge=0, le=65535, description="public gRPC port")
    http_port: int = Field(8000, ge=0, le=65535, description="OpenAI-compatible HTTP port (Ray Serve)")
    ready_timeout_s: float = Field(1800.0, gt=0, description="seconds `serve` waits for the first pipeline")
    drain_timeout_s: float = Field(20.0, ge=0, description="seconds running requests get when the gateway stops")


class Config(_Section):
    """The whole configuration."""

    model: ModelSection = ModelSection()
    stages: StagesSection = StagesSection()
    kv_cache: KvCacheSection = KvCacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    pipelines: PipelinesSection = PipelinesSection()
    server: ServerSection = ServerSection()

    def block_size_tokens(self) -> int:
        """Tokens of a KV block: as configured, else 16, and 256 on CUDA (FlashAttention-2's paged KV)."""
        return self.kv_cache.block_size_tokens or (256 if self.stages.device == "cuda" else 16)


def fields() -> Iterator[tuple[str, str, type | None, str]]:
    """Every field as (section, name, element type or None for free text, description)."""
    for section, info in Config.model_fields.items():
        kind = info.annotation
        assert isinstance(kind, type)
        assert issubclass(kind, BaseModel)
        for name, field in kind.model_fields.items():
            yield section, name, bool if field.annotation is bool else None, field.description or ""


def from_mapping(data: Mapping[str, Any], *, source: str) -> Config:
    """Validate; raises ConfigError that names the field, its source, what was expected and what was given."""
    try:
        return Config.model_validate(dict(data))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                "CONFIG_UNKNOWN_KEY",
                f"{source}: unknown key {name!r}; `stageline config` lists all keys",
                field=name,
                source=source,
            ) from None
        raise ConfigError(
            "CONFIG_INVALID",
            f"{source}: {name}: {first['msg']}, got {first['input']!r}",
            field=name,
            source=source,
            value=first["input"],
        ) from None


def load(config_file: str | None, flags: Mapping[str, str], environ: Mapping[str, str]) -> Config:
    """Merge defaults, file, environment and flags (`section.field` → text), later ones winning.

    Raises ConfigError for a file that cannot be read, an unknown key or a wrong value.
    """
    known = {f"{section}.{name}" for section, name, *_ in fields()}
    layers = [("the configuration file " + config_file, _read_yaml(config_file))] if config_file else []
    environment = {}
    for key, value in environ.items():
        if key.startswith(ENV_PREFIX) and "__" in key:
            name = key.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            if name not in known:
                raise ConfigError(
                    "CONFIG_UNKNOWN_KEY",
                    f"environment variable {key}: there is no field {name!r}; `stageline config` lists all keys",
                    field=name,
                    source="environment",
                )
            environment[name] = value
    merged: dict[str, dict[str, Any]] = {}
    for source, data in layers:
        from_mapping(data, source=source)
        for section, values in data.items():
            merged.setdefault(section, {}).update(values or {})
    for source, pairs in (("the environment", environment), ("the command line", flags)):
        for name, value in pairs.items():
            section, _, field = name.partition(".")
            merged.setdefault(section, {})[field] = value
        from_mapping(merged, source=source)
    return from_mapping(merged, source="the configuration")


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("CONFIG_FILE_MISSING", f"--config {path}: no such file", field="config", path=path) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(
            "CONFIG_FILE_UNREADABLE", f"--config {path}: not readable as YAML: {error}", field="config", path=path
        ) from None
    if data is None:
        return {}
    if not isinstance(data, dict) or not all(isinstance(v, dict | None) for v in data.values()):
        raise ConfigError(
            "CONFIG_FILE_UNREADABLE",
            f"--config {path}: expected sections ({', '.join(Config.model_fields)}) with fields below them",
            field="config",
            path=path,
        )
    return {section: values or {} for section, values in data.items()}
