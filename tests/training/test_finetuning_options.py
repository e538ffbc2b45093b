"""Every option in small runs: each dataset format trains the same model, and runs with each option can be resumed."""

import itertools
import json
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from transformers import ResNetConfig, ResNetForImageClassification

from helpers.coco_files import annotation, write_coco
from helpers.command_line import hf_dino, train_arguments
from helpers.data_formats import FORMATS, write_shapes
from helpers.jobs import Killed
from helpers.models import TINY_RESNET, tiny_config
from hf_dino.data import InputError
from hf_dino.data.shapes import generate_shapes
from hf_dino.training import FineTuningArguments, finetuning
from hf_dino.training_arguments import reproduction_argv


UPSIDE_DOWN = """
from torchvision.transforms import v2

def upside_down(size):
    return v2.RandomVerticalFlip(1.0)
"""


def train(arguments):
    assert hf_dino(["train", *arguments]) == 0


@pytest.fixture(autouse=True)
def plots(monkeypatch):
    """Count the rows of the curves that a run plots instead of drawing them, which takes most of the time."""
    rows = []
    monkeypatch.setattr(
        "hf_dino.training.logging.plot_training_curves", lambda history, path: rows.append(len(history))
    )
    return rows


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Let each run choose its precision, as in a process of its own."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Return the options of a tiny model and of fast steps."""
    config = tmp_path_factory.mktemp("config") / "tiny.json"
    config.write_text(json.dumps(tiny_config(num_denoising=6, freeze_backbone_batch_norms=False).to_diff_dict()))
    sizes = ["--image_size=96", "--global_batch_size=4", "--per_device_eval_batch_size=2"]
    return [
        f"--config_name={config}",
        *sizes,
        "--dataloader_num_workers=0",
        "--logging_steps=1",
        "--learning_rate=1e-3",
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    return f"--dataset={generate_shapes(folder, image_size=64, num_train=12, num_val=4, num_test=2)}"


def weights(run):
    return load_file(run / "model.safetensors")


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def assert_same_run(one, other):
    assert history(one) == history(other)
    torch.testing.assert_close(weights(one), weights(other), rtol=0, atol=0)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Return shapes with the classes that Pascal VOC can express: those of the objects, in alphabetical order."""
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
def trained_on_source(start, source, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "source"
    train([*start, f"--dataset={source}", f"--output_dir={run}", "--num_train_epochs=2", "--max_train_steps=3"])
    return run


@pytest.mark.usefixtures("datasets_cache")
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_trains_the_same_model(start, source, trained_on_source, tmp_path, name):
    FORMATS[name](source, tmp_path / name)
    run = tmp_path / "run"
    train(
        [*start, f"--dataset={tmp_path / name}", f"--output_dir={run}", "--num_train_epochs=2", "--max_train_steps=3"]
    )
    assert len([row for row in history(run) if "loss" in row]) == 3
    assert_same_run(run, trained_on_source)


OPTIONS = {
    "average and cosine": ["--ema_decay=0.9", "--lr_scheduler_type=cosine", "--warmup_steps=2"],
    "one cycle": ["--lr_scheduler_type=one_cycle", "--augmentation=photometric"],
    "steps": ["--lr_milestones", "1", "0.9", "--augmentation=flip", "--sampling_lr_multiplier=0.1"],
    "buckets": ["--gradient_accumulation_steps=2", "--group_by_aspect_ratio", "--augmentation=dino-large"],
    "bf16": ["--mixed_precision=bf16", "--gradient_checkpointing", "--augmentation=none"],
    "frozen": ["--freeze", "backbone.stage1", "encoder", "--backbone_lr_multiplier=1"],
    "early": ["--early_stopping_patience=1", "--learning_rate=1e-12"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_run_with_these_options_ends_the_same_when_it_was_interrupted(
    start, data, tmp_path, monkeypatch, plots, options
):
    """It is killed after its second checkpoint was written, between two evaluations."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    command = [*start, data, "--num_train_epochs=3", "--checkpointing_steps=2", *options]
    train([*command, f"--output_dir={whole}"])
    rows = [row for row in history(whole) if "loss" in row]
    assert len(rows) == (6 if "--early_stopping_patience=1" in options else 9)
    assert plots[0] == 2, "after the first checkpoint"
    assert plots[-1] == len(history(whole))

    save, saved = finetuning.save_checkpoint, []

    def save_and_die(*args):
        save(*args)
        saved.append(args)
        if len(saved) == 2:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "save_checkpoint", save_and_die)
        with pytest.raises(Killed):
            train([*command, f"--output_dir={cut}"])
    torch.manual_seed(1234)  # nothing may depend on the state of this process
    train([*command, f"--output_dir={cut}", "--resume_from_checkpoint"])
    assert_same_run(cut, whole)


