"""The first steps of training from scratch, over many seeds: with which schedule and weights the box loss falls.

    OMP_NUM_THREADS=1 python benchmarks/from_scratch.py [--dataset DIR] [--variants one_cycle full_rate] [--seeds 1 2]

Trains a small DINO (ConvNeXt of widths 24 to 192, width 128, 2 + 3 layers, 100 queries) from fresh weights with 40
steps of 8 images, in the order of the files, resized to 256 x 192 and not augmented. Only the seed of the weights and
of the denoising noise differs between the runs of a variant. Without `--dataset` it trains on generated `shapes`.

The result has one row per run: the mean box loss (L1) of the last decoder layer over the last five steps, every fifth
value of it, and the mean side of the selected proposals in the first and in the last step, as a fraction of the image.
It is written after each run; a run that is already in the file is not repeated.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from common.machine import RESULTS, save_result
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection
from hf_dino.data import AnnotatedImage, read_data
from hf_dino.data.shapes import generate_shapes
from hf_dino.query_selection_dino_detr import PROPOSAL_BASE_SIZE
from hf_dino.training.optim import get_lr_multiplier


WIDTH, HEIGHT, BATCH_SIZE, NUM_IMAGES = 256, 192, 8, 292
THRESHOLD = 0.2  # of the box loss: a run above it has not left the plateau

CONVNEXT = {
    "model_type": "convnext",
    "hidden_sizes": [24, 48, 96, 192],
    "depths": [1, 1, 2, 1],
    "out_features": ["stage2", "stage3", "stage4"],
}
SMALL: dict[str, Any] = {
    "num_feature_levels": 3,
    "d_model": 128,
    "encoder_layers": 2,
    "encoder_ffn_dim": 256,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 256,
    "decoder_attention_heads": 4,
    "num_queries": 100,
    "num_denoising": 50,
}

Labels = list[dict[str, torch.Tensor]]
Model = DinoDetrForObjectDetection


class Data(NamedTuple):
    """Resized images, `(num_images, 3, height, width)` uint8, with their labels, which are category ids."""

    images: torch.Tensor
    labels: Labels
    num_labels: int

    def batch(self, step: int) -> tuple[torch.Tensor, Labels]:
        rows = [(BATCH_SIZE * step + index) % len(self.images) for index in range(BATCH_SIZE)]
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
        return (self.images[rows] / 255 - mean) / std, [self.labels[row] for row in rows]


def as_it_is(model: Model, data: Data) -> None:
    """Train the weights that a new model has."""


@torch.no_grad()
def know_sizes(model: Any, data: Data) -> None:
    """Let query selection start at the mean size of the objects, for proposals of the middle level."""
    sizes = torch.cat([label["boxes"] for label in data.labels])[:, 2:].logit(1e-3)
    model.model.query_selection.bbox_embed.layers[-1].bias[2:] = sizes.mean(dim=0) - logit(2 * PROPOSAL_BASE_SIZE)


@torch.no_grad()
def balance_levels(model: Any, data: Data) -> None:
    """Make the mean scores of all levels equal, so that the best tokens come from all of them."""
    selection, sizes, tokens = model.model.query_selection, [], []
    hooks = [
        selection.enc_output_norm.register_forward_hook(lambda _, args, output: tokens.append(output)),
        selection.register_forward_pre_hook(lambda _, args: sizes.extend(args[1].spatial_shapes.prod(1).tolist())),
    ]
    model.eval()(data.batch(0)[0])
    model.train()
    for hook in hooks:
        hook.remove()
    means = torch.stack([level.mean(dim=(0, 1)) for level in tokens[0].split(sizes, dim=1)])
    between_levels = torch.linalg.svd(means - means.mean(dim=0), full_matrices=False).Vh[: len(sizes) - 1]
    weight = selection.class_embed.weight
    weight -= weight @ between_levels.T @ between_levels


def zero_scores(model: Any, data: Data) -> None:
    """Score all tokens alike at first."""
    nn.init.zeros_(model.model.query_selection.class_embed.weight)


def logit(fraction: float) -> float:
    return math.log(fraction / (1 - fraction))


class Variant(NamedTuple):
    """A way to train; the defaults are those of the official implementation's recorded 40 steps."""

    schedule: str = "official"
    learning_rate: float = 6e-4
    warmup_steps: int = 0
    total_steps: int = 1800
    max_grad_norm: float = 1.0
    backbone: dict[str, Any] = {}
    prepare: Callable[[Model, Data], None] = as_it_is


LAYER_SCALE = {"layer_scale_init_value": 1.0}
VARIANTS = {
    "one_cycle": Variant(),
    "full_rate": Variant("multi_step"),
    "full_rate_4e-4": Variant("multi_step", learning_rate=4e-4),
    "full_rate_3e-4": Variant("multi_step", learning_rate=3e-4),
    "full_rate_2e-4": Variant("multi_step", learning_rate=2e-4),
    "full_rate_clip_0.1": Variant("multi_step", max_grad_norm=0.1),
    "full_rate_layer_scale_1": Variant("multi_step", backbone=LAYER_SCALE),
    "full_rate_balanced": Variant("multi_step", prepare=balance_levels),
    "warmup_10": Variant("multi_step", warmup_steps=10),
    "warmup_20": Variant("multi_step", warmup_steps=20),
    "one_cycle_200_steps": Variant(total_steps=200),
    "one_cycle_layer_scale_1": Variant(backbone=LAYER_SCALE),
    "one_cycle_known_sizes": Variant(prepare=know_sizes),
    "one_cycle_balanced": Variant(prepare=balance_levels),
    "one_cycle_zero_scores": Variant(prepare=zero_scores),
}


