r"""Fine-tune DINO on a dataset of your own, or train it from scratch, and leave a model that anyone can load.

    accelerate launch examples/finetune_coco.py --model dino-4scale-r50 --data mine --output runs/mine

`--data` is a folder in the format of COCO, Pascal VOC, YOLO or Hugging Face `datasets`, or a name on the Hub, with
images to train on and to validate with; `python -m hf_dino.data check mine` tells what is wrong with it. Files in
other places are named one by one:

    accelerate launch examples/finetune_coco.py --model dino-4scale-r50 --output runs/mine \
        --train-images data/train --train-annotations data/train.json \
        --val-images data/val --val-annotations data/val.json

The defaults are the original's recipe for COCO: AdamW, 12 epochs of 16 images per step, one drop of the learning
rate before the last epoch, the backbone at a tenth of it. `--recipe examples/recipes/...` takes others. It runs
unchanged on a CPU, one GPU or many, and a step learns the same however its images are divided among processes and
accumulated batches. Ctrl-C, SIGTERM and SIGUSR1 stop it after the step that it is in, with a checkpoint; `--resume`
goes on from there, or from the last checkpoint if there was no time for one, and ends with the weights that an
uninterrupted run would have. With other `--epochs` or `--max-steps` it goes on along the learning rates of a run of
that length, and the log says so where they jump.

In the output folder are the model with the best average precision on the validation images, its image processor and
card, `metrics.json` with every number measured, and while it runs `history.csv`, `history.jsonl`, `checkpoints/` and,
from the first checkpoint or epoch on, `curves.png`.

Several processes on CPUs are started by `accelerate launch --multi_gpu --num_processes 2`, in spite of its name, or by
`torchrun --nproc_per_node 2`; without `--multi_gpu`, or with `--cpu`, `accelerate launch` starts one there.
"""

import argparse
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import send_to_device, set_seed
from rich.logging import RichHandler
from transformers import BaseImageProcessor

from hf_dino import DinoDetrForObjectDetection
from hf_dino.data import (
    AUGMENTATIONS,
    DetectionDataset,
    DetectionSplit,
    InputError,
    TrainingBatchSampler,
    per_device_batch_size,
    predict_batch_shapes,
    read_coco,
    read_data,
    steps_per_epoch,
    training_loader,
)
from hf_dino.evaluation import CocoScores, evaluate_model
from hf_dino.hub import (
    build_model_and_processor,
    load_backbone_weights,
    load_pretrained_for_categories,
    warn_if_batch_norms_frozen,
)
from hf_dino.model_card import training_command
from hf_dino.training import (
    PROCESS_GROUP_TIMEOUT,
    SCHEDULES,
    ExponentialMovingAverage,
    LossMonitor,
    RunHistory,
    StopSignals,
    TrainingProgress,
    TrainingState,
    build_training_pipeline,
    check_disk_space,
    checkpoint_path,
    compile_layers,
    data_fingerprint,
    enable_gradient_checkpointing,
    file_fingerprint,
    freeze,
    gather_full_model,
    get_lr_multiplier,
    get_milestones,
    get_param_groups,
    init_tracking,
    load_checkpoint,
    load_training_state,
    lock_output_dir,
    parse_args_with_recipe,
    read_and_check,
    resolve_resume_checkpoint,
    save_checkpoint,
    save_emergency_checkpoint,
    save_run,
    set_lr,
    should_stop_early,
    with_effective_batch,
)
from hf_dino.utils.arguments import HelpFormatter, at_least, config_field, number_between, parse_size
from hf_dino.utils.errors import run_cli


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    args = parse_arguments(words)
    accelerator = start_accelerator(args)
    checkpoints = args.output / "checkpoints"
    start = resolve_resume_checkpoint(args.output, checkpoints, resume=args.resume, overwrite=args.overwrite)
    data = read_and_check(partial(read_splits, args), is_new=start is None)
    run = FineTuning(args, accelerator, data, checkpoints, start)
    with (
        lock_output_dir(accelerator, checkpoints, start, overwrite=args.overwrite),
        run.signals,
        init_tracking(accelerator, run.state, args.output, vars(args)),
        run.progress,
    ):
        if start:
            load_checkpoint(accelerator, start)
            run.progress.say(f"going on after step {run.state.step}, with {start}")
        run.train(RunHistory(args.output, run.state.history, accelerator.is_main_process))
        again = words_to_train_again(words, args, accelerator)
        run.export(training_command("examples/finetune_coco.py", again, accelerator.num_processes))
    accelerator.end_training()


