"""Train the models of the family alike, measure them while they learn, and report them side by side."""

from .measures import MeasuringFineTuner, matching_changes
from .plan import ComparisonSettings, Run, plan_runs
from .run import compare


__all__ = ["ComparisonSettings", "MeasuringFineTuner", "Run", "compare", "matching_changes", "plan_runs"]
