"""Find kernels that were compiled elsewhere and came in a wheel, and tell which of them run here.

`make wheels` makes two: that of this package, with a kernel for CPUs, and hf-dino-cuda13, with one for CUDA alone. A
prebuilt entry is laid out as one of the cache; its name begins with the device and the hash of the sources, and its
metadata.json has a section `built_for`, with the oldest Linux and PyTorch that run it, and for CUDA the major version
and the GPUs:

    {"platform": "manylinux_2_28_x86_64", "torch": "2.10", "cuda": "13", "architectures": "8.0 9.0 12.0+PTX"}
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from packaging.tags import platform_tags
from torch.torch_version import TorchVersion

from .build import hash_sources, is_complete
from .compilers import read_architectures, requested_architectures, runs_on


PACKAGED = Path(__file__).parents[1] / "prebuilt"


def prebuilt_entries(device_type: str) -> list[Path]:
    """Return the entries for `"cpu"` or `"cuda"`, in this package and in each hf_dino_cuda* on Python's path."""
    others = [found for folder in dict.fromkeys(sys.path) for found in _find(str(folder), "hf_dino_cuda")]
    return [entry for folder in [str(PACKAGED), *others] for entry in map(Path, _find(folder, f"{device_type}-"))]


def _find(folder: str, prefix: str) -> list[str]:
    """Return what begins with a prefix in a folder, or nothing if it cannot be read, as Python's import does."""
    with suppress(OSError):
        return sorted(found.path for found in os.scandir(folder or ".") if found.name.startswith(prefix))
    return []


def mismatch(entry: Path, sources: Path) -> str:
    """Return why a prebuilt entry does not run here or is of other sources, or an empty string if it matches.

    Raises:
        KernelError: If `TORCH_CUDA_ARCH_LIST` cannot be read, or there are no sources.
    """
    try:
        built_for = json.loads((entry / "metadata.json").read_text(encoding="utf-8"))["built_for"]
        oldest_linux, oldest_torch = str(built_for["platform"]), str(built_for["torch"])
        for_gpus = (str(built_for["cuda"]), str(built_for["architectures"])) if entry.name.startswith("cuda") else None
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"its metadata.json cannot be read ({error})"
    checks = [
        (is_complete(entry), "files are missing"),
        (entry.name.split("-")[1] == hash_sources(sources), f"it is not of the sources in {sources}"),
        (oldest_linux in platform_tags(), f"it is for {oldest_linux}, and this is {next(platform_tags())}"),
        (
            TorchVersion(torch.__version__) >= oldest_torch,
            f"it is for PyTorch {oldest_torch} and later, and this is {torch.__version__}",
        ),
    ]
    reason = next((reason for holds, reason in checks if not holds), "")
    return reason or (_cuda_mismatch(*for_gpus) if for_gpus else "")


def _cuda_mismatch(major: str, architectures: str) -> str:
    if str(torch.version.cuda).partition(".")[0] != major:
        return f"it is for CUDA {major}, and PyTorch is of CUDA {torch.version.cuda}"
    requested = read_architectures(requested_architectures())
    missing = [name for name in requested if not runs_on(name, architectures.split())]
    return f"it is for GPUs {architectures}, and not for {' '.join(missing)}" if missing else ""