class FineTuning:
    """A run: what its steps share. Everything that a resumed run needs to know is in `state` and in checkpoints.

    Making one writes nothing, and sees that the steps can be taken.

    Args:
        args (`argparse.Namespace`): From [`parse_arguments`].
        accelerator (`Accelerator`): From [`start_accelerator`].
        data (`dict[str, DetectionSplit]`): From [`read_splits`].
        checkpoints (`Path`): Their folder.
        start (`Path` or `None`): The checkpoint that a resumed run goes on from.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        accelerator: Accelerator,
        data: dict[str, DetectionSplit],
        checkpoints: Path,
        start: Path | None,
    ):
        self.args, self.accelerator, self.checkpoints = args, accelerator, checkpoints
        self.train_data = data["train"]
        self.measured_on = {name: images for name, images in data.items() if name != "train"}
        settings = settings_of(args, accelerator, data)
        self.state = load_training_state(start, settings) if start else TrainingState(settings)

        set_seed(args.seed)
        model, self.processor = make_detector(args, self.train_data, is_new=start is None)
        self.inputs = build_training_pipeline(model, self.processor, data, args.augmentation)
        groups = get_param_groups(model, args.learning_rate, args.backbone_lr_factor, args.sampling_lr_factor)
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.average = ExponentialMovingAverage(accelerator.unwrap_model(self.model), args.ema) if args.ema else None
        self.averaged = self.average.applied if self.average else nullcontext  # for evaluation and export
        self.monitor = LossMonitor(
            accelerator,
            self.model,
            rescue=lambda: save_emergency_checkpoint(accelerator, self.model, self.optimizer, checkpoints, self.state),
            files={image.image_id: image.path for image in self.train_data.images},
        )
        accelerator.register_for_checkpointing(*filter(None, (self.average, self.monitor)))
        averages = self.average.averages.values() if self.average else ()
        check_disk_space(checkpoints, self.model, self.optimizer, averages)

        self.epoch_steps = steps_per_epoch(len(self.train_data.images), args.batch_size)
        self.total_steps = min(args.epochs * self.epoch_steps, args.max_steps or sys.maxsize)
        self.rate_at = self.schedule(self.total_steps)
        self.warn_of_learning_rate()
        self.state.total_steps = self.total_steps
        self.signals = StopSignals(accelerator)
        self.progress = TrainingProgress(
            self.total_steps, self.state.step, accelerator.is_main_process, args.batch_size
        )
        if self.state.best_step is not None:
            self.progress.scored(self.state.best_ap)
        set_seed(args.seed, device_specific=True)  # from here on each process draws its own noise

    def schedule(self, total_steps: int) -> Callable[[int], float]:
        """What the learning rate is multiplied with at each step of a run of that length."""
        drops, warmup = self.drops(total_steps), self.args.warmup_steps
        return get_lr_multiplier(
            self.args.schedule, total_steps=total_steps, get_milestones=drops, warmup_steps=warmup
        )

    def drops(self, total_steps: int) -> list[int]:
        return get_milestones(self.args.lr_drop, total_steps=total_steps, steps_per_epoch=self.epoch_steps)

    def warn_of_learning_rate(self) -> None:
        """Log it if a run is too short for its schedule, or a resumed one jumps since it is to have another length."""
        args, warn = self.args, logging.getLogger("hf_dino").warning
        if args.warmup_steps > self.total_steps:
            warn(
                f"the learning rate rises for {args.warmup_steps} steps (--warmup-steps) and the run has "
                f"{self.total_steps}: it never comes to {args.learning_rate:g}"
            )
        drops = zip(args.lr_drop, self.drops(self.total_steps))
        for late in (when for when, drop in drops if when >= 1 and drop >= self.total_steps):
            warn(f"--lr-drop {late:g}: never comes, the run ends after {self.total_steps / self.epoch_steps:g} epochs")
        step, before = self.state.step, self.state.total_steps or self.total_steps
        was, now = (args.learning_rate * self.schedule(total)(step) for total in (before, self.total_steps))
        if step < self.total_steps and not math.isclose(was, now, rel_tol=0.01):
            warn(
                f"the run is to have {self.total_steps} steps, before it was to have {before}: after step {step} the "
                f"learning rate goes on at {now:.2e} instead of {was:.2e}"
            )

    def train(self, history: RunHistory) -> None:
        """Take the steps that are left, and evaluate between epochs."""
        state = self.state
        self.evaluate_if_due(history)  # the run may have been stopped between a step and its evaluation
        while state.step < self.total_steps and not should_stop_early(state.history, self.args.early_stopping):
            self.train_epoch(history)
            self.save_and_stop_if_asked()
            self.evaluate_if_due(history)
            history.plot()

    def train_epoch(self, history: RunHistory) -> None:
        """Take the steps of an epoch that are left."""
        self.model.train()
        for batch in self.batches(*divmod(self.state.step, self.epoch_steps)):
            losses = self.learn(batch)
            if losses is None:
                continue
            self.state.step += 1
            at_end = self.state.step % self.epoch_steps == 0 or self.state.step == self.total_steps
            at_checkpoint = self.args.checkpoint_steps and self.state.step % self.args.checkpoint_steps == 0
            is_row = self.state.step % self.args.report_every == 0 or at_checkpoint or at_end
            self.report(history, losses, is_row=is_row)
            if at_end:
                break
            if at_checkpoint or self.signals.should_stop():
                self.save_and_stop_if_asked()
                history.plot()

    def batches(self, epoch: int, first_step: int) -> Iterator[dict[str, Any]]:
        """The model's arguments for the batches of an epoch, from a step on."""
        images = DetectionDataset(self.train_data, self.inputs.augmentation, self.args.seed, epoch)
        sampler = TrainingBatchSampler(
            len(self.train_data.images),
            self.args.batch_size,
            seed=self.args.seed,
            epoch=epoch,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            gradient_accumulation_steps=self.args.gradient_accumulation,
            first_step=first_step,
            get_shape=predict_batch_shapes(images, self.inputs.collate) if self.args.bucketing else None,
        )
        loader = training_loader(images, self.inputs.collate, sampler, num_workers=self.args.num_workers)
        return with_effective_batch(loader, self.accelerator)

    def learn(self, batch: dict[str, Any]) -> dict[str, float] | None:
        """Learn from a batch. Return the step's losses if it was the step's last one."""
        accelerator, model, optimizer = self.accelerator, self.model, self.optimizer
        set_lr(optimizer, self.rate_at(self.state.step))
        self.monitor.begin(batch)
        losses = None
        with accelerator.accumulate(model):
            outputs = model(**send_to_device(batch, accelerator.device, non_blocking=True))
            accelerator.backward(outputs.loss)
            self.monitor.add(outputs.loss, outputs.loss_dict)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), self.args.clip)
                losses = self.monitor.check(self.state.step, norm)
            optimizer.step()
            optimizer.zero_grad()
        if losses is not None and self.average:
            self.average.update()
        return losses

    def report(self, history: RunHistory, losses: dict[str, float], *, is_row: bool) -> None:
        """Show the step that was just done and, if there is to be a row of the history, write it."""
        epoch = self.state.step / self.epoch_steps
        learning_rate = self.args.learning_rate * self.rate_at(self.state.step - 1)
        self.progress.step(epoch, losses, learning_rate)
        if is_row:
            row = self.monitor.averages()
            measured = self.progress.report(self.state.step, epoch, row or losses, learning_rate)
            self.record(history, {**row, "learning_rate": learning_rate}, measured)

    def record(self, history: RunHistory, row: dict[str, float], measured: dict[str, float] | None = None) -> None:
        """Add a row to the history and, with what was `measured` of the machine, to the tracker."""
        history.add({"step": self.state.step, "epoch": self.state.step / self.epoch_steps, **row})
        self.accelerator.log({**row, **(measured or {})}, step=self.state.step)

    def evaluate_if_due(self, history: RunHistory) -> None:
        """Measure the model on the validation images at the end of an epoch, unless that was done already."""
        state, every = self.state, self.args.eval_every * self.epoch_steps
        is_due = state.step == self.total_steps or (state.step and state.step % every == 0)
        if not is_due or state.evaluated:
            return
        scores = self.evaluate("validation")
        self.record(history, scores.metrics)
        ap, ap50 = scores.metrics["ap"], scores.metrics["ap50"]
        self.progress.scored(ap)
        self.progress.say(f"step {state.step}: validation AP {ap:.3f}, AP50 {ap50:.3f}")
        if ap > state.best_ap or state.best_step is None:
            state.best_step, state.best_ap = state.step, ap
        self.save_and_stop_if_asked()

    def evaluate(self, name: str) -> CocoScores:
        data = self.measured_on[name]
        share = -(-len(data.images) // self.accelerator.num_processes)
        options = {"batch_size": self.args.eval_batch_size, "num_workers": self.args.num_workers}
        with (
            self.progress.count(name, share) as counted,
            self.averaged(),
            torch.random.fork_rng(devices=[]),  # loading draws a number, and training goes on as if it had not
        ):
            return evaluate_model(self.model, self.processor, data, self.accelerator, on_batch=counted, **options)[0]

    def save_and_stop_if_asked(self) -> None:
        """Write a checkpoint and, if a signal came, end the process."""
        save_checkpoint(self.accelerator, self.checkpoints, self.state)
        self.stop_if_asked()

    def stop_if_asked(self) -> None:
        if self.signals.should_stop():
            self.signals.leave(f"stopped after step {self.state.step} of {self.total_steps}; go on with --resume")

    def export(self, command: str) -> None:
        """Measure the best model on all images but those that it learned from, and write what the run leaves."""
        load_checkpoint(self.accelerator, checkpoint_path(self.checkpoints, self.state.export_step))
        scores = {}
        for name in self.measured_on:
            self.stop_if_asked()
            scores[name] = self.evaluate(name)
        self.stop_if_asked()
        with self.averaged():
            model = gather_full_model(self.accelerator, self.model)
            if self.accelerator.is_main_process:
                save_run(
                    self.args.output,
                    model,
                    self.processor,
                    self.state,
                    scores,
                    dataset=self.args.dataset_name or self.train_data.name,
                    command=command,
                    base_model=self.args.model,
                    backbone=self.args.backbone_weights,
                )
        part = list(scores)[-1]
        self.accelerator.print(
            f"{part}, checkpoint of step {self.state.export_step}:\n{scores[part].table}\nmodel: {self.args.output}"
        )


def start_accelerator(args: argparse.Namespace) -> Accelerator:
    """Make the accelerator, and let the log have one line for each thing that one process has to say."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # said so, several processes on CPUs find each other
        gradient_accumulation_steps=args.gradient_accumulation,
        mixed_precision=args.mixed_precision,
        log_with=args.report_to,
        project_dir=str(args.output),
        kwargs_handlers=[PROCESS_GROUP_TIMEOUT],
    )
    level = logging.WARNING if accelerator.is_main_process else logging.ERROR
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(show_path=False)])
    transformers.utils.logging.disable_progress_bar()  # there is one already
    if accelerator.gradient_accumulation_steps != args.gradient_accumulation:
        raise InputError(
            f"accelerate is set to {accelerator.gradient_accumulation_steps} accumulated batches, but "
            f"--gradient-accumulation is {args.gradient_accumulation}; make them the same"
        )
    part = per_device_batch_size(args.batch_size, accelerator.num_processes, args.gradient_accumulation)
    if (deepspeed := accelerator.state.deepspeed_plugin) is not None:  # it asks for what it could read from a loader
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = part
    if args.bucketing and accelerator.num_processes * args.gradient_accumulation == 1:
        raise InputError("--bucketing sorts the batches of a step, of which there is one; use --gradient-accumulation")
    return accelerator


def read_splits(args: argparse.Namespace) -> dict[str, DetectionSplit]:
    """Read the data by the names of splits, those to train on and to validate with among them."""
    if not args.data:
        return {SPLIT_OF_OPTION[name]: read_coco(*pair) for name, pair in files_of_splits(args).items() if all(pair)}
    data = read_data(args.data, streaming=args.streaming)
    if missing := [split for split in ("train", "validation") if split not in data]:
        raise InputError(f"{args.data}: has no split for {' and '.join(missing)}; it has {', '.join(data)}")
    return data


def settings_of(args: argparse.Namespace, accelerator: Accelerator, data: dict[str, DetectionSplit]) -> dict[str, Any]:
    """What a run and its resumption must have in common."""
    train, validation = data["train"], data["validation"]
    return {
        **{name: str(value) for name, value in vars(args).items() if name not in NOT_SETTINGS},
        "mixed_precision": accelerator.mixed_precision,  # which accelerate may have been set to
        "config_file": file_fingerprint(args.config),
        "images": len(train.images),
        "data": data_fingerprint(train),
        "validation_data": data_fingerprint(validation),  # the best AP is the best of those on the same images
    }


def make_detector(
    args: argparse.Namespace, train: DetectionSplit, *, is_new: bool
) -> tuple[DinoDetrForObjectDetection, BaseImageProcessor]:
    """Make the model for the classes of the data, and say what of it is to be trained."""
    size = parse_size(args.image_size) if args.image_size else None
    fields = dict(args.config_override)
    if args.model:
        model, processor = load_pretrained_for_categories(args.model, train.categories, size, fields)
    else:
        model, processor = build_model_and_processor(args.config, train.categories, size, fields)
        if not args.backbone_weights:
            warn_if_batch_norms_frozen(model)
    if args.backbone_weights and is_new:
        load_backbone_weights(model, args.backbone_weights)
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if args.compile:
        compile_layers(model)
    freeze(model, args.freeze)
    return model, processor


def words_to_train_again(words: list[str], args: argparse.Namespace, accelerator: Accelerator) -> list[str]:
    """The command line from the start, with the precision if accelerate's configuration has chosen it."""
    is_set_elsewhere = args.mixed_precision is None and accelerator.mixed_precision != "no"
    precision = ["--mixed-precision", accelerator.mixed_precision] if is_set_elsewhere else []
    return [word for word in words if word not in ("--resume", "--overwrite")] + precision


# what may differ between a run and its resumption: where things are, how fast they are read, and how long it goes on
NOT_SETTINGS = {
    "output", "resume", "overwrite", "recipe", "data", "streaming", "dataset_name", "report_to", "report_every",
    "num_workers", "eval_batch_size", "eval_every", "checkpoint_steps", "epochs", "max_steps", "early_stopping",
    "gradient_checkpointing", "compile", "config", "train_images", "train_annotations", "val_images",
    "val_annotations", "test_images", "test_annotations",
}  # fmt: skip
SPLIT_OF_OPTION = {"train": "train", "val": "validation", "test": "test"}
ABOVE_0 = at_least(1)
NOT_NEGATIVE = number_between(0, 1e38)  # no weight holds a number that is much larger, and inf is a slip


def parse_arguments(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_model(parser.add_argument_group("the model"))
    add_data(parser.add_argument_group("the data"))
    add_run(parser.add_argument_group("the run"))
    add_step(parser.add_argument_group("a step"))
    add_learning_rate(parser.add_argument_group("the learning rate"))
    add_watching(parser.add_argument_group("watching"))
    args = parse_args_with_recipe(parser, words)
    if not (args.model or args.config or args.backbone_weights):
        parser.error("one of --model, --config and --backbone-weights is needed")
    if args.model and args.backbone_weights:
        parser.error("--model brings its backbone; leave out --backbone-weights")
    if args.lr_drop and args.schedule != "step":
        parser.error(f"--schedule {args.schedule} has no drops; give --lr-drop without a value, or leave it out")
    if args.lr_drop is None:
        args.lr_drop = [11 / 12]
    check_files_or_data(parser, args)
    return args


def add_model(part: argparse._ArgumentGroup) -> None:
    start = part.add_mutually_exclusive_group()
    start.add_argument("--model", help="folder or Hub name of the DINO model to fine-tune")
    start.add_argument("--config", type=Path, help="JSON file with fields of DinoDetrConfig, to train from scratch")
    backbone = "train from scratch, but a backbone that was pre-trained: torchvision/resnet50, or a folder or Hub name"
    part.add_argument("--backbone-weights", metavar="NAME", help=backbone)
    part.add_argument(
        "--config-override", type=config_field, nargs="+", action="extend", default=[], metavar="FIELD=VALUE",
        help="fields of DinoDetrConfig that are to differ",
    )  # fmt: skip
    part.add_argument("--freeze", nargs="*", metavar="STAGE", help="stem, backbone, backbone.stage1 ..., encoder, "
                      "decoder; nothing after it trains all (default: the stem of a pre-trained ResNet)")  # fmt: skip


def add_data(part: argparse._ArgumentGroup) -> None:
    part.add_argument("--data", help="folder, or OWNER/NAME on the Hub; instead of the files below")
    part.add_argument("--streaming", action="store_true", help="fetch a dataset of the Hub image by image")
    for split in SPLIT_OF_OPTION:
        part.add_argument(f"--{split}-images", type=Path, help="folder of images")
        part.add_argument(f"--{split}-annotations", type=Path, help="COCO annotation file")
    part.add_argument("--dataset-name", help="for the model card (default: the folder of the data)")
    size = "SHORTEST [LONGEST] edge, or HEIGHTxWIDTH (default: the model's, 800 1333 for a new one)"
    part.add_argument("--image-size", nargs="+", metavar="PIXELS", help=size)
    augmentations = f"{', '.join(AUGMENTATIONS)}, or path/to/file.py:function"
    part.add_argument("--augmentation", default="dino", metavar="NAME", help=augmentations)
    part.add_argument(
        "--bucketing", action=argparse.BooleanOptionalAction, default=False,
        help="put those images of a step that have like shapes into one of its batches, to pad less",
    )  # fmt: skip
    part.add_argument("--num-workers", type=at_least(0), default=2, help="processes that read, for each process")


def add_run(part: argparse._ArgumentGroup) -> None:
    part.add_argument("--output", type=Path, required=True, help="folder for the model; must be new or empty")
    part.add_argument("--recipe", type=Path, help="YAML file with any of these options; those given here win")
    part.add_argument("--resume", action="store_true", help="go on with the run in --output")
    part.add_argument("--overwrite", action="store_true", help="replace the model and checkpoints in --output")
    part.add_argument("--epochs", type=ABOVE_0, default=12, help="passes over the training images")
    part.add_argument("--max-steps", type=ABOVE_0, help="ends the run earlier, even within an epoch")
    stop = "end when so many evaluations in a row were no better than the best"
    part.add_argument("--early-stopping", type=ABOVE_0, metavar="EVALUATIONS", help=stop)
    part.add_argument("--seed", type=at_least(0, 2**31), default=0, help="of weights, order and augmentation")


def add_step(part: argparse._ArgumentGroup) -> None:
    part.add_argument("--batch-size", type=ABOVE_0, default=16, help="images per step, over all processes")
    parts = "batches that each process's images of a step are split into, to save memory"
    part.add_argument("--gradient-accumulation", type=ABOVE_0, default=1, help=parts)
    part.add_argument(
        "--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False,
        help="less memory, more time",
    )  # fmt: skip
    part.add_argument("--compile", action="store_true", help="torch.compile: a minute at the start, then faster")
    part.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: what accelerate is set to")
    part.add_argument("--weight-decay", type=NOT_NEGATIVE, default=1e-4, help="AdamW's")
    clip = number_between(0, without_lowest=True)
    part.add_argument("--clip", type=clip, default=0.1, help="largest norm of the gradient; inf for no limit")
    below_1 = number_between(0, 1 - 1e-6)
    part.add_argument("--ema", type=below_1, help="evaluate and keep a running average of the weights, as 0.9997")


def add_learning_rate(part: argparse._ArgumentGroup) -> None:
    part.add_argument("--learning-rate", type=NOT_NEGATIVE, default=1e-4, help="but the backbone's")
    part.add_argument("--backbone-lr-factor", type=NOT_NEGATIVE, default=0.1, help="of that")
    sampling = "of that, for the sampling offsets"
    part.add_argument("--sampling-lr-factor", type=NOT_NEGATIVE, default=1.0, help=sampling)
    part.add_argument(
        "--schedule", choices=SCHEDULES, default="step", help="how the learning rate falls; step: at --lr-drop"
    )
    drop = "epochs, or below 1 fractions of the run, at which --schedule step drops to a tenth (default: 11/12)"
    part.add_argument("--lr-drop", type=NOT_NEGATIVE, nargs="*", metavar="WHEN", help=drop)
    part.add_argument("--warmup-steps", type=at_least(0), default=0, help="in which the learning rate rises")


def add_watching(part: argparse._ArgumentGroup) -> None:
    part.add_argument("--eval-batch-size", type=ABOVE_0, default=8, help="images, for each process")
    part.add_argument("--eval-every", type=ABOVE_0, default=1, metavar="EPOCHS", help="between evaluations")
    between = "between checkpoints within an epoch"
    part.add_argument("--checkpoint-steps", type=ABOVE_0, metavar="STEPS", help=between)
    part.add_argument("--report-every", type=ABOVE_0, default=20, metavar="STEPS", help="between rows of the history")
    trackers = [str(tracker.value) for tracker in get_available_trackers()]
    part.add_argument("--report-to", choices=trackers, help="a tracker of accelerate's that is installed")


def check_files_or_data(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """See that either `--data` is given, or the files of at least training and validation."""
    given = files_of_splits(args)
    if args.data and any(file for pair in given.values() for file in pair):
        parser.error("give either --data or the files of each split, not both")
    for split, pair in given.items():
        if any(pair) and not all(pair):
            parser.error(f"--{split}-images and --{split}-annotations belong together")
    if not args.data and not all(given["train"] + given["val"]):
        parser.error("give --data, or --train-images, --train-annotations, --val-images and --val-annotations")


def files_of_splits(args: argparse.Namespace) -> dict[str, tuple[Path, Path]]:
    return {split: (vars(args)[f"{split}_images"], vars(args)[f"{split}_annotations"]) for split in SPLIT_OF_OPTION}


if __name__ == "__main__":
    run_cli(main)
