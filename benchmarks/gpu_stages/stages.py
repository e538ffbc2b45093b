"""The stages of a GPU run, the most important first, and their time limits."""

from typing import NamedTuple


class StageLimits(NamedTuple):
    """A module of `gpu_stages` and its limits.

    Attributes:
        module (`str`): Its `main` takes a `Stage`.
        seconds (`float`): Time limit of the stage.
        stall (`float`): Seconds without a new row after which the stage is stopped.
        group (`str`): Stages of one group share a process, which loads PyTorch once.
    """

    module: str
    seconds: float
    stall: float
    group: str


# Rows name a stage by its key. A run that is stopped after four minutes has checked and timed the operator.
STAGES = {
    "machine": StageLimits("machine_facts", 45, 40, "operator"),
    "build": StageLimits("build", 150, 140, "operator"),
    "correctness": StageLimits("correctness", 45, 25, "operator"),
    "operator": StageLimits("timing", 60, 25, "operator"),
    "tests": StageLimits("gpu_tests", 60, 60, "tests"),
    "sanitizer": StageLimits("sanitizer", 60, 40, "sanitizer"),
    "models": StageLimits("models", 140, 100, "models"),
    "counters": StageLimits("counters", 60, 60, "counters"),
    "fine-tuning": StageLimits("finetuning", 480, 480, "fine-tuning"),  # the remaining time
}
