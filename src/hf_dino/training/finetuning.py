"""The fine-tuning loop: from a dataset and a pretrained model, or a configuration, to the model with the best AP."""

import dataclasses
import logging
import math
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import transformers
from accelerate import Accelerator, DistributedType
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, send_to_device, set_seed
from transformers import BaseImageProcessor, PreTrainedModel

from ..backbone_weights import load_backbone_weights
from ..configuration_dino_detr import DinoDetrConfig
from ..data import (
    DetectionDataset,
    DetectionSplit,
    ReadOptions,
    TrainingBatchSampler,
    per_device_batch_size,
    predict_batch_shapes,
    read_coco,
    read_data,
    steps_per_epoch,
    training_loader,
)
from ..data.images import set_max_image_pixels
from ..data.split import missing_split_message
from ..detectors import model_class_of, model_inputs, training_loss
from ..evaluation import CocoScores, evaluate_model
from ..hub import (
    build_model_and_processor,
    load_pretrained_for_categories,
    parse_image_size,
    save_detector,
    warn_if_batch_norms_frozen,
)
from ..model_card import finetuned_card, training_command
from ..training_arguments import RESUME_IGNORED_ARGS, SPLIT_PREFIXES, FineTuningArguments, reproduction_argv
from ..utils.distributed import create_accelerator
from ..utils.errors import InputError
from ..utils.io import atomic_update_directory, write_json
from ..visualization import plot_training_curves
from .batch import build_training_pipeline, read_and_check, with_effective_batch
from .checkpoint import (
    TrainingState,
    check_disk_space,
    checkpoint_path,
    data_fingerprint,
    file_fingerprint,
    load_checkpoint,
    load_training_state,
    lock_output_dir,
    resolve_resume_checkpoint,
    save_checkpoint,
    save_emergency_checkpoint,
)
from .ema import ExponentialMovingAverage
from .logging import RunHistory, TrainingProgress, init_tracking
from .loss_monitor import LossMonitor
from .optim import (
    compile_layers,
    enable_gradient_checkpointing,
    freeze,
    get_lr_multiplier,
    get_milestones,
    get_param_groups,
    scale_lr,
    set_training_mode,
    should_stop_early,
)
from .signals import StopSignals


logger = logging.getLogger(__name__)


