"""What the package knows by name: the Qwen2 family's configurations and the GPUs that can run a stage."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from stageline.errors import ConfigError
from stages.checkpoint import open_checkpoint
from stages.config import ModelConfig

MIB = 1 << 20
# What the driver, the CUDA context, cuBLAS's workspaces and the kernels take before the first tensor: an assumption, on
# the safe side of the 0.6 GiB that a driver holds back and the 0.5 GiB of a context.
CUDA_RESERVE_BYTES = 3 << 29


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Seconds of one model on a device, instead of rooflines: (tokens of a step, seconds of a layer without attention), (rows,
    seconds of `lm_head` with what follows it), both ascending; attention of one layer for each position read or attended."""

    layer_s: tuple[tuple[int, float], ...]
    head_s: tuple[tuple[int, float], ...]
    kv_token_s: float = 0.0
    attended_token_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One machine that computes all stages, on `cores` processors, one each at a time.

    `busy` are the times while all of its cores compute, which share memory bandwidth (None: the same as alone), `crowded` the
    seconds of a core while twice as many processes compute, which empty each other's caches (None: as `busy`). A stage takes a
    core for `hop_core_s` more a step (receiving, sending), beside its compute thread; what does not belong to stages takes
    `background_cores` all the time.
    """

    cores: int
    busy: Measured | None = None
    crowded: Measured | None = None
    hop_core_s: float = 0.0
    background_cores: float = 0.0

    def load(self, num_computing: int) -> float:
        """0 for one process that computes, 1 for as many as cores, 2 for twice as many and more."""
        if num_computing > self.cores:
            return 1 + min(1.0, (num_computing - self.cores) / self.cores)
        return (num_computing - 1) / (self.cores - 1) if self.cores > 1 else 0.0

    def capacity(self, num_computing: int) -> float:
        """Cores for so many processes."""
        return min(float(num_computing), max(0.5, self.cores - self.background_cores))


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of device. Rates are peaks: bytes and bfloat16 floating point operations a second.

    `step_overhead_s` is time a stage spends on a micro-batch besides reading and computing (0 for a roofline), `reserve_bytes`
    what its process holds before the first tensor.
    `measured`, where set, goes before the rates; it holds for the model that it was measured with. `host`, where set, is what
    all devices share: they are processes of one machine, not devices of their own.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    products: tuple[str, ...] = ()
    source: str = ""
    step_overhead_s: float = 0.0
    reserve_bytes: int = CUDA_RESERVE_BYTES
    measured: Measured | None = None
    host: Host | None = None

    def under_load(self) -> tuple[Gpu, Gpu, Gpu]:
        """The same device alone on its host, while all cores compute, and while twice as many processes do."""
        host, busy = self.host, self
        if host is None:
            return self, self, self
        if host.busy is not None and host.cores > 1:
            busy = replace(self, measured=host.busy)
        return self, busy, busy if host.crowded is None else replace(self, measured=host.crowded)


def host_of(devices: Sequence[Gpu]) -> Host | None:
    """The machine that all of them share, None where each computes for itself. Raises ConfigError where they differ."""
    hosts = {gpu.host for gpu in devices}
    if len(hosts) > 1:
        raise ConfigError(
            "HOSTS_DIFFER",
            "--profile: `host` says that all stages share the cores of one machine: give all devices the same, or none",
            field="profile",
        )
    return next(iter(hosts), None)


def known_models() -> tuple[str, ...]:
    """Names of the configurations that ship with the package."""
    return tuple(_data("models.yaml")["models"])


def hub_id(name: str) -> str:
    """Where the weights of a known model are published."""
    return str(_data("models.yaml")["hub"][name])


def find_model_config(model: str, revision: str | None = None) -> ModelConfig:
    """The configuration of a path, a known name, or a hub id; a local path wins. Reads no weights.

    A folder with nothing but `config.json` will do. Raises CheckpointError for what is not served, ConfigError for a
    name that looks like one of ours and is not.
    """
    config_file = Path(model).expanduser() / "config.json"
    if config_file.is_file():
        return ModelConfig.from_file(config_file)
    known = _data("models.yaml")["models"]
    if not Path(model).expanduser().exists() and model.lower() in known:
        return ModelConfig.from_dict(known[model.lower()], source=model)
    if "/" not in model and not Path(model).expanduser().exists():
        raise ConfigError(
            "UNKNOWN_MODEL",
            f"model {model!r} is neither a path nor a known name; known names: {', '.join(known)}",
            field="model.path",
            value=model,
        )
    return open_checkpoint(model, revision=revision).config


def gpus() -> dict[str, Gpu]:
    """Every known GPU by name."""
    return {name: _gpu(name, values) for name, values in _data("gpus.yaml")["gpus"].items()}


def read_profile(path: str) -> dict[str, Gpu]:
    """Devices of a user's own file, in the format of `gpus.yaml` (measured rates, GPUs that we do not know).

    Raises ConfigError where the file or a value is wrong.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        return {str(name): _gpu(str(name), values) for name, values in data["gpus"].items()}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problem = str(error)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"expected `gpus:` with memory_mib, memory_gb_per_s and bf16_tflops for each name ({error!r})"
    raise ConfigError("PROFILE_INVALID", f"--profile {path}: {problem}", field="profile", path=path)


