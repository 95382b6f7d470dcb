"""Cluster files parse, fit the schemas that can be had, and name only what exists in the code."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import re
import shlex
import zipfile
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

REPO = Path(__file__).resolve().parents[2]
CLUSTER = REPO / "cluster"
RAY_UP = sorted([*CLUSTER.glob("aws/*.yaml"), *CLUSTER.glob("gcp/*.yaml")])
KUBERAY = sorted(CLUSTER.glob("kuberay/*.yaml"))
DOCKERFILE = (CLUSTER / "Dockerfile").read_text("utf-8")
PINS = dict(line.split("==") for line in (REPO / "constraints.txt").read_text("utf-8").splitlines()
            if "==" in line and not line.startswith("#"))


def parsed(path: Path) -> dict[str, Any]:
    value = yaml.safe_load(path.read_text("utf-8"))
    assert isinstance(value, dict)
    return value


def ray_cluster_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    key = {"RayCluster": None, "RayJob": "rayClusterSpec", "RayService": "rayClusterConfig"}[manifest["kind"]]
    spec: dict[str, Any] = manifest["spec"] if key is None else manifest["spec"][key]
    return spec


def containers(spec: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_there_is_a_file_for_every_way() -> None:
    assert {path.parent.name for path in RAY_UP} == {"aws", "gcp"}
    assert {path.stem for path in KUBERAY} == {"raycluster", "rayjob", "rayservice"}


# --- ray up ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.parent.name)
def test_ray_up_files_fit_rays_own_schema(path: Path) -> None:
    ray_files = importlib.metadata.distribution("ray").locate_file("ray/autoscaler")
    schema = json.loads((Path(str(ray_files)) / "ray-schema.json").read_text("utf-8"))
    jsonschema.validate(parsed(path), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**parsed(path), "max_worker": 3}, schema)


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.parent.name)
def test_ray_up_files_are_closed_and_have_gpus(path: Path) -> None:
    config = parsed(path)
    assert config["head_node_type"] in config["available_node_types"]
    gpu = config["available_node_types"]["gpu_worker"]
    assert gpu["min_workers"] == 0
    assert gpu["max_workers"] > 0
    assert {"guestAccelerators", "InstanceType"} & set(gpu["node_config"])
    starts = [line for key in ("head_start_ray_commands", "worker_start_ray_commands") for line in config[key]
              if "ray start" in line]
    assert len(starts) == 2
    assert all("RAY_AUTH_MODE=token" in line for line in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "/home/ray/.ray/auth_token" in config["file_mounts"]
    assert config["docker"]["image"].startswith("recsys-ray:")


# --- KubeRay --------------------------------------------------------------------------------------
@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_kuberay_manifests_have_the_structure_of_their_kind(path: Path) -> None:
    manifest = parsed(path)
    assert manifest["apiVersion"] == "ray.io/v1"
    assert manifest["kind"] == {"raycluster": "RayCluster", "rayjob": "RayJob", "rayservice": "RayService"}[path.stem]
    assert set(manifest["metadata"]) & {"name", "generateName"}
    spec = ray_cluster_spec(manifest)
    assert spec["rayVersion"] == PINS["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    for group in spec["workerGroupSpecs"]:
        assert group["groupName"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for container in containers(spec):
        assert container["resources"]["limits"] == container["resources"]["requests"], "Ray sizes itself by the limits"
        assert container["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("path", KUBERAY, ids=lambda path: path.stem)
def test_volumes_mounts_and_gpu_images_belong_together(path: Path) -> None:
    spec = ray_cluster_spec(parsed(path))
    for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
        pod = group["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            has_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
            assert has_gpu == container["image"].endswith("-gpu")


def test_ray_start_parameters_are_strings() -> None:
    for path in KUBERAY:
        spec = ray_cluster_spec(parsed(path))
        for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]:
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_the_job_manifest_runs_a_job_that_exists_with_keys_that_exist() -> None:
    from recsys_ray.config import load_config

    manifest = parsed(CLUSTER / "kuberay" / "rayjob.yaml")
    words = shlex.split(manifest["spec"]["entrypoint"])
    assert words[0] == "python"
    script, config = (Path(word) for word in (words[1], words[words.index("--config") + 1]))
    inside = Path("/home/ray/app")
    assert f"WORKDIR {inside}" in DOCKERFILE
    source = REPO / script.relative_to(inside)
    assert source.is_file()
    match = re.search(r"from (recsys_ray[\w.]*) import (\w+) as JobConfig", source.read_text("utf-8"))
    assert match is not None
    job_config = getattr(importlib.import_module(match[1]), match[2])
    overrides = [word for word in words[2:] if "=" in word]
    assert overrides
    load_config(job_config, REPO / config.relative_to(inside), overrides)
    yaml.safe_load(manifest["spec"]["runtimeEnvYAML"])


def test_the_service_manifest_builds_our_application_from_its_arguments() -> None:
    from ray.serve.schema import ServeDeploySchema

    from recsys_ray.serving.config import ServeConfig

    manifest = parsed(CLUSTER / "kuberay" / "rayservice.yaml")
    serve_config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    schema = ServeDeploySchema.model_validate(serve_config)
    application = schema.applications[0]
    module, name = application.import_path.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    config = ServeConfig.model_validate(application.args)
    assert config.host == schema.http_options.host, "the key is asked for by what the proxies listen on"
    assert config.port == schema.http_options.port
    for container in containers(ray_cluster_spec(manifest)):
        assert [one["name"] for one in container["env"]] == ["RECSYS_API_KEY"]


def test_the_service_has_room_for_its_replicas() -> None:
    from recsys_ray.serving.config import ServeConfig

    manifest = parsed(CLUSTER / "kuberay" / "rayservice.yaml")
    config = ServeConfig.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"])["applications"][0]["args"])
    stages = config.stages
    asked = [(1, stages.gateway), (1, stages.encoder), (config.shards, stages.shard)]
    needed = sum(times * stage.replicas * stage.cpus for times, stage in asked)
    workers = ray_cluster_spec(manifest)["workerGroupSpecs"]
    room = sum(group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
               for group in workers)
    assert needed <= room


# --- image, runtime environment, page -------------------------------------------------------------
def test_the_image_is_built_from_the_pins() -> None:
    assert re.search(r"^FROM python:3\.11", DOCKERFILE, re.M)
    assert "-c constraints.txt" in DOCKERFILE
    assert not re.search(r"[\w-]+==\d", DOCKERFILE.replace("faiss-cpu==/d", "")), "versions belong into constraints.txt"
    for source in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.M):
        for name in source.split():
            assert (REPO / name).exists(), f"COPY {name}"
    assert re.search(r"^USER ray$", DOCKERFILE, re.M)
    assert "RAY_AUTH_MODE=token" in DOCKERFILE
    assert not re.search(r"RAY_AUTH_TOKEN=|API_KEY=", DOCKERFILE)


def test_all_files_name_the_image_of_this_version() -> None:
    version = re.search(r'^version = "([^"]+)"', (REPO / "pyproject.toml").read_text("utf-8"), re.M)
    assert version is not None
    for path in [*RAY_UP, *KUBERAY]:
        images = re.findall(r"image: (\S+)", path.read_text("utf-8"))
        assert images
        assert all(image in (f"recsys-ray:{version[1]}", f"recsys-ray:{version[1]}-gpu") for image in images)


def test_the_upload_leaves_out_what_is_large_or_private(tmp_path: Path) -> None:
    """Through Ray's own packaging, with a directory laid out like a working copy."""
    from ray._private.runtime_env.packaging import create_package

    runtime_env = parsed(CLUSTER / "runtime_env.yaml")
    assert set(runtime_env) <= {"excludes", "env_vars", "pip", "config"}
    tree = tmp_path / "copy"
    for name in (".git/objects/a", ".venv/lib/b.py", "runs/demo/c", ".cluster/token", ".ruff_cache/d", "jobs/embed.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    (tree / ".rayignore").write_text((REPO / ".rayignore").read_text("utf-8"))
    target = tmp_path / "package.zip"
    create_package(str(tree), target, include_gitignore=True, excludes=runtime_env["excludes"])
    names = zipfile.ZipFile(target).namelist()
    assert any(name.endswith("jobs/embed.py") for name in names)
    assert not [name for name in names if re.search(r"\.git/|\.venv|runs/|\.cluster|ruff_cache", name)]


def test_the_page_names_files_that_exist() -> None:
    page = (REPO / "docs" / "cluster.md").read_text("utf-8")
    linked = re.findall(r"\]\((\.\./[^)]+)\)", page)
    linked += ["../" + name for name in re.findall(r"(cluster/\S+\.yaml)", page)]
    assert linked
    for name in linked:
        assert (REPO / "docs" / name).exists(), name