class FineTuner:
    """Fine-tune DINO, or another detection model, on a dataset, or train it from scratch.

    A step of DINO, DN-DETR or Deformable DETR gives the same result however its images are divided among processes and
    accumulated micro-batches; the losses of other models in transformers normalize each micro-batch by itself. A run
    that was stopped or killed resumes from its last checkpoint and ends with bitwise-identical weights. Everything
    that a resumed run needs is in `state` and in the files of its checkpoint.

    Making a `FineTuner` reads the data, builds the model and checks that both fit; it writes nothing.

    Args:
        arguments (`FineTuningArguments`): The options of the run.
        accelerator (`Accelerator`, *optional*): From [`make_accelerator`], which is called if there is none.

    Raises:
        InputError: If the options, the data and the model do not fit together.
    """

    def __init__(self, arguments: FineTuningArguments, accelerator: Accelerator | None = None):
        set_max_image_pixels(arguments.max_image_pixels)
        self.arguments = arguments
        self.accelerator = accelerator or make_accelerator(arguments)
        self.checkpoints = arguments.output_dir / "checkpoints"
        self.start = resolve_resume_checkpoint(
            arguments.output_dir,
            self.checkpoints,
            resume=arguments.resume_from_checkpoint,
            overwrite=arguments.overwrite_output_dir,
        )
        splits = read_and_check(partial(read_splits, arguments), is_new=self.start is None)
        self.train_split = splits["train"]
        self.eval_splits = {name: split for name, split in splits.items() if name != "train"}
        settings = resume_settings(arguments, self.accelerator, splits)
        self.state = load_training_state(self.start, settings) if self.start else TrainingState(settings)

        set_seed(arguments.seed)
        model, self.processor = build_model(arguments, self.train_split, is_new=self.start is None)
        self.pipeline = build_training_pipeline(
            model, self.processor, splits, arguments.augmentation, arguments.max_detections
        )
        self.config = model.config
        self._prepare(model)
        self._plan_steps()
        set_seed(arguments.seed, device_specific=True)  # from here on, each process samples its own noise

    def _prepare(self, model: PreTrainedModel) -> None:
        """Make the optimizer and everything else that holds the model's weights."""
        args, accelerator = self.arguments, self.accelerator
        groups = get_param_groups(model, args.learning_rate, args.backbone_lr_multiplier, args.sampling_lr_multiplier)
        optimizer = torch.optim.AdamW(groups, weight_decay=args.weight_decay, fused=True)
        if not isinstance(self.config, DinoDetrConfig):  # others have parts that no loss reaches
            accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=True)
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        unwrapped = accelerator.unwrap_model(self.model)
        self.average = ExponentialMovingAverage(unwrapped, args.ema_decay) if args.ema_decay is not None else None
        self.eval_weights = self.average.average_parameters if self.average else nullcontext
        self.monitor = LossMonitor(
            accelerator,
            self.model,
            on_failure=self._save_emergency_checkpoint,
            files={image.image_id: image.path for image in self.train_split.images},
        )
        accelerator.register_for_checkpointing(*filter(None, (self.average, self.monitor)))
        shadow = self.average.shadow.values() if self.average else ()
        check_disk_space(self.checkpoints, self.model, self.optimizer, shadow)

    def _save_emergency_checkpoint(self) -> str:
        return save_emergency_checkpoint(self.accelerator, self.model, self.optimizer, self.checkpoints, self.state)

    def _plan_steps(self) -> None:
        """Compute the length of the run and, from it, the learning rate of each step."""
        args, state = self.arguments, self.state
        self.epoch_steps = steps_per_epoch(len(self.train_split.images), args.global_batch_size)
        self.total_steps = min(args.num_train_epochs * self.epoch_steps, args.max_train_steps or sys.maxsize)
        self.lr_multiplier = self._schedule(self.total_steps)
        self._warn_about_schedule()
        state.total_steps = self.total_steps
        self.signals = StopSignals(self.accelerator)
        self.progress = TrainingProgress(
            self.total_steps, state.step, self.accelerator.is_main_process, args.global_batch_size
        )
        if state.best_step is not None:
            self.progress.set_ap(state.best_ap)

    def _schedule(self, total_steps: int) -> Callable[[int], float]:
        """Return the multiplier on the learning rate at each step of a run of this length."""
        args = self.arguments
        milestones = get_milestones(args.lr_milestones, total_steps=total_steps, steps_per_epoch=self.epoch_steps)
        return get_lr_multiplier(
            args.lr_scheduler_type, total_steps=total_steps, milestones=milestones, warmup_steps=args.warmup_steps
        )

    def _warn_about_schedule(self) -> None:
        """Warn if the run is too short for its schedule, or if a new length makes the learning rate jump."""
        args, step, total_steps = self.arguments, self.state.step, self.total_steps
        if args.warmup_steps > total_steps:
            logger.warning(
                "the learning rate rises for %d steps (--warmup_steps), but the run has %d: it never reaches %g",
                *(args.warmup_steps, total_steps, args.learning_rate),
            )
        steps = get_milestones(args.lr_milestones, total_steps=total_steps, steps_per_epoch=self.epoch_steps)
        for milestone, at_step in zip(args.lr_milestones, steps):
            if args.lr_scheduler_type == "multi_step" and milestone >= 1 and at_step >= total_steps:
                epochs = total_steps / self.epoch_steps
                logger.warning("--lr_milestones %g is never reached: the run ends after %g epochs", milestone, epochs)
        before = self.state.total_steps or total_steps
        old_rate, new_rate = (args.learning_rate * self._schedule(total)(step) for total in (before, total_steps))
        if step < total_steps and not math.isclose(old_rate, new_rate, rel_tol=0.01):
            logger.warning(
                "the run now has %d steps instead of %d: after step %d the learning rate is %.2e instead of %.2e",
                *(total_steps, before, step, new_rate, old_rate),
            )

    def train(self) -> dict[str, CocoScores]:
        """Train from the first or the resumed step to the last, and write the model with the best AP.

        Afterwards, `output_dir` contains the model, its image processor and model card, `metrics.json`,
        `history.jsonl`, `curves.png` and `checkpoints/`.

        Returns:
            `dict[str, CocoScores]`: The COCO metrics of that model by the name of the split, `"validation"` first.

        Raises:
            InputError: If another run uses `output_dir`, or a checkpoint cannot be read or written.
            FloatingPointError: If the loss or the gradient is NaN or infinite.
            SystemExit: After SIGINT, SIGTERM or SIGUSR1, once the step is done and its checkpoint written.
        """
        scores = self.train_and_save()
        self.accelerator.end_training()
        return scores

    def train_and_save(self) -> dict[str, CocoScores]:
        """Do the work of [`FineTuner.train`], and leave the group of processes open for another run."""
        args, state = self.arguments, self.state
        with (
            lock_output_dir(self.accelerator, self.checkpoints, self.start, overwrite=args.overwrite_output_dir),
            self.signals,
            init_tracking(self.accelerator, state, args.output_dir, vars(args)),
            self.progress,
        ):
            if self.start:
                load_checkpoint(self.accelerator, self.start)
                self.progress.print(f"resuming after step {state.step} from {self.start}")
            self.history = RunHistory(args.output_dir, state, enabled=self.accelerator.is_main_process)
            self.evaluate_if_due()  # the run may have been stopped between a step and its evaluation
            while state.step < self.total_steps and not should_stop_early(
                state.validation_ap, args.early_stopping_patience
            ):
                self.train_epoch()
                self.checkpoint()
                self.evaluate_if_due()
                self.history.plot()
            scores = self.evaluate_best()
            self.save(scores)
        return scores

    def train_epoch(self) -> None:
        """Take the remaining steps of an epoch, or those up to an evaluation within it."""
        state, args = self.state, self.arguments
        set_training_mode(self.model)
        for batch in self.epoch_dataloader(*divmod(state.step, self.epoch_steps)):
            losses = self.training_step(batch)
            if losses is None:
                continue
            state.step += 1
            is_last = state.step % self.epoch_steps == 0 or self.is_evaluation_due
            is_checkpoint = _is_multiple(state.step, args.checkpointing_steps)
            self.log_step(losses, is_row=is_last or is_checkpoint or _is_multiple(state.step, args.logging_steps))
            if is_last:
                break
            if is_checkpoint or self.signals.should_stop():
                self.checkpoint()
                self.history.plot()

    def epoch_dataloader(self, epoch: int, first_step: int) -> Iterator[dict[str, Any]]:
        """Return the micro-batches of this process in an epoch, from a step on."""
        args, accelerator, collate = self.arguments, self.accelerator, self.pipeline.collate
        dataset = DetectionDataset(self.train_split, self.pipeline.augmentation, args.seed, epoch)
        sampler = TrainingBatchSampler(
            len(self.train_split.images),
            args.global_batch_size,
            seed=args.seed,
            epoch=epoch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            first_step=first_step,
            get_shape=predict_batch_shapes(dataset, collate) if args.group_by_aspect_ratio else None,
        )
        loader = training_loader(dataset, collate, sampler, num_workers=args.dataloader_num_workers)
        return with_effective_batch(loader, accelerator)

    def training_step(self, batch: dict[str, Any]) -> dict[str, float] | None:
        """Train on a micro-batch. Return the mean losses of the step after its last one, `None` before."""
        accelerator, model, optimizer = self.accelerator, self.model, self.optimizer
        scale_lr(optimizer, self.lr_multiplier(self.state.step))
        self.monitor.begin(batch)
        losses = None
        with accelerator.accumulate(model):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            outputs = model(**model_inputs(batch, self.config))
            loss, terms = training_loss(outputs, batch, self.config)
            accelerator.backward(loss)
            self.monitor.add(loss, terms)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), self.arguments.max_grad_norm)
                losses = self.monitor.check(self.state.step, norm)
            optimizer.step()
            optimizer.zero_grad()
        if losses is not None and self.average:
            self.average.update()
        return losses

    def log_step(self, losses: dict[str, float], *, is_row: bool) -> None:
        """Show the losses of the last step; for a row of the history, log the averages since the last row."""
        learning_rate = self.arguments.learning_rate * self.lr_multiplier(self.state.step - 1)
        self.progress.step(self.epoch, losses, learning_rate)
        if is_row:
            averages = self.monitor.averages()
            throughput = self.progress.report(self.state.step, self.epoch, averages or losses, learning_rate)
            self.log({**averages, "learning_rate": learning_rate}, **throughput)

    def log(self, row: dict[str, float], **throughput: float) -> None:
        """Add a row to the history and, with the throughput of this machine, to the tracker."""
        self.history.add({"step": self.state.step, "epoch": self.epoch, **row})
        self.accelerator.log({**row, **throughput}, step=self.state.step)

    @property
    def epoch(self) -> float:
        """Passes over the training images so far."""
        return self.state.step / self.epoch_steps

    @property
    def is_evaluation_due(self) -> bool:
        """Return whether the model of this step is evaluated."""
        args, step = self.arguments, self.state.step
        return step == self.total_steps or _is_multiple(step, args.eval_steps or args.eval_epochs * self.epoch_steps)

    def evaluate_if_due(self) -> None:
        """Evaluate on the validation images if this is due and was not done already."""
        state = self.state
        if not state.step or not self.is_evaluation_due or state.is_evaluated:
            return
        metrics = self.evaluate("validation").metrics
        self.log(metrics)
        state.add_evaluation(metrics["ap"])
        self.progress.set_ap(metrics["ap"])
        self.progress.print(f"step {state.step}: validation AP {metrics['ap']:.3f}, AP50 {metrics['ap50']:.3f}")
        self.checkpoint()

    def evaluate(self, name: str) -> CocoScores:
        """Compute the COCO metrics of the model, with averaged weights if there are any, on a split."""
        args, split = self.arguments, self.eval_splits[name]
        num_images = math.ceil(len(split.images) / self.accelerator.num_processes)
        with (
            self.progress.track(name, num_images) as advance,
            self.eval_weights(),
            torch.random.fork_rng(devices=[]),  # a DataLoader samples a seed, which must not change the training
        ):
            scores, _ = evaluate_model(
                self.model,
                self.processor,
                split,
                self.accelerator,
                batch_size=args.per_device_eval_batch_size,
                num_workers=args.dataloader_num_workers,
                on_batch=advance,
                max_detections=args.max_detections,
            )
        return scores

    def checkpoint(self) -> None:
        """Write a checkpoint, then exit if a signal was received."""
        self.history.sync()
        save_checkpoint(self.accelerator, self.checkpoints, self.state)
        self.exit_if_stopped()

    def exit_if_stopped(self) -> None:
        """End the process if a signal to stop was received."""
        if self.signals.should_stop():
            step = f"stopped after step {self.state.step} of {self.total_steps}"
            self.signals.exit(f"{step}; resume with --resume_from_checkpoint")

    def evaluate_best(self) -> dict[str, CocoScores]:
        """Load the checkpoint with the best AP and evaluate it on every split but the one it was trained on."""
        load_checkpoint(self.accelerator, checkpoint_path(self.checkpoints, self.state.export_step))
        scores = {}
        for name in self.eval_splits:
            self.exit_if_stopped()
            scores[name] = self.evaluate(name)
        self.exit_if_stopped()
        return scores

    def save(self, scores: dict[str, CocoScores]) -> None:
        """Write model, image processor, model card, `metrics.json` and `curves.png`, all at once.

        Args:
            scores (`dict[str, CocoScores]`): From [`FineTuner.evaluate_best`]; the model card cites the last split.
        """
        args, state, split = self.arguments, self.state, list(scores)[-1]
        with self.eval_weights():
            model = gather_full_model(self.accelerator, self.model)
            if self.accelerator.is_main_process:
                with atomic_update_directory(args.output_dir, last="config.json") as folder:
                    save_detector(folder, model, self.processor, self._model_card(model, scores[split], split))
                    write_json(folder / "metrics.json", self._report(scores))
                    plot_training_curves(self.history.rows, folder / "curves.png")
        self.accelerator.print(
            f"{split}, checkpoint of step {state.export_step}:\n{scores[split].table}\nmodel: {args.output_dir}"
        )

    def _model_card(self, model: PreTrainedModel, scores: CocoScores, split: str) -> str:
        return finetuned_card(
            self.config,
            metrics=scores.metrics,
            dataset=self.arguments.dataset_label or self.train_split.name,
            command=self.command,
            base_model=self.arguments.model_name_or_path,
            backbone=self.arguments.backbone_weights,
            split=split,
            size=dict(self.processor.size),
            max_detections=self.arguments.max_detections,
        )

    def _report(self, scores: dict[str, CocoScores]) -> dict[str, Any]:
        return {
            "best_step": self.state.export_step,
            **{name: each.to_dict() for name, each in scores.items()},
            "command": self.command,
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
        }

    @property
    def command(self) -> str:
        """The shell command that repeats the run, with the precision that accelerate may have been configured to."""
        precision = self.arguments.mixed_precision or self.accelerator.mixed_precision
        arguments = dataclasses.replace(self.arguments, mixed_precision=precision if precision != "no" else None)
        argv = ["hf_dino", "train", *reproduction_argv(arguments)]
        return training_command("-m", argv, self.accelerator.num_processes)


