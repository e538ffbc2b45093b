"""Recipes are options in a file: below the command line, checked as it is, and those of the examples are right."""

import argparse
import importlib.util
from pathlib import Path

import pytest
from hf_dino.training.recipe import parse_args_with_recipe

from hf_dino import DinoDetrConfig
from hf_dino.data import AUGMENTATIONS, InputError
from hf_dino.utils.arguments import at_least, number_between, parse_config_override


RECIPES = Path(__file__).parents[1] / "examples" / "recipes"


def make_parser():
    """Options of every kind."""
    positive = number_between(0, without_lowest=True)
    parser = argparse.ArgumentParser(prog="finetune", allow_abbrev=False)
    parser.add_argument("--recipe", type=Path)
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--model")
    start.add_argument("--config", type=Path)
    parser.add_argument("--backbone-weights")
    parser.add_argument("--config-override", type=parse_config_override, nargs="+", action="extend", default=[])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data")
    parser.add_argument("--augmentation", default="dino")
    parser.add_argument("--bucketing", action="store_true")
    parser.add_argument("--epochs", type=at_least(1), default=12)
    parser.add_argument("--batch-size", type=at_least(1), default=16)
    parser.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"))
    parser.add_argument("--learning-rate", type=positive, default=1e-4)
    parser.add_argument("--backbone-lr-factor", type=positive, default=0.1)
    parser.add_argument("--schedule", choices=("step", "cosine", "one-cycle"), default="step")
    parser.add_argument("--lr-drop", type=positive, nargs="*", default=[11 / 12])
    parser.add_argument("--warmup-steps", type=at_least(0), default=0)
    parser.add_argument("--ema", type=number_between(0, 1))
    parser.add_argument("--eval-every", type=at_least(1), default=1)
    return parser


def parse(tmp_path, recipe, *words):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    return parse_args_with_recipe(make_parser(), ["--output", "out", "--recipe", str(file), *words])


def test_without_a_recipe_it_is_parse_args():
    words = ["--output", "out", "--epochs", "3"]
    assert parse_args_with_recipe(make_parser(), words) == make_parser().parse_args(words)


def test_recipe_lies_between_defaults_and_command_line(tmp_path):
    recipe = """
    epochs: 24
    learning_rate: 5e-5
    batch-size: 8
    """
    args = parse(tmp_path, recipe, "--batch-size=2")
    assert (args.epochs, args.learning_rate, args.batch_size, args.backbone_lr_factor) == (24, 5e-5, 2, 0.1)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("lr-drop: [20, 0.5]", ["--lr-drop", "20", "0.5"]),
        ("lr-drop: []", ["--lr-drop"]),
        ("lr-drop: 20", ["--lr-drop", "20"]),
        ("bucketing: true", ["--bucketing"]),
        ("bucketing: false", []),
        ("gradient-checkpointing: yes", ["--gradient-checkpointing"]),
        ("gradient-checkpointing: false", ["--no-gradient-checkpointing"]),
        ("mixed-precision: 'no'", ["--mixed-precision", "no"]),
        ("config-override: {box_noise_scale: 1.0}", ["--config-override", "box_noise_scale=1.0"]),
        ("config-override: {denoising: plain, dropout: 0}", ["--config-override", "denoising=plain", "dropout=0"]),
        ("", []),
        ("{}", []),
    ],
)
def test_an_entry_is_what_one_would_type(tmp_path, recipe, words):
    given = parse(tmp_path, recipe or "# nothing\n{}")
    given.recipe = None
    assert given == make_parser().parse_args(["--output", "out", *words])


def test_command_line_adds_to_a_mapping_and_switches_off(tmp_path):
    recipe = """
    config-override:
      box_noise_scale: 1.0
      backbone_config: {model_type: swin, depths: [2, 2]}
    gradient-checkpointing: true
    """
    words = ["--no-gradient-checkpointing", "--config-override", "box_noise_scale=0.2", "num_queries=7"]
    args = parse(tmp_path, recipe, *words)
    assert not args.gradient_checkpointing
    assert dict(args.config_override) == {
        "box_noise_scale": 0.2,
        "backbone_config": {"model_type": "swin", "depths": [2, 2]},
        "num_queries": 7,
    }


WRONG = {
    "epoch: 3": "there is no option epoch; did you mean epochs?",
    "learning rate: 3": "there is no option learning rate; did you mean learning-rate?",
    "zzz: 3": "there is no option zzz; --help names the options",
    "recipe: other.yaml": "there is no option recipe",
    "help: true": "there is no option help",
    "3: 3": "there is no option 3",
    "epochs: many": "epochs: expected a whole number, got 'many'",
    "epochs: 0": "epochs: must be at least 1, got 0",
    "epochs: 1.5": "epochs: expected a whole number, got '1.5'",
    "epochs: [1, 2]": "epochs: takes one value, got 2",
    "epochs: []": "epochs: expected one argument",
    "epochs: {a: 1, b: 2}": "epochs: expected a whole number, got 'a=1'",
    "epochs:": "epochs: has no value; leave the line out for the default",
    "schedule: cosin": "schedule: invalid choice: 'cosin'",
    "mixed-precision: no": "mixed-precision: got true or false, which is how YAML reads yes and no too; put a word in",
    "bucketing: 1": "bucketing: is switched on by true and off by false, got 1",
    "config-override: {box_noise: 1.0}": "config-override: DinoDetrConfig has no field 'box_noise'; did you mean box",
    "config-override: box_noise_scale": "config-override: expected FIELD=VALUE, got 'box_noise_scale'",
    "epochs: 3\nepochs: 4": "epochs is there more than once",
    "learning_rate: 3\nlearning-rate: 4": "learning-rate is there more than once",
    "epochs 3": "must hold lines such as `epochs: 12`, got str",
    "- epochs": "must hold lines such as `epochs: 12`, got list",
    "": "must hold lines such as `epochs: 12`, got NoneType",
    "epochs: [3": "cannot be read as YAML",
    "[1, 2]: 3": "cannot be read as YAML",
}


