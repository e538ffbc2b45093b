"""Train with `examples/finetune_coco.py` on generated images, and stop by SIGTERM before the time limit."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

from gpu_stages.rows import Row, Stage, parse_line


EXAMPLES = Path(__file__).parents[2] / "examples"
SECONDS_TO_STOP = 25  # an evaluation may be running, and a checkpoint is written
BATCH_SIZE = 16


def script_arguments(data: Path, output: Path, stage: Stage) -> list[str]:
    """Return the command line of the run: DINO-4scale with ResNet-50 from scratch, or a tiny model in a dry run."""
    config = EXAMPLES / "configs" / "tiny.json"
    if not stage.dry_run:
        config = data.parent / "resnet50.json"
        config.write_text(json.dumps({"freeze_backbone_batch_norms": False}))
    files = [f"--{split}_{kind}={path}" for split in ("train", "val") for kind, path in files_of(data, split).items()]
    sizes = (
        ["--image_size=128x128", "--global_batch_size=4", "--dataloader_num_workers=0"]
        if stage.dry_run
        else full_size()
    )
    schedule = ["--num_train_epochs=100000", "--lr_milestones", "--backbone_lr_multiplier=1", "--logging_steps=2"]
    return [f"--config_name={config}", f"--output_dir={output}", "--augmentation=flip", *files, *sizes, *schedule]


def full_size() -> list[str]:
    return [
        "--image_size=544x544", f"--global_batch_size={BATCH_SIZE}", "--dataloader_num_workers=8",
        "--mixed_precision=bf16", "--eval_epochs=10", "--learning_rate=2e-4", "--warmup_steps=50",
        "--per_device_eval_batch_size=16",
    ]  # fmt: skip


def files_of(data: Path, split: str) -> dict[str, Path]:
    return {"images": data / split, "annotations": data / f"{split}.json"}


def wait_for(data: Path, deadline: float) -> None:
    """Wait until another process has drawn the images.

    Raises:
        TimeoutError: If they are not complete in time.
    """
    while not data.is_dir():
        if time.time() > deadline:
            raise TimeoutError(f"{data}: the images were not drawn in time")
        time.sleep(0.2)


def read_history(path: Path) -> list[Row]:
    """Return the complete rows; the script may still be writing the last one."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [row for row in map(parse_line, lines) if row]


def train(row: Row, command: list[str], output: Path, stage: Stage) -> None:
    """Run the script, send SIGTERM in time for it to stop, and report its history."""
    print(*command, flush=True)
    printed = stage.work / "finetuning.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    seen: list[tuple[float, int]] = []  # time and step, when a step was first seen
    is_stopping = False
    while process.poll() is None and stage.seconds_left() > 2:
        history = read_history(output / "history.jsonl")
        if history and (not seen or history[-1]["step"] > seen[-1][1]):
            seen.append((time.time(), history[-1]["step"]))
        is_time = stage.seconds_left() < SECONDS_TO_STOP or (stage.dry_run and len(seen) > 1)
        if is_time and not is_stopping:
            process.send_signal(signal.SIGTERM)
            is_stopping = True
        time.sleep(0.1)
    if process.poll() is None:
        process.kill()
    exit_code = process.wait()
    row["ended"] = {143: "stopped by SIGTERM", -9: "killed"}.get(exit_code, f"with exit code {exit_code}")
    row["ok"] = is_stopping and exit_code == 128 + signal.SIGTERM
    print(printed.read_text(), flush=True)
    if not row["ok"]:
        row["last_line"] = (printed.read_text().splitlines() or [""])[-1][:200]
    summarize(row, read_history(output / "history.jsonl"), seen, 4 if stage.dry_run else BATCH_SIZE)


def summarize(row: Row, history: list[Row], seen: list[tuple[float, int]], batch_size: int) -> None:
    """Fill in steps, speed (evaluations included), losses and the best AP."""
    row["steps"] = history[-1]["step"] if history else 0
    if len(seen) > 1:
        (start, first), (end, last) = seen[0], seen[-1]
        row["samples_per_second"] = round((last - first) * batch_size / (end - start), 2)
    losses = [line["loss"] for line in history if "loss" in line]
    row |= {"first_loss": round(losses[0], 2), "last_loss": round(losses[-1], 2)} if losses else {}
    scores = [line["ap"] for line in history if "ap" in line]
    row["best_ap"] = round(max(scores), 3) if scores else "not evaluated yet"


def main(stage: Stage) -> None:
    work = stage.work
    for name in stage.todo(["from scratch on shapes"]):
        with stage.rows.case(name) as row:
            wait_for(work / "shapes", stage.deadline - SECONDS_TO_STOP)
            output = work / "finetuned"
            arguments = script_arguments(work / "shapes", output, stage)
            train(row, [sys.executable, str(EXAMPLES / "finetune_coco.py"), *arguments], output, stage)