def _is_multiple(step: int, interval: int | None) -> bool:
    return interval is not None and step % interval == 0


def make_accelerator(arguments: FineTuningArguments) -> Accelerator:
    """Make the accelerator of a run and check that the images of a step can be split evenly.

    Args:
        arguments (`FineTuningArguments`): The options of the run.

    Raises:
        InputError: If they contradict accelerate's configuration or the number of processes.
    """
    if arguments.report_to and arguments.report_to not in (trackers := list(map(str, get_available_trackers()))):
        raise InputError(f"--report_to {arguments.report_to}: is not an installed tracker ({', '.join(trackers)})")
    accumulation = arguments.gradient_accumulation_steps
    accelerator = create_accelerator(
        arguments.mixed_precision,
        gradient_accumulation_steps=accumulation,
        log_with=arguments.report_to,
        project_dir=str(arguments.output_dir),
    )
    if accelerator.gradient_accumulation_steps != accumulation:
        raise InputError(
            f"accelerate is configured for {accelerator.gradient_accumulation_steps} gradient accumulation steps, but "
            f"--gradient_accumulation_steps is {accumulation}; make them equal"
        )
    micro_batch = per_device_batch_size(arguments.global_batch_size, accelerator.num_processes, accumulation)
    if (deepspeed := accelerator.state.deepspeed_plugin) is not None:  # which would read it from a DataLoader
        deepspeed.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
    if arguments.group_by_aspect_ratio and accelerator.num_processes * accumulation == 1:
        raise InputError(
            "--group_by_aspect_ratio sorts images into the micro-batches of a step, but there is only one; increase "
            "--gradient_accumulation_steps"
        )
    return accelerator


