"""What `stageline plan --output k8s` writes for other plans and options, and what it refuses."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from manifest_files import DEFAULT, find, planned, read_folder, read_manifests, serve_config
from schemas import errors_of, serve_config_errors

from gateway import config as configuration
from gateway.app import SPARE_DEPLOYMENT, autoscaling_policy
from gateway.cli import main


def test_demand_decides_within_the_pods_there_may_be(tmp_path: Path, ray_service) -> None:
    """The policy of the file can be made as Serve makes it, is the one `serve` declares, and finds its pods."""

    def policy_of(service: dict[str, Any]) -> dict[str, Any]:
        [application] = serve_config(service)["applications"]
        declared: dict[str, Any] = application["autoscaling_policy"]
        assert declared == autoscaling_policy(configuration.from_mapping(application["args"], source="args"))
        module, _, name = declared["policy_function"].partition(":")
        getattr(importlib.import_module(module), name)(**declared["policy_kwargs"])
        return application["args"]["pipelines"] | declared["policy_kwargs"]

    def bounds(service: dict[str, Any]) -> tuple[int, int, int]:
        group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][1]
        return group["minReplicas"], group["replicas"], group["maxReplicas"]

    assert policy_of(ray_service) == {"min": 1, "max": 1, "sequences": 64}
    assert bounds(ray_service) == (4, 4, 4)
    more = ("--pipelines.max", "3", "--pipelines.target-sequences", "16", "--pipelines.idle-s", "900")
    some = planned(tmp_path / "some", *more, "--stages.spares", "1")
    assert policy_of(find(some, "RayService")) == {"min": 1, "max": 3, "idle_s": 900.0, "target_sequences": 16,
                                                   "sequences": 16}  # fmt: skip
    assert bounds(find(some, "RayService")) == (5, 5, 13)
    assert find(some, "PodDisruptionBudget")["spec"]["minAvailable"] == 4  # one pod at a time, whichever it is
    none = planned(tmp_path / "none", *more, "--pipelines.min", "0")  # batch only: no GPU while there is nothing to do
    assert bounds(find(none, "RayService")) == (0, 4, 12)
    assert find(none, "PodDisruptionBudget")["spec"]["minAvailable"] == 0
    assert all(errors_of(item) == [] for item in (*some, *none))
    assert serve_config_errors(serve_config(find(none, "RayService"))) == []


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--pipelines.min", "2"), "needs pipelines.max"),
        (("--gpu", "a100-80g:8", "--stages", "4", "--pipelines.max", "1"), "make 2 pipelines"),
    ],
)
def test_pipelines_that_cannot_be_write_nothing(capsys, args: tuple[str, ...], says: str) -> None:
    assert main([*DEFAULT, *args]) == 2
    captured = capsys.readouterr()
    assert says in captured.err
    assert captured.out == ""


def test_a_mixed_inventory_has_a_group_a_kind(tmp_path: Path) -> None:
    folder = str(tmp_path)
    args = ["plan", "--model", "qwen2-72b", "--gpu", "l40s-48g:4,a10g-24g:2", "--output", "k8s", "--output-dir", folder]
    assert main(args) == 0
    [service] = read_manifests((tmp_path / "30-rayservice.yaml").read_text())
    assert errors_of(service) == []
    assert serve_config_errors(serve_config(service)) == []
    groups = {g["groupName"]: g["replicas"] for g in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    assert groups == {"gateway": 1, "gpu-l40s-48g": 4, "gpu-a10g-24g": 2}
    kinds = [
        next(iter(d["ray_actor_options"]["resources"])) for d in serve_config(service)["applications"][0]["deployments"]
    ]
    assert sorted(kinds) == ["a10g-24g"] * 2 + ["l40s-48g"] * 4 + ["stageline-gateway"]


def test_a_spare_has_a_replica_and_a_gpu_with_room_for_any_stage(tmp_path: Path, capsys) -> None:
    args = ["plan", "--model", "qwen2-72b", "--gpu", "a10g-24g:2,l40s-48g:4", "--stages.spares", "2"]
    assert main([*args, "--output", "k8s", "--output-dir", str(tmp_path)]) == 0
    capsys.readouterr()
    assert main([*args, "--output", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    kinds = {stage["gpu"]: stage["memory"]["total_bytes"] for stage in plan["stages"]}
    used = [stage["memory"]["total_bytes"] - stage["memory"]["unassigned_bytes"] for stage in plan["stages"]]
    assert plan["num_spares"] == 2
    assert kinds["a10g-24g"] < max(used) <= 0.9 * kinds[plan["spare_gpu"]]
    objects = read_folder(tmp_path)
    service = find(objects, "RayService")
    assert errors_of(service) == []
    assert serve_config_errors(serve_config(service)) == []
    groups = {
        group["groupName"]: (group["minReplicas"], group["replicas"], group["maxReplicas"])
        for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    }
    assert groups == {"gateway": (1, 1, 1), "gpu-a10g-24g": (2, 2, 2), "gpu-l40s-48g": (6, 6, 6)}
    [application] = serve_config(service)["applications"]
    assert application["args"]["stages"]["spares"] == 2
    [spare] = [one for one in application["deployments"] if one["name"] == SPARE_DEPLOYMENT]
    assert spare["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1, "resources": {"l40s-48g": 1}}
    assert find(objects, "PodDisruptionBudget")["spec"]["minAvailable"] == 7


def test_spare_gpus_is_another_name_of_stages_spares(tmp_path: Path) -> None:
    written = [planned(tmp_path / flag, flag, "1") for flag in ("--stages.spares", "--spare-gpus")]
    assert written[0] == written[1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--namespace", "Not_A_Name"), "--namespace"),
        (("--namespace", "x" * 64), "--namespace"),
        (("--image", "a b"), "--image"),
        (("--storage-class", "'"), "--storage-class"),
        (("--spare-gpus", "-1"), "stages.spares"),
        (("--stages.device", "cpu"), "stages.device is decided by the plan"),
        (("--gpu-dollars-per-hour", "2"), "manifests hold no prices"),
        (("--output-dir", "/proc/nothing"), "/proc/nothing"),
    ],
)
def test_wrong_names_write_nothing(capsys, args: tuple[str, ...], says: str) -> None:
    assert main([*DEFAULT, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert says in captured.err


@pytest.mark.parametrize(
    ("name", "product"), [("My_GPU", "P"), ("g" * 37, "P"), ("mine", "two words"), ("mine", "p" * 64)]
)
def test_a_profile_with_names_that_kubernetes_refuses_writes_nothing(tmp_path: Path, capsys, name, product) -> None:
    values = {"memory_mib": 81920, "memory_gb_per_s": 2000, "bf16_tflops": 300, "products": [product]}
    (tmp_path / "gpus.yaml").write_text(yaml.safe_dump({"gpus": {name: values}}))
    args = [*DEFAULT, "--profile", str(tmp_path / "gpus.yaml")]
    args[args.index("a100-80g:4")] = f"{name}:4"
    assert main(args) == 2
    captured = capsys.readouterr()
    assert name in captured.err
    assert captured.out == ""


def test_every_field_reaches_the_application_or_is_refused(tmp_path: Path, capsys) -> None:
    """Nothing that a user sets is dropped in silence, whichever field it is."""
    values = {"device": "cuda", "dtype": "float32", "layers": "0-20,20-40,40-60,60-80", "count": "4", "path": "qwen2-72b",
              "block_size_tokens": "512", "batch_invariant": "true"}  # fmt: skip
    seen = 0
    for section, name, *_ in configuration.fields():
        flag = f"--{section}.{name}".replace("_", "-")
        value = values.get(name, "7")
        folder = tmp_path / f"{section}.{name}"
        code = main([*DEFAULT, flag, value, "--output-dir", str(folder)])
        capsys.readouterr()
        if code == 2:
            assert not folder.exists()
            continue
        [service] = read_manifests((folder / "30-rayservice.yaml").read_text())
        assert serve_config_errors(serve_config(service)) == []
        args = serve_config(service)["applications"][0]["args"]
        [_, model] = read_manifests((folder / "20-config.yaml").read_text())
        if f"{section}.{name}" == "stages.count":
            assert len(args["stages"]["layers"].split(",")) == 4
        elif f"{section}.{name}" == "model.revision":
            assert model["data"]["REVISION"] == value
        elif f"{section}.{name}" != "model.path":
            assert str(args[section][name]).lower() in (value, f"{value}.0"), flag
        seen += 1
    assert seen >= 10


def test_the_service_says_whether_the_door_speaks_tls(manifests, tmp_path: Path) -> None:
    files = (
        "--security.certificate-file",
        "/etc/stageline/door/tls.crt",
        "--security.key-file",
        "/etc/stageline/door/tls.key",
    )
    for objects, protocol in ((manifests, "kubernetes.io/h2c"), (planned(tmp_path, *files), "https")):
        assert find(objects, "Service", "stageline-gateway")["spec"]["ports"][0]["appProtocol"] == protocol


def test_a_plan_that_does_not_fit_has_no_manifests(capsys) -> None:
    args = ["plan", "--model", "qwen2-72b", "--gpu", "l4-24g:4", "--output", "k8s"]
    assert main(args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "would fit" in captured.err
