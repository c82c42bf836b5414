"""What one stage is asked to be, checked before anything heavy is loaded. No torch here."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from stageline.errors import ConfigError
from stages.config_values import MAX_LAYERS
from stages.logs import LOG_FORMATS
from stages.partition import LayerRange

DTYPE_NAMES = ("float32", "bfloat16")
QUANTIZATIONS = ("int8", "int4")
HIDDEN_DTYPES = ("fp8", "int8")
DEVICES = ("cpu", "cuda")
DEFAULT_SHARED_MEMORY_BYTES = 128 << 20  # four payloads of 2,048 tokens of the 72B
DEFAULT_QUEUE_DEPTH_STEPS = 32
_MAX_INT32 = (1 << 31) - 1  # slots and block ids travel as int32
_INTEGERS = (
    ("start_layer", 0, MAX_LAYERS),
    ("end_layer", 1, MAX_LAYERS),
    ("block_size_tokens", 1, 1 << 16),
    ("kv_memory_bytes", 1, 1 << 50),
    ("num_blocks", 2, _MAX_INT32),
    ("num_threads", 1, 1024),
    ("port", 0, 65535),
    ("queue_depth_steps", 1, 1 << 16),
    ("shared_memory_bytes", 0, 1 << 40),
)
ACCESS_FIELDS = ("certificate_file", "key_file", "ca_file", "server_name", "token_file")  # of StageAccess
_OPTIONAL = ("start_layer", "end_layer", "kv_memory_bytes", "num_blocks", "num_threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """What a stage is, in plain values, so that it can cross process borders.

    Raises ConfigError where a value cannot be right on any machine; what depends on the machine or the checkpoint is
    checked when the stage starts. After `stall_timeout_s` in one step a replica reports itself unhealthy, so that it is
    replaced; the gateway gives up on it earlier (pipelines.stall_timeout_s). A replica that is to stop goes on for its owner for
    at most `drain_timeout_s`. `stages.server.access.StageAccess` says what the
    files are. Without layers (both None) it is an unbound spare, which a gateway binds to a stage when it needs one.
    `shared_memory_bytes` bounds the ring to a next stage on the same host; 0: none.
    """

    model: str
    start_layer: int | None
    end_layer: int | None
    dtype: str = "bfloat16"
    device: str = "cpu"
    batch_invariant: bool = False
    debug_kv: bool = False
    cuda_graphs: bool = False
    quantization: str | None = None
    hidden_dtype: str | None = None
    block_size_tokens: int = 16
    kv_memory_bytes: int | None = None
    num_blocks: int | None = None
    num_threads: int | None = None
    host: str = "127.0.0.1"
    port: int = 0
    revision: str | None = None
    queue_depth_steps: int = DEFAULT_QUEUE_DEPTH_STEPS
    stall_timeout_s: float = 120.0
    drain_timeout_s: float = 20.0
    certificate_file: str | None = None
    key_file: str | None = None
    ca_file: str | None = None
    server_name: str | None = None
    token_file: str | None = None
    shared_memory_bytes: int = DEFAULT_SHARED_MEMORY_BYTES
    log_format: str = "text"

    def __post_init__(self) -> None:
        for name in ("model", "host"):
            value = getattr(self, name)
            self._check(name, isinstance(value, str) and value.strip() != "", "text that is not empty")
        for name in ("revision", *ACCESS_FIELDS):
            value = getattr(self, name)
            self._check(name, value is None or isinstance(value, str), "text")
        self._check("dtype", self.dtype in DTYPE_NAMES, f"one of {', '.join(DTYPE_NAMES)}")
        self._check("device", self.device in DEVICES, f"one of {', '.join(DEVICES)}")
        self._check("log_format", self.log_format in LOG_FORMATS, f"one of {', '.join(LOG_FORMATS)}")
        fits = self.quantization is None or self.quantization in QUANTIZATIONS
        self._check("quantization", fits, f"one of {', '.join(QUANTIZATIONS)}, or not set")
        fits = self.hidden_dtype is None or self.hidden_dtype in HIDDEN_DTYPES
        self._check("hidden_dtype", fits, f"one of {', '.join(HIDDEN_DTYPES)}, or not set")
        for name in ("batch_invariant", "debug_kv", "cuda_graphs"):
            self._check(name, isinstance(getattr(self, name), bool), "true or false")
        recorded = not self.cuda_graphs or (self.device == "cuda" and not self.batch_invariant)
        self._check("cuda_graphs", recorded, "false on the CPU and in batch-invariant mode")
        seconds = self.stall_timeout_s
        self._check("stall_timeout_s", isinstance(seconds, int | float) and seconds > 0, "a number of seconds over 0")
        seconds = self.drain_timeout_s
        self._check(
            "drain_timeout_s", isinstance(seconds, int | float) and seconds >= 0, "a number of seconds, 0 or more"
        )
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is None and name in _OPTIONAL:
                continue
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            self._check(name, is_integer and low <= value <= high, f"an integer in [{low}, {high}]")
        together = (self.start_layer is None) == (self.end_layer is None)
        self._check("start_layer", together, "set where end_layer is, and only there")
        if self.start_layer is not None and self.end_layer is not None:
            self._check("end_layer", self.end_layer > self.start_layer, f"above start_layer ({self.start_layer})")

    @property
    def layers(self) -> LayerRange | None:
        """The stage it holds from its start; None for an unbound spare."""
        if self.start_layer is None or self.end_layer is None:
            return None
        return LayerRange(self.start_layer, self.end_layer)

    def to_dict(self) -> dict[str, Any]:
        """For another process."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> StageSpec:
        """Raises ConfigError for an unknown field."""
        unknown = data.keys() - {field.name for field in fields(cls)}
        if unknown:
            raise ConfigError("CONFIG_UNKNOWN_KEY", f"stage specification: unknown fields {', '.join(sorted(unknown))}")
        missing = {"model", "start_layer", "end_layer"} - data.keys()
        if missing:
            raise ConfigError("CONFIG_KEY_MISSING", f"stage specification: missing fields {', '.join(sorted(missing))}")
        return cls(**data)

    def _check(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            value = getattr(self, name)
            raise ConfigError(
                "PORT_OUT_OF_RANGE" if name == "port" else "CONFIG_INVALID",
                f"{name} must be {expected}, got {value!r}",
                field=name,
                value=repr(value),
                expected=expected,
            )
