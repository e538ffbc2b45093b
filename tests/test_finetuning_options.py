"""Every option of fine-tuning on real, if small, runs: each format trains the same, each option outlives a kill."""

import importlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from conftest import TINY_RESNET, tiny_config
from data_formats import FORMATS, write_shapes
from hf_dino.data import InputError
from hf_dino.data.shapes import generate_shapes


ROOT = Path(__file__).parents[1]
UPSIDE_DOWN = """
from torchvision.transforms import v2

def upside_down(size):
    return v2.RandomVerticalFlip(1.0)
"""


@pytest.fixture(scope="module")
def finetune():
    sys.path.insert(0, str(ROOT / "examples"))
    yield importlib.import_module("finetune_coco")
    sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Each run is to choose its precision, as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A detector in a file, and what makes three steps of it quick."""
    config = tmp_path_factory.mktemp("config") / "tiny.json"
    config.write_text(json.dumps(tiny_config(num_denoising=6, freeze_backbone_batch_norms=False).to_diff_dict()))
    sizes = ["--image-size=96", "--batch-size=4", "--eval-batch-size=2"]
    return [f"--config={config}", *sizes, "--num-workers=0", "--report-every=1", "--learning-rate=1e-3"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return f"--data={generate_shapes(folder, image_size=64, num_train=12, num_val=4, num_test=2)}"


def weights(run):
    return load_file(run / "model.safetensors")


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    assert history(one) == history(other)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pascal VOC lists no classes, they are those of the objects by alphabet: so here they are that from the start."""
    folder = write_shapes(tmp_path_factory.mktemp("formats") / "shapes")
    content = {split: json.loads((folder / f"{split}.json").read_text()) for split in ("train", "val", "test")}
    names = {each["id"]: each["name"] for each in content["train"]["categories"]}
    used = sorted({names[each["category_id"]] for each in content["train"]["annotations"]})
    for split, each in content.items():
        each["categories"] = [{"id": number, "name": name} for number, name in enumerate(used)]
        each["annotations"] = [
            entry | {"category_id": used.index(names[entry["category_id"]])}
            for entry in each["annotations"]
            if names[entry["category_id"]] in used
        ]
        (folder / f"{split}.json").write_text(json.dumps(each))
    return folder


