"""Train the models of the family alike, measure them while they learn, and report them side by side."""

from .measures import MeasuringFineTuner, matching_changes
from .plan import ComparisonSettings, Run, plan_runs
from .report import report_comparison
from .run import compare
from .speed import measure_comparison


__all__ = [
    "ComparisonSettings",
    "MeasuringFineTuner",
    "Run",
    "compare",
    "matching_changes",
    "measure_comparison",
    "plan_runs",
    "report_comparison",
]
