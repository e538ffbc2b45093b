"""Detections of a model on a data set, COCO's numbers, and what goes wrong: gathered, scored, sorted and reported."""

try:
    from ..data.objects import OBJECT
    from .analysis import KINDS, Analysis, OperatingPoint, PictureMistakes, analyse
    from .detections import collect_detections, write_coco_results
    from .records import DETECTION, as_detections
    from .run import evaluate_model
    from .scores import ENGINES, METRICS, CocoScores, check_engine, evaluate_coco
except ImportError as error:
    raise ImportError(f"evaluation needs {error.name}: pip install 'hf-dino[train]'") from error


__all__ = [
    "DETECTION",
    "ENGINES",
    "KINDS",
    "METRICS",
    "OBJECT",
    "Analysis",
    "CocoScores",
    "OperatingPoint",
    "PictureMistakes",
    "analyse",
    "as_detections",
    "check_engine",
    "collect_detections",
    "evaluate_coco",
    "evaluate_model",
    "write_coco_results",
]
