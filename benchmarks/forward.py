"""Time and memory of one forward pass: ours, without compiled operators, prepared, and transformers' Deformable DETR.

    python benchmarks/forward.py [--height 800] [--width 1066] [--rounds 5]
    python benchmarks/forward.py --backbone swin-l
    python benchmarks/forward.py --avx2
    python benchmarks/forward.py --device cuda --precision bf16 --compile

All are two-stage with box refinement: ResNet-50 unless `--backbone` says otherwise, 4 levels, 6 + 6 layers, 900
queries, 91 classes, random weights. Each model lives in a process of its own, so that its peak memory is its own;
their runs are interleaved, one pass at a time, and the medians are compared.
"""

import argparse
import functools
import os
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig, SwinConfig

from common.interleave import Candidate, interleave
from common.machine import write_result
from common.precision import PRECISIONS, use_precision
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from hf_dino.conversion.settings import BACKBONES
from hf_dino.inference import prepare_for_inference


DEFAULT = ["cpu", "fp32"]
SHAPE: dict[str, Any] = {"num_queries": 900, "num_labels": 91}
BACKBONE = {"out_features": ["stage2", "stage3", "stage4"]}
SMALL: dict[str, Any] = {  # to check that everything works
    "backbone_config": ResNetConfig(**BACKBONE, embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1]),
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "num_queries": 9,
}

SWIN_L = {**BACKBONES["swin_L_384_22k"], "out_indices": [2, 3, 4]}
BACKBONES_BY_NAME: dict[str, dict[str, Any]] = {  # fields of both configurations
    "resnet-50": {},
    "swin-l": {"backbone_config": SwinConfig(**{key: value for key, value in SWIN_L.items() if key != "model_type"})},
}

MakeModel = Callable[[], torch.nn.Module]


def make_ours(**overrides: Any) -> torch.nn.Module:
    return DinoDetrForObjectDetection(DinoDetrConfig(**SHAPE | overrides))


def make_transformers(num_queries: int = SHAPE["num_queries"], **overrides: Any) -> torch.nn.Module:
    fields: dict[str, Any] = {
        "backbone_config": ResNetConfig(**BACKBONE),
        "two_stage": True,
        "two_stage_num_proposals": num_queries,
        "with_box_refine": True,
        "encoder_ffn_dim": 2048,
        "decoder_ffn_dim": 2048,
        "auxiliary_loss": True,
    }
    return DeformableDetrForObjectDetection(
        DeformableDetrConfig(**SHAPE | {"num_queries": num_queries} | fields | overrides)
    )


def make_candidates(build: Callable[[MakeModel], Any], **overrides: Any) -> dict[str, Candidate]:
    """Return our model and the models that it is compared with; ours comes first.

    Args:
        build (`Callable`): Takes a function that makes a model, and returns the function to measure.
        overrides: Fields of both configurations, such as those of `SMALL`.
    """
    ours, peer = (partial(make, **overrides) if overrides else make for make in (make_ours, make_transformers))
    return {
        "hf_dino": (partial(build, ours), {"HF_DINO_KERNELS": "require"}),
        "hf_dino_reference": (partial(build, ours), {"HF_DINO_KERNELS": "off"}),
        "transformers": (partial(build, peer), {}),
    }


@functools.cache
def _made(make: MakeModel) -> torch.nn.Module:
    torch.manual_seed(0)
    return make()


def make_model(make: MakeModel, device: str = "cpu", compiled: bool = False) -> Any:
    """Return a new model on a device. Its initial weights, which take seconds, are computed once per process."""
    model: Any = deepcopy(_made(make)).to(device)
    if compiled:  # as hf_dino.training does, which needs more packages
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            layer.compile(dynamic=True)
    return model


def make_pass(
    make: MakeModel,
    pixel_values: torch.Tensor,
    device: str = "cpu",
    precision: str = "fp32",
    compiled: bool = False,
    prepare: Callable[[Any], Any] = lambda model: model,
) -> Callable[[], None]:
    model, pixel_values = prepare(make_model(make, device, compiled).eval()), pixel_values.to(device)

    def run() -> None:
        with torch.no_grad(), use_precision(precision, device):
            model(pixel_values)

    return run


def random_images(batch_size: int, height: int, width: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(0))


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the device and precision of a whole model."""
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the models run (default: cpu)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="arithmetic (default: fp32)")
    parser.add_argument("--compile", action="store_true", help="compile the layers of all models with torch.compile")
    kept = "have glibc keep freed memory, as the commands of hf-dino do, in the processes of all models"
    parser.add_argument("--keep-freed-memory", action="store_true", help=kept)


def set_environment(args: argparse.Namespace) -> None:
    """Set what the processes of the models inherit; glibc and the libraries read it when they start."""
    if args.keep_freed_memory:
        os.environ.update(MALLOC_MMAP_MAX_="0", MALLOC_TRIM_THRESHOLD_=str(2**31 - 1))
    if getattr(args, "avx2", False):
        os.environ.update({"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2"})
        os.environ.update({"MKL_ENABLE_INSTRUCTIONS": "AVX2", "HF_DINO_CPU_CAPABILITY": "avx2"})


def command_of(name: str, args: argparse.Namespace) -> str:
    """Return the command line that repeats a run."""
    values = {option.replace("_", "-"): value for option, value in vars(args).items() if value is not False}
    options = [f"--{option}" if value is True else f"--{option} {value}" for option, value in values.items()]
    return " ".join([f"python benchmarks/{name}.py", *options])


def result_name(name: str, args: argparse.Namespace) -> str:
    """Return the name of a result, without a suffix for what is the default."""
    where = [args.device, args.precision]
    where += [name for name in ("compile", "keep_freed_memory", "avx2") if getattr(args, name, False)]
    backbone = getattr(args, "backbone", "resnet-50").replace("-", "_")
    return "_".join([name, *([backbone] if backbone != "resnet_50" else []), *(where if where != DEFAULT else [])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1, help="number of images (default: 1)")
    parser.add_argument("--height", type=int, default=800, help="of the images, in pixels (default: 800)")
    parser.add_argument("--width", type=int, default=1066, help="of the images, in pixels (default: 1066)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each model (default: 5)")
    parser.add_argument("--backbone", choices=BACKBONES_BY_NAME, default="resnet-50", help="(default: resnet-50)")
    limit = "limit all models to the instructions of a CPU without AVX-512"
    parser.add_argument("--avx2", action="store_true", help=limit)
    add_device_options(parser)
    args = parser.parse_args()

    set_environment(args)
    overrides = BACKBONES_BY_NAME[args.backbone]
    images = random_images(args.batch_size, args.height, args.width)
    where: dict[str, Any] = {"device": args.device, "precision": args.precision, "compiled": args.compile}
    candidates = make_candidates(partial(make_pass, pixel_values=images, **where), **overrides)
    if args.device == "cpu":
        ours = partial(make_ours, **overrides)
        prepared = partial(make_pass, ours, images, **where, prepare=prepare_for_inference)
        candidates["hf_dino_prepared"] = (prepared, {"HF_DINO_KERNELS": "require"})
    content = interleave(candidates, args.rounds, args.device)
    write_result(result_name("forward", args), command_of("forward", args), content)


if __name__ == "__main__":
    main()