def read_splits(arguments: FineTuningArguments) -> dict[str, DetectionSplit]:
    """Read the dataset of a run by the names of splits, `"train"` and `"validation"` among them.

    Raises:
        InputError: If it cannot be read or lacks one of the two.
    """
    options = ReadOptions(arguments.box_format, arguments.rotated_boxes, arguments.columns)
    if arguments.dataset is None:
        files = arguments.split_files.items()
        return {SPLIT_PREFIXES[prefix]: read_coco(pair[0], pair[1], options) for prefix, pair in files if pair}
    splits = read_data(arguments.dataset, streaming=arguments.streaming, options=options)
    if message := missing_split_message(arguments.dataset, splits, options):
        raise InputError(f"{arguments.dataset}: {message}")
    return splits


def resume_settings(
    arguments: FineTuningArguments, accelerator: Accelerator, splits: dict[str, DetectionSplit]
) -> dict[str, Any]:
    """Return everything that must be the same when a run is resumed."""
    train, validation = splits["train"], splits["validation"]
    return {
        **{name: str(value) for name, value in vars(arguments).items() if name not in RESUME_IGNORED_ARGS},
        "mixed_precision": accelerator.mixed_precision,  # which accelerate's configuration may have chosen
        "config_file": file_fingerprint(arguments.config_name),
        "num_images": len(train.images),
        "data": data_fingerprint(train),
        "validation_data": data_fingerprint(validation),  # the best AP is comparable on the same images only
    }


