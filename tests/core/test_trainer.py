"""transformers' own `Trainer` fits, resumes and evaluates a DINO."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from helpers.models import TINY_RESNET, TINY_SWIN, tiny_model
from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor


CATEGORY_TO_LABEL = {1: 0, 5: 1, 90: 2}


class Images(Dataset):
    """Eight images of different sizes with 0 to 3 objects, as COCO describes them."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.examples = []
        for index in range(8):
            height, width = rng.integers(80, 128, 2)
            image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
            annotations = [
                {"category_id": int(rng.choice(list(CATEGORY_TO_LABEL))), "bbox": rng.integers(10, 40, 4).tolist()}
                for _ in range(index % 4)
            ]
            self.examples.append({"image": image, "target": {"image_id": index, "annotations": annotations}})

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        return self.examples[index]


def collate(examples):
    processor = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    batch = processor(
        images=[example["image"] for example in examples],
        annotations=[example["target"] for example in examples],
        category_id_to_label=CATEGORY_TO_LABEL,
        return_tensors="pt",
    )
    return dict(batch)


def make_trainer(model, folder, **settings):
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-3,
        per_device_train_batch_size=2,
        per_device_eval_batch_size=4,
        remove_unused_columns=False,
        eval_do_concat_batches=False,
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    return Trainer(model, arguments, data_collator=collate, train_dataset=Images(), eval_dataset=Images())


class StopAfter(TrainerCallback):
    """Stop training early, as an interruption does."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


@pytest.mark.parametrize("backbone_config", [TINY_RESNET, TINY_SWIN], ids=["resnet", "swin"])
def test_a_resumed_training_ends_where_an_uninterrupted_one_does(backbone_config, tmp_path):
    def fresh(seed=0):
        return tiny_model(seed, freeze_backbone_batch_norms=False, backbone_config=backbone_config)

    uninterrupted = make_trainer(fresh(), tmp_path / "uninterrupted")
    result = uninterrupted.train()
    assert np.isfinite(result.training_loss)

    interrupted = make_trainer(fresh(), tmp_path / "interrupted")
    interrupted.add_callback(StopAfter(2))
    interrupted.train()

    resumed = make_trainer(fresh(seed=1), tmp_path / "interrupted")
    resumed.train(resume_from_checkpoint=True)

    start, expected, actual = (model.state_dict() for model in (fresh(), uninterrupted.model, resumed.model))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    trained = {name for name, parameter in uninterrupted.model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if torch.equal(start[name], expected[name])} == set()


def test_the_best_checkpoint_is_loaded_completely(tmp_path):
    """`Trainer` reads it by `load_state_dict(strict=False)`, which does not report a backbone under other names."""
    trainer = make_trainer(
        tiny_model(backbone_config=TINY_SWIN),
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    trainer.train()
    best = DinoDetrForObjectDetection.from_pretrained(trainer.state.best_model_checkpoint)
    torch.testing.assert_close(trainer.model.state_dict(), best.state_dict(), rtol=0, atol=0)


def test_evaluation_gathers_the_loss_terms_the_logits_and_the_boxes_and_no_more(tmp_path):
    trainer = make_trainer(tiny_model(), tmp_path)
    output = trainer.predict(Images())
    assert np.isfinite(output.metrics["test_loss"])
    assert len(output.predictions) == len(output.label_ids) == 2
    for loss_dict, logits, pred_boxes in output.predictions:  # per batch: what the example's metrics unpack
        assert {"loss_ce", "loss_bbox_0", "loss_giou_encoder"} <= loss_dict.keys()
        assert logits.shape == (4, 12, 5)
        assert pred_boxes.shape == (4, 12, 4)
    labels = [label for batch in output.label_ids for label in batch]
    assert [len(label["boxes"]) for label in labels] == [0, 1, 2, 3] * 2
    assert [label["image_id"].item() for label in labels] == list(range(8))