@pytest.mark.parametrize("recipe", WRONG)
def test_an_error_names_the_file_and_what_to_do(tmp_path, recipe):
    with pytest.raises(InputError, match=rf"recipe\.yaml: {WRONG[recipe]}"):
        parse(tmp_path, recipe)


def test_a_recipe_that_is_not_there():
    with pytest.raises(InputError, match=r"nowhere\.yaml: file not found"):
        parse_args_with_recipe(make_parser(), ["--recipe", "nowhere.yaml"])


def test_errors_of_the_command_line_stay_argparses(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path, "epochs: 3", "--epochs", "0")
    assert "finetune: error: argument --epochs: must be at least 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse_args_with_recipe(make_parser(), ["--recipe"])


def parse_finetune(*words):
    """What examples/finetune_coco.py makes of a command line."""
    spec = importlib.util.spec_from_file_location("finetune_coco", RECIPES.parent / "finetune_coco.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse_arguments(["--data=mine", "--output=out", *words])


def read(name):
    file = RECIPES / f"{name}.yaml"
    return parse_finetune(f"--recipe={file}", *([] if "backbone-weights:" in file.read_text() else ["--model=m"]))


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_say_what_they_are_and_can_be_used(file):
    head = file.read_text().partition("\n\n")[0].splitlines()
    assert all(line.startswith("#") and len(line) < 120 for line in head)
    text = "\n".join(head)
    assert f"--recipe examples/recipes/{file.name}" in text, "the command"
    assert "\n# Hardware: " in text
    assert "\n# Result" in text
    assert any(word in text for word in ("published", "reported", "measured"))
    args = read(file.stem)
    assert args.augmentation in AUGMENTATIONS
    defaults = vars(parse_finetune("--model=m"))
    repeated = [name for name, value in vars(args).items() if value == defaults[name]]
    given = {line.partition(":")[0].replace("-", "_") for line in file.read_text().splitlines() if line[:1].isalpha()}
    assert not given & set(repeated), "a number has one home"


# README of IDEA-Research/DINO: AP on COCO val2017
PUBLISHED_AP = {
    "coco-r50-4scale-12ep": 49.0,
    "coco-r50-4scale-24ep": 50.4,
    "coco-r50-4scale-36ep": 50.9,
    "coco-r50-5scale-12ep": 49.4,
    "coco-r50-5scale-24ep": 51.3,
    "coco-r50-5scale-36ep": 51.2,
    "coco-swin-l-4scale-12ep": 56.8,
    "coco-swin-l-4scale-36ep": 58.0,
    "coco-swin-l-5scale-12ep": 57.3,
    "coco-swin-l-5scale-36ep": 58.5,
}


def test_there_is_a_recipe_for_every_published_model():
    assert {file.stem for file in RECIPES.glob("coco-*.yaml")} == set(PUBLISHED_AP)


@pytest.mark.parametrize("name", PUBLISHED_AP)
def test_published_settings(name):
    _, *backbone, levels, epochs = name.split("-")
    epochs = int(epochs.removesuffix("ep"))
    args = read(name)
    assert f"# Result: AP {PUBLISHED_AP[name]} on COCO val2017 (published" in (RECIPES / f"{name}.yaml").read_text()
    assert (args.epochs, args.batch_size, args.learning_rate, args.backbone_lr_factor) == (epochs, 16, 1e-4, 0.1)
    assert args.lr_drop == {12: [11 / 12], 24: [20], 36: [30]}[epochs]
    config = DinoDetrConfig(**dict(args.config_override))
    assert config.box_noise_scale == 1.0
    assert config.num_feature_levels == int(levels[0])
    stages = ["stage2", "stage3", "stage4"] if levels == "4scale" else ["stage1", "stage2", "stage3", "stage4"]
    assert list(config.backbone_config.out_features) == stages
    assert args.gradient_checkpointing == (backbone == ["swin", "l"])


def test_swin_of_the_recipes_is_the_original_one():
    from hf_dino.conversion.key_tables import BACKBONES

    for levels in "45":
        backbone = dict(read(f"coco-swin-l-{levels}scale-12ep").config_override)["backbone_config"]
        del backbone["out_features"]
        assert backbone == BACKBONES["swin_L_384_22k"]


def test_large_fine_tuning():
    args = read("finetune-large")
    assert (args.batch_size, args.epochs, args.learning_rate, args.augmentation) == (1, 100, 5e-5, "dino-large")
    assert args.learning_rate * args.backbone_lr_factor == pytest.approx(1e-5)
    assert (args.gradient_checkpointing, args.mixed_precision) == (True, "bf16")


def test_drops_belong_to_the_schedule_that_has_them(capsys):
    with pytest.raises(SystemExit):
        parse_finetune("--model=a", "--schedule=one-cycle", "--lr-drop=0.5")
    assert "error: --schedule one-cycle has no drops; give --lr-drop without a value, or" in capsys.readouterr().err
    recipe = f"--recipe={RECIPES / 'coco-r50-4scale-24ep.yaml'}"
    assert parse_finetune(recipe, "--schedule=cosine", "--lr-drop").lr_drop == []
    assert parse_finetune("--model=a").lr_drop == [11 / 12]
