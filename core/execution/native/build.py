"""Compiles the C sources with the system's compiler, once per source, compiler and CPU.

Threads come from `pool.c`, not from OpenMP; each call is told how many it may use.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.logs import get_logger

logger = get_logger(__name__)

SOURCES = (
    "linear.c", "halves.c", "packed.c", "quantized.c", "panel_order.c", "panels.c", "attention.c", "merge.c",
    "elementwise.c", "layer.c", "pool.c",
)  # fmt: skip
HEADERS = (
    "attention_inner.h", "common.h", "integers.h", "kernels.h", "panel_codes.h", "panel_lines.h", "panels.h",
    "quantized.h", "pool.h",
)  # fmt: skip
_BASE_FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden", "-pthread", "-w")
_TIMEOUT_S = 180


def find_compilers() -> list[list[str]]:
    """Commands to try, best first: the one Python was built with, then the usual names."""
    configured = shlex.split(sysconfig.get_config_var("CC") or "")
    paths = filter(None, map(shutil.which, [*configured[:1], "cc", "gcc", "clang"]))
    return [[path] for path in dict.fromkeys(paths)]


def _cpu_model() -> str:
    """What `-march=native` looks at."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text(errors="replace").splitlines()
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _run(command: list[str]) -> tuple[bool, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return False, str(error)
    return done.returncode == 0, (done.stderr or done.stdout).strip()


def _compile(compiler: list[str], flags: Sequence[str], target: Path) -> str | None:
    """Build `target` and put it in place in one step. Returns the compiler's complaint, None on success."""
    source_dir = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        objects = []
        for name in SOURCES:
            objects.append(str(Path(folder) / f"{name}.o"))
            ok, message = _run([*compiler, *_BASE_FLAGS, *flags, "-c", str(source_dir / name), "-o", objects[-1]])
            if not ok:
                return message
        built = Path(folder) / target.name
        ok, message = _run([*compiler, "-shared", "-pthread", *objects, "-lm", "-o", str(built)])
        if not ok:
            return message
        built.replace(target)
    return None


def build_library(cache_dir: Path, flag_sets: Sequence[Sequence[str]]) -> Path | None:
    """The compiled library under `cache_dir`, built if need be; None if no compiler can, with a log line.

    `flag_sets` are compiler flags to try, best first.
    """
    compilers = find_compilers()
    if not compilers:
        logger.info("native kernels are off", reason="no C compiler found")
        return None
    source_dir = Path(__file__).parent
    sources = b"".join((source_dir / name).read_bytes() for name in (*HEADERS, *SOURCES))
    complaint = ""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for compiler in compilers:
            _, version = _run([*compiler, "-dumpfullversion", "-dumpversion"])
            parts = (shlex.join(compiler), _run([*compiler, "--version"])[1], version, _cpu_model())
            for flags in flag_sets:
                key = hashlib.sha256(sources + repr((parts, _BASE_FLAGS, list(flags))).encode()).hexdigest()[:32]
                target = cache_dir / f"{key}.so"
                if target.exists():
                    return target
                if not complaint:  # the one line that says why nothing seems to happen
                    logger.info("building CPU kernels, once, about half a minute", into=str(cache_dir))
                failure = _compile(compiler, flags, target)
                if failure is None:
                    logger.debug("native kernels built", compiler=compiler[0], flags=" ".join(flags), path=str(target))
                    return target
                complaint = complaint or failure
    except OSError as error:
        complaint = str(error)
    logger.warning("native kernels are off", reason=complaint[-2000:] or "the compiler failed")
    return None


def is_safe(path: Path) -> bool:
    """Whether only this user (or root) could have written the library."""
    if not hasattr(os, "getuid"):
        return True
    return all(
        item.stat().st_uid in (os.getuid(), 0) and not item.stat().st_mode & 0o022 for item in (path, path.parent)
    )
