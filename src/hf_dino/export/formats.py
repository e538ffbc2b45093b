"""Write exported models in their formats, each with what it states about its model."""

import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..exported import INPUTS, METADATA_KEY, OPENVINO_FILE, OUTPUTS, in_archive, quiet_loggers
from ..utils.errors import import_extra
from .precision import (
    Reduce,
    onnx_float16,
    onnx_int8,
    onnx_int8_dynamic,
    openvino_float16,
    openvino_int8,
)
from .program import digest


OPSET = 18
"""Of ONNX. The exporter cannot write a lower one; higher ones run GridSample on the CPU in ONNX Runtime's CUDA."""

Program = torch.export.ExportedProgram


def convert_to_onnx(program: Program) -> Any:
    """Convert to an ONNX model without the names of local source files."""
    with quiet_loggers("torch.onnx", "onnxscript", "onnx_ir"):
        exported = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=INPUTS, output_names=OUTPUTS, verbose=False
        )
    assert exported is not None
    proto = exported.model_proto
    graph = proto.graph
    # they repeat, node by node, the names of modules and of local source files
    for part in (graph, *graph.node, *graph.value_info, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    pixel_values = graph.input[0].type.tensor_type.shape.dim
    names = {pixel_values[axis].dim_param: name for axis, name in ((0, "batch"), (2, "height"), (3, "width"))}
    for value in (*graph.value_info, *graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    return proto


def save_onnx(proto: Any, path: Path, facts: Mapping[str, Any]) -> None:
    """Write an ONNX file with all weights and facts in it."""
    proto.ClearField("metadata_props")
    proto.metadata_props.add(key=METADATA_KEY, value=json.dumps(facts))
    path.write_bytes(proto.SerializeToString())


def load_onnx(path: Path) -> Any:
    """Read an ONNX file."""
    return import_extra("onnx", "export", "reading an ONNX file").load(path)


def onnx_contents(proto: Any) -> Iterator[bytes]:
    """Yield the values of all weights."""
    to_array = import_extra("onnx", "export", "reading an ONNX file").numpy_helper.to_array
    return (to_array(each).tobytes() for each in proto.graph.initializer)


def convert_to_openvino(program: Program) -> Any:
    """Convert to an OpenVINO model."""
    model = import_extra("openvino", "openvino", "writing an OpenVINO model").convert_model(program)
    for port, name in zip((*model.inputs, *model.outputs), (*INPUTS, *OUTPUTS), strict=True):
        port.get_tensor().set_names({name})
    return model


def save_openvino(model: Any, path: Path, facts: Mapping[str, Any]) -> None:
    """Write an OpenVINO model and facts into a directory."""
    model.set_rt_info(json.dumps(facts), [METADATA_KEY])
    import_extra("openvino", "openvino", "writing an OpenVINO model").save_model(
        model, path / OPENVINO_FILE, compress_to_fp16=False
    )


def load_openvino(path: Path) -> Any:
    """Read the OpenVINO model in a directory."""
    return import_extra("openvino", "openvino", "reading an OpenVINO model").Core().read_model(path / OPENVINO_FILE)


def openvino_contents(model: Any) -> Iterator[bytes]:
    """Yield the values of all weights."""
    return (each.get_data().tobytes() for each in model.get_ops() if each.get_type_name() == "Constant")


def convert_to_archive(program: Program) -> bytes:
    """Convert to the archive of `torch.export.save`."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    return buffer.getvalue()


def compile_archive(program: Program) -> bytes:
    """Compile for this machine with AOTInductor; takes minutes and needs a C++ compiler."""
    with tempfile.TemporaryDirectory() as folder, quiet_loggers("torch.utils.cpp_extension"):
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(Path(folder, "model.pt2")))
        return Path(path).read_bytes()


def save_archive(archive: bytes, path: Path, facts: Mapping[str, Any]) -> None:
    """Write an archive with facts in it, as one of its extra files."""
    path.write_bytes(archive)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(in_archive(file, f"extra/{METADATA_KEY}"), json.dumps(facts))


def archive_contents(archive: bytes) -> Iterator[bytes]:
    """Yield all files in an archive but the facts."""
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        for name in file.namelist():
            if not name.endswith(f"extra/{METADATA_KEY}"):
                yield file.read(name)


@dataclass(frozen=True)
class Format:
    """A format of exported models. Its functions pass a model in memory, of a type of the format's library.

    Args:
        suffix (`str`): Of the file; empty for a directory.
        extra (`str`): The extra of this package that installs `packages`.
        packages (`tuple[str, ...]`): Needed to write and to run it.
        convert (`Callable`): Converts a program.
        save (`Callable`): Writes the model and facts to a path.
        load (`Callable`): Reads the model again.
        contents (`Callable`): Yields what the model consists of, which a changed weight changes.
        reduce (`dict[str, Reduce]`, *optional*): Functions that reduce the precision, by its name.
        packages_of_precision (`dict[str, tuple[str, ...]]`, *optional*): Needed to reduce the precision, by its name.
        attention (`str`, *optional*, defaults to `"grid_sample"`): The form of the operator that is used by default.
    """

    suffix: str
    extra: str
    packages: tuple[str, ...]
    convert: Callable[[Program], Any]
    save: Callable[[Any, Path, Mapping[str, Any]], None]
    load: Callable[[Path], Any]
    contents: Callable[[Any], Iterator[bytes]]
    reduce: Mapping[str, Reduce] = field(default_factory=dict)
    packages_of_precision: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    attention: str = "grid_sample"

    def write(self, model: Any, path: Path, facts: Mapping[str, Any]) -> None:
        """Write a model with facts and the digest of its contents."""
        self.save(model, path, {**facts, "content_sha256": digest(self.contents(model))})


_ONNX_PRECISIONS = {"float16": onnx_float16, "int8": onnx_int8, "int8_dynamic": onnx_int8_dynamic}
_OPENVINO_PRECISIONS = {"float16": openvino_float16, "int8": openvino_int8}
_ARCHIVE: dict[str, Any] = {"save": save_archive, "load": Path.read_bytes, "contents": archive_contents}

FORMATS = {
    "onnx": Format(
        ".onnx",
        "export",
        ("onnx", "onnxscript", "onnxruntime"),
        convert_to_onnx,
        save_onnx,
        load_onnx,
        onnx_contents,
        _ONNX_PRECISIONS,
    ),
    "openvino": Format(
        "",
        "openvino",
        ("openvino",),
        convert_to_openvino,
        save_openvino,
        load_openvino,
        openvino_contents,
        _OPENVINO_PRECISIONS,
        {"int8": ("nncf",)},
    ),
    "pt2": Format(".pt2", "export", (), convert_to_archive, **_ARCHIVE),
    "aoti": Format(".pt2", "export", (), compile_archive, **_ARCHIVE, attention="compiled"),
}
PRECISIONS = ("float32", *_ONNX_PRECISIONS)


def format_of(path: Path) -> Format:
    """Return the format of an exported model."""
    suffix = "" if path.is_dir() else path.suffix
    return next(each for each in FORMATS.values() if each.suffix == suffix)
