"""The example with transformers' `Trainer` runs as a user runs it: train, stop, resume, load, push."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from accelerate import Accelerator
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModelForObjectDetection, TrainerCallback

from helpers.models import TINY_RESNET, tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import InputError, NoAugmentation, read_coco
from hf_dino.data.shapes import generate_shapes
from hf_dino.evaluation import METRICS, evaluate_model


EXAMPLES = Path(__file__).parents[2] / "examples"
BACKBONE = {**TINY_RESNET, "out_features": ["stage2", "stage3", "stage4"]}


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))
    yield importlib.import_module("finetune_trainer")
    sys.path.remove(str(EXAMPLES))


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return generate_shapes(folder, image_size=64, num_train=10, num_val=4, num_test=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a model of other classes, to be fine-tuned."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(backbone_config=BACKBONE, freeze_backbone_batch_norms=False).save_pretrained(folder)
    DinoDetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 133}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def arguments(shapes, model):
    """Return options for two epochs of three steps, the last one with one batch and the others with two."""
    return [
        f"--model_name_or_path={model}",
        f"--dataset={shapes}",
        "--num_train_epochs=2",
        "--per_device_train_batch_size=2",
        "--gradient_accumulation_steps=2",
        "--learning_rate=1e-3",
        "--eval_strategy=steps",
        "--save_strategy=steps",
        "--eval_steps=2",
        "--save_steps=2",
        "--logging_steps=1",
        "--dataloader_num_workers=0",
        "--disable_tqdm=True",
    ]


@pytest.fixture(scope="module")
def finished(example, arguments, tmp_path_factory):
    """Return a finished run and the epochs of its images."""
    run, epochs = tmp_path_factory.mktemp("runs") / "uninterrupted", []

    class Watched(example.DetectionDataset):
        def __getitem__(self, index):
            epochs.append((not isinstance(self.augmentation, NoAugmentation), self.epoch))
            return super().__getitem__(index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "DetectionDataset", Watched)
        example.main([*arguments, f"--output_dir={run}"])
    return run, [epoch for is_training, epoch in epochs if is_training]


def test_a_run_leaves_a_model_that_loads_and_numbers_that_are_its_own(finished, arguments, shapes):
    run, _ = finished
    detector = AutoModelForObjectDetection.from_pretrained(run)
    processor = AutoImageProcessor.from_pretrained(run)
    val = read_coco(shapes / "val", shapes / "val.json")
    assert set(detector.config.label2id) == set(val.categories.values())
    assert dict(processor.size) == {"shortest_edge": 80, "longest_edge": 133}

    written = json.loads((run / "eval_results.json").read_text())
    assert {f"eval_{name}" for name in METRICS} <= written.keys()
    measured = evaluate_model(detector, processor, val, Accelerator(cpu=True), batch_size=2)[0].metrics
    assert {name: written[f"eval_{name}"] for name in METRICS} == pytest.approx(measured, abs=1e-6)
    history = json.loads((run / "trainer_state.json").read_text())
    scores = {row["step"]: row["eval_ap"] for row in history["log_history"] if "eval_ap" in row}
    assert list(scores) == [2, 4, 6]
    assert history["best_metric"] == max(scores.values())
    best = load_file(run / f"checkpoint-{history['best_global_step']}" / "model.safetensors")
    torch.testing.assert_close(load_file(run / "model.safetensors"), best, rtol=0, atol=0)

    card = (run / "README.md").read_text()
    words = [*arguments, f"--output_dir={run}"]
    shortened = [re.sub(r"=/.*/", "=path/to/", word) for word in words]
    command = shlex.join(["python", "examples/finetune_trainer.py", *shortened])
    assert f"```bash\n{command}\n```" in card
    assert "trained on shapes\n" in card
    assert "AP@[.50:.95]" in card
    assert (run / "modeling_dino_detr.py").is_file()


def test_every_epoch_is_augmented_differently_and_the_backbone_has_a_lower_learning_rate(finished):
    run, epochs = finished
    assert epochs == [0] * 10 + [1] * 10
    groups = torch.load(run / "checkpoint-6" / "optimizer.pt", weights_only=False)["param_groups"]
    assert sorted({round(group["initial_lr"], 6) for group in groups}) == [1e-4, 1e-3]
    assert {group["weight_decay"] for group in groups} == {1e-4}


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_equals_the_uninterrupted_one(finished, example, arguments, tmp_path, monkeypatch, step):
    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == step:
                raise KeyboardInterrupt

    output = f"--output_dir={tmp_path / 'run'}"
    with monkeypatch.context() as patch:
        patch.setattr(example, "EpochCallback", type("Stopped", (Stop, example.EpochCallback), {}))
        with pytest.raises(KeyboardInterrupt):
            example.main([*arguments, output])
    with pytest.raises(InputError, match=r"run: is not empty; use a different --output_dir, or --resume"):
        example.main([*arguments, output])
    with pytest.raises(InputError, match="uninterrupted: is not empty"):  # it is another run's
        example.main([*arguments, f"--output_dir={finished[0]}", f"--resume_from_checkpoint={tmp_path / 'run'}"])
    (tmp_path / "run" / "checkpoint-5").mkdir()  # a partial one
    torch.manual_seed(1234)  # nothing may depend on the state of this process
    example.main([*arguments, output, "--resume_from_checkpoint", str(tmp_path / "run")])

    for name in ("checkpoint-6/model.safetensors", "model.safetensors"):
        torch.testing.assert_close(load_file(tmp_path / "run" / name), load_file(finished[0] / name), rtol=0, atol=0)
    rows = [
        json.loads((run / "trainer_state.json").read_text())["log_history"] for run in (tmp_path / "run", finished[0])
    ]
    ours, theirs = ([(row["step"], row["loss"]) for row in history if "loss" in row] for history in rows)
    assert ours == theirs
    assert "--resume_from_checkpoint" not in (tmp_path / "run" / "README.md").read_text()


def test_the_model_with_the_best_ap_is_the_result(example, arguments, tmp_path, monkeypatch):
    aps = iter([0.1, 0.5, 0.2, 0.5])  # after each step, and of the result

    def evaluate_model(*args, **kwargs):
        return SimpleNamespace(metrics=dict.fromkeys(METRICS, 0.3) | {"ap": next(aps)}), []

    monkeypatch.setattr(example, "evaluate_model", evaluate_model)
    run = tmp_path / "run"
    options = ["--max_steps=3", "--eval_steps=1", "--save_steps=1", "--save_total_limit=3", f"--output_dir={run}"]
    example.main([*arguments, *options, "--dataset_label=drawn shapes"])
    first, best, last = (load_file(run / f"checkpoint-{step}" / "model.safetensors") for step in (1, 2, 3))
    result = load_file(run / "model.safetensors")
    torch.testing.assert_close(result, best, rtol=0, atol=0)
    assert all(any(not torch.equal(result[name], other[name]) for name in result) for other in (first, last))
    card = (run / "README.md").read_text()
    assert "| AP@[.50:.95] | 0.500 |" in card
    assert "trained on drawn shapes\n" in card


def test_accumulated_batches_are_as_one_big_batch(example, arguments, tmp_path):
    model = tmp_path / "model"
    fields = {"backbone_config": BACKBONE, "label_noise_ratio": 0.0, "box_noise_scale": 0.0}
    tiny_model(**fields).save_pretrained(model)
    DinoDetrImageProcessor(size={"height": 80, "width": 80}).save_pretrained(model)
    losses = []
    for images, batches in ((4, 1), (2, 2), (1, 4)):
        run = tmp_path / str(batches)
        sizes = [f"--per_device_train_batch_size={images}", f"--gradient_accumulation_steps={batches}"]
        options = [
            f"--model_name_or_path={model}",
            f"--output_dir={run}",
            "--augmentation=none",
            "--max_steps=3",
            "--eval_steps=3",
        ]
        example.main([*arguments, *sizes, *options, "--save_steps=3"])
        history = json.loads((run / "trainer_state.json").read_text())["log_history"]
        losses.append([row["loss"] for row in history if "loss" in row])
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[2] == pytest.approx(losses[0], rel=1e-4)


def test_the_complete_model_is_pushed(example, arguments, tmp_path, monkeypatch):
    uploads = []

    def create_repo(*args, **kwargs):
        return type("RepoUrl", (), {"repo_id": "someone/shapes"})

    def upload_folder(*args, folder_path, repo_id, ignore_patterns, **kwargs):
        uploads.append((repo_id, {path.name for path in Path(folder_path).iterdir()}, ignore_patterns))

    for owner, is_method in ((HfApi, True), (transformers.trainer, False)):
        monkeypatch.setattr(owner, "create_repo", create_repo, raising=is_method)
        monkeypatch.setattr(owner, "upload_folder", upload_folder, raising=is_method)
    run, steps = tmp_path / "run", ["--max_steps=1", "--eval_steps=1", "--save_steps=1"]
    options = ["--bf16", "--augmentation=dino-large", "--push_to_hub", "--hub_model_id=someone/shapes"]
    example.main([*arguments, *steps, *options, f"--output_dir={run}"])
    [(repo_id, files, ignored)] = uploads
    assert repo_id == "someone/shapes"
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "modeling_dino_detr.py"} <= files
    assert "checkpoint-*" in ignored
    size = AutoImageProcessor.from_pretrained(run).size
    assert dict(size) == {"shortest_edge": 120, "longest_edge": 200}, "what dino-large makes of 80 and 133"
    card = (run / "README.md").read_text()
    assert "model-index" in card
    assert "trained on shapes\n" in card


def test_a_loss_that_is_not_finite_stops_the_run(example, arguments, tmp_path):
    broken = [*arguments, f"--output_dir={tmp_path / 'run'}", "--learning_rate=1e30", "--max_grad_norm=0"]
    with pytest.raises(FloatingPointError, match=r"the loss is \S+ at step \d: lower --learning_rate"):
        example.main(broken)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--learning_rat=1"], "are not used by the HfArgumentParser: ['--learning_rat=1']"),
        (["--num_train_epochs=x"], "argument --num_train_epochs/--num-train-epochs: invalid float value: 'x'"),
        (["--eval_strategy=no"], "requires the save and eval strategy to match"),
        (["--metric_for_best_model=map"], "--metric_for_best_model map: must be one of ap, ap50"),
        (["--hub_token=x"], "--hub_token: would be saved with the model; log in with `hf auth login`"),
        (
            ["--dataloader_persistent_workers", "--dataloader_num_workers=1"],
            "--dataloader_persistent_workers: would repeat all crops and flips",
        ),
    ],
)
def test_wrong_arguments_are_one_line(example, arguments, tmp_path, capsys, wrong, message):
    with pytest.raises(SystemExit):
        example.main([*arguments, f"--output_dir={tmp_path / 'run'}", *wrong])
    usage, error = capsys.readouterr().err.strip().splitlines()
    assert usage.startswith("usage: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_wrong_input_is_reported_before_anything_is_written(example, arguments, tmp_path):
    output = f"--output_dir={tmp_path / 'run'}"
    for wrong, message in (
        (f"--resume_from_checkpoint={tmp_path}", "has no checkpoint to resume from; remove"),
        (f"--dataset={tmp_path / 'gone'}", "gone: directory not found"),
        (f"--model_name_or_path={tmp_path}", r"it has no config\.json"),
        ("--image_size=big", "--image_size big: expected SHORTEST"),
        ("--augmentation=hard", "unknown augmentation 'hard'"),
    ):
        with pytest.raises(InputError, match=message):
            example.main([*arguments, output, wrong])
        assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_share_the_images(arguments, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    script = [str(EXAMPLES / "finetune_trainer.py"), *arguments, f"--output_dir={tmp_path / 'run'}", "--max_steps=2"]
    search_path = os.pathsep.join([str(EXAMPLES.parent / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
    subprocess.run([*launch, *script], env=environment, check=True, capture_output=True)
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())
    assert [row["epoch"] for row in history["log_history"] if "loss" in row] == [pytest.approx(2 / 3), 1.0]
    assert len(list((tmp_path / "run" / "checkpoint-2").glob("rng_state_*"))) == 2
