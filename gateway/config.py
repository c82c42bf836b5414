"""Configuration: one YAML file, sections by owner, units in the names; flag > environment > file > default.

A field has one spelling in three alphabets: `kv_cache.block_size_tokens` in the file, `--kv-cache.block-size-tokens`
on the command line, `STAGELINE_KV_CACHE__BLOCK_SIZE_TOKENS` in the environment. An unknown key is an error.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gateway.batch.state_url import absolute_url, has_password, without_password
from stageline.errors import ConfigError
from stages.spec import DEFAULT_SHARED_MEMORY_BYTES
from stages.tls import TlsFiles, tls_files

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
    chat_template_file: str | None = Field(
        None, description="file with a Jinja chat template; default: the model's own"
    )

    def absolute(self) -> ModelSection:
        """With paths that mean the same in processes that run elsewhere; a hub id stays."""
        template = self.chat_template_file
        return self.model_copy(
            update={
                "path": os.path.abspath(self.path) if os.path.exists(self.path) else self.path,
                "chat_template_file": None if template is None else os.path.abspath(template),
            }
        )


class StagesSection(_Section):
    """How the layers are cut and where stages run."""

    count: int | None = Field(None, ge=1, description="stages of a pipeline; default: 1, or as many as `layers` names")
    layers: str | None = Field(None, description="half-open ranges, one a stage: 0-9,9-18; default: by cost model")
    replicas: int = Field(1, ge=1, description="replicas of every stage: pipelines, or spares")
    spares: int = Field(
        0, ge=0, description="replicas that hold no stage until one is lost, and then load it, whichever it is"
    )
    device: Literal["cpu", "cuda"] = Field(
        "cpu", description="where stages compute; the CUDA path has not run on a GPU"
    )
    cuda_graphs: bool = Field(False, description="decode steps as CUDA graphs; not yet run on a GPU")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of a stage; default: cores / stages")
    num_cpus: float = Field(0.1, ge=0, description="CPUs that Ray reserves for a stage")
    num_gpus: float = Field(0, ge=0, description="GPUs that Ray reserves for a stage")
    hidden_dtype: Literal["fp8", "int8"] | None = Field(
        None, description="8-bit hidden states between stages, a scale a token; default: as computed"
    )
    shared_memory_bytes: int = Field(
        DEFAULT_SHARED_MEMORY_BYTES, ge=0, le=1 << 40,
        description="memory through which a stage passes hidden states to the next one on its host; 0: over the socket",
    )  # fmt: skip
    host: str | None = Field(None, description="address stage servers listen on; default: the node's")
    drain_timeout_s: float = Field(
        20.0, ge=0, description="seconds a stage that is to stop goes on, while its sequences end or move elsewhere"
    )


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
    eager: int | None = Field(
        None,
        ge=1,
        description="pipelines that one of several gateways takes at once; all that are free after patience_s",
    )
    patience_s: float = Field(
        30.0, ge=0, description="seconds from its start before a gateway takes more than `eager` pipelines"
    )
    stall_timeout_s: float = Field(
        60.0, gt=0, description="seconds without a returned step after which a stage that answers calls counts as hung"
    )
    canary_interval_s: float = Field(
        5.0, gt=0, description="seconds of quiet after which a token through all stages proves an idle pipeline"
    )
    unready_after_s: float = Field(
        10.0, gt=0, description="seconds without a returned step after which a pipeline counts as not ready"
    )

    superseded_after_s: float = Field(
        30.0, gt=0, description="seconds in which all stages are of another model before requests end with UNAVAILABLE"
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
    write_timeout_s: float = Field(
        600.0, gt=0, description="seconds that one piece of a streamed answer may wait for its reader"
    )
    max_unread_tokens: int = Field(
        1 << 16, ge=1, description="tokens and log-probabilities of one request that its client may leave unread"
    )
    max_unread_tokens_total: int = Field(
        1 << 21, ge=1, description="the same of all requests; beyond it those furthest behind are ended"
    )
    drain_timeout_s: float = Field(20.0, ge=0, description="seconds running requests get when the gateway stops")
    log_format: Literal["text", "json"] = Field(
        "text", description="log lines on stderr, of gateway and stages: text, or each a JSON object"
    )


class BatchSection(_Section):
    """Batches of requests; on where there is a place for their state."""

    state_url: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="where files, batches and results are kept: sqlite:///PATH, or postgresql://USER@HOST:PORT/DATABASE "
        "(needs the extra `postgres`)",
    )
    max_concurrency: int = Field(20, ge=1, description="lines that run at a time; so many are run again after a crash")
    max_lines: int = Field(1_000_000, ge=1, description="requests of one batch")
    max_file_bytes: int = Field(1 << 30, ge=1, description="bytes of one input file")

    def absolute(self) -> BatchSection:
        """The same for a process with another working directory. Raises ConfigError for a URL that is not supported."""
        if self.state_url is None:
            return self
        return self.model_copy(update={"state_url": absolute_url(self.state_url)})


class SecuritySection(_Section):
    """Who may call the doors and the stages. Names of files only: what is secret stands in no configuration."""

    certificate_file: str | None = Field(None, description="PEM certificate chain of the gateway: TLS at the gRPC door")
    key_file: str | None = Field(None, description="its private key, PEM")
    client_ca_file: str | None = Field(
        None, description="clients of the gRPC door need a certificate of this authority"
    )
    keys_file: str | None = Field(
        None, description="tenants with their API keys' hashes and limits; unset: open to all"
    )
    reflection: bool = Field(True, description="gRPC reflection (with keys: for those who have one)")
    audit_file: str | None = Field(None, description="JSON lines, one for each call; default: the log stageline.audit")
    audit_prompts: bool = Field(False, description="the audit log holds the texts of prompts")
    stage_certificate_file: str | None = Field(
        None, description="PEM certificate chain of stages and gateway among each other: mutual TLS"
    )
    stage_key_file: str | None = Field(None, description="its private key, PEM")
    stage_ca_file: str | None = Field(None, description="the authority of all stages and gateways, PEM")
    stage_server_name: str | None = Field(
        None, description="name in the stages' certificates; default: the address each listens on"
    )
    stage_token_file: str | None = Field(
        None, description="tokens of stages and gateway, one a line: the first is sent, every one accepted"
    )

    def absolute(self) -> SecuritySection:
        """With paths that mean the same in processes that run elsewhere."""
        names = [name for name in type(self).model_fields if name.endswith("_file") and getattr(self, name)]
        return self.model_copy(update={name: os.path.abspath(getattr(self, name)) for name in names})

    def door_tls(self) -> TlsFiles | None:
        """Of the gRPC door. Raises ConfigError for files that cannot be used."""
        return tls_files(
            self.certificate_file, self.key_file, self.client_ca_file,
            names="security.certificate_file, security.key_file",
        )  # fmt: skip

    def stage_files(self) -> dict[str, str | None]:
        """As `StageAccess` and `StageSpec` call them."""
        return {
            "certificate_file": self.stage_certificate_file,
            "key_file": self.stage_key_file,
            "ca_file": self.stage_ca_file,
            "server_name": self.stage_server_name,
            "token_file": self.stage_token_file,
        }


class TracingSection(_Section):
    """OpenTelemetry traces of calls, over OTLP gRPC; the standard OTEL_* variables hold for all that is not here."""

    enabled: bool = Field(False, description="send a trace of each sampled call (needs the extra `tracing`)")
    endpoint: str | None = Field(
        None, description="of the collector, http://host:4317; default: OTEL_EXPORTER_OTLP_ENDPOINT"
    )
    sample_ratio: float | None = Field(
        None, ge=0, le=1,
        description="share of the calls that come without a caller's decision; default: OTEL_TRACES_SAMPLER, else all",
    )  # fmt: skip


class Config(_Section):
    """The whole configuration."""

    model: ModelSection = ModelSection()
    stages: StagesSection = StagesSection()
    kv_cache: KvCacheSection = KvCacheSection()
    scheduler: SchedulerSection = SchedulerSection()
    pipelines: PipelinesSection = PipelinesSection()
    server: ServerSection = ServerSection()
    batch: BatchSection = BatchSection()
    security: SecuritySection = SecuritySection()
    tracing: TracingSection = TracingSection()

    def shown(self) -> dict[str, Any]:
        """All fields for people to see: without the password of a URL."""
        data = self.model_dump()
        if self.batch.state_url is not None:
            data["batch"]["state_url"] = without_password(self.batch.state_url)
        return data

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
            f"{source}: {name}: {first['msg']}, got {without_password(repr(first['input']))}",
            field=name,
            source=source,
            value=without_password(str(first["input"])),
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
    if has_password(flags.get("batch.state_url", "")):
        raise ConfigError(
            "PASSWORD_ON_COMMAND_LINE", "--batch.state-url: others on this machine can read the arguments of a process; give "
            "the URL in the configuration file or in STAGELINE_BATCH__STATE_URL, or leave the password to PGPASSWORD or a "
            "password file (PGPASSFILE)", field="batch.state_url",
        )  # fmt: skip
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
