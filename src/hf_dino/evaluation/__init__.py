"""Evaluate a model: collect its detections on a dataset, compute COCO metrics, analyze errors, write a report."""

try:
    from .coco_eval import ENGINES, METRICS, CocoScores, check_engine, evaluate_coco
    from .error_analysis import analyze_errors
    from .predictions import (
        DETECTION_DTYPE,
        collect_detections,
        detections_from_results,
        evaluate_model,
        write_coco_results,
    )
except ImportError as error:
    raise ImportError(f"evaluation needs {error.name}: pip install 'hf-dino[train]'") from error


__all__ = [
    "DETECTION_DTYPE",
    "ENGINES",
    "METRICS",
    "CocoScores",
    "analyze_errors",
    "check_engine",
    "collect_detections",
    "detections_from_results",
    "evaluate_coco",
    "evaluate_model",
    "write_coco_results",
]
