"""Run the operator forward and backward once, for compute-sanitizer and ncu.

python -m gpu_stages.operator_once --device cuda --size small
"""

import argparse
import itertools
from typing import Any

import torch

from deformable_attention_accuracy import run_form
from deformable_attention_inputs import Case, Inputs
from gpu_stages.correctness import FORMS, attend


# shapes, numbers of images, dtypes, forms, image size
SIZES: dict[str, tuple[Any, ...]] = {
    "small": (("encoder-4scale", "decoder-900"), (2,), ("float32", "bfloat16"), FORMS, (96, 136)),
    "large": (("encoder-4scale", "decoder-900"), (2,), ("float32", "bfloat16"), ("fused",), (800, 1333)),
    "tiny": (("encoder-4scale",), (1,), ("float32",), ("fused",), (64, 96)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True, help="where the operator runs")
    parser.add_argument("--size", choices=SIZES, required=True, help="which shapes and dtypes")
    parser.add_argument("--deterministic", action="store_true", help="also with PyTorch's deterministic mode")
    args = parser.parse_args()

    *options, image_size = SIZES[args.size]
    for deterministic, (shape, batch, dtype, form) in itertools.product(
        [False, *([True] if args.deterministic else [])], itertools.product(*options)
    ):
        inputs = Inputs(Case(shape, batch, dtype, image_size), args.device)
        torch.use_deterministic_algorithms(deterministic)
        outputs, gradients = run_form(form, lambda *given, form=form: attend(form, args.device, *given), inputs, True)
        assert all(tensor.isfinite().all() for tensor in (*outputs, *gradients))
        torch.use_deterministic_algorithms(False)
        print(f"{shape} {dtype} {form} {deterministic=}: done", flush=True)


if __name__ == "__main__":
    main()