@pytest.fixture(scope="module")
def trained_on_source(finetune, start, source, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "source"
    finetune.main([*start, f"--data={source}", f"--output={run}", "--epochs=2", "--max-steps=3"])
    return run


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_the_same_model(finetune, start, source, trained_on_source, tmp_path, name):
    FORMATS[name](source, tmp_path / name)
    run = tmp_path / "run"
    finetune.main([*start, f"--data={tmp_path / name}", f"--output={run}", "--epochs=2", "--max-steps=3"])
    assert len([row for row in history(run) if "loss" in row]) == 3
    assert_same_run(run, trained_on_source)


OPTIONS = {
    "average and cosine": ["--ema=0.9", "--schedule=cosine", "--warmup-steps=2"],
    "one cycle": ["--schedule=one-cycle", "--augmentation=photometric"],
    "steps": ["--lr-drop", "1", "0.9", "--augmentation=flip", "--sampling-lr-factor=0.1"],
    "buckets": ["--gradient-accumulation=2", "--bucketing", "--augmentation=dino-large"],
    "bf16": ["--mixed-precision=bf16", "--gradient-checkpointing", "--augmentation=none"],
    "frozen": ["--freeze", "backbone.stage1", "encoder", "--backbone-lr-factor=1"],
    "early": ["--early-stopping=1", "--learning-rate=1e-12"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_with_these_options_ends_the_same_when_it_was_interrupted(
    finetune, start, data, tmp_path, monkeypatch, options
):
    """It dies after the second of its checkpoints is on the disk, between two evaluations."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*start, data, "--epochs=3", "--checkpoint-steps=2", *options]
    finetune.main([*command, f"--output={whole}"])
    rows = [row for row in history(whole) if "loss" in row]
    assert len(rows) == (6 if "--early-stopping=1" in options else 9)

    save, saved = finetune.save_checkpoint, []

    def save_and_die(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finetune, "save_checkpoint", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            finetune.main([*command, f"--output={cut}"])
    torch.manual_seed(1234)  # nothing may depend on the state of this process
    finetune.main([*command, f"--output={cut}", "--resume"])
    assert_same_run(cut, whole)


def test_a_resumed_run_of_another_length_says_where_the_learning_rate_jumps(finetune, start, data, tmp_path, caplog):
    """The configuration's file may have moved, but neither it nor the validation images may have changed."""
    config, *others = start
    command = [*others, data, "--schedule=cosine", f"--output={tmp_path / 'run'}"]
    finetune.main([*command, config, "--max-steps=2"])
    moved = shutil.copy(config.removeprefix("--config="), tmp_path / "moved.json")
    for options, jump in (
        (["--max-steps=2"], None),
        (
            ["--max-steps=3"],
            "to have 3 steps, before it was to have 2: after step 2 the learning rate goes on at 2.50e-04",
        ),
    ):
        caplog.clear()
        finetune.main([*command, f"--config={moved}", *options, "--resume"])
        assert [jump in message for message in caplog.messages if "learning rate" in message] == (
            [True] if jump else []
        )

    other = generate_shapes(tmp_path / "other", image_size=64, num_train=12, num_val=3, num_test=2)
    with pytest.raises(InputError, match=r"validation_data: '.*' before, '.*' now"):
        finetune.main([*command, config, f"--data={other}", "--resume"])
    moved.write_text(moved.read_text() + "\n")
    with pytest.raises(InputError, match=r"config_file: '.*' before, '.*' now"):
        finetune.main([*command, f"--config={moved}", "--resume"])


def test_a_run_that_is_too_short_for_its_schedule_says_so(finetune, start, data, tmp_path, caplog):
    command = [
        *start,
        data,
        f"--output={tmp_path / 'run'}",
        "--max-steps=1",
        "--warmup-steps=2",
        "--lr-drop",
        "0.5",
        "1",
    ]
    finetune.main(command)
    for said in (
        "rises for 2 steps (--warmup-steps) and the run has 1: it never comes to 0.001",
        "--lr-drop 1: never comes, the run ends after 0.333333 epochs",
    ):
        assert any(said in message for message in caplog.messages)


@pytest.mark.parametrize(
    ("given", "chosen", "added"), [(None, "bf16", True), ("bf16", "bf16", False), (None, "no", False)]
)
def test_the_command_that_repeats_a_run_says_the_precision(finetune, given, chosen, added):
    args, accelerator = SimpleNamespace(mixed_precision=given), SimpleNamespace(mixed_precision=chosen)
    words = finetune.words_to_train_again(["--ema=0.5", "--resume"], args, accelerator)
    assert words == ["--ema=0.5", *(["--mixed-precision", chosen] if added else [])]


@pytest.mark.parametrize("last", [1, 2, 3], ids=["last evaluation", "validation of the export", "test of the export"])
def test_a_signal_is_heard_until_the_model_is_written(finetune, start, data, tmp_path, monkeypatch, last):
    run, evaluate, calls = tmp_path / "run", finetune.evaluate_model, []

    def evaluate_and_get_a_signal(*args, **options):
        calls.append(args)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    command = [*start, data, "--max-steps=1", f"--output={run}"]
    with monkeypatch.context() as patch:
        patch.setattr(finetune, "evaluate_model", evaluate_and_get_a_signal)
        with pytest.raises(SystemExit) as stopped:
            finetune.main(command)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert len(calls) == last
    assert not (run / "config.json").exists()
    finetune.main([*command, "--resume"])
    assert (run / "config.json").exists()
    assert len([row for row in history(run) if "ap" in row]) == 1


def test_a_frozen_part_stays_as_it_was(finetune, start, data, tmp_path):
    for name, steps in (("one", 1), ("three", 3)):
        options = [f"--max-steps={steps}", "--freeze", "backbone.stage1", "encoder", "--weight-decay=0.1"]
        finetune.main([*start, data, *options, f"--output={tmp_path / name}"])
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    moved = {name for name, weight in one.items() if not torch.equal(weight, three[name])}
    assert moved and not [name for name in moved if name.startswith("model.encoder.")]
    assert any(name.startswith("model.decoder.") for name in moved)


def test_a_backbone_from_a_folder_is_where_training_starts(finetune, start, data, tmp_path):
    classifier = ResNetForImageClassification(ResNetConfig(**TINY_RESNET))
    classifier.save_pretrained(tmp_path / "resnet")
    run = tmp_path / "run"
    options = [f"--backbone-weights={tmp_path / 'resnet'}", "--max-steps=1", "--freeze", "backbone"]
    finetune.main([*start, data, *options, f"--output={run}"])
    assert (
        "with the backbone from the local model `resnet` and the rest from random" in (run / "README.md").read_text()
    )
    theirs = classifier.state_dict()["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    assert any(weight.shape == theirs.shape and torch.equal(weight, theirs) for weight in weights(run).values())


def test_a_recipe_and_an_augmentation_of_ones_own(finetune, start, data, tmp_path):
    """The recipe's values are taken; what is said on the command line wins."""
    (tmp_path / "mine.py").write_text(UPSIDE_DOWN)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("epochs: 5\nmax-steps: 2\nema: 0.5\nfreeze: [encoder]\nlearning-rate: 0.5\n")
    function = f"--augmentation={tmp_path / 'mine.py'}:upside_down"
    run = tmp_path / "run"
    finetune.main([*start, data, f"--recipe={recipe}", function, f"--output={run}"])
    rows = [row for row in history(run) if "loss" in row]
    assert [(row["step"], row["learning_rate"]) for row in rows] == [(1, 1e-3), (2, 1e-3)]
    (settings,) = {path.read_text() for path in run.glob("checkpoints/*/training_state.json")}
    assert (
        json.loads(settings)["settings"] | {"ema": "0.5", "freeze": "['encoder']"} == json.loads(settings)["settings"]
    )


@pytest.mark.slow
def test_a_compiled_run_learns_the_same(finetune, start, data, tmp_path):
    for name, options in (("plain", []), ("compiled", ["--compile"])):
        finetune.main([*start, data, "--max-steps=3", *options, f"--output={tmp_path / name}"])
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), rtol=1e-3, atol=1e-4)
