"""Record the machine: GPU, driver, versions, clocks. No setting is changed."""

import os
import platform
import shutil
import subprocess

import torch
import transformers

from common.machine import processor_name
from gpu_stages.rows import Stage


QUERY = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,temperature.gpu,power.draw,power.limit"


def output_of(*command: str) -> str:
    """Return the output of a command, or that it was not found or failed."""
    if shutil.which(command[0]) is None:
        return "not found"
    done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    return done.stdout.strip() if done.returncode == 0 else f"failed: {(done.stdout + done.stderr).strip()[:300]}"


def last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def main(stage: Stage) -> None:
    with stage.rows.case("processor") as row:
        row["name"] = f"{processor_name()}, {os.cpu_count()} cores"
        row["free_disk_gib"] = shutil.disk_usage(os.curdir).free // 2**30
    with stage.rows.case("versions") as row:
        row |= {"python": platform.python_version(), "torch": torch.__version__}
        row |= {"transformers": transformers.__version__}
    with stage.rows.case("tools") as row:
        row["nvcc"] = last_line(output_of("nvcc", "--version"))
        row["gcc"] = output_of("gcc", "-dumpfullversion")
        row["ncu"] = last_line(output_of("ncu", "--version"))
        row["compute_sanitizer"] = last_line(output_of("compute-sanitizer", "--version"))
    with stage.rows.case("GPU as found") as row:
        row["query"] = output_of("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    with stage.rows.case("GPU as PyTorch sees it") as row:
        row |= device_properties() if stage.device == "cuda" else {"name": "none: a dry run"}


def device_properties() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "l2_mib": properties.L2_cache_size // 2**20,
    }
