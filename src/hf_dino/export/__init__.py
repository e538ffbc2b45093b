"""Export a model to one portable file, and verify that the file computes what the model computes."""

import copy
import tempfile
from pathlib import Path

from transformers import BaseImageProcessor

from ..exported import load_exported
from ..kernels import operators
from ..registration import DinoDetrForObjectDetection
from ..utils.errors import InputError, import_extra
from ..utils.io import atomic_directory, atomic_write, ensure_new_directory
from .benchmark import measure
from .formats import FORMATS, PRECISIONS, Format
from .precision import (
    PrecisionData,
    PrecisionError,
    average_precision,
    calibration_inputs,
    check_loss,
    read_precision_data,
)
from .program import ATTENTIONS, describe, make_program
from .verification import Comparison, DifferenceError, compare, make_inputs, verify


__all__ = [
    "ATTENTIONS",
    "FORMATS",
    "PRECISIONS",
    "Comparison",
    "DifferenceError",
    "Format",
    "PrecisionData",
    "PrecisionError",
    "calibration_inputs",
    "check_output",
    "compare",
    "describe",
    "export_model",
    "make_inputs",
    "make_program",
    "measure",
    "read_precision_data",
    "verify",
]


def check_output(
    output: Path,
    format: str,
    precision: str = "float32",
    attention: str | None = None,
    data: PrecisionData | str | None = None,
) -> None:
    """Check all that can be wrong before the export, which takes minutes; leaves nothing behind.

    Raises:
        InputError: If the output exists, cannot be written or has the suffix of another format, the format does not
            have this precision or form of the operator, or the precision does not go with the dataset or its absence.
        ImportError: If a package is not installed.
    """
    wanted = FORMATS[format]
    for package in (*wanted.packages, *wanted.packages_of_precision.get(precision, ())):
        import_extra(package, wanted.extra, f"--format {format}")
    if output.suffix != wanted.suffix:
        ending = f"end in {wanted.suffix}" if wanted.suffix else "be a directory, without a suffix"
        raise InputError(f"--output {output}: with --format {format} it must {ending}")
    if precision not in ("float32", *wanted.reduce):
        known = ", ".join(["float32", *wanted.reduce])
        raise InputError(f"--precision {precision}: not available with --format {format}, which has {known}")
    if precision != "float32" and data is None:
        raise InputError(f"--precision {precision}: needs --dataset DATASET, images that its AP is measured on")
    if precision == "float32" and data is not None:
        raise InputError("--dataset: is read only with --precision float16, int8 or int8_dynamic; remove it")
    if attention == "compiled" and wanted.suffix != ".pt2":
        raise InputError(f"--attention compiled: only PyTorch has it, not --format {format}; use pt2 or aoti")
    if wanted.suffix and output.exists():
        raise InputError(f"{output}: already exists; use a different path or remove it")
    ensure_new_directory(output)
    folder = next(parent for parent in output.absolute().parents if parent.exists())
    with tempfile.TemporaryFile(dir=folder):
        pass


def export_model(
    model: DinoDetrForObjectDetection,
    processor: BaseImageProcessor,
    output: str | Path,
    *,
    format: str = "onnx",
    attention: str | None = None,
    origin: str | None = None,
    precision: str = "float32",
    data: PrecisionData | None = None,
    max_ap_loss: float = 0.005,
) -> list[Comparison]:
    """Export a model with dynamic batch, height and width, and verify the file before it gets its name.

    Args:
        model (`DinoDetrForObjectDetection`): The model; it is exported in float32.
        processor (`BaseImageProcessor`): Its image processor, whose settings are stored in the file.
        output (`str` or `Path`): File, or directory for `"openvino"`, to write; it must not exist.
        format (`str`, *optional*, defaults to `"onnx"`): A key of [`FORMATS`].
        attention (`str`, *optional*): A key of [`ATTENTIONS`]; by default that of the format.
        origin (`str`, *optional*): Where the model came from, to be stored in the file.
        precision (`str`, *optional*, defaults to `"float32"`): One of [`PRECISIONS`]; others than float32 need `data`.
        data (`PrecisionData`, *optional*): Images that AP is measured on before and after, from
            [`read_precision_data`]; not for float32.
        max_ap_loss (`float`, *optional*, defaults to 0.005): Loss of AP above which the file is refused.

    Returns:
        `list[Comparison]`: The differences, all within their bounds, of the file in float32.

    Raises:
        InputError: If the output exists, cannot be written or has the suffix of another format.
        DifferenceError: If the file does not compute what the model computes; it is deleted.
        PrecisionError: If the file loses too much AP; it is deleted.
    """
    output, wanted = Path(output), FORMATS[format]
    check_output(output, format, precision, attention, data)
    model = copy.deepcopy(model).cpu().float().eval()
    attention = attention or _available_attention(wanted.attention)
    program = make_program(model, attention, with_selection=format == "aoti")
    facts = describe(model, processor, program, origin, attention)
    converted = wanted.convert(program)
    del program
    with (atomic_write if wanted.suffix else atomic_directory)(output) as temporary:
        wanted.write(converted, temporary, facts)
        comparisons = verify(temporary, model)
        if data is not None:
            before = average_precision(model, processor, data.judging)
            reduced = wanted.reduce[precision](converted, calibration_inputs(data, processor))
            facts |= {"precision": precision, "data": data.name, "ap_before": before}
            wanted.write(reduced, temporary, facts)
            after = average_precision(*load_exported(temporary), data.judging)
            check_loss(before, after, max_ap_loss, precision)
            wanted.write(reduced, temporary, facts | {"ap_after": after})
        return comparisons


def _available_attention(attention: str) -> str:
    """Return a form of the operator, or the reference implementation where there is no compiled one."""
    return attention if attention != "compiled" or operators("cpu") else "grid_sample"
