"""Describe the machine that a benchmark ran on, and write its result."""

import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from hf_dino.utils.io import atomic_write


RESULTS = Path(__file__).parents[1] / "results"


def processor_name() -> str:
    """Return the processor's name according to Linux, or else to Python."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_result(name: str, command: str, content: dict[str, Any]) -> None:
    """Write a result with the machine, the versions and the command that repeats it, and print it."""
    RESULTS.mkdir(exist_ok=True)
    print(save_result(RESULTS / f"{name}.json", command, content))


def describe() -> dict[str, Any]:
    """Return the machine and the versions."""
    return {
        "machine": f"{processor_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def save_result(path: Path, command: str, content: dict[str, Any]) -> str:
    """Write a result with the machine, the versions and the command that repeats it, and return its text."""
    text = json.dumps({"command": command, **describe(), **content}, indent=2)
    with atomic_write(path) as draft:  # a run that is stopped loses nothing
        draft.write_text(text + "\n")
    return text
