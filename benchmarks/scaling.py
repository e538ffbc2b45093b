"""Growth of time and memory: against tokens, queries, objects, denoising queries, images, levels, and of their parts.

    python benchmarks/scaling.py [--rounds 3]
    python benchmarks/scaling.py --only tokens queries
    python benchmarks/scaling.py --quick

Ours with the compiled kernel and transformers' Deformable DETR, two-stage with box refinement, random weights: a
forward pass, or a training step where the variable exists only in training. Tokens grow in the full model with
ResNet-50. Everything else grows in a model whose backbone is tiny and which has 1 encoder and 2 decoder layers of full
width, or what does not grow would hide what does. Parts that a whole hides are measured alone. Both live in a process
of their own, their runs are interleaved, and medians are reported; memory is what the process grew by at the peak.

Of each curve the result has two exponents, slopes on log scales: `exponent` over all sizes, by least squares, and
`exponent_at_the_end`, between the last two. A constant part makes both too small. Therefore `a + b x + c x²`, none of
them negative, is fitted with the least squares of relative errors: all work here is constant, per item or per pair of
items. `percent_at_the_end` is the part of each term in the largest size, `growth` the exponent there of all but the
constant (1 is linear, 2 quadratic), and `quadratic_from` the size at which pairs begin to cost more than items. If a
curve grows faster than the square of its size, its exponent at the end is above `growth`. Memory is no such sum: its
peak is that of the part that needs the most, and stays where it is until a part that grows needs more.

The result is written after each panel. A panel that the file already has, measured by the same code on the same
machine, is kept, unless `--only` names it: a run that was stopped goes on where it was.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import nnls
from transformers import DeformableDetrConfig, ResNetConfig
from transformers.loss import loss_deformable_detr
from transformers.models.deformable_detr import modeling_deformable_detr

from common import machine
from common.interleave import Worker, measure
from forward import MakeModel, make_ours, make_pass, make_transformers, random_images
from hf_dino import DinoDetrConfig
from hf_dino.denoising_dino_detr import empty_denoising_queries, make_decoder_attention_mask
from hf_dino.loss_dino_detr import dino_detr_loss, hungarian_match
from hf_dino.modeling_dino_detr import DinoDetrSelfAttention
from scaling_report import draw, write_table
from training_step import NUM_LABELS, make_same_step, random_batch


ROOT = Path(__file__).parents[1]
MEASURED = (
    "src/hf_dino/*_dino_detr.py",
    "kernels/csrc/**/*.*",
    "kernels/torch-ext/**/*.*",
    "benchmarks/common/*.py",
    "benchmarks/forward.py",
    "benchmarks/training_step.py",
)
ENVIRONMENTS = {"hf_dino": {"HF_DINO_KERNELS": "require"}, "transformers": {"HF_DINO_KERNELS": "off"}}
STRIDES = (4, 8, 16, 32, 64)  # of the levels
NOISE_MIB = 1.0  # memory that is less is not fitted
LAYERS = 6  # whose predictions are matched and get a loss

Work = Callable[[], Any]


def make_small(make: MakeModel, levels: int = 4, **fields: Any) -> MakeModel:
    """Return a function that makes a model whose transformer costs more than its backbone.

    The last level has a stride of 64 and the one before it a stride of 32, the coarsest of the backbone. The one and
    only level is of stride 32.
    """
    stages = [f"stage{stage}" for stage in range(min(6 - levels, 4), 5)]
    backbone = ResNetConfig(embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=stages)
    small = {"backbone_config": backbone, "num_feature_levels": levels, "encoder_layers": 1, "decoder_layers": 2}
    return partial(make, **small | fields)


def count_tokens(side: int, levels: int = 4) -> int:
    strides = STRIDES[-levels:] if levels > 1 else (32,)
    return sum((-(-side // stride)) ** 2 for stride in strides)


def grow_tokens(make: MakeModel, side: int, **fields: Any) -> Work:
    return make_pass(partial(make, **fields), random_images(1, side, side))


def grow_queries(make: MakeModel, queries: int, side: int = 608) -> Work:
    return make_pass(make_small(make, num_queries=queries, encoder_ffn_dim=256), random_images(1, side, side))


def grow_objects(make: MakeModel, objects: int, side: int = 256, **fields: Any) -> Work:
    return make_same_step(make_small(make, **fields), random_batch(side, side, 2, objects))


def grow_denoising(make: MakeModel, queries: int, side: int = 256) -> Work:
    return grow_objects(make, 10, side, num_queries=300, num_denoising=queries // 2)


def grow_batch(make: MakeModel, images: int, side: int = 256, **fields: Any) -> Work:
    return make_pass(make_small(make, **fields), random_images(images, side, side))


def grow_levels(make: MakeModel, levels: int, side: int = 512) -> Work:
    return make_pass(make_small(make, levels, num_queries=100), random_images(1, side, side))


def predictions(images: int, queries: int, objects: int) -> dict[str, Any]:
    """Return random predictions of all layers, `(images, LAYERS, queries, ...)`, and objects to be matched to them."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, LAYERS, queries, NUM_LABELS, generator=generator)
    boxes = 0.25 + 0.5 * torch.rand(images, LAYERS, queries, 4, generator=generator)
    labels = random_batch(1, 1, images, objects)["labels"]
    return {"logits": logits.requires_grad_(), "pred_boxes": boxes.requires_grad_(), "labels": labels}


