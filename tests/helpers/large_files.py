"""Convert a file of hundreds of megabytes in a process of its own, and measure memory and time."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


# Prints the memory that the conversion adds to that of a process with the package imported, and its time.
_CONVERSION = """
import json, sys, time
from pathlib import Path
from hf_dino.conversion import convert_checkpoint

def peak():
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
    return 1024 * int(line.split()[1])  # unlike ru_maxrss not that of the process that started this one

before, start = peak(), time.perf_counter()
embedding = (10000, -0.5) if "detrex" in sys.argv[1] else None
convert_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), positional_encoding=embedding)
print(json.dumps({"memory": peak() - before, "seconds": time.perf_counter() - start}))
"""


def write_file(shared: Path, name: str, path: Path) -> None:
    """Write a file of a format with its full size."""
    folder = shared / ("formats" if name.startswith(("detrex", "mmdet")) else "official")
    sys.path.insert(0, str(folder))
    try:
        if folder.name == "formats":
            import synthesize_formats

            content = synthesize_formats.checkpoint(name)
        else:
            import synthesize

            args = json.loads((folder / "manifests" / f"{name}.json").read_text())["args"]
            content = {"model": synthesize.state_dict(name), "args": argparse.Namespace(**args)}
    finally:
        sys.path.remove(str(folder))
    torch.save(content, path, _use_new_zipfile_serialization="state_dict" not in content)


def copy_seconds(path: Path, copy: Path) -> float:
    """Return the time in which a file is read into memory and written to the disk."""
    start = time.perf_counter()
    content = path.read_bytes()
    with copy.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    copy.unlink()
    return seconds


def measure_conversion(shared: Path, name: str, folder: Path) -> dict[str, Any]:
    """Measure the conversion and the copying of a file in turn, because other programs use the disk too.

    Returns:
        `dict[str, Any]`: The size of the file and the memory of its conversion in bytes, and the times in seconds: of
        the faster conversion and of the slower copy.
    """
    path = folder / f"{name}.pth"
    write_file(shared, name, path)
    conversions, copies = [], []
    for turn in range(2):
        copies.append(copy_seconds(path, folder / "copy"))
        command = [sys.executable, "-c", _CONVERSION, str(path), str(folder / f"model{turn}")]
        ended = subprocess.run(command, capture_output=True, text=True, check=True)
        conversions.append(json.loads(ended.stdout.splitlines()[-1]))
    return {
        "size": path.stat().st_size,
        "memory": max(each["memory"] for each in conversions),
        "seconds": min(each["seconds"] for each in conversions),
        "copy_seconds": max(copies),
    }
