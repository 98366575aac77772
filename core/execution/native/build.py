"""Compiles the C sources with the system's compiler, once per source, compiler and CPU.

The library must share torch's OpenMP runtime: a second one would bring its own threads and ignore
`torch.set_num_threads`. So objects are compiled with OpenMP and linked against the runtime file that torch has loaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from core.logs import get_logger

logger = get_logger(__name__)

SOURCES = ("linear.c", "attention.c", "elementwise.c")
HEADERS = ("common.h", "attention_inner.h")
_BASE_FLAGS = ("-O3", "-fPIC", "-std=gnu11", "-fno-math-errno", "-fvisibility=hidden", "-w")
_TIMEOUT_S = 180


def find_compilers() -> list[list[str]]:
    """Commands to try, best first: the one Python was built with, then the usual names."""
    configured = shlex.split(sysconfig.get_config_var("CC") or "")
    candidates = [configured[:1], ["cc"], ["gcc"], ["clang"]]
    found: list[list[str]] = []
    for command in candidates:
        if command and (path := shutil.which(command[0])) is not None and [path] not in found:
            found.append([path])
    return found


def torch_openmp() -> Path | None:
    """The OpenMP runtime that torch brings or has loaded, None if there is none to be found."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(errors="replace").splitlines():
            path = line.split(maxsplit=5)[-1]
            if re.search(r"/lib(gomp|iomp5|omp)[-.\w]*\.so[.\d]*$", path) and Path(path).exists():
                return Path(path)
    package = Path(torch.__file__).parent
    for folder in (package / "lib", package.parent / "torch.libs"):
        for pattern in ("libgomp*.so*", "libiomp5.so*", "libomp.so*"):
            for match in sorted(folder.glob(pattern)):
                return match
    return None


def _flag_sets(openmp: Path | None) -> Iterator[tuple[list[str], list[str]]]:
    """Compile and link flags to try, best first."""
    native = ["-mcpu=native"] if platform.machine() in ("arm64", "aarch64") else ["-march=native"]
    if openmp is not None:
        link = [str(openmp), f"-Wl,-rpath,{openmp.parent}"]
        yield [*native, "-fopenmp"], link
        yield ["-fopenmp"], link
    yield native, []
    yield [], []


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


def _compile(compiler: list[str], flags: list[str], link: list[str], target: Path) -> str | None:
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
        ok, message = _run([*compiler, "-shared", *objects, *link, "-lm", "-o", str(built)])
        if not ok:
            return message
        built.replace(target)
    return None


def build_library(cache_dir: Path) -> Path | None:
    """The compiled library under `cache_dir`, built if need be; None if no compiler can, with a log line."""
    compilers = find_compilers()
    if not compilers:
        logger.info("native kernels are off", reason="no C compiler found")
        return None
    source_dir = Path(__file__).parent
    sources = b"".join((source_dir / name).read_bytes() for name in (*HEADERS, *SOURCES))
    openmp = torch_openmp()
    complaint = ""
    try:
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        for compiler in compilers:
            _, version = _run([*compiler, "-dumpfullversion", "-dumpversion"])
            parts = (shlex.join(compiler), _run([*compiler, "--version"])[1], version, _cpu_model(), str(openmp))
            for flags, link in _flag_sets(openmp):
                key = hashlib.sha256(sources + repr((parts, _BASE_FLAGS, flags, link)).encode()).hexdigest()[:32]
                target = cache_dir / f"{key}.so"
                if target.exists():
                    return target
                failure = _compile(compiler, flags, link, target)
                if failure is None:
                    logger.info("native kernels built", compiler=compiler[0], flags=" ".join(flags), path=str(target))
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