def match_ours(objects: int, queries: int = 900) -> Work:
    return partial(hungarian_match, **predictions(1, queries, objects), config=DinoDetrConfig())


def match_transformers(objects: int, queries: int = 900) -> Work:
    given = predictions(1, queries, objects)
    matcher = loss_deformable_detr.DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    layers = zip(given["logits"].unbind(1), given["pred_boxes"].unbind(1))
    outputs = [{"logits": logits, "pred_boxes": boxes} for logits, boxes in layers]
    return lambda: [matcher(output, given["labels"]) for output in outputs]


def loss_ours(images: int, objects: int = 100, queries: int = 900) -> Work:
    given = predictions(images, queries, objects)
    none = torch.zeros(images, LAYERS, 0, NUM_LABELS)
    denoising: dict[str, Any] = {
        "denoising_logits": none,
        "denoising_boxes": none[..., :4],
        "denoising_object_index": torch.zeros(images, 0, dtype=torch.int64),
        "num_denoising_groups": 1,
    }
    config = DinoDetrConfig(num_labels=NUM_LABELS)
    return lambda: dino_detr_loss(**given, **denoising, config=config, num_boxes=1.0)[0].backward()


def loss_transformers(images: int, objects: int = 100, queries: int = 900) -> Work:
    given = predictions(images, queries, objects)
    config = DeformableDetrConfig(num_labels=NUM_LABELS, auxiliary_loss=True)

    def run() -> None:
        logits, boxes = given["logits"].transpose(0, 1), given["pred_boxes"].transpose(0, 1)
        loss = loss_deformable_detr.DeformableDetrForObjectDetectionLoss
        loss(logits[-1], given["labels"], logits.device, boxes[-1], config, logits, boxes)[0].backward()

    return run


def attend_ours(queries: int) -> Work:
    """Return self-attention as in training: with a mask."""
    attention = DinoDetrSelfAttention(DinoDetrConfig(attn_implementation="sdpa")).eval()
    return attend(attention, queries, attention_mask=mask_of(queries)())


def attend_transformers(queries: int) -> Work:
    config = DeformableDetrConfig(attn_implementation="sdpa")
    return attend(modeling_deformable_detr.DeformableDetrSelfAttention(config, 256, 8).eval(), queries)


def attend(attention: torch.nn.Module, queries: int, **mask: torch.Tensor) -> Work:
    states = torch.randn(1, queries, 256, generator=torch.Generator().manual_seed(0))

    def run() -> None:
        with torch.no_grad():
            attention(states, position_embeddings=states, **mask)

    return run