def test_names_of_the_same_words_and_dense_images_from_training_to_evaluation(start, tmp_path, caplog, capsys):
    """Train and validation split, the model and another dataset spell a class differently."""
    names = {"train": "traffic light", "val": "Traffic_Light", "test": " TRAFFIC-LIGHT "}
    files = {}
    for split, name in names.items():
        objects = [annotation(1, 1, [n % 8 * 8, n // 8 * 3, 8, 3]) for n in range(105)]
        files[split] = write_coco(tmp_path / split, objects, sizes=[(64, 64)] * 2, categories={1: name})
    paired = [
        f"--{split}_{kind}={path}"
        for split in ("train", "val")
        for kind, path in zip(("images", "annotations"), files[split])
    ]
    run = tmp_path / "run"
    train([*start, *paired, f"--output_dir={run}", "--max_train_steps=1", "--max_detections=104"])
    said = [message.partition(";")[0] for message in caplog.messages if "objects" in message]
    of_val = f"{files['val'][1]}: 1 of 2 images have more than"
    assert said == [
        "train: 1 of 2 images have no objects",
        "validation: 1 of 2 images have no objects",
        "train: 1 of 2 images have more than 12 objects, up to 105: a model of 12 queries cannot detect them all, one "
        "that is trained with --config_overrides num_queries=105 can",
        "train: 1 of 2 images have more than 6 objects, up to 105: a step takes 6 of them at random for denoising, "
        "with --config_overrides num_denoising=105 all",
        f"{of_val} 12 objects, up to 105: a model of 12 queries cannot detect them all, one that is trained with "
        "--config_overrides num_queries=105 can",
        f"{of_val} 104 objects of a class, up to 105: an evaluation counts 104 detections of a class in an image, "
        "with --max_detections 105 more",
    ]
    assert (
        "validation: classes are those of train with the same words: 'Traffic_Light' is 'traffic light'" in caplog.text
    )
    measured = json.loads((run / "metrics.json").read_text())
    assert measured["validation"]["max_detections"] == 104
    assert measured["validation"]["ap_per_category"].keys() == {"Traffic_Light"}
    assert "instead of 100: not comparable with COCO's metrics" in (run / "README.md").read_text()

    capsys.readouterr()
    for split in ("val", "test"):
        pair = (f"--{kind}={path}" for kind, path in zip(("images", "annotations"), files[split]))
        command = ["evaluate", f"--model_name_or_path={run}", *pair, f"--metrics_json={tmp_path / split}.json"]
        assert hf_dino([*command, "--max_detections=104", "--dataloader_num_workers=0"]) == 0
        scores = json.loads((tmp_path / f"{split}.json").read_text())
        del scores["ap_per_category"]
        assert scores == {name: measured["validation"][name] for name in scores}


def test_a_resumed_run_of_another_length_warns_where_the_learning_rate_jumps(start, data, tmp_path, caplog):
    """The configuration file may move, but neither it nor the validation images may change."""
    config, *others = start
    command = [*others, data, "--lr_scheduler_type=cosine", f"--output_dir={tmp_path / 'run'}"]
    train([*command, config, "--max_train_steps=2"])
    moved = shutil.copy(config.removeprefix("--config_name="), tmp_path / "moved.json")
    for options, jump in (
        (["--max_train_steps=2"], None),
        (
            ["--max_train_steps=3"],
            "now has 3 steps instead of 2: after step 2 the learning rate is 2.50e-04",
        ),
    ):
        caplog.clear()
        train([*command, f"--config_name={moved}", *options, "--resume_from_checkpoint"])
        assert [jump in message for message in caplog.messages if "learning rate" in message] == (
            [True] if jump else []
        )

    other = generate_shapes(tmp_path / "other", image_size=64, num_train=12, num_val=3, num_test=2)
    with pytest.raises(InputError, match=r"validation_data: '.*' before, '.*' now"):
        train([*command, config, f"--dataset={other}", "--resume_from_checkpoint"])
    moved.write_text(moved.read_text() + "\n")
    with pytest.raises(InputError, match=r"config_file: '.*' before, '.*' now"):
        train([*command, f"--config_name={moved}", "--resume_from_checkpoint"])


def test_a_run_that_is_too_short_for_its_schedule_warns(start, data, tmp_path, caplog):
    command = [
        *start,
        data,
        f"--output_dir={tmp_path / 'run'}",
        "--max_train_steps=1",
        "--warmup_steps=2",
        "--lr_milestones",
        "0.5",
        "1",
    ]
    train(command)
    for said in (
        "rises for 2 steps (--warmup_steps), but the run has 1: it never reaches 0.001",
        "--lr_milestones 1 is never reached: the run ends after 0.333333 epochs",
    ):
        assert any(said in message for message in caplog.messages)


def make_arguments(**given):
    return FineTuningArguments(**{"model_name_or_path": "m", "dataset": "d", "output_dir": "o"} | given)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"ema_decay": 0.5, "resume_from_checkpoint": True}, ["--ema_decay", "0.5"]),
        ({"lr_milestones": [8, 0.9]}, ["--lr_milestones", "8.0", "0.9"]),
        ({"lr_milestones": []}, ["--lr_milestones"]),
        ({"torch_compile": True}, ["--torch_compile"]),
        ({"config_overrides": {"denoising": "plain", "dropout": 0.1}}, ["denoising=plain", "dropout=0.1"]),
    ],
)
def test_the_command_that_repeats_a_run_has_what_is_not_a_default(given, words):
    arguments = make_arguments(**given)
    command = reproduction_argv(arguments)
    assert [word for word in command if word in words] == words
    assert not {"--resume_from_checkpoint", "--overwrite_output_dir"} & set(command)
    parsed = train_arguments(command)
    assert vars(parsed) == vars(arguments) | {"resume_from_checkpoint": False}