def read_images(dataset: Path) -> Data:
    splits = read_data(dataset, splits=("train", "validation")).values()
    records = [record for split in splits for record in split.images][:NUM_IMAGES]
    num_labels = 1 + max(category_id for split in splits for category_id in split.categories)
    return Data(torch.stack([resized(each) for each in records]), [labels_of(each) for each in records], num_labels)


def resized(record: AnnotatedImage) -> torch.Tensor:
    pixels = np.array(record.read().resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def labels_of(record: AnnotatedImage) -> dict[str, torch.Tensor]:
    corners, sizes = torch.from_numpy(record.clipped_boxes).split(2, dim=1)
    boxes = torch.cat([corners + sizes / 2, sizes], dim=1) / torch.tensor([record.width, record.height] * 2)
    return {"class_labels": torch.from_numpy(record.category_ids).long(), "boxes": boxes.float()}


def make_model(variant: Variant, seed: int, num_labels: int) -> Model:
    torch.manual_seed(seed)
    names = {label: f"category {label}" for label in range(num_labels)}
    fields = SMALL | {"backbone_config": CONVNEXT | variant.backbone, "id2label": names}
    return DinoDetrForObjectDetection(DinoDetrConfig(**fields)).train()


def make_optimizer(variant: Variant, parameters: list[nn.Parameter]) -> tuple[Any, Any]:
    optimizer = torch.optim.AdamW(parameters, lr=variant.learning_rate, weight_decay=1e-4)
    if variant.schedule == "official":  # torch's also cycles the first beta of AdamW
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(
            optimizer, variant.learning_rate, variant.total_steps, pct_start=0.2
        )
    multiplier = get_lr_multiplier(
        variant.schedule, total_steps=variant.total_steps, warmup_steps=variant.warmup_steps
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)


def train(variant: Variant, seed: int, data: Data, steps: int) -> Iterator[tuple[float, float]]:
    """Yield the box loss of each step, and the mean side of the proposals that it started from."""
    model = make_model(variant, seed, data.num_labels)
    variant.prepare(model, data)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, schedule = make_optimizer(variant, parameters)
    for step in range(steps):
        pixel_values, labels = data.batch(step)
        outputs = model(pixel_values, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        nn.utils.clip_grad_norm_(parameters, variant.max_grad_norm)
        optimizer.step()
        schedule.step()
        yield outputs.loss_dict["loss_bbox"].item(), outputs.init_reference_points[..., 2:].mean().item()


def measure(name: str, seed: int, data: Data, steps: int) -> dict[str, Any]:
    started = time.process_time()
    losses, sides = zip(*train(VARIANTS[name], seed, data, steps))
    return {
        "variant": name,
        "seed": seed,
        "steps": steps,
        "box_loss": round(statistics.mean(losses[-5:]), 4),
        "box_losses": [round(loss, 3) for loss in losses[::5]],
        "first_side": round(sides[0], 4),
        "last_side": round(sides[-1], 4),
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def summarize(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, of each variant and number of steps, the number of seeds, of those below the threshold, and losses."""
    losses: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        losses.setdefault((row["variant"], row["steps"]), []).append(row["box_loss"])
    return [
        {
            "variant": name,
            "steps": steps,
            "seeds": len(values),
            "below_threshold": sum(value < THRESHOLD for value in values),
            "median": round(statistics.median(values), 4),
            "worst": max(values),
        }
        for (name, steps), values in losses.items()
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, help="dataset in a format that hf-dino reads (default: shapes)")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=["one_cycle", "full_rate"], metavar="NAME",
        help=f"{', '.join(VARIANTS)} (default: one_cycle full_rate)",
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 21)), help="default: 1 to 20")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of a run (default: 40)")
    parser.add_argument("--output", type=Path, help="file to write (default: benchmarks/results/from_scratch*.json)")
    args = parser.parse_args(arguments)

    with ExitStack() as stack:
        dataset = args.dataset or generate_shapes(
            Path(stack.enter_context(tempfile.TemporaryDirectory())) / "shapes", num_train=NUM_IMAGES, num_val=1
        )
        data = read_images(dataset)
    output = args.output or RESULTS / f"from_scratch_{dataset.name}.json"
    rows = json.loads(output.read_text())["rows"] if output.exists() else []
    done = {(row["variant"], row["seed"], row["steps"]) for row in rows}
    command = "python benchmarks/from_scratch.py" + (f" --dataset {dataset.name}" if args.dataset else "")
    for seed in args.seeds:
        for name in args.variants:
            if (name, seed, args.steps) not in done:
                rows.append(measure(name, seed, data, args.steps))
                print(json.dumps(rows[-1]), flush=True)
                rows.sort(key=lambda row: (list(VARIANTS).index(row["variant"]), row["steps"], row["seed"]))
                save_result(output, command, {"threshold": THRESHOLD, "summary": summarize(rows), "rows": rows})


if __name__ == "__main__":
    main()