def parse_inventory(text: str, known: Mapping[str, Gpu]) -> tuple[Gpu, ...]:
    """`a100-80g:4` or `l40s-48g:4,a10g-24g:2` → one entry a GPU, in the order written.

    Raises ConfigError for a name that is not known (it lists those that are), a GPU that cannot run the kernels, a
    count under 1, and a name that stands there twice.
    """
    devices: list[Gpu] = []
    seen: set[str] = set()
    for part in text.split(","):
        name, colon, count = part.strip().partition(":")
        if not re.fullmatch(r"[1-9][0-9]{0,4}", count if colon else "1"):
            raise ConfigError(
                "GPU_COUNT_INVALID",
                f"--gpu {text}: {part!r} must be NAME:COUNT with a count of at least 1, such as a100-80g:4",
                field="gpu",
                value=text,
            )
        if name in seen:
            raise ConfigError("GPU_REPEATED", f"--gpu {text}: {name} is there twice; add the counts up", field="gpu")
        seen.add(name)
        devices += [find_gpu(name, known)] * int(count if colon else 1)
    return tuple(devices)


def find_gpu(name: str, known: Mapping[str, Gpu]) -> Gpu:
    """A GPU by name. Raises ConfigError that lists the known names, or says why a known one cannot serve."""
    if name in known:
        return known[name]
    capability = _data("gpus.yaml")["unsupported"].get(name)
    if capability is not None:
        raise ConfigError(
            "GPU_NOT_SUPPORTED",
            f"GPU {name} has compute capability {capability}; FlashAttention-2 in bfloat16 needs 8.0 or more. "
            f"GPUs that can serve: {', '.join(sorted(known))}",
            field="gpu",
            value=name,
        )
    raise ConfigError(
        "UNKNOWN_GPU",
        f"unknown GPU {name!r}; known: {', '.join(sorted(known))}. Another one can be described in a file: --profile FILE",
        field="gpu",
        value=name,
    )


def gpu_of_product(product: str, known: Mapping[str, Gpu]) -> Gpu | None:
    """The GPU whose product label this is; None where we do not know it."""
    for gpu in known.values():
        if product in gpu.products:
            return gpu
    # MIG slices ("...-MIG-1g.10gb") and time-shared GPUs ("...-SHARED") are other devices than their product: not matched.
    return None


def inventory_text(devices: Sequence[Gpu]) -> str:
    """The inverse of `parse_inventory`."""
    counts: dict[str, int] = {}
    for gpu in devices:
        counts[gpu.name] = counts.get(gpu.name, 0) + 1
    return ",".join(f"{name}:{count}" for name, count in counts.items())


def _gpu(name: str, values: Mapping[str, Any]) -> Gpu:
    unknown = values.keys() - {
        "products", "memory_mib", "memory_gb_per_s", "bf16_tflops", "source", "step_overhead_s", "measured",
        "reserve_mib", "host",
    }  # fmt: skip
    if unknown:
        raise ValueError(f"{name}: unknown keys {', '.join(sorted(unknown))}")
    gpu = Gpu(
        name=name,
        memory_bytes=int(values["memory_mib"] * MIB),
        memory_bytes_per_s=float(values["memory_gb_per_s"]) * 1e9,
        flops_per_s=float(values["bf16_tflops"]) * 1e12,
        products=tuple(values.get("products", ())),
        source=str(values.get("source", "")),
        step_overhead_s=float(values.get("step_overhead_s", 0.0)),
        reserve_bytes=int(values.get("reserve_mib", CUDA_RESERVE_BYTES / MIB) * MIB),
        measured=_measured(values["measured"]) if "measured" in values else None,
        host=_host(values["host"]) if "host" in values else None,
    )
    if (
        min(gpu.memory_bytes, gpu.memory_bytes_per_s, gpu.flops_per_s) <= 0
        or min(gpu.step_overhead_s, gpu.reserve_bytes) < 0
    ):
        raise ValueError(f"{name}: memory and rates must be over 0, step_overhead_s and reserve_mib not below")
    return gpu


def _host(values: Mapping[str, Any]) -> Host:
    numbers = {name: float(values.get(name, 0.0)) for name in ("hop_core_s", "background_cores")}
    if values.keys() - {"cores", "busy", "crowded", *numbers} or int(values["cores"]) < 1 or min(numbers.values()) < 0:
        raise ValueError("host has cores, at least 1, busy, crowded, hop_core_s and background_cores, none below 0")
    busy, crowded = (_measured(values[name]) if name in values else None for name in ("busy", "crowded"))
    return Host(cores=int(values["cores"]), busy=busy, crowded=crowded, **numbers)


def _measured(values: Mapping[str, Any]) -> Measured:
    def table(name: str) -> tuple[tuple[int, float], ...]:
        points = tuple(sorted((int(size), float(seconds)) for size, seconds in values[name].items()))
        if not points or min(min(point) for point in points) <= 0:
            raise ValueError(f"measured.{name}: sizes and seconds must be over 0")
        return points

    rest = {name: float(values.get(name, 0.0)) for name in ("kv_token_s", "attended_token_s")}
    if values.keys() - {"layer_s", "head_s", *rest} or min(rest.values()) < 0:
        raise ValueError("measured has layer_s, head_s, kv_token_s and attended_token_s, none below 0")
    return Measured(layer_s=table("layer_s"), head_s=table("head_s"), **rest)


@functools.cache
def _data(file_name: str) -> dict[str, Any]:
    text = resources.files("gateway.planner").joinpath(file_name).read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    return data
