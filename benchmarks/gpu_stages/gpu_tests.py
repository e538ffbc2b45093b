"""Run the tests that need a GPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

from gpu_stages.rows import Row, Stage


ROOT = Path(__file__).parents[2]
COUNT = re.compile(r"(\d+) (passed|failed|errors?|skipped|xfailed|xpassed|deselected)\b")


def files_with_gpu_tests(root: Path = ROOT) -> list[str]:
    """Return the test files with tests marked `gpu`. The others may import packages that are not installed."""
    files = sorted((root / "tests").rglob("test_*.py"))
    return [str(path.relative_to(root)) for path in files if "pytest.mark.gpu" in path.read_text()]


def read_summary(output: str) -> Row:
    """Parse the number of tests by outcome from pytest's output, and the names of those that failed.

    Example:

    ```python
    >>> read_summary("FAILED tests/test_a.py::test_b - assert 0\\n==== 1 failed, 2 passed in 3.10s ====")
    {'failed': 1, 'passed': 2, 'which': ['test_b']}

    ```
    """
    lines = output.strip().splitlines()
    row: Row = {name: int(number) for number, name in COUNT.findall(lines[-1] if lines else "")}
    failures = re.findall(r"^(?:FAILED|ERROR) \S+?(?:::(\S+))?(?: - .*)?$", output, re.MULTILINE)
    return {**row, "which": failures[:12]} if failures else row


def main(stage: Stage) -> None:
    command = [sys.executable, "-m", "pytest", "-m", "gpu and not slow", "-q", "--maxfail=12"]
    for name in stage.todo(["marked gpu"]):
        with stage.rows.case(name) as row:
            environment = os.environ | {"HF_DINO_KERNELS": "auto"}  # as in `make test`
            arguments = [*command, "-p", "no:cacheprovider", *files_with_gpu_tests()]
            done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, env=environment)
            print(done.stdout, done.stderr, sep="\n", flush=True)
            row |= read_summary(done.stdout)
            row["exit_code"] = done.returncode
            row["ok"] = done.returncode == 0 and (stage.dry_run or row.get("passed", 0) > 0)