def build_model(
    arguments: FineTuningArguments, train: DetectionSplit, *, is_new: bool
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load or make the model for the classes of a dataset, with frozen stages, and its image processor.

    Args:
        arguments (`FineTuningArguments`): The options of the run.
        train (`DetectionSplit`): The training split.
        is_new (`bool`): False for a resumed run, whose checkpoint has the backbone's weights.
    """
    size = parse_image_size(arguments.image_size) if arguments.image_size else None
    settings = (train.categories, size, arguments.config_overrides)
    if arguments.model_name_or_path:
        model, processor = load_pretrained_for_categories(arguments.model_name_or_path, *settings)
    else:
        model, processor = build_model_and_processor(arguments.config_name, *settings, arguments.architecture)
        _initialize_backbone(model, arguments.backbone_weights, is_new=is_new)
    if arguments.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    if arguments.torch_compile:
        compile_layers(model)
    freeze(model, arguments.freeze)
    return model, processor


def _initialize_backbone(model: PreTrainedModel, weights: str | None, *, is_new: bool) -> None:
    """Load pretrained weights into the backbone of a new model, or warn if it would be frozen as initialized."""
    if not weights:
        warn_if_batch_norms_frozen(model)
    elif is_new:
        load_backbone_weights(model, weights)


def gather_full_model(accelerator: Accelerator, model: torch.nn.Module) -> PreTrainedModel:
    """Return the unwrapped model; of a sharded one, a copy that has all weights on the main process.

    Args:
        accelerator (`Accelerator`): The accelerator, of which every process calls this.
        model (`nn.Module`): The model that it prepared.
    """
    unwrapped = accelerator.unwrap_model(model)
    if accelerator.distributed_type != DistributedType.FSDP:
        return unwrapped
    weights = accelerator.get_state_dict(model)
    copy = model_class_of(unwrapped.config)(unwrapped.config)  # FSDP has replaced the class of the other
    if accelerator.is_main_process:
        copy.load_state_dict(weights)
    return copy
