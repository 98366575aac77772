"""What `docker-compose.yml` promises: ports, pinned images, little privilege, a token, and settings that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from stack_files import BACKENDS, COMPOSE_FILES, REPOSITORY, compose, dockerfile, services

from core.config import ApiSettings, iter_settings, load_settings
from core.errors import ConfigError
from core.security.token import check_bind, resolve_token

MONITORING = REPOSITORY / "monitoring"
needs_monitoring = pytest.mark.skipif(not MONITORING.exists(), reason="monitoring/ is not in this version")
TOKEN = "a-token-of-more-than-sixteen-characters"
PUBLIC = "5030"
OTHER_VARIABLES = {"HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY"}
"""Of the server's variables, those that are not VRAMancer's own."""


def published(service: dict[str, object]) -> list[str]:
    ports = service.get("ports", [])
    assert isinstance(ports, list)
    return [str(port) for port in ports]


def variables() -> dict[str, str | None]:
    return dict(services()["vramancer"]["environment"])


def test_the_promised_ports_are_published_and_only_the_api_to_other_machines() -> None:
    ports = {name: published(service) for name, service in services().items()}
    assert ports == {
        "vramancer": ["5030:5030", "127.0.0.1:9108:9108"],
        "prometheus": ["127.0.0.1:9090:9090"],
        "alertmanager": ["127.0.0.1:9093:9093"],
        "grafana": ["127.0.0.1:3000:3000"],
    }
    assert [port for each in ports.values() for port in each if not port.startswith("127.0.0.1:")] == [f"{PUBLIC}:5030"]
    assert not [service for service in compose(COMPOSE_FILES[1])["services"].values() if "ports" in service]


def test_every_service_has_as_little_privilege_as_it_needs() -> None:
    for name, service in services().items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not {"privileged", "cap_add", "network_mode", "pid", "ipc", "user"} & set(service), name
        assert service["restart"] == "unless-stopped", name
        assert not any("docker.sock" in str(volume) for volume in service["volumes"]), name


def test_images_of_others_are_pinned_to_a_release() -> None:
    images = {name: service["image"] for name, service in services().items() if "image" in service}
    assert set(images) == {"prometheus", "alertmanager", "grafana"}, "the server's is built here"
    for image in images.values():
        assert re.fullmatch(r"[\w/-]+:v?\d+\.\d+\.\d+(@sha256:[0-9a-f]{64})?", image), image


def test_each_backend_has_an_image_of_its_own_and_its_devices() -> None:
    devices = compose(COMPOSE_FILES[1])["services"]
    assert {name: service["image"] for name, service in devices.items()} == {
        name: f"vramancer:{name}" for name in BACKENDS
    }
    reserved = devices["cuda"]["deploy"]["resources"]["reservations"]["devices"]
    assert reserved == [{"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}]
    assert devices["rocm"]["devices"] == ["/dev/kfd", "/dev/dri"]
    assert set(devices["cpu"]) == {"image"}


def test_the_server_is_started_with_a_token_or_not_at_all() -> None:
    text = variables()["VRM_API_TOKEN"]
    assert text is not None and re.fullmatch(r"\$\{VRM_API_TOKEN:\?.*\.env.*\}", text), text


def test_the_servers_variables_are_known_to_it() -> None:
    known = {info.env for info in iter_settings()}
    assert set(variables()) <= known | OTHER_VARIABLES
    assert set(dockerfile()[1][-1].environment) & known, "the Dockerfile's are read"
    assert {name for name in dockerfile()[1][-1].environment if name.startswith("VRM_")} <= known


def test_the_settings_that_most_people_look_for_are_handed_on() -> None:
    """But for a cluster's: its machines meet on a network that a container is not part of."""
    common = {info.env for info in iter_settings() if info.common and not info.key.startswith("cluster.")}
    assert common <= set(variables())


def environment(token: str | None) -> dict[str, str]:
    """What the server's process sees: the image's variables, then those of Compose."""
    given = {name: value for name, value in variables().items() if value is not None}
    given["VRM_PRODUCTION"] = re.sub(r"^\$\{VRM_PRODUCTION:-(.*)\}$", r"\1", given["VRM_PRODUCTION"])
    del given["VRM_API_TOKEN"]
    image = {name: value for name, value in dockerfile()[1][-1].environment.items() if "$" not in value}
    return {**image, **given, **({} if token is None else {"VRM_API_TOKEN": token})}


