"""Loading of weights, measured in a process of its own: this one must not load torch."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from gateway.bench.measure import Figures
from stageline.errors import CheckpointError, ConfigError
from stages.checkpoint import open_checkpoint


def loading(model: str | None, layers: str, dtype: str, repeats: int) -> Figures:
    """Bytes a second of loading and of plain reading, cold and warm, and the peak memory. Raises ConfigError for a wrong
    model or layers, CheckpointError."""
    if model is None:
        raise ConfigError("CONFIG_INVALID", "bench load needs --model FOLDER", field="--model")
    checkpoint = open_checkpoint(model)
    if checkpoint.kind != "folder":
        raise ConfigError(
            "CONFIG_INVALID", f"bench load reads a local folder of safetensors, and {model} is none", field="--model"
        )
    num_layers = checkpoint.config.num_layers
    start, end = map(int, layers.split("-")) if re.fullmatch(r"\d{1,4}-\d{1,4}", layers) else (0, num_layers)
    if (layers and f"{start}-{end}" != layers) or not 0 <= start < end <= num_layers:
        raise ConfigError(
            "LAYERS_OUT_OF_RANGE",
            f"--layers {layers} is no range START-END within the model's {num_layers} layers",
            field="--layers",
        )
    spec = {"model": str(checkpoint.path), "layers": f"{start}-{end}", "dtype": dtype, "repeats": repeats}
    command = [sys.executable, "-m", "stages.load_benchmark", json.dumps(spec)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise CheckpointError("LOAD_FAILED", f"the benchmark's process failed: {last}", path=spec["model"])
    figures: Figures = json.loads(done.stdout)
    return {"model": checkpoint.path.name, "dtype": dtype, **figures}