def mask_of(queries: int) -> Work:
    """Return the making of the mask between queries, a half of which are denoising queries."""
    half = torch.zeros(1, queries // 2, 256)
    denoising = empty_denoising_queries(half)._replace(inputs_embeds=half)
    return partial(make_decoder_attention_mask, denoising, queries - queries // 2, torch.float32)


class Panel(NamedTuple):
    """A variable that grows.

    Attributes:
        title (`str`): Of the plot.
        variable (`str`): What is counted along x.
        sizes (`Sequence[int]`): Given to the builders, ascending.
        builders (`Mapping[str, Callable[[int], Work]]`): By the name of a candidate.
        count (`Callable[[int], int]`): What is counted, given a size.
        quick (`Sequence[int]`): Sizes to check that everything works.
    """

    title: str
    variable: str
    sizes: tuple[int, ...]
    builders: Mapping[str, Callable[[int], Work]]
    quick: tuple[int, ...]
    count: Callable[[int], int] = int


def of_both(grow: Callable[..., Work]) -> dict[str, Callable[[int], Work]]:
    return {"hf_dino": partial(grow, make_ours), "transformers": partial(grow, make_transformers)}


def at_side(levels: int, side: int = 512) -> int:
    return count_tokens(side, levels)


QUERIES = (225, 450, 900, 1800, 3600, 7200)
OBJECTS = (1, 4, 16, 64, 125, 250, 500)
PANELS = {
    "tokens": Panel(
        "forward, ResNet-50", "tokens", (256, 384, 512, 768, 1024), of_both(grow_tokens), (256, 320, 384), count_tokens
    ),
    "queries": Panel("forward", "queries", QUERIES, of_both(grow_queries), (30, 60, 120)),
    "objects": Panel("training step", "objects per image", OBJECTS, of_both(grow_objects), (1, 4, 16)),
    "denoising": Panel(
        "training step",
        "denoising queries",
        (100, 200, 400, 800, 1600, 3200, 6400),
        {"hf_dino": partial(grow_denoising, make_ours)},
        (20, 40, 80),
    ),
    "batch": Panel("forward", "images", (1, 2, 4, 8, 16), of_both(grow_batch), (1, 2, 4)),
    "levels": Panel("forward", "tokens of 1 to 5 levels", (1, 2, 3, 4, 5), of_both(grow_levels), (1, 2, 3), at_side),
    "matcher": Panel(
        "matcher",
        "objects per image",
        OBJECTS,
        {"hf_dino": match_ours, "transformers": match_transformers},
        (1, 4, 16),
    ),
    "matcher-queries": Panel(
        "matcher, 100 objects",
        "queries",
        QUERIES,
        {"hf_dino": partial(match_ours, 100), "transformers": partial(match_transformers, 100)},
        (30, 60, 120),
    ),
    "losses": Panel(
        "matcher and losses, 100 objects",
        "images",
        (1, 2, 4, 8, 16),
        {"hf_dino": loss_ours, "transformers": loss_transformers},
        (1, 2, 4),
    ),
    "self-attention": Panel(
        "self-attention of queries",
        "queries",
        QUERIES,
        {"hf_dino": attend_ours, "transformers": attend_transformers},
        (30, 60, 120),
    ),
    "mask": Panel("attention mask", "queries and denoising queries", QUERIES, {"hf_dino": mask_of}, (30, 60, 120)),
}


def slopes(sizes: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Return the exponents of a curve, over all sizes and at the end."""
    x, y = np.log(sizes), np.log(values)
    whole, last = np.polyfit(x, y, 1)[0], (y[-1] - y[-2]) / (x[-1] - x[-2])
    return {"exponent": round(whole, 2), "exponent_at_the_end": round(last, 2)}


def fit(sizes: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Return the exponents of a curve, and its constant, linear and quadratic part at the largest size."""
    x, y = np.array(sizes, dtype=float), np.array(values, dtype=float)
    terms, _ = nnls((x[:, None] / x[-1]) ** [0, 1, 2] / y[:, None], np.ones(len(x)))
    terms[terms < 1e-9 * terms.sum()] = 0  # rounding errors
    constant, linear, quadratic = terms / terms.sum()
    growing = linear + quadratic
    percent = {"constant": constant, "linear": linear, "quadratic": quadratic}
    return {
        **slopes(sizes, values),
        "growth": round((linear + 2 * quadratic) / growing, 2) if growing else 0.0,
        "percent_at_the_end": {name: round(100 * part) for name, part in percent.items()},
        "quadratic_from": round(x[-1] * linear / quadratic) if quadratic else None,
        "terms": [float(f"{term:.4g}") for term in terms],
    }


def measure_panel(panel: Panel, sizes: tuple[int, ...], workers: Mapping[str, Any], rounds: int) -> dict[str, Any]:
    """Measure all candidates at all sizes, and fit their curves."""
    chosen = {name: workers[name] for name in panel.builders}
    rows = []
    for size in (sizes[0], *sizes):  # the first is not counted: it includes what a process allocates once
        for name, worker in chosen.items():
            worker.start_building(partial(panel.builders[name], size))
        for worker in chosen.values():
            worker.wait()
        rows.append(measure(chosen, rounds))
        print(f"{panel.title}, {panel.count(size)} {panel.variable}: {rows[-1][0]} s, {rows[-1][1]} MiB", flush=True)
    del rows[0]
    counts = [panel.count(size) for size in sizes]
    curves = {
        name: {
            "seconds": curve(counts, [float(f"{seconds[name]:.4g}") for seconds, _ in rows], 0, fit),
            "mebibytes": curve(counts, [round(memory[name], 1) for _, memory in rows], NOISE_MIB, slopes),
        }
        for name in chosen
    }
    return {"title": panel.title, "variable": panel.variable, "sizes": counts, "curves": curves}


def curve(sizes: list[int], values: list[float], noise: float, describe: Callable[..., Any]) -> dict[str, Any]:
    """Return values and, if at least three are beyond the noise, what `describe` finds in them."""
    seen = [(size, value) for size, value in zip(sizes, values) if value > noise]
    return {"values": values, "fit": describe(*zip(*seen)) if len(seen) >= 3 else None}


def fingerprint(args: argparse.Namespace) -> dict[str, Any]:
    """Return what results depend on: those with another fingerprint are not kept."""
    files = [Path(__file__), *(path for pattern in MEASURED for path in sorted(ROOT.glob(pattern)))]
    code = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:12]
    return {**machine.describe(), "code": code, "rounds": args.rounds}


def read_kept(path: Path, expected: dict[str, Any], only: list[str] | None) -> dict[str, Any]:
    """Return the panels of an earlier run, or none if it was of other code, another machine or other versions.

    Raises:
        SystemExit: If panels that are not to be measured again would be lost.
    """
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text())
        kept = dict(found["panels"])
    except (ValueError, LookupError, TypeError):
        raise SystemExit(f"{path} is damaged; move it away") from None
    differing = [name for name, value in expected.items() if found.get(name) != value]
    if not differing:
        return kept
    reason = f"of another {', another '.join(differing)}"
    if only and not kept.keys() <= set(only):
        raise SystemExit(f"{path}: its other panels are {reason}; run without --only, or move the file away")
    print(f"{path.name}: its panels are measured again, because they are {reason}")
    return {}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--only", nargs="+", choices=PANELS, metavar="PANEL", help=f"measure only: {', '.join(PANELS)}"
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs at each size after one to warm up (default: 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes and one round, to check that it works")
    args = parser.parse_args(arguments)
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {args.rounds}")
    args.rounds = 1 if args.quick else args.rounds
    return args


def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    name = "scaling_quick" if args.quick else "scaling"
    path, expected = machine.RESULTS / f"{name}.json", fingerprint(args)
    panels = read_kept(path, expected, args.only)
    missing = args.only or [key for key in PANELS if key not in panels]
    workers = {name: Worker(environment) for name, environment in ENVIRONMENTS.items()} if missing else {}
    for key in missing:
        panel = PANELS[key]
        panels[key] = measure_panel(panel, panel.quick if args.quick else panel.sizes, workers, args.rounds)
        content = {
            "code": expected["code"],
            "rounds": args.rounds,
            "panels": {k: panels[k] for k in PANELS if k in panels},
        }
        machine.save_result(path, f"python benchmarks/scaling.py --rounds {args.rounds}", content)
    for worker in workers.values():
        worker.close()
    result = json.loads(path.read_text())
    write_table(path.with_suffix(".md"), result)
    draw(path.with_suffix(".png"), result)
    print(path.with_suffix(".md").read_text())


if __name__ == "__main__":
    main()
