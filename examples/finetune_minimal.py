"""Fine-tune DINO with a loop that fits on a page: a start for a loop of your own.

    accelerate launch examples/finetune_minimal.py dino-4scale-r50 mine runs/mine

The arguments are a model, a dataset (a directory in the format of COCO, Pascal VOC, YOLO or Hugging Face datasets, or
its name on the Hub) and a directory for the result. It runs on a CPU, one GPU or several. `hf-dino train` trains the
same way and adds resuming, EMA weights, logs and options.
"""

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device, set_seed

from hf_dino.data import DetectionDataset, TrainingBatchSampler, read_data, steps_per_epoch, training_loader
from hf_dino.evaluation import evaluate_model
from hf_dino.hub import load_pretrained_for_categories
from hf_dino.training import (
    build_training_pipeline,
    freeze,
    get_param_groups,
    read_and_check,
    scale_lr,
    with_effective_batch,
)


NUM_EPOCHS = 12
GLOBAL_BATCH_SIZE = 16  # images per optimizer step, over all processes and accumulated micro-batches
GRADIENT_ACCUMULATION_STEPS = 2  # more need less memory, and give the same result
NUM_WORKERS = 2
SEED = 0


def main(model_name: str, dataset: str, output_dir: str) -> float:
    """Fine-tune a model and save it. Return its average precision on the validation images, in [0, 1]."""
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS
    )
    set_seed(SEED)  # new weights are the same on every process

    # The dataset, which one process downloads, and a model for its categories. Class heads of known classes are kept.
    splits = read_and_check(partial(read_data, dataset))
    model, processor = load_pretrained_for_categories(model_name, splits["train"].categories)
    freeze(model)  # the stem of a pretrained ResNet, as in the official implementation

    # Augmentation, and a collator that makes `pixel_values`, `pixel_mask` and `labels` from images and annotations.
    preprocessing = build_training_pipeline(model, processor, splits, augmentation="dino")

    # AdamW with the backbone at a tenth of the learning rate, which decays to a tenth before the last epoch.
    groups = get_param_groups(model, learning_rate=1e-4, backbone_lr_multiplier=0.1)
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    set_seed(SEED, device_specific=True)  # each process samples its own denoising queries

    for epoch in range(NUM_EPOCHS):
        scale_lr(optimizer, 0.1 if epoch == NUM_EPOCHS - 1 else 1.0)
        train_split = DetectionDataset(splits["train"], preprocessing.augmentation, SEED, epoch)
        sampler = TrainingBatchSampler(
            len(train_split),
            GLOBAL_BATCH_SIZE,
            seed=SEED,
            epoch=epoch,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            gradient_accumulation_steps=GRADIENT_ACCUMULATION_STEPS,
        )
        loader = training_loader(train_split, preprocessing.collate, sampler, num_workers=NUM_WORKERS)
        loss = train_epoch(accelerator, model, optimizer, loader)
        scores, _ = evaluate_model(model, processor, splits["validation"], accelerator, batch_size=8)
        num_steps = (epoch + 1) * steps_per_epoch(len(train_split), GLOBAL_BATCH_SIZE)
        accelerator.print(f"step {num_steps}: mean loss {loss:.3f}, AP {scores.metrics['ap']:.3f}")

    # A directory that `from_pretrained` loads, with the code of the model.
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(output_dir)
        processor.save_pretrained(output_dir)
    accelerator.end_training()
    return scores.metrics["ap"]


def train_epoch(
    accelerator: Accelerator,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: Iterable[dict[str, Any]],
) -> float:
    """Train on each batch once. Return the mean loss over all steps and processes."""
    losses = []
    model.train()
    # The loss is normalized by the objects of the whole step, as if its micro-batches were one large batch.
    for batch in with_effective_batch(loader, accelerator):
        with accelerator.accumulate(model):
            loss = model(**send_to_device(batch, accelerator.device)).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    return accelerator.reduce(torch.stack(losses).mean(), "mean").item()


if __name__ == "__main__":
    main(*sys.argv[1:])
