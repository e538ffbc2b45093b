r"""Fine-tune DINO on a data set in COCO's format, or train it from scratch, and leave a model that anyone can load.

    accelerate launch examples/finetune_coco.py --model dino-4scale-r50 --output runs/mine \
        --train-images data/train --train-annotations data/train.json \
        --val-images data/val --val-annotations data/val.json

The defaults are the original's recipe for COCO: AdamW, 12 epochs of 16 pictures per step, one drop of the learning
rate before the last epoch, the backbone at a tenth of it. It runs unchanged on a CPU, one GPU or many; `--resume` goes
on where a run was stopped. In the output folder are the model with the best average precision on the validation
pictures, its image processor and card, `metrics.json` with every number measured, `curves.png`, and `checkpoints/`.

Several processes on CPUs are started by `torchrun --nproc_per_node 2 examples/finetune_coco.py`: there `accelerate
launch` would start one, whatever `--num_processes` says.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import send_to_device, set_seed
from rich.logging import RichHandler

from hf_dino.data import (
    AUGMENTATIONS,
    DetectionData,
    DetectionDataset,
    InputError,
    TrainingBatchSampler,
    TrainingCollator,
    label_of_category,
    make_augmentation,
    read_coco,
    steps_per_epoch,
    training_loader,
)
from hf_dino.evaluation import CocoScores, evaluate_model
from hf_dino.loading import load_detector_for, new_detector
from hf_dino.training import (
    HelpFormatter,
    LossMonitor,
    TrainingProgress,
    TrainingState,
    at_least,
    checkpoint_activations,
    checkpoint_path,
    drop_steps,
    export_run,
    find_start,
    freeze_stem,
    learning_rate_factor,
    load_checkpoint,
    number_between,
    parameter_groups,
    parse_size,
    prepare_checkpoints,
    read_state,
    save_checkpoint,
    set_learning_rate,
)


# what may differ between a run and its resumption: where things are, how fast they are read, and how long it goes on
NOT_SETTINGS = {
    "output", "resume", "overwrite", "dataset_name", "report_to", "num_workers", "eval_batch_size", "eval_every",
    "checkpoint_steps", "epochs", "max_steps", "gradient_checkpointing", "train_images", "train_annotations",
    "val_images", "val_annotations", "test_images", "test_annotations",
}  # fmt: skip


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="folder or Hub name of the DINO model to fine-tune")
    start.add_argument("--config", type=Path, help="JSON file with fields of DinoDetrConfig, to train from scratch")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-images", type=Path, required=split != "test", help="folder of pictures")
        parser.add_argument(f"--{split}-annotations", type=Path, required=split != "test", help="COCO annotation file")
    parser.add_argument("--dataset-name", help="for the model card (default: the folder of the annotation file)")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; must be new or empty")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the model and checkpoints in --output")
    size = "SHORTEST [LONGEST] edge, or HEIGHTxWIDTH (default: the model's, 800 1333 for a new one)"
    parser.add_argument("--image-size", nargs="+", metavar="PIXELS", help=size)
    parser.add_argument(
        "--augmentation", choices=AUGMENTATIONS, default="dino", help="dino: the original's flip, resize and crop"
    )
    parser.add_argument("--epochs", type=at_least(1), default=12, help="passes over the training pictures")
    parser.add_argument("--max-steps", type=at_least(1), help="ends the run earlier, even within an epoch")
    parser.add_argument("--batch-size", type=at_least(1), default=16, help="pictures per step, over all processes")
    parts = "batches that each process's pictures of a step are split into, to save memory"
    parser.add_argument("--gradient-accumulation", type=at_least(1), default=1, help=parts)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is set to")
    parser.add_argument("--learning-rate", type=number_between(0, 1e38), default=1e-4, help="but the backbone's")
    parser.add_argument("--backbone-lr-factor", type=number_between(0, 1e38), default=0.1, help="of that")
    parser.add_argument("--weight-decay", type=number_between(0, 1e38), default=1e-4, help="AdamW's")
    clip = number_between(0, without_lowest=True)
    parser.add_argument("--clip", type=clip, default=0.1, help="largest norm of the gradient; inf for no limit")
    drop = number_between(0, 1e38)
    parser.add_argument(
        "--lr-drop", type=drop, nargs="*", default=[11 / 12], help="epochs, or below 1 fractions of the run"
    )
    parser.add_argument("--warmup-steps", type=at_least(0), default=0, help="in which the learning rate rises")
    parser.add_argument("--seed", type=at_least(0, 2**31), default=0, help="of weights, order and augmentation")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="processes that read, for each process")
    parser.add_argument("--eval-batch-size", type=at_least(1), default=8, help="pictures, for each process")
    parser.add_argument("--eval-every", type=at_least(1), default=1, metavar="EPOCHS", help="between evaluations")
    parser.add_argument(
        "--checkpoint-steps", type=at_least(1), metavar="STEPS", help="between checkpoints within an epoch"
    )
    parser.add_argument(
        "--report-every", type=at_least(1), default=20, metavar="STEPS", help="between rows of the history"
    )
    trackers = [str(tracker.value) for tracker in get_available_trackers()]
    parser.add_argument("--report-to", choices=trackers, help="a tracker of accelerate's that is installed")
    args = parser.parse_args(words)
    if (args.test_images is None) != (args.test_annotations is None):
        parser.error("--test-images and --test-annotations belong together")
    return args


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse_arguments(words)
    size = parse_size(args.image_size) if args.image_size else None
    settings: dict[str, Any] = {name: str(value) for name, value in vars(args).items() if name not in NOT_SETTINGS}
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said so, several processes on CPUs find each other
        gradient_accumulation_steps=args.gradient_accumulation,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=str(args.output),
    )
    level = logging.WARNING if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(show_path=False)])
    transformers.utils.logging.disable_progress_bar()  # there is one already
    checkpoints = args.output / "checkpoints"
    checkpoint = find_start(args.output, checkpoints, resume=args.resume, overwrite=args.overwrite)
    data = {name: read_coco(*files) for name, files in coco_files(args).items()}
    train, val = data.pop("train"), data["validation"]
    settings["pictures"] = len(train.pictures)
    state = read_state(checkpoint, settings) if checkpoint else TrainingState(settings)

    set_seed(args.seed)
    if args.config is not None:
        model, processor = new_detector(args.config, train.categories, size)
    else:
        model, processor = load_detector_for(args.model, train.categories, size)
    labels = label_of_category(train, model.config.id2label)
    for other in data.values():
        label_of_category(other, model.config.id2label)  # so that an unknown category is heard of now
    augmentation = make_augmentation(args.augmentation, dict(processor.size))
    do_resize = augmentation is None or not augmentation.resizes
    collate = TrainingCollator(processor, labels, model.config.num_labels, do_resize)
    if args.gradient_checkpointing:
        checkpoint_activations(model)
    freeze_stem(model)
    groups = parameter_groups(model, args.learning_rate, args.backbone_lr_factor)
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
    )
    epoch_steps = steps_per_epoch(len(train.pictures), args.batch_size)
    total_steps = min(args.epochs * epoch_steps, args.max_steps or sys.maxsize)
    drops = drop_steps(args.lr_drop, total_steps=total_steps, steps_per_epoch=epoch_steps)
    # from here on each process draws its own noise
    set_seed(args.seed, device_specific=True)
    if accelerator.is_main_process:
        prepare_checkpoints(checkpoints, resume=args.resume)
    if checkpoint:
        load_checkpoint(accelerator, checkpoint)
    accelerator.init_trackers("hf_dino")
    monitor = LossMonitor(with_scaler=accelerator.scaler is not None)

    def evaluate(data: DetectionData, name: str) -> CocoScores:
        share = -(-len(data.pictures) // accelerator.num_processes)
        options = {"batch_size": args.eval_batch_size, "num_workers": args.num_workers}
        with progress.count(name, share) as counted:
            return evaluate_model(model, processor, data, accelerator, on_batch=counted, **options)[0]

    def record(row: dict[str, float]) -> None:
        state.history.append({"step": state.step, "epoch": state.step / epoch_steps, **row})
        accelerator.log(row, step=state.step)

    with TrainingProgress(total_steps, state.step, accelerator.is_main_process) as progress:
        while state.step < total_steps:
            epoch, first_step = divmod(state.step, epoch_steps)
            batches = TrainingBatchSampler(
                len(train.pictures),
                args.batch_size,
                seed=args.seed,
                epoch=epoch,
                rank=accelerator.process_index,
                world_size=accelerator.num_processes,
                accumulation=args.gradient_accumulation,
                first_step=first_step,
            )
            pictures = DetectionDataset(train, augmentation, args.seed, epoch)
            model.train()
            for batch in training_loader(pictures, collate, batches, num_workers=args.num_workers):
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    outputs = model(**batch)
                    accelerator.backward(outputs.loss)
                    monitor.add(outputs.loss, outputs.loss_dict, batch["labels"])
                    if accelerator.sync_gradients:
                        loss = monitor.check(state.step)
                        accelerator.clip_grad_norm_(model.parameters(), args.clip)
                    factor = learning_rate_factor(state.step, drop_steps=drops, warmup_steps=args.warmup_steps)
                    set_learning_rate(optimizer, factor)
                    optimizer.step()
                    optimizer.zero_grad()
                if not accelerator.sync_gradients:
                    continue

                state.step += 1
                progress.step(state.step / epoch_steps, loss)
                at_end = state.step % epoch_steps == 0 or state.step == total_steps
                at_checkpoint = args.checkpoint_steps and state.step % args.checkpoint_steps == 0
                if state.step % args.report_every == 0 or at_checkpoint or at_end:
                    row = monitor.averages()
                    record({**row, "learning_rate": args.learning_rate * factor})
                    progress.report(state.step, state.step / epoch_steps, row.get("loss", loss))
                if at_checkpoint and not at_end:
                    save_checkpoint(accelerator, checkpoints, state)
                if at_end:
                    break

            if (epoch + 1) % args.eval_every == 0 or state.step == total_steps:
                scores = evaluate(val, "validation")
                record(scores.metrics)
                ap, ap50 = scores.metrics["ap"], scores.metrics["ap50"]
                progress.say(f"step {state.step}: validation AP {ap:.3f}, AP50 {ap50:.3f}")
                if ap > state.best_ap or state.best_step is None:
                    state.best_step, state.best_ap = state.step, ap
            save_checkpoint(accelerator, checkpoints, state)

        load_checkpoint(accelerator, checkpoint_path(checkpoints, state.kept_step))
        measured = {name: evaluate(pictures, name) for name, pictures in data.items()}

    if accelerator.is_main_process:
        again = [word for word in words if word not in ("--resume", "--overwrite")]
        export_run(
            args.output,
            accelerator.unwrap_model(model),
            processor,
            state,
            measured,
            dataset=args.dataset_name or train.name,
            command=shlex.join(["accelerate", "launch", "examples/finetune_coco.py", *again]),
            base_model=args.model,
        )
        part, scores = list(measured.items())[-1]
        print(f"{part}, checkpoint of step {state.kept_step}:\n{scores.table}\nmodel: {args.output}")
    accelerator.end_training()


def coco_files(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Folder of pictures and annotation file of each part of the data that was given."""
    files = {
        "train": (args.train_images, args.train_annotations),
        "validation": (args.val_images, args.val_annotations),
        "test": (args.test_images, args.test_annotations),
    }
    return {name: pair for name, pair in files.items() if pair[0] is not None}


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError, OSError) as error:
        raise SystemExit(f"error: {error}") from None
