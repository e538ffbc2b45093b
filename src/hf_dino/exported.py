"""Run exported models: files that `hf-dino export` wrote, called as the model is."""

import json
import logging
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BaseImageProcessor

from .configuration_dino_detr import DinoDetrConfig
from .image_processing_dino_detr import DinoDetrImageProcessor, DinoDetrImageProcessorPil
from .kernels import operators
from .modeling_dino_detr import DinoDetrObjectDetectionOutput
from .utils.errors import InputError, import_extra


METADATA_KEY = "hf_dino"
INPUTS, OUTPUTS = ("pixel_values", "pixel_mask"), ("logits", "pred_boxes")
OPENVINO_FILE = "model.xml"

FACTS = ("attention", "config", "content_sha256", "least_edge", "least_size", "model_sha256", "precision", "processor")
"""What a file must state to be run and verified; files of earlier versions state less."""


class Session(NamedTuple):
    r"""
    An exported model in the program that runs it.

    Args:
        run (`Callable`): Maps `pixel_values` and `pixel_mask` to the outputs.
        facts (`dict[str, Any]`): What the file states about its model: `config`, `processor`, `least_edge` and more.
        runtime (`str`): Name and version of the program, and where it runs.
    """

    run: Callable[..., list[Any]]
    facts: dict[str, Any]
    runtime: str


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


def open_onnx(path: Path, device: str, threads: int, *, with_selection: bool = False) -> Session:
    """Open an ONNX file in ONNX Runtime, on the CPU or a CUDA device."""
    onnxruntime = import_extra("onnxruntime", "export", "running an ONNX file")
    kind, _, index = device.partition(":")
    provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(kind, kind)
    if provider not in onnxruntime.get_available_providers():
        raise _not_available(device, "onnxruntime", onnxruntime.get_available_providers(), "onnxruntime-gpu has cuda")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    source = _add_selection(path) if with_selection else str(path)
    providers = [(provider, {"device_id": index} if index else {}), "CPUExecutionProvider"][: 2 - (kind == "cpu")]
    session = onnxruntime.InferenceSession(source, options, providers=providers)
    if session.get_providers()[0] != provider:  # it falls back to the CPU where a library of CUDA is missing
        raise _not_available(device, "onnxruntime", session.get_providers(), "it could not load the others")

    def run(*inputs: torch.Tensor) -> list[Any]:
        return session.run(None, {name: each.numpy() for name, each in zip(INPUTS, inputs, strict=True)})

    facts = _read_facts(path, session.get_modelmeta().custom_metadata_map[METADATA_KEY])
    return Session(run, facts, f"ONNX Runtime {onnxruntime.__version__}, {provider}")


def _read_facts(path: Path, text: str | bytes) -> dict[str, Any]:
    """Return what a file states about its model.

    Raises:
        InputError: If it lacks something.
    """
    facts = json.loads(text)
    if missing := [name for name in FACTS if name not in facts]:
        raise InputError(f"{path}: was written by an older hf_dino, without {missing[0]}; export the model again")
    return facts


def _not_available(device: str, package: str, available: Iterable[str], hint: str) -> InputError:
    return InputError(f"--device {device}: the installed {package} has only {', '.join(available)}; {hint}")


def _add_selection(path: Path) -> bytes:
    """Return an ONNX model that also returns the indices of the selected tokens."""
    onnx = import_extra("onnx", "export", "verifying an ONNX file")
    model = onnx.load(path)
    selections = [node.output[1] for node in model.graph.node if node.op_type == "TopK"]
    int64 = onnx.TensorProto.INT64
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, int64, None) for name in selections)
    return model.SerializeToString()


def open_openvino(path: Path, device: str, threads: int, *, with_selection: bool = False) -> Session:
    """Open a directory with an OpenVINO model, in float32, on the CPU or another device of OpenVINO."""
    openvino = import_extra("openvino", "openvino", "running an OpenVINO model")
    core = openvino.Core()
    if device.upper() not in core.available_devices:
        raise _not_available(device, "openvino", [each.lower() for each in core.available_devices], "choose one")
    core.set_property({"ENABLE_MMAP": False})  # the file may be replaced while it is open
    model = core.read_model(path / OPENVINO_FILE)
    if with_selection:
        model.add_outputs([each.output(1) for each in model.get_ops() if each.get_type_name() == "TopK"])
    settings = {"INFERENCE_PRECISION_HINT": "f32"} | ({"INFERENCE_NUM_THREADS": threads} if threads else {})
    compiled = core.compile_model(model, device.upper(), settings)

    def run(*inputs: torch.Tensor) -> list[Any]:
        return list(compiled([each.numpy() for each in inputs]).to_tuple())

    facts = _read_facts(path, model.get_rt_info([METADATA_KEY]).astype(str))
    return Session(run, facts, f"OpenVINO {openvino.__version__.partition('-')[0]}, {device.upper()}")


