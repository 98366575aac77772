"""Where the token comes from, and what is refused as one."""

from __future__ import annotations

import os
import stat
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from core.config import Settings, load_settings
from core.errors import AuthenticationError, ConfigError, PermissionDeniedError
from core.security.access import ADMIN, Policy, Principal, authorize, bearer_token, check_token, policy, policy_of
from core.security.token import check_bind, is_loopback, resolve_cluster_token, resolve_token

MakeSettings = Callable[..., Settings]


@pytest.fixture
def make_settings(tmp_path: Path) -> MakeSettings:
    config_file = tmp_path / "config.yaml"
    config_file.touch()

    def make(**environ: str) -> Settings:
        return load_settings(config_file, {"HOME": str(tmp_path), **environ})

    return make


def test_a_token_in_the_settings_is_used_as_it_is(make_settings: MakeSettings) -> None:
    assert resolve_token(make_settings(VRM_API_TOKEN="short")) == ("short", False, None)


def test_a_generated_token_is_stored_for_its_owner_and_kept(make_settings: MakeSettings, tmp_path: Path) -> None:
    token, created, path = resolve_token(make_settings())
    assert created
    assert path == tmp_path / ".local/state/vramancer/api-token"
    assert len(token) >= 43
    assert resolve_token(make_settings()) == (token, False, path)
    assert [item.name for item in path.parent.iterdir()] == ["api-token"]
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_file_may_be_elsewhere(make_settings: MakeSettings, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "token"
    assert resolve_token(make_settings(VRM_API_TOKEN_FILE=str(path)))[1:] == (True, path)


def test_processes_that_start_together_agree(make_settings: MakeSettings) -> None:
    results: list[Any] = []
    settings = make_settings()
    threads = [threading.Thread(target=lambda: results.append(resolve_token(settings))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({token for token, _, _ in results}) == 1
    assert sum(created for _, created, _ in results) == 1


def test_who_comes_second_takes_the_token_of_the_first(
    make_settings: MakeSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, link = make_settings(), os.link

    def beaten(source: str, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        resolve_token(settings)  # another process, between a look at the place and the writing there
        link(source, target)

    monkeypatch.setattr(os, "link", beaten)
    token, created, path = resolve_token(settings)
    assert not created and path is not None
    assert path.read_text().strip() == token and resolve_token(settings) == (token, False, path)
    assert [item.name for item in path.parent.iterdir()] == ["api-token"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions")
def test_a_file_that_others_may_read_is_refused(make_settings: MakeSettings) -> None:
    _, _, path = resolve_token(make_settings())
    assert path is not None
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        resolve_token(make_settings())


def test_an_empty_file_is_refused(make_settings: MakeSettings) -> None:
    _, _, path = resolve_token(make_settings())
    assert path is not None
    path.write_text("\n")
    with pytest.raises(ConfigError, match="not empty"):
        resolve_token(make_settings())


def test_a_place_that_cannot_be_written_is_refused(make_settings: MakeSettings, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="VRM_API_TOKEN"):
        resolve_token(make_settings(VRM_API_TOKEN_FILE=str(tmp_path / "file" / "token")))


def test_a_folder_that_is_there_is_used_as_it_is(make_settings: MakeSettings, tmp_path: Path) -> None:
    assert resolve_token(make_settings(VRM_API_TOKEN_FILE=str(tmp_path / "token")))[1]


@pytest.mark.parametrize("what", ["a folder", "no text"])
def test_what_cannot_be_read_is_named(make_settings: MakeSettings, tmp_path: Path, what: str) -> None:
    path = tmp_path / "token"
    if what == "a folder":
        path.mkdir(mode=0o700)
    else:
        path.write_bytes(b"\xff" * 40)
        path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"token: the API token cannot be read"):
        resolve_token(make_settings(VRM_API_TOKEN_FILE=str(path)))


@pytest.mark.parametrize("token", ["with space", "umläut", "tab\t"])
def test_a_token_that_no_header_can_carry_is_refused(make_settings: MakeSettings, token: str) -> None:
    with pytest.raises(ConfigError, match="ASCII"):
        resolve_token(make_settings(VRM_API_TOKEN=token))


def test_production_refuses_a_weak_token(make_settings: MakeSettings) -> None:
    with pytest.raises(ConfigError, match="16 characters"):
        resolve_token(make_settings(VRM_API_TOKEN="x" * 15, VRM_PRODUCTION="1"))
    assert resolve_token(make_settings(VRM_API_TOKEN="x" * 16, VRM_PRODUCTION="1"))[0] == "x" * 16
    assert resolve_token(make_settings(VRM_PRODUCTION="1"))[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "myhost"])
def test_other_machines_need_a_token_that_was_chosen(make_settings: MakeSettings, host: str) -> None:
    with pytest.raises(ConfigError, match="VRM_API_TOKEN"):
        check_bind(make_settings(VRM_API_HOST=host))
    check_bind(make_settings(VRM_API_HOST=host, VRM_API_TOKEN="x"))
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "localhost", "::1", "[::1]"])
def test_loopback_needs_none(make_settings: MakeSettings, host: str) -> None:
    check_bind(make_settings(VRM_API_HOST=host))


def test_check_token() -> None:
    check_token((None, "right"), "right")
    check_token(("wrong", "right"), "right")
    with pytest.raises(AuthenticationError) as missing:
        check_token((None, ""), "right")
    assert missing.value.error_code == "missing_api_key"
    for wrong in ("wrong", "right ", "\udcff", "é"):
        with pytest.raises(AuthenticationError) as refused:
            check_token((wrong,), "right")
        assert refused.value.error_code == "invalid_api_key"


@pytest.mark.parametrize(
    ("header", "token"),
    [
        (None, None),
        ("", None),
        ("Bearer", None),
        ("Bearer  x ", "x"),
        ("BEARER x", "x"),
        ("Basic x", None),
        ("x", None),
    ],
)
def test_bearer_token(header: str | None, token: str | None) -> None:
    assert bearer_token(header) == token


def test_a_route_is_public_or_for_a_role() -> None:
    for wrong in ({}, {"role": "viewer", "public": True}):
        with pytest.raises(ValueError, match="either public or for a role"):
            policy(**wrong)

    @policy("operator", mutates=True)
    def route() -> None: ...

    assert policy_of(route) == Policy("operator", mutates=True)
    assert policy_of(policy(public=True)(lambda: None)) == Policy(None)
    assert policy_of(lambda: None) is None


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS"])
@pytest.mark.parametrize("declared", [None, Policy(None), Policy("viewer"), Policy("user"), Policy("operator", True)])
def test_authorize(declared: Policy | None, method: str, read_only: bool) -> None:
    """What matches no route is private, and a change unless it only reads; preflights are public."""

    def ask(token: str) -> Principal | None:
        return authorize(declared, method, (token, None), "right", read_only=read_only)

    if method == "OPTIONS" or declared == Policy(None):
        assert ask("wrong") is None
    else:
        with pytest.raises(AuthenticationError):
            ask("wrong")
    if read_only and method != "OPTIONS" and (declared.mutates if declared is not None else method == "POST"):
        with pytest.raises(PermissionDeniedError):
            ask("right")
    else:
        assert ask("right") == ADMIN


def test_a_cluster_token_is_made_by_a_master_and_found_by_its_workers(
    make_settings: MakeSettings, tmp_path: Path
) -> None:
    path = tmp_path / ".local/state/vramancer/cluster-token"
    with pytest.raises(ConfigError, match="no cluster token: set VRM_CLUSTER_TOKEN"):
        resolve_cluster_token(make_settings(), create=False)
    assert not path.exists()
    made = resolve_cluster_token(make_settings(), create=True)
    assert (made.created, made.path, len(made.value) >= 43) == (True, path, True)
    if sys.platform != "win32":
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert resolve_cluster_token(make_settings(), create=False) == (made.value, False, path)
    assert resolve_cluster_token(make_settings(), create=True) == (made.value, False, path)
    assert resolve_token(make_settings()).value != made.value


def test_a_cluster_token_is_long(make_settings: MakeSettings, tmp_path: Path) -> None:
    good, short = "c" * 16, "c" * 15
    assert resolve_cluster_token(make_settings(VRM_CLUSTER_TOKEN=good), create=False) == (good, False, None)
    with pytest.raises(ConfigError, match=r"cluster.token \(VRM_CLUSTER_TOKEN\): .* 16 characters, got 15"):
        resolve_cluster_token(make_settings(VRM_CLUSTER_TOKEN=short), create=False)
    kept = tmp_path / "kept"
    kept.write_text(short)
    kept.chmod(0o600)
    with pytest.raises(ConfigError, match=r"kept: .* 16 characters"):
        resolve_cluster_token(make_settings(VRM_CLUSTER_TOKEN_FILE=str(kept)), create=True)
