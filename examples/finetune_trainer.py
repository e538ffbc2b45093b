r"""Fine-tune DINO on a dataset with the `Trainer` of transformers.

    accelerate launch examples/finetune_trainer.py --model_name_or_path dino-4scale-r50 --dataset mine \
        --output_dir runs/mine --bf16 --push_to_hub --hub_model_id me/mine

`--dataset` is a directory in the format of COCO, Pascal VOC, YOLO or Hugging Face datasets, or its name on the Hub,
with a train and a validation split. All options of `TrainingArguments` are accepted; `DEFAULTS` lists those with
another default. A step has `per_device_train_batch_size` x `gradient_accumulation_steps` x processes images, 16 in the
official recipe. It runs on a CPU, one GPU or many; `--resume_from_checkpoint runs/mine` resumes a run. The output
directory gets the model with the best average precision on the validation images, its image processor and model card,
`eval_results.json`, and checkpoints. `hf-dino train` does the same, and more, with a loop of its own.
"""

import argparse
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from hf_dino.data import DetectionDataset, InputError, read_data
from hf_dino.evaluation import METRICS, evaluate_model
from hf_dino.hub import load_pretrained_for_categories, parse_image_size
from hf_dino.model_card import finetuned_card, training_command
from hf_dino.training import (
    PROCESS_GROUP_TIMEOUT,
    build_training_pipeline,
    effective_batch,
    freeze,
    get_param_groups,
    read_and_check,
)
from hf_dino.training_arguments import OPTIONS, default_of
from hf_dino.utils.errors import run_cli


DEFAULTS: dict[str, Any] = {
    "num_train_epochs": 12,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 8,
    "learning_rate": 1e-4,
    "lr_scheduler_type": "cosine",
    "weight_decay": 1e-4,
    "max_grad_norm": 0.1,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,  # the best and the last
    "load_best_model_at_end": True,
    "metric_for_best_model": "ap",
    "logging_steps": 20,
    "logging_nan_inf_filter": False,  # it would hide a non-finite loss
    "remove_unused_columns": False,  # the columns are for the collator, not for the model
    "ddp_find_unused_parameters": False,  # every parameter gets a gradient in every step
    "dataloader_num_workers": 2,
    "ddp_timeout": int(PROCESS_GROUP_TIMEOUT.timeout.total_seconds()),
    "hub_strategy": "end",  # earlier pushes would have neither model card nor code
    "use_cpu": not torch.accelerator.is_available(),  # given explicitly, several processes on CPUs find each other
}


def option(name: str) -> dict[str, str]:
    """Return the help of an option of `hf-dino train`."""
    return {"help": OPTIONS[name].metadata["help"]}


@dataclass
class DetectionArguments:
    """The options of the model and the dataset, a selection of [`FineTuningArguments`]."""

    model_name_or_path: str = field(metadata=option("model_name_or_path"))
    dataset: str = field(metadata=option("dataset"))
    image_size: list[str] = field(default_factory=list, metadata=option("image_size"))
    augmentation: str = field(default=default_of("augmentation"), metadata=option("augmentation"))
    backbone_lr_multiplier: float = field(
        default=default_of("backbone_lr_multiplier"), metadata=option("backbone_lr_multiplier")
    )
    dataset_label: str = field(default="", metadata=option("dataset_label"))


