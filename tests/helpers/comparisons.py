"""Comparisons for tests: tiny ones that are trained, and made-up ones that are only reported."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from hf_dino.compare import ComparisonSettings, compare, plan_runs
from hf_dino.compare.plan import RECIPE, SETTINGS_FILE, run_folder
from hf_dino.family import FAMILY
from hf_dino.utils.io import write_json


ROWS = ["detr", "dino_4scale"]
SETTINGS = ComparisonSettings(max_train_steps=4, evaluations=2, image_size="128x128", global_batch_size=2)


def train(output: Path, dataset: Path | None, rows=ROWS, seeds=1):
    """Train a comparison, or continue it, on one thread."""
    torch.set_num_threads(1)
    runs = plan_runs(output, rows, seeds)
    return compare(output, runs, SETTINGS, dataset=dataset and str(dataset), dataloader_num_workers=0)


def make_up(output: Path, rows=tuple(FAMILY), seeds=3, steps=1200, evaluations=12, unfinished=()):
    """Write the files of a comparison in which each row learns faster than the one before."""
    settings = ComparisonSettings(max_train_steps=steps, evaluations=evaluations)
    write_json(output / SETTINGS_FILE, {**asdict(settings), "recipe": RECIPE, "data": "made up", "dataset": None})
    for number, row in enumerate(rows):
        for seed in range(seeds):
            folder = run_folder(output, row, seed)
            folder.mkdir(parents=True)
            lines = [json.dumps(each) + "\n" for each in _made_up_rows(number, row, seed, settings)]
            is_finished = (row, seed) not in unfinished
            (folder / "measures.jsonl").write_text("".join(lines[: None if is_finished else evaluations // 2]))
            if is_finished:
                (folder / "config.json").write_text("{}")
    costs = {row: _made_up_cost(number) for number, row in enumerate(rows)}
    write_json(output / "speed.json", {"device": "a made-up CPU", "threads": 1, "rounds": 7, "rows": costs})


def _made_up_rows(number, row, seed, settings):
    random = np.random.default_rng(100 * number + seed)
    has_denoising = FAMILY[row].config.get("denoising", "contrastive") != "none" and number >= 7
    for step in range(settings.eval_steps, settings.max_train_steps + 1, settings.eval_steps):
        done = step / settings.max_train_steps
        ap = (0.12 + 0.045 * number) * (1 - np.exp(-(1.5 + number / 3) * done)) + 0.01 * random.standard_normal()
        yield {
            "step": step,
            "epoch": step / 250,
            "ap": max(0.0, float(ap)),
            "ap50": max(0.0, 1.4 * float(ap)),
            "ap75": max(0.0, 1.1 * float(ap)),
            "recall_boxes": min(1.0, 0.2 + 0.06 * number * done) if number > 4 else None,
            "recall_points": min(1.0, 0.5 + 0.04 * number) if number else None,
            "denoising_before": 0.7 if has_denoising else None,
            "denoising_after": 0.5 + 0.4 * done if has_denoising else None,
            "instability": None if step == settings.eval_steps else 2 * (1 - done),
            "instability_share": None if step == settings.eval_steps else 0.6 * (1 - done) + 0.02 * number,
        }


def _made_up_cost(number):
    return {
        "parameters": 1_500_000 + 30_000 * number,
        "flops": 250_000_000 + 10_000_000 * number,
        "images": 8,
        "step_seconds": 0.2 + 0.02 * number,
        "inference_seconds": 0.06 + 0.005 * number,
        "training_memory": 100_000_000 + 5_000_000 * number,
    }


if __name__ == "__main__":
    make_up(Path(sys.argv[1]))
