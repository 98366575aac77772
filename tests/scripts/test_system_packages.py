"""The script that installs what tests want from Debian: it never fails, and says what it leaves out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "system_packages"
NEEDED = ("bash", "env", "cat", "mktemp", "rm", "tail")

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a script for bash")


def machine(folder: Path, **programs: str) -> Path:
    """A folder with what the script calls, and `programs` by name: lines of shell."""
    for name in NEEDED:
        found = next(Path(place) / name for place in ("/bin", "/usr/bin") if (Path(place) / name).exists())
        (folder / name).symlink_to(found)
    for name, lines in programs.items():
        (folder / name.replace("_", "-")).write_text(f"#!{folder}/bash\n{lines}\n")
        (folder / name.replace("_", "-")).chmod(0o755)
    return folder


def run(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(path), "CALLS": str(path / "calls")}
    command = [str(path / "bash"), str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_what_is_there_is_left_alone(tmp_path: Path) -> None:
    path = machine(tmp_path, promtool="", amtool="", chromium="", apt_get="exit 9")
    done = run(path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    done = run(machine(tmp_path, amtool=""), "--list")
    assert (done.returncode, done.stdout.split()) == (0, ["prometheus", "chromium"])


def test_without_apt_get_all_is_left_out(tmp_path: Path) -> None:
    done = run(machine(tmp_path, id="echo 0"))
    assert done.returncode == 0
    assert "no apt-get: prometheus prometheus-alertmanager chromium" in done.stderr


def test_without_root_all_is_left_out(tmp_path: Path) -> None:
    done = run(machine(tmp_path, id="echo 1000", sudo="exit 1", apt_get="exit 9"))
    assert done.returncode == 0
    assert "takes root: prometheus prometheus-alertmanager chromium" in done.stderr


def test_packages_are_installed_without_their_services(tmp_path: Path) -> None:
    """Root's commands go through a `sudo` that notes them; one package is not to be had."""
    sudo = """
if [ "$1 $2" = "-n true" ]; then exit 0; fi
echo "$*" >>"$CALLS"
case "$*" in *"install"*chromium) echo "no such package"; exit 100;; *tee*) cat >/dev/null;; esac
"""
    done = run(machine(tmp_path, id="echo 1000", sudo=sudo, apt_get="", systemctl=""))
    calls = (tmp_path / "calls").read_text()
    assert done.returncode == 0
    assert "installed: prometheus\n" in done.stderr and "installed: prometheus-alertmanager" in done.stderr
    assert "could not install it: chromium" in done.stderr and "no such package" in done.stderr
    assert calls.count("--no-install-recommends chromium") == 2, "once more with new lists"
    assert calls.count("update") == 1
    assert [line.split()[-1] for line in calls.splitlines() if "systemctl mask" in line] == [
        "prometheus",
        "prometheus-alertmanager",
    ]
    if not Path("/usr/sbin/policy-rc.d").exists():
        assert "tee /usr/sbin/policy-rc.d" in calls and "rm -f /usr/sbin/policy-rc.d" in calls