def parse_arguments(argv: list[str]) -> tuple[DetectionArguments, TrainingArguments]:
    usage = (
        "%(prog)s --model_name_or_path MODEL --dataset DATASET --output_dir DIRECTORY ... (--help lists all options)"
    )
    parser = HfArgumentParser((DetectionArguments, TrainingArguments), usage=usage, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    try:
        options, training = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    problems = {  # would fail only after the first epoch, or silently
        "several GPUs need a process each; start the script with `accelerate launch`": training.n_gpu > 1,
        "--dataloader_persistent_workers: would repeat all crops and flips": training.dataloader_persistent_workers,
        "--hub_token: would be saved with the model; log in with `hf auth login`": training.hub_token is not None,
        f"--metric_for_best_model {metric}: must be one of {', '.join(METRICS)}": metric not in METRICS,
    }
    for problem in (text for text, is_so in problems.items() if is_so):
        parser.error(problem)
    return options, training


class DetectionTrainer(Trainer):
    """A `Trainer` with the official parameter groups, a loss as of one large batch per step, and COCO metrics."""

    control: Any  # `Trainer` has no types for them
    optimizer: Any

    def __init__(self, options: DetectionArguments, command: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.options, self.command = options, command

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = model or self.model
            groups = get_param_groups(model, self.args.learning_rate, self.options.backbone_lr_multiplier)
            make, settings = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = make(groups, weight_decay=self.args.weight_decay, **settings)
        return self.optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, None]:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.whole_step = effective_batch([batch["labels"] for batch in batches], self.accelerator)
        return batches, None

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], **kwargs: Any) -> torch.Tensor:
        return super().compute_loss(model, {**inputs, "effective_batch": self.whole_step}, **kwargs)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        data = (eval_dataset or self.eval_dataset).split
        loading = {"batch_size": self.args.eval_batch_size, "num_workers": self.args.dataloader_num_workers}
        self.scores, _ = evaluate_model(self.model, self.processing_class, data, self.accelerator, **loading)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.scores.metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, **kwargs: Any) -> None:
        card = finetuned_card(
            self.model.config,
            metrics=self.scores.metrics,
            dataset=self.options.dataset_label or self.train_dataset.split.name,
            command=self.command,
            base_model=self.options.model_name_or_path,
            split="validation",
            size=dict(self.processing_class.size),
        )
        if self.is_world_process_zero():
            (Path(self.args.output_dir) / "README.md").write_text(card, encoding="utf-8")


class EpochCallback(TrainerCallback):
    """Augment the images differently in every epoch, and stop a run with a non-finite loss."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
        train_dataloader.dataset.epoch = int(state.epoch)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {state.global_step}: lower --learning_rate")


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options, training = parse_arguments(argv)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, Path(training.output_dir))
    data = read_and_check(partial(read_data, options.dataset, splits=("train", "validation")))
    size = parse_image_size(options.image_size) if options.image_size else None

    set_seed(training.seed)
    model, processor = load_pretrained_for_categories(options.model_name_or_path, data["train"].categories, size)
    freeze(model)
    preprocessing = build_training_pipeline(model, processor, data, options.augmentation)
    trainer = DetectionTrainer(
        options,
        training_command("examples/finetune_trainer.py", without_resume(argv), training.world_size),
        model=model,
        args=training,
        data_collator=preprocessing.collate,
        train_dataset=DetectionDataset(data["train"], preprocessing.augmentation, training.seed),
        eval_dataset=DetectionDataset(data["validation"]),
        processing_class=processor,
        callbacks=[EpochCallback()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model()  # and push it, with --push_to_hub
    trainer.create_model_card()


def find_checkpoint(resumed: str | None, output: Path) -> str | None:
    """Return the checkpoint to resume from, or `None` for a new run, which needs a new or empty `output`."""
    checkpoint = None
    if resumed is not None:
        # this file is written last, so a partial checkpoint does not count
        states = [path.parent for path in Path(resumed).resolve().rglob("trainer_state.json")]
        complete = {int(path.name.partition("-")[2]): path for path in states if path.name.startswith("checkpoint-")}
        if not complete:
            raise InputError(f"{resumed}: has no checkpoint to resume from; remove --resume_from_checkpoint")
        checkpoint = complete[max(complete)]
    is_its_own = checkpoint is not None and checkpoint.parent == output.resolve()
    if not is_its_own and output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"{output}: is not empty; use a different --output_dir, or --resume_from_checkpoint {output}")
    return str(checkpoint) if checkpoint else None


def without_resume(argv: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
    return parser.parse_known_args(argv)[1]


if __name__ == "__main__":
    run_cli(main)