@pytest.mark.parametrize(
    ("given", "chosen", "expected"), [(None, "bf16", "bf16"), ("bf16", "bf16", "bf16"), (None, "no", None)]
)
def test_the_command_that_repeats_a_run_has_the_precision(given, chosen, expected):
    run = SimpleNamespace(
        arguments=make_arguments(mixed_precision=given),
        accelerator=SimpleNamespace(mixed_precision=chosen, num_processes=1),
    )
    words = finetuning.FineTuner.command.fget(run).split()
    assert dict(itertools.pairwise(words)).get("--mixed_precision") == expected


@pytest.mark.parametrize("last", [1, 2, 3], ids=["last evaluation", "validation of the export", "test of the export"])
def test_signals_are_handled_until_the_model_is_written(start, data, tmp_path, monkeypatch, last):
    run, evaluate, calls = tmp_path / "run", finetuning.evaluate_model, []

    def evaluate_and_get_a_signal(*args, **options):
        calls.append(args)
        if len(calls) == last:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*args, **options)

    command = [*start, data, "--max_train_steps=1", f"--output_dir={run}"]
    with monkeypatch.context() as patch:
        patch.setattr(finetuning, "evaluate_model", evaluate_and_get_a_signal)
        assert hf_dino(["train", *command]) == 128 + signal.SIGTERM
    assert len(calls) == last
    assert not (run / "config.json").exists()
    train([*command, "--resume_from_checkpoint"])
    assert (run / "config.json").exists()
    assert len([row for row in history(run) if "ap" in row]) == 1


def test_a_frozen_part_stays_as_it_was(start, data, tmp_path):
    for name, steps in (("one", 1), ("three", 3)):
        options = [f"--max_train_steps={steps}", "--freeze", "backbone.stage1", "encoder", "--weight_decay=0.1"]
        train([*start, data, *options, f"--output_dir={tmp_path / name}"])
    one, three = weights(tmp_path / "one"), weights(tmp_path / "three")
    moved = {name for name, weight in one.items() if not torch.equal(weight, three[name])}
    assert moved and not [name for name in moved if name.startswith("model.encoder.")]
    assert any(name.startswith("model.decoder.") for name in moved)


def test_a_backbone_from_a_folder_is_where_training_starts(start, data, tmp_path):
    classifier = ResNetForImageClassification(ResNetConfig(**TINY_RESNET))
    classifier.save_pretrained(tmp_path / "resnet")
    run = tmp_path / "run"
    options = [f"--backbone_weights={tmp_path / 'resnet'}", "--max_train_steps=1", "--freeze", "backbone"]
    train([*start, data, *options, f"--output_dir={run}"])
    assert (
        "with the backbone from the local model `resnet` and the rest from random" in (run / "README.md").read_text()
    )
    theirs = classifier.state_dict()["resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"]
    assert any(weight.shape == theirs.shape and torch.equal(weight, theirs) for weight in weights(run).values())


def test_a_recipe_and_an_augmentation_of_ones_own(start, data, tmp_path):
    """The values of the recipe are used, and the command line takes precedence."""
    (tmp_path / "mine.py").write_text(UPSIDE_DOWN)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        "num_train_epochs: 5\nmax-train-steps: 2\nema_decay: 0.5\nfreeze: [encoder]\nlearning_rate: 0.5\n"
    )
    function = f"--augmentation={tmp_path / 'mine.py'}:upside_down"
    run = tmp_path / "run"
    train([*start, data, f"--recipe={recipe}", function, f"--output_dir={run}"])
    rows = [row for row in history(run) if "loss" in row]
    assert [(row["step"], row["learning_rate"]) for row in rows] == [(1, 1e-3), (2, 1e-3)]
    (settings,) = {path.read_text() for path in run.glob("checkpoints/*/training_state.json")}
    assert (
        json.loads(settings)["settings"] | {"ema_decay": "0.5", "freeze": "['encoder']"}
        == json.loads(settings)["settings"]
    )


@pytest.mark.slow
def test_a_compiled_run_trains_the_same_model(start, data, tmp_path):
    for name, options in (("plain", []), ("compiled", ["--torch_compile"])):
        train([*start, data, "--max_train_steps=3", *options, f"--output_dir={tmp_path / name}"])
    torch.testing.assert_close(weights(tmp_path / "compiled"), weights(tmp_path / "plain"), rtol=1e-3, atol=1e-4)
