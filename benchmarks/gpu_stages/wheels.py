"""Fetch and install the packages that a GPU machine may lack, listed in `requirements.txt`.

python benchmarks/gpu_stages/wheels.py wheels    # fetch, for Python 3.12 on x86-64 Linux
"""

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path


REQUIREMENTS = Path(__file__).with_name("requirements.txt")
MAX_MIB = 50
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux1_x86_64")


def required() -> dict[str, str]:
    """Return the requirements by import name.

    Example:

    ```python
    >>> sorted(required())
    ['pycocotools']

    ```
    """
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return {re.split(r"[=<>~!]", line)[0].strip().replace("-", "_"): line for line in lines if line}


def fetch(directory: Path) -> None:
    """Download the wheels.

    Raises:
        SystemExit: If their total size exceeds `MAX_MIB`, or they cannot be downloaded.
    """
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        *options,
        f"--dest={directory}",
        *required().values(),
    ]
    if (exit_code := subprocess.run(command).returncode) != 0:
        raise SystemExit(exit_code)
    wheels = sorted(directory.glob("*.whl"))
    mib = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{directory}: {', '.join(wheel.name for wheel in wheels)}, {mib:.1f} MiB")
    if mib > MAX_MIB:
        raise SystemExit(
            f"error: the wheels in {directory} have {mib:.1f} MiB, the limit is {MAX_MIB}: remove old ones"
        )


def install_missing(directory: Path, target: Path) -> str:
    """Install missing packages into `target` from wheels, without network; return what was done, or why it failed."""
    missing = [requirement for name, requirement in required().items() if importlib.util.find_spec(name) is None]
    if not missing:
        return "nothing is missing"
    options = ["--no-index", "--no-deps", "--no-compile", f"--find-links={directory}", f"--target={target}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, *missing]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return f"installing {', '.join(missing)} from {directory} took too long"
    if done.returncode != 0:
        return f"{', '.join(missing)} not installed from {directory}: {done.stderr.strip()[-300:]}"
    return f"installed {', '.join(missing)} from {directory}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="directory to download the wheels to")
    fetch(parser.parse_args().directory)


if __name__ == "__main__":
    main()
