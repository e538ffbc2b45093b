"""Fine-tune DINO on a data set in COCO's format, or train it from scratch, and leave a model that anyone can load.

    accelerate launch examples/finetune_coco.py --model dino-4scale-r50 --output runs/mine \
        --train-images data/train --train-annotations data/train.json \
        --val-images data/val --val-annotations data/val.json

The defaults are the original's recipe for COCO: AdamW, 12 epochs of 16 pictures per step, one drop of the learning
rate before the last epoch, the backbone at a tenth of it. It runs unchanged on a CPU, one GPU or many; `--resume` goes
on where a run was stopped. In the output folder are the model with the best average precision on the validation
pictures, its image processor and card, `metrics.json` with every number measured, `curves.png`, and `checkpoints/`.
"""

import argparse
import logging
import platform
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed
from rich.logging import RichHandler
from transformers import AutoImageProcessor, BaseImageProcessor

from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.data import (
    AUGMENTATIONS,
    UNUSED_LABEL,
    CocoData,
    CocoDetection,
    InputError,
    TrainingBatchSampler,
    TrainingCollator,
    contiguous_id2label,
    label_of_category,
    make_augmentation,
    read_coco,
    steps_per_epoch,
    training_loader,
)
from hf_dino.evaluation import CocoScores, evaluate_model
from hf_dino.loading import load_config, read_config
from hf_dino.model_card import finetuned_card
from hf_dino.training import (
    LossMonitor,
    TrainingProgress,
    TrainingState,
    checkpoint_path,
    drop_steps,
    files_into_folder,
    find_start,
    freeze_stem,
    learning_rate_factor,
    parameter_groups,
    read_state,
    save_checkpoint,
    set_learning_rate,
    write_json,
)
from hf_dino.visualization import plot_training_curves


