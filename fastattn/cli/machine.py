"""What this machine and this installation are, as plain values for tables and JSON."""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastattn
from fastattn.backends import CPU_ISAS, compiled_library

PACKAGE = Path(fastattn.__file__).resolve().parent


def machine() -> dict[str, Any]:
    """The hardware a number was measured on; two results compare only where these are equal."""
    native = compiled_library()
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "arch": platform.machine(),
        "isas": [isa for isa in CPU_ISAS if native and isa in native.isas],
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "os": f"{platform.system()} {platform.release().split('-')[0]}",
    }


def versions() -> dict[str, str]:
    native = compiled_library()
    found = {"fastattn": fastattn.__version__, "python": platform.python_version()}
    for name in ("torch", "triton", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["compiler"] = getattr(native, "compiler", "unknown") if native else "nothing compiled"
    return found


def commit() -> str:
    """The revision of a checkout, "+" where files were changed since; "" for an installed package."""
    top = _git("rev-parse", "--show-toplevel")
    if not top or Path(top, "fastattn") != PACKAGE:
        return ""
    revision = _git("rev-parse", "--short=10", "HEAD")
    return revision + ("+" if revision and _git("status", "--porcelain") else "")


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def openmp() -> str:
    """Which OpenMP libraries this process has loaded: one means that torch and the kernels share a pool."""
    compiled_library()
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return "cannot be read on this system"
    words = (line.split()[-1] for line in maps.splitlines())
    found = sorted(
        {w for w in words if any(n in Path(w).name for n in ("libgomp", "libomp", "libiomp"))}
    )
    shown = ", ".join(f".../{'/'.join(Path(w).parts[-3:])}" for w in found) or "none"
    return shown + (" (one pool)" if len(found) == 1 else f" ({len(found)} pools)" if found else "")


def missing(module: str) -> str:
    """Why ``fastattn.<module>`` cannot be imported, or "" when it can."""
    try:
        importlib.import_module(f"fastattn.{module}")
    except ImportError as error:
        return "not built" if isinstance(error, ModuleNotFoundError) else f"does not load: {error}"
    return ""


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _git(*words: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(PACKAGE), *words], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
