"""Recipes are options in a file: below the command line, checked as it is, and those of the examples are right."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command_line import hf_dino, train_arguments
from hf_dino import DinoDetrConfig
from hf_dino.data import InputError
from hf_dino.data.augmentation import AUGMENTATIONS
from hf_dino.training_arguments import OPTIONS, FineTuningArguments, read_recipe


RECIPES = Path(__file__).parents[2] / "examples" / "recipes"


def parse(tmp_path, recipe, *words):
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    return parse_finetune("--model_name_or_path=m", "--recipe", file, *words)


def parse_finetune(*words):
    """Return what `hf-dino train` makes of a command line."""
    return train_arguments(["--dataset=mine", "--output_dir=out", *words])


def test_without_options_everything_has_its_default():
    expected = FineTuningArguments(model_name_or_path="m", dataset="mine", output_dir="out")
    assert parse_finetune("--model_name_or_path=m") == expected


def test_recipe_lies_between_defaults_and_command_line(tmp_path):
    recipe = """
    num_train_epochs: 24
    learning-rate: 5e-5
    global_batch_size: 8
    """
    args = parse(tmp_path, recipe, "--global-batch-size=2")
    assert (args.num_train_epochs, args.learning_rate, args.global_batch_size) == (24, 5e-5, 2)
    assert args.backbone_lr_multiplier == 0.1


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("lr_milestones: [20, 0.5]", ["--lr_milestones", "20", "0.5"]),
        ("lr_milestones: []", ["--lr_milestones"]),
        ("lr_milestones: 20", ["--lr_milestones", "20"]),
        ("group_by_aspect_ratio: true", ["--group_by_aspect_ratio"]),
        ("group_by_aspect_ratio: false", []),
        ("gradient_checkpointing: yes", ["--gradient_checkpointing"]),
        ("gradient_checkpointing: false", ["--no_gradient_checkpointing"]),
        ("mixed_precision: 'no'", ["--mixed_precision", "no"]),
        ("lr_scheduler_type: one_cycle", ["--lr_scheduler_type", "one-cycle"]),
        ("seed: 1\n<<: {seed: 2, eval-epochs: 3}", ["--seed", "1", "--eval_epochs", "3"]),
        ("config_overrides: {box_noise_scale: 1.0}", ["--config_overrides", "box_noise_scale=1.0"]),
        ("config_overrides: {denoising: plain, dropout: 0}", ["--config_overrides", "denoising=plain", "dropout=0"]),
        ("dataset_label: 2017", ["--dataset_label", "2017"]),
        ("", []),
        ("{}", []),
    ],
)
def test_an_entry_is_what_one_would_type(tmp_path, recipe, words):
    given = parse(tmp_path, recipe or "# nothing\n{}")
    assert given == parse_finetune("--model_name_or_path=m", *words)


def test_command_line_adds_to_a_mapping_and_switches_off(tmp_path):
    recipe = """
    config_overrides:
      box_noise_scale: 1.0
      backbone_config: {model_type: swin, depths: [2, 2]}
    gradient_checkpointing: true
    """
    words = ["--no_gradient_checkpointing", "--config_overrides", "box_noise_scale=0.2", "num_queries=7"]
    args = parse(tmp_path, recipe, *words)
    assert not args.gradient_checkpointing
    assert args.config_overrides == {
        "box_noise_scale": 0.2,
        "backbone_config": {"model_type": "swin", "depths": [2, 2]},
        "num_queries": 7,
    }


WRONG = {
    "train_epochs: 3": r"--train_epochs: option not found; did you mean --num_train_epochs\?",
    "learning rate: 3": r"--learning rate: option not found; did you mean --learning_rate\?",
    "zzz: 3": "--zzz: option not found; see --help",
    "recipe: other.yaml": "--recipe: option not found",
    "help: true": "--help: option not found",
    "3: 3": "--3: option not found",
    "num_train_epochs: many": "--num_train_epochs: must be an integer, got 'many'",
    "num_train_epochs: 0": "--num_train_epochs: must be at least 1, got 0",
    "num_train_epochs: 1.5": "--num_train_epochs: must be an integer, got 1.5",
    "num_train_epochs: true": "--num_train_epochs: must be an integer, got True",
    "num_train_epochs: [1, 2]": r"--num_train_epochs: must be an integer, got \[1, 2\]",
    "num_train_epochs: []": r"--num_train_epochs: must be an integer, got \[\]",
    "num_train_epochs: {a: 1, b: 2}": "--num_train_epochs: must be an integer, got {'a': 1, 'b': 2}",
    "num_train_epochs:": "--num_train_epochs: has no value; remove it to use the default",
    "augmentation: [dino, flip]": r"--augmentation: takes one value, got \['dino', 'flip'\]",
    "lr_milestones: [20, x]": "--lr_milestones: must be a number, got 'x'",
    "lr_scheduler_type: cosin": "--lr_scheduler_type: must be one of multi_step, cosine, one_cycle, got 'cosin'",
    "mixed_precision: no": "--mixed_precision: got true or false, which is how YAML reads yes and no; put the word in",
    "group_by_aspect_ratio: 1": "--group_by_aspect_ratio: must be true or false, got 1",
    "config_overrides: {box_noise: 1.0}": "--config_overrides: DinoDetrConfig has no field 'box_noise'; did you mean",
    "config_overrides: box_noise_scale": "--config_overrides: expected FIELD=VALUE, got 'box_noise_scale'",
    "num_train_epochs: 3\nnum_train_epochs: 4": "--num_train_epochs is duplicated",
    "learning_rate: 3\nlearning-rate: 4": "--learning_rate is duplicated",
    "num_train_epochs 3": "must have lines such as `num_train_epochs: 12`, got str",
    "- num_train_epochs": "must have lines such as `num_train_epochs: 12`, got list",
    "": "must have lines such as `num_train_epochs: 12`, got NoneType",
    "num_train_epochs: [3": "is not valid YAML",
    "[1, 2]: 3": "is not valid YAML",
}


@pytest.mark.parametrize("recipe", WRONG)
def test_an_error_names_the_file_and_what_to_do(tmp_path, recipe):
    with pytest.raises(InputError, match=rf"recipe\.yaml: {WRONG[recipe]}"):
        parse(tmp_path, recipe)


def test_a_recipe_that_is_not_there():
    with pytest.raises(InputError, match=r"nowhere\.yaml: file not found"):
        read_recipe(Path("nowhere.yaml"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_train_epochs", "0"], "--num_train_epochs: must be at least 1, got 0"),
        (["--learning_rate=-1"], r"--learning_rate: must be at least 0 and at most 1e\+38, got -1"),
        (["--seed=2147483649"], "--seed: must be at least 0 and at most 2147483648, got 2147483649"),
        (["--max_grad_norm=0"], "--max_grad_norm: must be greater than 0, got 0"),
        (["--config_name=c"], "--model_name_or_path has its own configuration; remove --config_name"),
        (["--backbone_weights=b"], "--model_name_or_path has its own backbone; remove --backbone_weights"),
        (["--train_images=a"], "give either --dataset or the files of each split, not both"),
    ],
)
def test_errors_of_the_command_line_do_not_blame_the_recipe(tmp_path, words, message):
    with pytest.raises(InputError, match=f"^{message}"):
        parse(tmp_path, "num_train_epochs: 3", *words)


def test_all_contradictions_are_reported_at_once():
    with pytest.raises(InputError) as raised:
        FineTuningArguments(output_dir="o", train_images="a", lr_scheduler_type="cosine", lr_milestones=[1])
    assert str(raised.value).split("; ") == [
        "give --model_name_or_path, or --architecture, --config_name and/or --backbone_weights",
        "--lr_scheduler_type cosine has no milestones",
        "remove --lr_milestones or give it no value",
        "--train_images and --train_annotations belong together",
        "give --dataset, or --train_images, --train_annotations, --val_images and --val_annotations",
    ]


def test_none_is_a_value_only_where_it_is_the_default():
    given = {"model_name_or_path": "m", "dataset": "mine", "output_dir": "out"}
    for name, option in OPTIONS.items():
        if option.default is None and name not in given:
            assert getattr(FineTuningArguments(**given, **{name: None}), name) is None
        elif option.default is not None:
            with pytest.raises(InputError, match=f"^--{name}: has no value; remove it to use the default"):
                FineTuningArguments(**given | {name: None})


@pytest.mark.parametrize("words", [["--recipe"], ["--num_train_epoch", "3"], ["mine"], ["--seed", "1", "2"]])
def test_a_command_line_that_cannot_be_parsed_is_no_run(words):
    assert hf_dino(["train", "--output_dir=out", "--dataset=mine", "--model_name_or_path=m", *words]) == 2


def test_help_has_every_option(capsys):
    assert hf_dino(["train", "--help"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for name, option in OPTIONS.items():
        assert f"--{name}" in told
        assert option.metadata["help"].endswith(".")
    assert "Number of passes over the training images. Default: 12." in told
    for values in ("recipe PATH", "mixed_precision <no|fp16|bf16>", "lr_scheduler_type <multi_step|cosine|one_cycle>"):
        assert f"--{values} " in told


def read(name):
    file = RECIPES / f"{name}.yaml"
    needs_model = "backbone_weights:" not in file.read_text()
    return parse_finetune(f"--recipe={file}", *(["--model_name_or_path=m"] if needs_model else []))


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
    defaults = vars(parse_finetune("--model_name_or_path=m"))
    repeated = [name for name, value in vars(args).items() if value == defaults[name]]
    given = {line.partition(":")[0] for line in file.read_text().splitlines() if line[:1].isalpha()}
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
    assert (args.num_train_epochs, args.global_batch_size) == (epochs, 16)
    assert (args.learning_rate, args.backbone_lr_multiplier) == (1e-4, 0.1)
    assert args.lr_milestones == {12: [11 / 12], 24: [20], 36: [30]}[epochs]
    config = DinoDetrConfig(**args.config_overrides)
    assert config.box_noise_scale == 1.0
    assert config.num_feature_levels == int(levels[0])
    stages = ["stage2", "stage3", "stage4"] if levels == "4scale" else ["stage1", "stage2", "stage3", "stage4"]
    assert list(config.backbone_config.out_features) == stages
    assert args.gradient_checkpointing == (backbone == ["swin", "l"])


def test_swin_of_the_recipes_is_the_original_one():
    from hf_dino.conversion.settings import BACKBONES

    for levels in "45":
        backbone = read(f"coco-swin-l-{levels}scale-12ep").config_overrides["backbone_config"]
        del backbone["out_features"]
        assert backbone == BACKBONES["swin_L_384_22k"]


def test_large_fine_tuning():
    args = read("finetune-large")
    assert (args.global_batch_size, args.num_train_epochs) == (1, 100)
    assert (args.learning_rate, args.augmentation) == (5e-5, "dino-large")
    assert args.learning_rate * args.backbone_lr_multiplier == pytest.approx(1e-5)
    assert (args.gradient_checkpointing, args.mixed_precision) == (True, "bf16")


def test_milestones_belong_to_the_schedule_that_has_them():
    model = "--model_name_or_path=a"
    with pytest.raises(InputError, match="--lr_scheduler_type one_cycle has no milestones; remove --lr_milestones or"):
        parse_finetune(model, "--lr_scheduler_type=one_cycle", "--lr_milestones=0.5")
    recipe = f"--recipe={RECIPES / 'coco-r50-4scale-24ep.yaml'}"
    assert parse_finetune(recipe, "--lr_scheduler_type=cosine", "--lr_milestones").lr_milestones == []
    assert parse_finetune(model).lr_milestones == [11 / 12]


def test_options_without_overrides_are_checked_without_importing_the_model():
    code = (
        "import sys; sys.argv = ['hf-dino']; from hf_dino.training_arguments import FineTuningArguments as Arguments\n"
    )
    code += "Arguments(model_name_or_path='m', dataset='d', output_dir='o'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