def open_archive(path: Path, device: str, threads: int, *, with_selection: bool = False) -> Session:
    """Open a program of `torch.export`, or one that AOTInductor compiled for this machine, on the CPU."""
    if device != "cpu":
        raise _not_available(device, "hf_dino runs .pt2 files and", ["cpu"], "leave it out")
    with zipfile.ZipFile(path) as file:
        facts = _read_facts(path, file.read(in_archive(file, f"extra/{METADATA_KEY}")))
        is_compiled = any("/data/aotinductor/" in name for name in file.namelist())
    if facts["attention"] == "compiled" and operators("cpu") is None:
        raise InputError(f"{path}: needs the compiled kernel, see hf-dino kernels")
    load = torch._inductor.aoti_load_package if is_compiled else lambda path: torch.export.load(path).module()
    with quiet_loggers("torch.utils.cpp_extension"):
        module: Callable[..., Any] = load(str(path))

    def run(*inputs: torch.Tensor) -> list[Any]:
        with torch.no_grad(), QuerySelectionMode() as mode:
            outputs = [*module(*inputs), *mode.selected]
        return outputs if with_selection else outputs[: len(OUTPUTS)]

    name = "AOTInductor" if is_compiled else "torch.export"
    return Session(run, facts, f"PyTorch {torch.__version__.partition('+')[0]}, {name}, CPU")


@contextmanager
def quiet_loggers(*names: str) -> Iterator[None]:
    """Keep loggers from informing of each step, and from warning of a GPU that is not used."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def in_archive(file: zipfile.ZipFile, name: str) -> str:
    """Return the full name of a file in an archive of PyTorch, which has one directory."""
    return f"{file.namelist()[0].partition('/')[0]}/{name}"


READERS: dict[str, Callable[..., Session]] = {".onnx": open_onnx, ".pt2": open_archive, "": open_openvino}
"""Functions that open exported models by suffix; a directory has none."""


def open_session(path: Path, device: str = "cpu", threads: int = 0, *, with_selection: bool = False) -> Session:
    """Open an exported model.

    Args:
        path (`Path`): A `.onnx` or `.pt2` file, or a directory with an OpenVINO model.
        device (`str`, *optional*, defaults to `"cpu"`): `cuda` for ONNX Runtime, or a device of OpenVINO.
        threads (`int`, *optional*, defaults to 0): Threads of the program, 0 for its default; that of PyTorch is
            `torch.set_num_threads`.
        with_selection (`bool`, *optional*, defaults to `False`): Return the selected encoder tokens as a third output.

    Raises:
        InputError: If there is no file, one that `hf-dino export` did not write, or no such device.
    """
    if not path.exists() or not is_exported(path):
        raise InputError(f"{path}: is not an exported model, a .onnx or .pt2 file or a directory of OpenVINO")
    try:
        reader = READERS["" if path.is_dir() else path.suffix]
        return reader(path, device, threads, with_selection=with_selection)
    except (ImportError, InputError):
        raise
    except Exception as error:  # each library has errors of its own
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{path}: is damaged, or was not written by `hf-dino export` ({reason})") from error


def is_exported(path: str | Path) -> bool:
    """Return whether a path names an exported model, and not a model directory or a name on the Hub."""
    return Path(path, OPENVINO_FILE).is_file() or Path(path).suffix in READERS.keys() - {""}


class ExportedDetector(nn.Module):
    """An exported model with the call of [`DinoDetrForObjectDetection`]. Its inputs and outputs are on the CPU.

    Args:
        path (`str` or `Path`): A `.onnx` or `.pt2` file, or a directory with an OpenVINO model.
        device (`str`, *optional*, defaults to `"cpu"`): As in [`open_session`].
        threads (`int`, *optional*, defaults to 0): As in [`open_session`].

    Attributes:
        config ([`DinoDetrConfig`]): Of the exported model.
        session ([`Session`]): The program, with what the file states.

    Raises:
        InputError: If there is no file, one that `hf-dino export` did not write, or no such device.
    """

    device = torch.device("cpu")

    def __init__(self, path: str | Path, device: str = "cpu", threads: int = 0):
        super().__init__()
        self.path = Path(path)
        self.session = open_session(self.path, device, threads)
        self.config = DinoDetrConfig(**self.session.facts["config"])
        self.eval()

    def to(self, device: str | torch.device) -> "ExportedDetector":  # type: ignore[override]
        """Return the model itself for the CPU.

        Raises:
            RuntimeError: For any other device.
        """
        if torch.device(device).type != "cpu":
            raise RuntimeError("exported models run on the CPU, or on the device that they were loaded for")
        return self

    def forward(
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
                outputs = self.session.run(pixel_values.cpu().float().contiguous(), mask.cpu().long().contiguous())
            except Exception as error:  # each library has errors of its own
                problem = str(error).strip().partition("\n")[0]
        if not outputs or outputs[0].shape[1] != self.config.num_queries:
            raise InputError(
                f"{self.path}: cannot process an image of {height} x {width} pixels ({problem}); square images must "
                f"have at least {facts['least_size']} x {facts['least_size']}"
            )
        logits, boxes = map(torch.as_tensor, outputs)
        return DinoDetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)


def load_exported(
    path: str | Path, backend: str | None = None, device: str = "cpu", threads: int = 0
) -> tuple[ExportedDetector, BaseImageProcessor]:
    """Load an exported model and its image processor, as `load_model_and_processor` loads others.

    Args:
        path (`str` or `Path`): A `.onnx` or `.pt2` file, or a directory with an OpenVINO model.
        backend (`str`, *optional*): Backend of the image processor, `"torchvision"` or `"pil"`.
        device (`str`, *optional*, defaults to `"cpu"`): As in [`open_session`].
        threads (`int`, *optional*, defaults to 0): As in [`open_session`].

    Raises:
        InputError: If there is no file, one that `hf-dino export` did not write, or no such device.
    """
    model = ExportedDetector(path, device, threads)
    processor = DinoDetrImageProcessorPil if backend == "pil" else DinoDetrImageProcessor
    return model, processor(**model.session.facts["processor"])
