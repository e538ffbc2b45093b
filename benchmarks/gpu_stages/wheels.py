"""The packages that a GPU machine may lack: `requirements.txt` lists them with reasons.

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
    """Return the requirements, by the name that is imported.

    Example:

    ```python
    >>> sorted(required())
    ['pycocotools']

    ```
    """
    lines = [line.partition("#")[0].strip() for line in REQUIREMENTS.read_text().splitlines()]
    return {re.split(r"[=<>~!]", line)[0].strip().replace("-", "_"): line for line in lines if line}


def fetch(folder: Path) -> None:
    """Download the wheels.

    Raises:
        SystemExit: If they are larger than `MAX_MIB` together, or cannot be downloaded.
    """
    options = ["--no-deps", "--only-binary=:all:", "--python-version=3.12", "--implementation=cp"]
    options += [f"--platform={platform}" for platform in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"--dest={folder}", *required().values()]
    if (exit_code := subprocess.run(command).returncode) != 0:
        raise SystemExit(exit_code)
    wheels = sorted(folder.glob("*.whl"))
    mib = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    print(f"{folder}: {', '.join(wheel.name for wheel in wheels)}, {mib:.1f} MiB")
    if mib > MAX_MIB:
        raise SystemExit(f"error: the wheels in {folder} have {mib:.1f} MiB, the limit is {MAX_MIB}: remove old ones")


def install_missing(folder: Path, target: Path) -> str:
    """Install into `target` what cannot be imported, without network; return what was done, or why it failed."""
    missing = [requirement for name, requirement in required().items() if importlib.util.find_spec(name) is None]
    if not missing:
        return "nothing is missing"
    options = ["--no-index", "--no-deps", "--no-compile", f"--find-links={folder}", f"--target={target}"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options, *missing]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return f"installing {', '.join(missing)} from {folder} took too long"
    if done.returncode != 0:
        return f"{', '.join(missing)} not installed from {folder}: {done.stderr.strip()[-300:]}"
    return f"installed {', '.join(missing)} from {folder}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the wheels go")
    fetch(parser.parse_args().folder)


if __name__ == "__main__":
    main()
