"""Detections of a model on a dataset, COCO's numbers, and what goes wrong: gathered, scored, sorted and reported."""

try:
    from ..data.dataset import ANNOTATION_DTYPE
    from .analysis import KINDS, Analysis, ImageErrors, OperatingPoint, analyze_errors
    from .detections import collect_detections, write_coco_results
    from .records import DETECTION_DTYPE, detections_from_results
    from .run import evaluate_model
    from .scores import ENGINES, METRICS, CocoScores, check_engine, evaluate_coco
except ImportError as error:
    raise ImportError(f"evaluation needs {error.name}: pip install 'hf-dino[train]'") from error


__all__ = [
    "ANNOTATION_DTYPE",
    "DETECTION_DTYPE",
    "ENGINES",
    "KINDS",
    "METRICS",
    "Analysis",
    "CocoScores",
    "ImageErrors",
    "OperatingPoint",
    "analyze_errors",
    "check_engine",
    "collect_detections",
    "detections_from_results",
    "evaluate_coco",
    "evaluate_model",
    "write_coco_results",
]
