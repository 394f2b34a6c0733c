"""Where and with what it was measured."""

import datetime
import hashlib
import os
import platform
import shutil
import subprocess
from pathlib import Path


def said(*command: str | Path, folder: Path | None = None) -> str | None:
    """What a program prints, or nothing where it is not there or fails."""
    try:
        ended = subprocess.run(list(map(str, command)), cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                               text=True)
    except OSError:
        return None
    return ended.stdout.strip() if ended.returncode == 0 else None


def about(device: str) -> dict:
    """The processor, and the GPU with its driver where one is measured."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
             if line.startswith("model name")]
    found = {
        "cpu": names[0] if names else platform.processor(), "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": platform.platform(), "load_at_start": os.getloadavg(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if device != "cpu":
        line = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit",
                    "--format=csv,noheader")
        if line:
            names = ["name", "driver", "memory", "max_sm_clock", "power_limit"]
            found["gpu"] = dict(zip(names, (value.strip() for value in line.splitlines()[0].split(","))))
    return found


def without_folders(arguments: list[str]) -> list[str]:
    """Arguments with absolute paths cut to their last name: where things lie on a machine says nothing."""
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]


def commit(root: Path) -> str | None:
    """The commit of the sources, marked where they have changes."""
    found = said("git", "rev-parse", "HEAD", folder=root)
    changed = said("git", "status", "--porcelain", "--untracked-files=no", folder=root)
    return f"{found} with changes" if found and changed else found


def program(path: Path) -> dict:
    """Version of mp-train and the first digits of its file's SHA-256."""
    return {"version": said(path.resolve(), "--version"),
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}


def build_preload(source: Path, folder: Path) -> Path | None:
    """The library that lets MKL use AVX-512; nothing without a C compiler or where the CPU has no AVX-512."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or "avx512f" not in Path("/proc/cpuinfo").read_text():
        return None
    library = folder / "mkl_on_amd.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, source], check=True)
    return library.resolve()
