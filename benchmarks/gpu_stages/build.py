"""Compile the operator as on the first use of the model, and measure the time."""

import time
from pathlib import Path

from gpu_stages.rows import Stage
from hf_dino import kernels


def main(stage: Stage) -> None:
    for device in dict.fromkeys(["cpu", stage.device]):
        for name in stage.todo([f"operator for {device}"]):
            with stage.rows.case(name) as row:
                start = time.monotonic()
                operators = kernels.operators(device)
                assert operators is not None
                row["seconds"] = round(time.monotonic() - start, 1)
                entry = Path(str(operators.__file__)).parent
                row["cache_entry"] = entry.name
                print((entry / "build.log").read_text(), flush=True)  # the commands and their output
