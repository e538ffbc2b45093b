"""Run the operator under compute-sanitizer, which finds accesses out of bounds and races in shared memory."""

import os
import re
import shutil
import subprocess
import sys

from gpu_stages.rows import Row, Stage


TOOLS = ("memcheck", "racecheck")
SAMPLE = "========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n"  # the output of a run without errors


def command_for(tool: str, sanitizer: str) -> list[str]:
    """Return the command that checks small inputs with a tool."""
    options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--target-processes", "all"]
    return [sanitizer, *options, *program("cuda", "small")]


def program(device: str, size: str) -> list[str]:
    return [sys.executable, "-m", "gpu_stages.operator_once", "--device", device, "--size", size, "--deterministic"]


def read_report(output: str, exit_code: int) -> Row:
    """Parse the number of errors from the output of compute-sanitizer.

    Example:

    ```python
    >>> read_report("========= ERROR SUMMARY: 2 errors", 9)
    {'errors': 2, 'ok': False}
    >>> read_report("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0)
    {'errors': 0, 'ok': True}

    ```
    """
    found = re.search(r"SUMMARY: (?:\d+ hazards? displayed \()?(\d+) errors?", output)
    if found is None:
        lines = [line for line in output.strip().splitlines() if line.strip()]
        return {"ok": False, "error": f"no summary, exit code {exit_code}: {' / '.join(lines[-2:])[:200]}"}
    return {"errors": int(found[1]), "ok": exit_code == 0 and found[1] == "0"}


def main(stage: Stage) -> None:
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    environment = os.environ | {
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"
    }  # else an access beyond a tensor may be within PyTorch's block
    for tool in stage.todo(TOOLS):
        with stage.rows.case(tool) as row:
            command = command_for(tool, sanitizer)
            print(*command, flush=True)
            if stage.dry_run:
                row |= read_report(SAMPLE, 0)
                continue
            done = subprocess.run(command, capture_output=True, text=True, env=environment)
            print(done.stdout[-20_000:], done.stderr[-5_000:], sep="\n", flush=True)
            row |= read_report(done.stdout + done.stderr, done.returncode)
