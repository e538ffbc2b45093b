"""Run exported models: files that `hf-dino export` wrote, called as the model is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BaseImageProcessor

from .configuration_dino_detr import DinoDetrConfig
from .image_processing_dino_detr import DinoDetrImageProcessor
from .modeling_dino_detr import DinoDetrObjectDetectionOutput
from .utils.errors import InputError, import_extra


METADATA_KEY = "hf_dino"
INPUTS, OUTPUTS = ("pixel_values", "pixel_mask"), ("logits", "pred_boxes")
OPENVINO_FILE = "model.xml"


class Session(NamedTuple):
    r"""
    An exported model in the program that runs it.

    Args:
        run (`Callable`): Maps `pixel_values` and `pixel_mask` to the outputs.
        facts (`dict[str, Any]`): What the file states about its model: `config`, `processor`, `least_edge` and more.
    """

    run: Callable[..., list[Any]]
    facts: dict[str, Any]


class QuerySelectionMode(TorchDispatchMode):
    """Record which encoder tokens a PyTorch model selects as queries; or make it select given ones.

    Args:
        forced (`torch.Tensor` of shape `(batch_size, num_queries)`, *optional*): Tokens to select, by rank.
    """

    def __init__(self, forced: torch.Tensor | None = None):
        super().__init__()
        self.forced = forced
        self.scores: list[torch.Tensor] = []  # of all tokens, (batch_size, sequence_length); empty without a selection
        self.selected: list[torch.Tensor] = []  # (batch_size, num_queries)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is not torch.ops.aten.topk.default:
            return result
        if self.forced is not None:
            result = (args[0].gather(1, self.forced), self.forced)
        self.scores.append(args[0])
        self.selected.append(result[1])
        return result


def open_onnx(path: Path, *, with_selection: bool = False) -> Session:
    """Open an ONNX file in ONNX Runtime, on the CPU."""
    onnxruntime = import_extra("onnxruntime", "export", "running an ONNX file")
    source = _add_selection(path) if with_selection else str(path)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])

    def run(*inputs: torch.Tensor) -> list[Any]:
        return session.run(None, {name: each.numpy() for name, each in zip(INPUTS, inputs, strict=True)})

    return Session(run, json.loads(session.get_modelmeta().custom_metadata_map[METADATA_KEY]))


def _add_selection(path: Path) -> bytes:
    """Return an ONNX model that also returns the indices of the selected tokens."""
    onnx = import_extra("onnx", "export", "verifying an ONNX file")
    model = onnx.load(path)
    selections = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
    int64 = onnx.TensorProto.INT64
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, int64, None) for name in selections)
    return model.SerializeToString()


def open_openvino(path: Path, *, with_selection: bool = False) -> Session:
    """Open a directory with an OpenVINO model, on the CPU, in float32."""
    openvino = import_extra("openvino", "openvino", "running an OpenVINO model")
    core = openvino.Core()
    model = core.read_model(path / OPENVINO_FILE)
    if with_selection:
        model.add_outputs([each.output(1) for each in model.get_ops() if each.get_type_name() == "TopK"])
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(*inputs: torch.Tensor) -> list[Any]:
        return list(compiled([each.numpy() for each in inputs]).to_tuple())

    return Session(run, json.loads(model.get_rt_info([METADATA_KEY]).astype(str)))


def open_program(path: Path, *, with_selection: bool = False) -> Session:
    """Open a program of `torch.export`, on the CPU."""
    files = {METADATA_KEY: ""}
    module = torch.export.load(path, extra_files=files).module()

    def run(*inputs: torch.Tensor) -> list[Any]:
        with torch.no_grad(), QuerySelectionMode() as mode:
            return [*module(*inputs), *(mode.selected if with_selection else [])]

    return Session(run, json.loads(files[METADATA_KEY]))


READERS: dict[str, Callable[..., Session]] = {".onnx": open_onnx, ".pt2": open_program, "": open_openvino}
"""Functions that open exported models by suffix; a directory has none."""


def is_exported(path: str | Path) -> bool:
    """Return whether a path names an exported model, and not a model directory or a name on the Hub."""
    return Path(path, OPENVINO_FILE).is_file() or Path(path).suffix in READERS.keys() - {""}


class ExportedDetector:
    """An exported model with the call of [`DinoDetrForObjectDetection`]; it runs on the CPU.

    Args:
        path (`str` or `Path`): A `.onnx` or `.pt2` file, or a directory with an OpenVINO model.

    Attributes:
        config ([`DinoDetrConfig`]): Of the exported model.
        processor ([`DinoDetrImageProcessor`]): Its image processor.

    Raises:
        InputError: If there is no file, or one that `hf-dino export` did not write.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.exists() or not is_exported(self.path):
            raise InputError(f"{path}: is not an exported model, a .onnx or .pt2 file or a directory of OpenVINO")
        try:
            self.session = READERS["" if self.path.is_dir() else self.path.suffix](self.path)
        except ImportError:
            raise
        except Exception as error:  # each library has errors of its own
            reason = str(error).strip().partition("\n")[0]
            raise InputError(f"{path}: is damaged, or was not written by `hf-dino export` ({reason})") from error
        self.config = DinoDetrConfig(**self.session.facts["config"])
        self.processor = DinoDetrImageProcessor(**self.session.facts["processor"])

    def to(self, device: str | torch.device) -> "ExportedDetector":
        """Return the model itself for the CPU.

        Raises:
            RuntimeError: For any other device.
        """
        if torch.device(device).type != "cpu":
            raise RuntimeError("exported models run on the CPU here")
        return self

    def __call__(
        self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None
    ) -> DinoDetrObjectDetectionOutput:
        """Return `logits` and `pred_boxes`.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`): As the image processor makes them.
            pixel_mask (`torch.Tensor` of shape `(batch_size, height, width)`, *optional*): 1 is image, 0 is padding.

        Raises:
            InputError: If the images are too small for the model.
        """
        mask = torch.ones_like(pixel_values[:, 0]) if pixel_mask is None else pixel_mask
        height, width = pixel_values.shape[-2:]
        facts = self.session.facts
        problem = f"edges must have {facts['least_edge']} pixels"
        outputs: list[Any] = []
        if min(height, width) >= facts["least_edge"]:
            try:
                outputs = self.session.run(pixel_values.float().contiguous(), mask.long().contiguous())
            except Exception as error:  # each library has errors of its own
                problem = str(error).strip().partition("\n")[0]
        if not outputs or outputs[0].shape[1] != self.config.num_queries:
            raise InputError(
                f"{self.path}: cannot process an image of {height} x {width} pixels ({problem}); square images must "
                f"have at least {facts['least_size']} x {facts['least_size']}"
            )
        logits, boxes = map(torch.as_tensor, outputs)
        return DinoDetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)


def load_exported(path: str | Path) -> tuple[ExportedDetector, BaseImageProcessor]:
    """Load an exported model and its image processor, as `load_model_and_processor` loads others.

    Args:
        path (`str` or `Path`): A `.onnx` or `.pt2` file, or a directory with an OpenVINO model.

    Raises:
        InputError: If there is no file, or one that `hf-dino export` did not write.
    """
    model = ExportedDetector(path)
    return model, model.processor
