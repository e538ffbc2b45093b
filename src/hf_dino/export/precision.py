"""Reduce the precision of exported models, and judge what that costs by average precision (AP) on one's own data."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import BaseImageProcessor

from ..data import DetectionSplit, read_data
from ..exported import INPUTS, quiet_loggers
from ..utils.errors import BrokenInputError, InputError, import_extra


NUM_CALIBRATION_IMAGES = 100

ONNX_FLOAT32 = ["GridSample", "TopK", "Sigmoid", "Log", "CumSum", "Sin", "Cos", "Range", "Resize"]
ONNX_FLOAT32 += ["IsInf", "IsNaN", "Where", "Clip", "Div"]
"""Operators that stay in float32: arithmetic of boxes, and what ONNX Runtime does not have in float16."""

Reduce = Callable[[Any, list[dict[str, np.ndarray]]], Any]
"""Makes another model of lower precision from one in float32 and the inputs of calibration, one image each."""


@dataclass(frozen=True)
class PrecisionData:
    """Images that a model of lower precision is made and judged with.

    Args:
        name (`str`): Of the dataset.
        calibration (`DetectionSplit`, *optional*): The training split, for ranges of activations.
        judging (`DetectionSplit`): The validation or else the test split, for AP.
    """

    name: str
    calibration: DetectionSplit | None
    judging: DetectionSplit


def read_precision_data(dataset: str, precision: str) -> PrecisionData:
    """Read a dataset; no image of calibration is one of those that judge.

    Raises:
        InputError: If the dataset lacks a split, or splits have images in common.
        ImportError: If a package is not installed that AP is measured with.
    """
    import_extra("accelerate", "train", "--dataset")
    splits = read_data(dataset)
    judging = splits.get("validation") or splits.get("test")
    if judging is None or (precision == "int8" and "train" not in splits):
        needed = "the splits train and validation" if precision == "int8" else "the split validation"
        raise InputError(
            f"--dataset {dataset}: needs {needed} (or test), it has {', '.join(splits)}; make them with "
            "hf-dino data split"
        )
    calibration = splits["train"] if precision == "int8" else None
    common = {str(each.path) for each in judging.images} & {
        str(each.path) for each in (calibration.images if calibration else ())
    }
    if common:
        raise InputError(f"--dataset {dataset}: {len(common)} images are in both splits, such as {min(common)}")
    return PrecisionData(judging.name, calibration, judging)


def calibration_inputs(data: PrecisionData, processor: BaseImageProcessor) -> list[dict[str, np.ndarray]]:
    """Return the inputs of images that are spread evenly over the training split."""
    images = data.calibration.images if data.calibration else []
    step = max(-(-len(images) // NUM_CALIBRATION_IMAGES), 1)
    batches = (processor(images=image.read(), return_tensors="pt") for image in images[::step])
    return [{name: batch[name].numpy() for name in INPUTS} for batch in batches]


def average_precision(model: Any, processor: BaseImageProcessor, split: DetectionSplit) -> float:
    """Return the AP of a model, exported or not, on the CPU."""
    accelerate = import_extra("accelerate", "train", "--dataset")
    from ..evaluation import evaluate_model

    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="no")
    scores, _ = evaluate_model(model, processor, split, accelerator, batch_size=8)
    return scores.metrics["ap"]


def onnx_float16(model: Any, _: list[dict[str, np.ndarray]]) -> Any:
    """Convert weights and most operators to float16; inputs and outputs stay in float32."""
    float16 = import_extra("onnxruntime.transformers.float16", "export", "--precision float16")
    blocked = [*float16.DEFAULT_OP_BLOCK_LIST, *ONNX_FLOAT32]
    return float16.convert_float_to_float16(copy.deepcopy(model), keep_io_types=True, op_block_list=blocked)


def onnx_int8_dynamic(model: Any, _: list[dict[str, np.ndarray]]) -> Any:
    """Quantize matrix products, with ranges that are measured at each call."""
    quantization = import_extra("onnxruntime.quantization", "export", "--precision int8_dynamic")
    return _quantized(
        lambda path: quantization.quantize_dynamic(copy.deepcopy(model), path, op_types_to_quantize=["MatMul"])
    )


def onnx_int8(model: Any, inputs: list[dict[str, np.ndarray]]) -> Any:
    """Quantize convolutions, with ranges of the calibration."""
    quantization = import_extra("onnxruntime.quantization", "export", "--precision int8")
    remaining = iter(inputs)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        """Return one input after the other, at last `None`."""

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(remaining, None)

    return _quantized(
        lambda path: quantization.quantize_static(
            copy.deepcopy(model), path, Reader(), op_types_to_quantize=["Conv"], per_channel=True
        )
    )


def _quantized(quantize: Callable[[Path], None]) -> Any:
    """Return the ONNX model that a function writes."""
    onnx = import_extra("onnx", "export", "--precision int8")
    # it asks for a preprocessing that the export has done
    with tempfile.TemporaryDirectory() as folder, quiet_loggers("root"):
        path = Path(folder, "model.onnx")
        quantize(path)
        return onnx.load(path)


def openvino_float16(model: Any, _: list[dict[str, np.ndarray]]) -> Any:
    """Store weights in float16; computations stay in float32."""
    openvino = import_extra("openvino", "openvino", "--precision float16")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.xml")
        openvino.save_model(model, path, compress_to_fp16=True)
        return openvino.Core().read_model(path.read_bytes(), path.with_suffix(".bin").read_bytes())


def openvino_int8(model: Any, inputs: list[dict[str, np.ndarray]]) -> Any:
    """Quantize convolutions, with ranges of the calibration."""
    nncf = import_extra("nncf", "openvino", "--precision int8")
    kinds: Iterator[str] = (each.get_type_name() for each in model.get_ops())
    others = nncf.IgnoredScope(types=sorted({kind for kind in kinds if kind != "Convolution"}), validate=False)
    batches = nncf.Dataset(inputs, lambda batch: [batch[name] for name in INPUTS])
    return nncf.quantize(model, batches, ignored_scope=others, subset_size=max(len(inputs), 1))


def check_loss(before: float, after: float, max_ap_loss: float, precision: str) -> None:
    """Check the AP of a model of lower precision.

    Raises:
        PrecisionError: If it loses too much; NaN is too much.
    """
    if not before - after <= max_ap_loss:
        raise PrecisionError(
            f"--precision {precision}: AP fell from {before:.4f} to {after:.4f}, by more than {max_ap_loss}; the file "
            "is not kept (--max_ap_loss)"
        )


class PrecisionError(BrokenInputError):
    """Raised if a model of lower precision loses too much."""
