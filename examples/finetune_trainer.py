r"""Fine-tune DINO on a dataset of your own with the `Trainer` of transformers.

    accelerate launch examples/finetune_trainer.py --model dino-4scale-r50 --data mine --output_dir runs/mine \
        --bf16 --push_to_hub --hub_model_id me/mine

`--data` is a folder in the format of COCO, Pascal VOC, YOLO or Hugging Face `datasets`, or a name on the Hub, with
images to train on and to validate with. All options of `TrainingArguments` work; `DEFAULTS` has those that DINO
wants otherwise. A step sees `per_device_train_batch_size` x `gradient_accumulation_steps` x processes images, 16 in
the original's recipe. It runs on a CPU, one GPU or many; `--resume_from_checkpoint runs/mine` goes on where a run was
stopped. In the folder are the model with the best average precision on the validation images, its image processor
and card, `eval_results.json`, and checkpoints. `finetune_coco.py` does the same, and more, with a loop to be read.
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
from hf_dino.hub import load_pretrained_for_categories
from hf_dino.model_card import finetuned_card, training_command
from hf_dino.training import PROCESS_GROUP_TIMEOUT, build_training_pipeline, freeze, get_param_groups, read_and_check
from hf_dino.training import batch as effective_batch
from hf_dino.utils.arguments import parse_image_size
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
    "logging_nan_inf_filter": False,  # it would hide a loss that is not a number
    "remove_unused_columns": False,  # what the dataset gives is for the collator, not for the model
    "ddp_find_unused_parameters": False,  # every parameter gets a gradient in every step
    "dataloader_num_workers": 2,
    "ddp_timeout": int(PROCESS_GROUP_TIMEOUT.timeout.total_seconds()),
    "hub_strategy": "end",  # what would be pushed before has neither card nor code
    "use_cpu": not torch.accelerator.is_available(),  # said so, several processes on CPUs find each other
}


@dataclass
class DetectionArguments:
    """What is no matter of the `Trainer`."""

    model: str = field(metadata={"help": "folder or Hub name of the DINO model to fine-tune"})
    data: str = field(metadata={"help": "folder, or OWNER/NAME on the Hub"})
    image_size: list[str] = field(default_factory=list, metadata={"help": "SHORTEST [LONGEST] edge, or HEIGHTxWIDTH"})
    augmentation: str = field(default="dino", metadata={"help": "a name of make_augmentation"})
    backbone_lr_factor: float = field(default=0.1, metadata={"help": "of learning_rate"})
    dataset_name: str = field(default="", metadata={"help": "for the model card (default: the folder of the data)"})


def parse_arguments(words: list[str]) -> tuple[DetectionArguments, TrainingArguments]:
    usage = "%(prog)s --model MODEL --data DATA --output_dir FOLDER ... (--help lists all options)"
    parser = HfArgumentParser((DetectionArguments, TrainingArguments), usage=usage, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS)
    try:
        options, training = parser.parse_args_into_dataclasses(words, look_for_args_file=False)
    except ValueError as error:
        parser.error(" ".join(str(error).split()))
    metric = str(training.metric_for_best_model).removeprefix("eval_")
    problems = {  # what would end badly, or only after the first epoch
        "several GPUs need a process each: start this by `accelerate launch`": training.n_gpu > 1,
        "--dataloader_persistent_workers: would repeat all crops and flips": training.dataloader_persistent_workers,
        "--hub_token: would be saved with the model; log in by `hf auth login`": training.hub_token is not None,
        f"--metric_for_best_model {metric}: must be one of {', '.join(METRICS)}": metric not in METRICS,
    }
    for problem in (text for text, is_so in problems.items() if is_so):
        parser.error(problem)
    return options, training


class DetectionTrainer(Trainer):
    """A `Trainer` that has the original's parameter groups, learns from the batches of a step as from one big batch,
    and measures COCO's numbers.
    """

    control: Any  # the types of what `Trainer` made, which it does not publish
    optimizer: Any

    def __init__(self, options: DetectionArguments, command: str, **kwargs: Any):
        super().__init__(**kwargs)
        self.options, self.command = options, command

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = model or self.model
            groups = get_param_groups(model, self.args.learning_rate, self.options.backbone_lr_factor)
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
        data = (eval_dataset or self.eval_dataset).data
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
            dataset=self.options.dataset_name or self.train_dataset.data.name,
            command=self.command,
            base_model=self.options.model,
            split="validation",
            size=dict(self.processing_class.size),
        )
        if self.is_world_process_zero():
            (Path(self.args.output_dir) / "README.md").write_text(card, encoding="utf-8")


class EpochWatch(TrainerCallback):
    """Augments the images anew in every epoch, and ends a run whose loss is not a number."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any, **kwargs: Any) -> None:
        train_dataloader.dataset.epoch = int(state.epoch)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        if not math.isfinite(logs.get("loss", 0.0)):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {state.global_step}: lower --learning_rate")


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    options, training = parse_arguments(words)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, Path(training.output_dir))
    data = read_and_check(partial(read_data, options.data, splits=("train", "validation")))
    size = parse_image_size(options.image_size) if options.image_size else None

    set_seed(training.seed)
    model, processor = load_pretrained_for_categories(options.model, data["train"].categories, size)
    freeze(model)
    inputs = build_training_pipeline(model, processor, data, options.augmentation)
    trainer = DetectionTrainer(
        options,
        training_command("examples/finetune_trainer.py", without_resume(words), training.world_size),
        model=model,
        args=training,
        data_collator=inputs.collate,
        train_dataset=DetectionDataset(data["train"], inputs.augmentation, training.seed),
        eval_dataset=DetectionDataset(data["validation"]),
        processing_class=processor,
        callbacks=[EpochWatch()],
    )
    trainer.train(resume_from_checkpoint=checkpoint)

    metrics = trainer.evaluate()
    trainer.log_metrics("eval", metrics)
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    trainer.save_model()  # pushes it, too, if it is to be
    trainer.create_model_card()


def find_checkpoint(resumed: str | None, output: Path) -> str | None:
    """The checkpoint to go on from, or None for a fresh start. What another run left in `output` is not touched."""
    checkpoint = None
    if resumed is not None:
        # the last file that is written of a checkpoint, so that one which was cut short does not count
        states = [path.parent for path in Path(resumed).resolve().rglob("trainer_state.json")]
        complete = {int(path.name.partition("-")[2]): path for path in states if path.name.startswith("checkpoint-")}
        if not complete:
            raise InputError(f"{resumed}: holds no checkpoint to resume from; start without --resume_from_checkpoint")
        checkpoint = complete[max(complete)]
    is_its_own = checkpoint is not None and checkpoint.parent == output.resolve()
    if not is_its_own and output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"{output}: is not empty; give another folder, or --resume_from_checkpoint {output}")
    return str(checkpoint) if checkpoint else None


def without_resume(words: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--resume_from_checkpoint", "--resume-from-checkpoint")
    return parser.parse_known_args(words)[1]


if __name__ == "__main__":
    run_cli(main)