# what may differ between a run and its resumption: where things are, how fast they are read, and how long it goes on
NOT_SETTINGS = {"output", "resume", "overwrite", "num_workers", "eval_batch_size", "eval_every", "checkpoint_steps"}
NOT_SETTINGS |= {"epochs", "max_steps", "report_to", "gradient_checkpointing", "train_images", "train_annotations"}
NOT_SETTINGS |= {"val_images", "val_annotations", "test_images", "test_annotations"}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--model", help="folder or Hub name of the DINO model to fine-tune")
    start.add_argument("--config", type=Path, help="JSON file with fields of DinoDetrConfig, to train from scratch")
    for split in ("train", "val", "test"):
        parser.add_argument(f"--{split}-images", type=Path, required=split != "test", help="folder of pictures")
        parser.add_argument(f"--{split}-annotations", type=Path, required=split != "test", help="COCO annotation file")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model; must be new or empty")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the model and checkpoints in --output")
    parser.add_argument("--image-size", nargs="+", metavar="PIXELS", help="SHORTEST [LONGEST] edge, or HEIGHTxWIDTH")
    parser.add_argument("--augmentation", choices=AUGMENTATIONS, default="dino")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--max-steps", type=int, help="stop after this many optimizer steps, even within an epoch")
    parser.add_argument("--batch-size", type=int, default=16, help="pictures per optimizer step over all processes")
    parser.add_argument("--gradient-accumulation", type=int, default=1, help="parts that a process does its share in")
    parser.add_argument("--gradient-checkpointing", action="store_true", help="less memory, more time")
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is set to")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--backbone-lr-factor", type=float, default=0.1)
    parser.add_argument("--weight-decay", type=float, default=1e-4)
    parser.add_argument("--clip", type=float, default=0.1, help="largest norm of the gradient; inf for no limit")
    parser.add_argument("--lr-drop", type=float, nargs="*", default=[11 / 12], help="epochs, or fractions of the run")
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-workers", type=int, default=2, help="processes that read pictures, for each process")
    parser.add_argument("--eval-batch-size", type=int, default=8, help="pictures of one size, for each process")
    parser.add_argument("--eval-every", type=int, default=1, metavar="EPOCHS")
    parser.add_argument("--checkpoint-steps", type=int, metavar="STEPS", help="of those within an epoch")
    parser.add_argument("--report-every", type=int, default=20, metavar="STEPS", help="of the rows in the history")
    parser.add_argument("--report-to", help="a tracker that accelerate knows, such as tensorboard")
    args = parser.parse_args(argv)
    if (args.test_images is None) != (args.test_annotations is None):
        parser.error("--test-images and --test-annotations belong together")
    positive = ("epochs", "max_steps", "batch_size", "gradient_accumulation", "eval_every", "report_every")
    for name in positive:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(args, name)}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    settings: dict[str, Any] = {name: str(value) for name, value in vars(args).items() if name not in NOT_SETTINGS}
    accelerator = Accelerator(
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
    model, processor = build_model(args, train)
    labels = label_of_category(train, model.config.id2label)
    for other in data.values():
        label_of_category(other, model.config.id2label)  # so that an unknown category is heard of now
    augmentation = make_augmentation(args.augmentation, dict(processor.size))
    collate = TrainingCollator(processor, labels, do_resize=augmentation is None or not augmentation.resizes)
    if args.gradient_checkpointing:
        newer, older = "activation_checkpointing_enable", "gradient_checkpointing_enable"  # since transformers 5.23
        getattr(model, newer if hasattr(model, newer) else older)()

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
    if checkpoint:
        accelerator.load_state(str(checkpoint))
    elif accelerator.is_main_process:
        shutil.rmtree(checkpoints, ignore_errors=True)
    accelerator.init_trackers("hf_dino")
    monitor = LossMonitor()

    def evaluate(data: CocoData, name: str) -> CocoScores:
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
            pictures = CocoDetection(train, augmentation, args.seed, epoch)
            model.train()
            for batch in training_loader(pictures, collate, batches, num_workers=args.num_workers):
                batch = send_to_device(batch, accelerator.device, non_blocking=True)
                with accelerator.accumulate(model):
                    outputs = model(**batch)
                    loss = monitor.add(outputs.loss, outputs.loss_dict, batch["labels"], state.step)
                    accelerator.backward(outputs.loss)
                    if accelerator.sync_gradients:
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
                    progress.report(state.step, state.step / epoch_steps, row["loss"])
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

        accelerator.load_state(str(checkpoint_path(checkpoints, state.kept_step)))
        measured = {name: evaluate(pictures, name) for name, pictures in data.items()}

    if accelerator.is_main_process:
        export(args, argv, accelerator.unwrap_model(model), processor, state, measured)
    accelerator.end_training()


def coco_files(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    """Folder of pictures and annotation file of each part of the data that was given."""
    files = {
        "train": (args.train_images, args.train_annotations),
        "validation": (args.val_images, args.val_annotations),
        "test": (args.test_images, args.test_annotations),
    }
    return {name: pair for name, pair in files.items() if pair[0] is not None}


def build_model(args: argparse.Namespace, train: CocoData) -> tuple[DinoDetrForObjectDetection, BaseImageProcessor]:
    """The model to train, with the classes of the data set, and its image processor."""
    size = {} if args.image_size is None else {"size": parse_size(args.image_size)}
    fresh = contiguous_id2label(train.categories)
    if args.config is not None:
        model = DinoDetrForObjectDetection(read_config(args.config, fresh))
        if model.config.freeze_batch_norm and any(
            isinstance(layer, torch.nn.BatchNorm2d) for layer in model.modules()
        ):
            logging.warning("training from scratch with frozen batch norms: set freeze_batch_norm to false")
        return model, DinoDetrImageProcessor(**size)

    config = load_config(args.model)
    processor = AutoImageProcessor.from_pretrained(args.model, **size)
    if set(config.id2label.values()) - {UNUSED_LABEL} == set(train.categories.values()):
        return DinoDetrForObjectDetection.from_pretrained(args.model), processor
    # other classes: the heads and the label embedding start anew, all else is kept
    classes = {"id2label": fresh, "label2id": {name: label for label, name in fresh.items()}}
    model = DinoDetrForObjectDetection.from_pretrained(args.model, ignore_mismatched_sizes=True, **classes)
    return model, processor


def parse_size(words: list[str]) -> dict[str, int]:
    """`800 1333` as shortest and longest edge, `800` in the same proportion, `480x640` as height x width."""
    try:
        if len(words) == 1 and "x" in words[0]:
            height, width = map(int, words[0].split("x"))
            return {"height": height, "width": width}
        shortest, longest = [*map(int, words), round(int(words[0]) * 1333 / 800)][:2]
        return {"shortest_edge": shortest, "longest_edge": longest}
    except ValueError:
        given = " ".join(words)
        raise InputError(f"--image-size {given}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH") from None


def export(
    args: argparse.Namespace,
    argv: list[str] | None,
    model: DinoDetrForObjectDetection,
    processor: BaseImageProcessor,
    state: TrainingState,
    measured: dict[str, CocoScores],
) -> None:
    """Put the model and all that is known about it into the output folder, and show the result."""
    split, final = list(measured.items())[-1]
    command = f"accelerate launch {shlex.join([sys.argv[0], *(sys.argv[1:] if argv is None else argv)])}"
    card = finetuned_card(
        model.config,
        metrics=final.metrics,
        dataset=args.train_annotations.stem,
        command=command,
        base_model=args.model,
        split=split,
        size=dict(processor.size),
    )
    report = {
        "best_step": state.kept_step,
        **{name: {**score.metrics, "ap_per_category": score.ap_per_category} for name, score in measured.items()},
        "command": command,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "history": state.history,
    }
    with files_into_folder(args.output, last="config.json") as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_json(folder / "metrics.json", report)
        plot_training_curves(state.history, folder / "curves.png")
    print(f"{split}, checkpoint of step {state.kept_step}:\n{final.table}\nmodel: {args.output}")


if __name__ == "__main__":
    try:
        main()
    except (InputError, FloatingPointError) as error:
        raise SystemExit(f"error: {error}") from None