def test_the_server_takes_these_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no config.yaml is
    settings = load_settings(environ=environment(TOKEN))
    assert (settings.api.host, settings.api.port, settings.api.metrics_port) == ("0.0.0.0", 5030, 9108)
    assert "metrics_port" in settings.api.model_fields_set, "it must not move to another port"
    assert settings.security.production
    check_bind(settings)
    assert resolve_token(settings) == (TOKEN, False, None)


def test_the_server_refuses_to_listen_there_without_a_good_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="VRM_API_TOKEN"):
        check_bind(load_settings(environ=environment(None)))
    with pytest.raises(ConfigError, match="at least 16"):
        resolve_token(load_settings(environ=environment("short")))


def test_running_requests_have_time_to_finish() -> None:
    grace = services()["vramancer"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > ApiSettings().drain_timeout_s
    assert services()["vramancer"]["init"] is True, "a process without handlers for signals is not stopped as number 1"


def test_what_others_depend_on_says_whether_it_is_well() -> None:
    for name, service in services().items():
        for other, wanted in service.get("depends_on", {}).items():
            assert other in services(), name
            if wanted["condition"] == "service_healthy":
                assert services()[other]["healthcheck"]["test"], other
        port = published(service)[0].split(":")[-1]
        assert name == "vramancer" or f":{port}/" in service["healthcheck"]["test"][-1], "the image has none of its own"
    assert "vramancer" not in services()["prometheus"].get("depends_on", {}), "it has to tell that the server is down"


def test_mounts_lead_to_what_is_there() -> None:
    named = set(compose()["volumes"])
    for name, service in services().items():
        for mount in service["volumes"]:
            source, target = mount.removesuffix(":ro").rsplit(":", 1)
            assert target.startswith("/"), mount
            if source.startswith("./"):
                assert mount.endswith(":ro"), f"{name}: files of the repository are only read"
                path = REPOSITORY / source
                assert path.exists() or (path.is_relative_to(MONITORING) and not MONITORING.exists()), mount
            else:
                assert source in named or source == "${VRAMANCER_MODELS:-models}", mount
    used = {mount.split(":")[0] for service in services().values() for mount in service["volumes"]} | {"models"}
    assert named <= used


def test_the_images_volumes_are_kept() -> None:
    targets = {mount.rsplit(":", 1)[1] for mount in services()["vramancer"]["volumes"]}
    assert targets == {"/models", "/cache", "/state"}
    assert all(f'"{target}"' in dockerfile()[1][-1].last("VOLUME") for target in targets)


@needs_monitoring
def test_prometheus_asks_the_server_and_alertmanager_where_they_are() -> None:
    mounts = dict(reversed(mount.removesuffix(":ro").rsplit(":", 1)) for mount in services()["prometheus"]["volumes"])
    folder = REPOSITORY / mounts["/etc/prometheus/targets"]
    targets = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))[0]["targets"] for path in folder.iterdir()}
    assert targets == {
        "vramancer": [f"vramancer:{variables()['VRM_METRICS_PORT']}"],
        "alertmanager": ["alertmanager:9093"],
    }


@needs_monitoring
def test_grafana_finds_the_boards_where_they_are_mounted() -> None:
    folder = MONITORING / "grafana" / "provisioning"
    providers = [
        provider
        for path in (folder / "dashboards").glob("*.y*ml")
        for provider in yaml.safe_load(path.read_text(encoding="utf-8"))["providers"]
    ]
    mounted = {mount.split(":")[1] for mount in services()["grafana"]["volumes"]}
    assert providers and {provider["options"]["path"] for provider in providers} <= mounted
    sources = [
        source
        for path in (folder / "datasources").glob("*.y*ml")
        for source in yaml.safe_load(path.read_text(encoding="utf-8"))["datasources"]
    ]
    assert "http://prometheus:9090" in {source["url"] for source in sources}
