"""lm-evaluation-harness, the real one, against our server and against its own `hf` backend, on the same float32 weights.

    python -m benchmarks.lm_eval.run --model DIR --lm-eval /path/to/lm_eval [--items 200] [--stages 2] [--out DIR]

`lm_eval` is the command of an environment with `lm_eval[api,hf]==0.4.13`. Both get the same token before a text that nothing
comes before: the model's end token, which both take by themselves where tokenizer.json is there to agree on it. Prints the
metrics of both, how many single results differ and the largest difference of a log-likelihood; exits 1 where a metric of a
choice differs or a log-likelihood by more than TOLERANCE. A run whose results lie in `--out` already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.lm_eval.make_data import write
from benchmarks.report import about
from benchmarks.servers import given_or_serving
from stageline.client import Client

TASKS = ("stdlib_choice", "stdlib_rolling", "stdlib_module")
GENERATED = "stdlib_module"
TOLERANCE = 1e-3  # of a log-likelihood
HERE = Path(__file__).resolve().parent


def main() -> int:
    """Make the data, run both, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder in the Hugging Face layout")
    parser.add_argument("--lm-eval", default="lm_eval", help="the command, of its own environment")
    parser.add_argument("--items", type=int, default=200)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument(
        "--server", nargs=2, metavar=("URL", "GRPC_ADDRESS"), help="one that serves the model in float32"
    )
    parser.add_argument("--concurrent", type=int, default=8)
    parser.add_argument("--out", help="where samples and data are kept; default: a folder that is removed")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(args.out or scratch).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        for task in TASKS:
            shutil.copy(HERE / "tasks" / f"{task}.yaml", folder)
        write(folder, args.items)
        report = measure(args, folder)
    print(json.dumps(report, indent=2))
    return 0 if report["agree"] else 1


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, one after the other."""
    with given_or_serving(args.server, args.model, args.stages, "--dtype", "float32") as (url, address):
        with Client(address) as client:
            model = client.get_model()
        prefix = model.eos_token_ids[0]
        ours = (
            f"model={model.name},base_url={url}/v1/completions,num_concurrent={args.concurrent},max_length=2048,"
            f"custom_prefix_token_id={prefix}"
        )
        evaluate(args.lm_eval, folder, "ours", "local-completions", ours)
    # torch's log_softmax in float32 on CPUs is off by 2e-5 a token, always to the same side: more than TOLERANCE over 60 tokens.
    theirs = (
        f"pretrained={Path(args.model).resolve()},dtype=float32,softmax_dtype=float64,max_length=2048,"
        f"prefix_token_id={prefix}"
    )
    evaluate(args.lm_eval, folder, "hf", "hf", theirs, "--device", "cpu", "--batch_size", "8")
    tasks = {task: compare(folder, task) for task in TASKS}
    return {
        **about("lm-evaluation-harness against our server and against its hf backend, float32", args),
        "agree": all(agrees(found) for found in tasks.values()),
        "tasks": tasks,
    }


def agrees(found: dict[str, Any]) -> bool:
    """Whether a task's accuracy is the same and every log-likelihood is close enough. Perplexities follow from those."""
    ours, theirs = (found["metrics"][label] for label in ("ours", "hf"))
    same = all(ours[name] == theirs[name] for name in ours if name.startswith(("acc", "exact_match")))
    return same and found["max_loglikelihood_difference"] <= TOLERANCE


def evaluate(lm_eval: str, folder: Path, label: str, model: str, model_args: str, *flags: str) -> None:
    """One run of the harness; its results and samples go to `folder`/`label`, unless they are there."""
    if any((folder / label).rglob("results_*.json")):
        return
    command = [
        lm_eval, "run", "--model", model, "--model_args", model_args, "--tasks", *TASKS, "--include_path", str(folder),
        "--output_path", str(folder / label), "--log_samples", *flags,
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    environment.pop("PYTHONPATH", None)  # its environment is its own
    subprocess.run(command, cwd=folder, env=environment, check=True, stdout=sys.stderr)


def compare(folder: Path, task: str) -> dict[str, Any]:
    """Metrics of both, results that differ, and the largest difference of a log-likelihood."""
    ours, theirs = (_samples(folder / label, task) for label in ("ours", "hf"))
    if ours.keys() != theirs.keys():
        raise SystemExit(f"{task}: the two runs have other items")
    differences, num_differ, num_loglikelihoods = [0.0], 0, 0
    for item in ours:
        for one, other in zip(ours[item]["resps"], theirs[item]["resps"], strict=True):
            (mine, *_), (its, *_) = one, other
            if task == GENERATED:
                num_differ += mine != its
                continue
            mine, its = (value if isinstance(value, list) else [value] for value in (mine, its))
            num_loglikelihoods += 1
            differences.append(abs(float(mine[0]) - float(its[0])))
            num_differ += [str(value) for value in mine[1:]] != [str(value) for value in its[1:]]  # is_greedy
    return {
        "items": len(ours),
        "metrics": {label: _metrics(folder / label, task) for label in ("ours", "hf")},
        "loglikelihoods": num_loglikelihoods,
        "max_loglikelihood_difference": max(differences),
        "results_that_differ": num_differ,
    }


def _samples(folder: Path, task: str) -> dict[int, dict[str, Any]]:
    [path] = folder.rglob(f"samples_{task}_*.jsonl")
    return {row["doc_id"]: row for row in map(json.loads, path.read_text().splitlines())}


def _metrics(folder: Path, task: str) -> dict[str, float]:
    [path] = folder.rglob("results_*.json")
    results = json.loads(path.read_text())["results"][task]
    return {name: value for name, value in results.items() if isinstance(value, float) and "stderr" not in name}


if __name__ == "__main__":
    sys.exit(main())
