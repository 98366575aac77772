"""An environment for each client: packages of the versions that its folder names, in a folder of the work directory."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
INSTALL_S = 1800.0


@dataclass(frozen=True)
class Client:
    """A folder beside this file: `requirements.txt` or `package.json`, and `check.py` or `check.mjs`."""

    name: str

    @property
    def folder(self) -> Path:
        return HERE / self.name

    @property
    def needs(self) -> Path:
        """What names its packages."""
        found = self.folder / "requirements.txt"
        return found if found.exists() else self.folder / "package.json"

    @property
    def check(self) -> Path:
        found = self.folder / "check.py"
        return found if found.exists() else self.folder / "check.mjs"

    @property
    def versions(self) -> str:
        """The packages that are asked for, as they are shown."""
        text = self.needs.read_text()
        if self.needs.suffix == ".json":
            return ", ".join(f"{name} {version}" for name, version in json.loads(text)["dependencies"].items())
        return ", ".join(re.sub(r"(\[.*\])?==", " ", line) for line in text.split()) or "by their HTTP shape"


def all_clients() -> list[Client]:
    """By name."""
    return [Client(path.parent.name) for path in sorted(HERE.glob("*/check.*"))]


class Environment:
    """Where a client's packages are, and its checks run."""

    def __init__(self, client: Client, work: Path) -> None:
        self._client = client
        self.folder = work / client.name
        self._of_node = client.needs.suffix == ".json"

    def prepare(self) -> None:
        """Install what is not there yet. Raises `RuntimeError` with what the installer said."""
        self.folder.mkdir(parents=True, exist_ok=True)
        wanted, stamp = self._client.needs.read_text(), self.folder / "installed"
        if not stamp.exists() or stamp.read_text() != wanted:
            stamp.unlink(missing_ok=True)
            self._install()
            stamp.write_text(wanted)
        for file in (self._client.check, HERE / f"common{self._client.check.suffix}"):
            shutil.copy(file, self.folder)

    def _install(self) -> None:
        if self._of_node:
            shutil.copy(self._client.needs, self.folder)
            command = ["npm", "install", "--no-audit", "--no-fund", "--loglevel=error"]
        else:
            venv.create(self.folder / "env", with_pip=bool(self._client.needs.read_text()), clear=True)
            if not self._client.needs.read_text():
                return
            command = [str(self._python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r",
                       str(self._client.needs)]  # fmt: skip
        done = subprocess.run(
            command, cwd=self.folder, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"not installed: {(done.stderr or done.stdout).strip()[-300:]}")

    @property
    def _python(self) -> Path:
        return self.folder / "env" / "bin" / "python"

    @property
    def command(self) -> list[str]:
        """What runs the checks."""
        check = str(self.folder / self._client.check.name)
        if check.endswith(".mjs"):
            return ["node", check]
        return [sys.executable if self._of_node else str(self._python), check]

    def variables(self, home: Path) -> dict[str, str]:
        """Of the environment: nothing of ours or of the user's own settings, and the client's programs first."""
        programs = self.folder / ("node_modules/.bin" if self._of_node else "env/bin")
        kept = {
            name: value for name, value in os.environ.items()
            if not name.startswith(("VRM_", "XDG_", "PYTHON", "OPENAI_", "ANTHROPIC_", "OLLAMA_", "VIRTUAL_ENV"))
        }  # fmt: skip
        return {**kept, "HOME": str(home), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}", "DO_NOT_TRACK": "1"}
