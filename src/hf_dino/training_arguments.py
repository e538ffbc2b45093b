"""The options of a fine-tuning run: names, types, defaults and ranges, for the library, the command line and recipes.

Nothing heavy is imported here, so that `hf-dino train --help` answers at once.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from .utils.errors import InputError
from .utils.io import read_text


SPLIT_PREFIXES = {"train": "train", "val": "validation", "test": "test"}
"""Prefixes of the options that name the files of a split, and the splits."""

# also the help of the commands that read a dataset
DATASET_HELP = (
    "Dataset: a directory in COCO, YOLO, Pascal VOC or Hugging Face datasets format, the YAML file of a YOLO dataset, "
    "or a Hub id, OWNER/NAME or OWNER/NAME:CONFIGURATION."
)
AUGMENTATION_HELP = "dino, dino-large, flip, photometric, none, or FILE.py:FUNCTION"
STREAMING_HELP = (
    "Download the images of a Hub dataset one by one and keep them, instead of downloading all its files; an "
    "interrupted download starts again."
)
BOX_FORMAT_HELP = (
    "Meaning of the boxes in COCO files and tables, in pixels: xywh is x, y, width, height; xyxy is the corners."
)
ROTATED_BOXES_HELP = "Rotated boxes: use the upright box around each one, or refuse the dataset."
COLUMNS = ("image", "objects", "bbox", "category")
COLUMNS_HELP = (
    f"Columns of a Hugging Face dataset by what they contain ({', '.join(COLUMNS)}), e.g. objects=digits; those with "
    "usual names are found without it."
)

MAX_IMAGE_PIXELS_HELP = (
    "Number of pixels (width x height) above which an image is reported; of more than twice as many, it is refused. "
    "By default, 89478485, as in Pillow."
)

LARGEST_FLOAT = 1e38  # about the largest float32; a larger value, or `inf`, is almost certainly a typo


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"must be true or false, got {value!r}")
    return value


def _text(value: Any) -> str:
    if isinstance(value, bool):
        raise ValueError("got true or false, which is how YAML reads yes and no; put the word in quotes, e.g. 'no'")
    if not isinstance(value, (str, int, float, Path)):
        raise ValueError(f"takes one value, got {value!r}")
    return str(value)


def _path(value: Any) -> Path:
    return Path(_text(value))


def _choice(choices: Sequence[str], value: Any) -> str:
    text = _text(value)
    if (choice := text.replace("-", "_")) not in choices:
        raise ValueError(f"must be one of {', '.join(choices)}, got {text!r}")
    return choice


def _number(kind: type, minimum: float, maximum: float = math.inf, *, exclusive_min: bool = False) -> Callable:
    """Make the parser of a number; text is accepted too, since YAML reads `5e-5` as text."""

    def parse(value: Any) -> Any:
        try:
            number = kind(_text(value))
        except ValueError:
            raise ValueError(f"must be {'an integer' if kind is int else 'a number'}, got {value!r}") from None
        if not minimum <= number <= maximum or (exclusive_min and number == minimum):
            lower = f"{'greater than' if exclusive_min else 'at least'} {minimum}"
            upper = "" if math.isinf(maximum) else f" and at most {maximum}"
            raise ValueError(f"must be {lower}{upper}, got {value}")
        return number

    return parse


def _integer(minimum: int, maximum: float = math.inf) -> Callable[[Any], int]:
    return _number(int, minimum, maximum)


def _float(minimum: float, maximum: float = LARGEST_FLOAT, **options: bool) -> Callable[[Any], float]:
    return _number(float, minimum, maximum, **options)


def _list(parse: Callable[[Any], Any]) -> Callable[[Any], list[Any]]:
    """Make the parser of a list; empty text, which is an option without a value, is an empty list."""
    return lambda value: [parse(item) for item in (value if isinstance(value, list) else [value]) if item != ""]


def _overrides(value: Any) -> dict[str, Any]:
    """Read fields of a configuration from a mapping, or from `FIELD=VALUE` with the value as JSON or plain text."""
    overrides = dict(value.items() if isinstance(value, dict) else map(_split_override, _list(_text)(value)))
    if overrides:
        from .hub import check_config_fields  # imports transformers and torch, only for a run that overrides something

        check_config_fields(overrides)
    return overrides


def _architecture(value: Any) -> str:
    """Read a key of the family."""
    from .family import FAMILY  # imports transformers and torch, only for a run that names one

    return _choice(list(FAMILY), value)


def _columns(value: Any) -> dict[str, str]:
    """Read names of columns from a mapping, or from `CONTENT=NAME`."""
    given = value.items() if isinstance(value, dict) else (text.partition("=")[::2] for text in _list(_text)(value))
    columns: dict[str, str] = {}
    for content, name in given:
        if content not in COLUMNS or content in columns or not isinstance(name, str) or not name:
            raise ValueError(
                f"must be CONTENT=NAME, with CONTENT each at most once of {', '.join(COLUMNS)}; got "
                f"{content!r} with {'a second' if content in columns else 'the'} name {name!r}"
            )
        columns[content] = name
    return columns


def _split_override(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"expected FIELD=VALUE, got {text!r}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


def _option(default: Any, parse: Callable[[Any], Any], help: str, metavar: str = "") -> Any:
    """Make a field of [`FineTuningArguments`].

    Args:
        default (`Any`): Default value; `None` makes `None` a valid value.
        parse (`Callable`): Converts a value to the type of the field and checks it.
        help (`str`): Description of the option.
        metavar (`str`, *optional*): Name of a value in the help; by default, that of its type.
    """
    metadata = {"parse": parse, "help": help, "metavar": metavar}
    if isinstance(default, (list, dict)):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def _choice_option(default: str | None, choices: Sequence[str], help: str) -> Any:
    """Make a field whose value is one of `choices`, which may also be typed with dashes."""
    return _option(default, partial(_choice, choices), help, f"<{'|'.join(choices)}>")


@dataclass(kw_only=True)
class FineTuningArguments:
    """The options of a run of [`~training.FineTuner`]. Every field is an option of `hf-dino train`.

    Values are checked when the object is made: text is converted to a field's type, so that a command line, a recipe
    and Python are read alike. `None` is accepted where it is the default.

    Raises:
        InputError: If a value has the wrong type, is out of its range or contradicts another one.

    Example:

    ```python
    >>> arguments = FineTuningArguments(model_name_or_path="dino-4scale-r50", dataset="mine", output_dir="runs/mine")
    >>> arguments.global_batch_size, arguments.lr_milestones
    (16, [0.9166666666666666])
    >>> FineTuningArguments(model_name_or_path="m", dataset="d", output_dir="o", num_train_epochs=0)
    Traceback (most recent call last):
    hf_dino.utils.errors.InputError: --num_train_epochs: must be at least 1, got 0

    ```
    """

    # the model
    model_name_or_path: str | None = _option(
        None, _text, "Directory or Hub id (OWNER/NAME) of the model to fine-tune: DINO or another DETR.", "NAME"
    )
    architecture: str | None = _option(
        None,
        _architecture,
        "Model to train from scratch: a row of the family from DETR to DINO, such as deformable_detr or dino_4scale.",
        "NAME",
    )
    config_name: Path | None = _option(
        None,
        _path,
        "JSON file with fields of DinoDetrConfig, to train a model from scratch; with a model_type, of another model.",
    )
    backbone_weights: str | None = _option(
        None,
        _text,
        "Pretrained backbone of a model trained from scratch: torchvision/resnet50, or a directory or Hub id.",
        "NAME",
    )
    config_overrides: dict[str, Any] = _option(
        {}, _overrides, "Fields of the configuration to change, e.g. box_noise_scale=1.0.", "FIELD=VALUE"
    )
    freeze: list[str] | None = _option(
        None,
        _list(_text),
        "Stages to freeze: stem, backbone, backbone.stage1 ..., encoder, decoder. Without a value, nothing is frozen; "
        "by default, the stem of a pretrained ResNet.",
        "STAGE",
    )
    # the data
    dataset: str | None = _option(
        None,
        _text,
        f"{DATASET_HELP} It must have a train and a validation split. To be given instead of the files of each split.",
        "DATASET",
    )
    streaming: bool = _option(False, _flag, STREAMING_HELP)
    box_format: str = _choice_option("xywh", ("xywh", "xyxy"), BOX_FORMAT_HELP)
    rotated_boxes: str = _choice_option("enclose", ("enclose", "refuse"), ROTATED_BOXES_HELP)
    columns: dict[str, Any] = _option({}, _columns, COLUMNS_HELP, "CONTENT=NAME")
    train_images: Path | None = _option(None, _path, "Directory of the training images.")
    train_annotations: Path | None = _option(None, _path, "COCO annotation file of the training images.")
    val_images: Path | None = _option(None, _path, "Directory of the validation images.")
    val_annotations: Path | None = _option(None, _path, "COCO annotation file of the validation images.")
    test_images: Path | None = _option(None, _path, "Directory of the test images.")
    test_annotations: Path | None = _option(None, _path, "COCO annotation file of the test images.")
    dataset_label: str | None = _option(
        None, _text, "Name of the dataset on the model card; by default, the name of its directory or its Hub id."
    )
    image_size: list[str] = _option(
        [],
        _list(_text),
        "Size of the images in pixels: shortest edge, shortest and longest edge, or HEIGHTxWIDTH. By default, the "
        "size of the model; 800 1333 for a new one.",
        "PIXELS",
    )
    augmentation: str = _option(
        "dino",
        _text,
        f"Augmentation of training images: {AUGMENTATION_HELP}.",
        "NAME",
    )
    group_by_aspect_ratio: bool = _option(
        False, _flag, "Put images of similar shape into the same micro-batch of a step, for less padding."
    )
    max_image_pixels: int | None = _option(None, _integer(1), MAX_IMAGE_PIXELS_HELP)
    dataloader_num_workers: int = _option(2, _integer(0), "Number of data loading processes per training process.")
    # the run
    output_dir: Path = _option(MISSING, _path, "Directory of the model; must be new or empty.")
    resume_from_checkpoint: bool = _option(False, _flag, "Resume the run in --output_dir from its last checkpoint.")
    overwrite_output_dir: bool = _option(False, _flag, "Replace the model and the checkpoints in --output_dir.")
    num_train_epochs: int = _option(12, _integer(1), "Number of passes over the training images.")
    max_train_steps: int | None = _option(
        None, _integer(1), "Maximum number of optimizer steps; ends the run even within an epoch."
    )
    early_stopping_patience: int | None = _option(
        None, _integer(1), "Stop after this number of evaluations without a better AP; by default, never."
    )
    seed: int = _option(0, _integer(0, 2**31), "Seed of new weights, the order of the images and their augmentation.")
    # a step
    global_batch_size: int = _option(
        16, _integer(1), "Number of images per optimizer step, over all processes and accumulated micro-batches."
    )
    gradient_accumulation_steps: int = _option(
        1, _integer(1), "Number of micro-batches that each process splits its images of a step into, to save memory."
    )
    gradient_checkpointing: bool = _option(
        False, _flag, "Recompute activations in the backward pass: less memory, more time."
    )
    torch_compile: bool = _option(
        False, _flag, "Compile the encoder and decoder layers: about a minute at the start, faster steps."
    )
    mixed_precision: str | None = _choice_option(
        None, ("no", "fp16", "bf16"), "Precision of the computations; by default, that of `accelerate config`."
    )
    weight_decay: float = _option(1e-4, _float(0), "Weight decay of AdamW.")
    max_grad_norm: float = _option(
        0.1, _float(0, math.inf, exclusive_min=True), "Maximum norm of the gradient; inf for no clipping."
    )
    ema_decay: float | None = _option(
        None, _float(0, 1 - 1e-6), "Evaluate and save an exponential moving average with this decay, such as 0.9997."
    )
    # the learning rate
    learning_rate: float = _option(1e-4, _float(0), "Peak learning rate.")
    backbone_lr_multiplier: float = _option(0.1, _float(0), "Multiplier on the learning rate of the backbone.")
    sampling_lr_multiplier: float = _option(
        1.0, _float(0), "Multiplier on the learning rate of the layers that predict sampling offsets."
    )
    lr_scheduler_type: str = _choice_option(
        "multi_step",
        ("multi_step", "cosine", "one_cycle"),
        "Learning-rate schedule; multi_step decays at --lr_milestones.",
    )
    lr_milestones: list[float] = _option(
        [11 / 12],
        _list(_float(0)),
        "Milestones of multi_step, in epochs, or below 1 as fractions of the run: the learning rate is multiplied by "
        "0.1 at each. By default, 11/12; without a value, there are none.",
        "EPOCH",
    )
    warmup_steps: int = _option(
        0, _integer(0), "Number of optimizer steps over which the learning rate rises linearly from 0."
    )
    # evaluation and logging
    per_device_eval_batch_size: int = _option(8, _integer(1), "Number of images per process in an evaluation batch.")
    eval_epochs: int = _option(1, _integer(1), "Number of epochs between two evaluations.")
    eval_steps: int | None = _option(
        None, _integer(1), "Number of optimizer steps between two evaluations; by default, --eval_epochs."
    )
    max_detections: int = _option(
        100,
        _integer(100),
        "Number of detections of a class in an image that evaluations count: COCO's 100, or more for images with more "
        "objects.",
    )
    checkpointing_steps: int | None = _option(
        None, _integer(1), "Number of optimizer steps between two checkpoints within an epoch; by default, none there."
    )
    logging_steps: int = _option(20, _integer(1), "Number of optimizer steps between two rows of the history.")
    report_to: str | None = _option(None, _text, "Tracker of accelerate to log to, such as tensorboard or wandb.")

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None or each.default is not None:
                setattr(self, each.name, parse_option(each.name, value))
        if problems := self._problems():
            raise InputError("; ".join(problems))

    @property
    def split_files(self) -> dict[str, list[Path]]:
        """Image directory and annotation file, if given, by the prefix of their options: `train`, `val` and `test`."""
        pairs = {prefix: (f"{prefix}_images", f"{prefix}_annotations") for prefix in SPLIT_PREFIXES}
        return {
            prefix: [getattr(self, name) for name in pair if getattr(self, name)] for prefix, pair in pairs.items()
        }

    def _problems(self) -> list[str]:
        """Return what is wrong with the combination of options."""
        files = self.split_files
        has_milestones = self.lr_milestones not in ([], default_of("lr_milestones"))
        checks = [
            (
                not (self.model_name_or_path or self.architecture or self.config_name or self.backbone_weights),
                "give --model_name_or_path, or --architecture, --config_name and/or --backbone_weights",
            ),
            (
                self.model_name_or_path and self.config_name,
                "--model_name_or_path has its own configuration; remove --config_name",
            ),
            (
                self.model_name_or_path and self.architecture,
                "--model_name_or_path has its own architecture; remove --architecture",
            ),
            (
                self.model_name_or_path and self.backbone_weights,
                "--model_name_or_path has its own backbone; remove --backbone_weights",
            ),
            (
                self.lr_scheduler_type != "multi_step" and has_milestones,
                f"--lr_scheduler_type {self.lr_scheduler_type} has no milestones; remove --lr_milestones or give it "
                "no value",
            ),
            (
                self.dataset and any(files.values()),
                "give either --dataset or the files of each split, not both",
            ),
            *(
                (len(given) == 1, f"--{prefix}_images and --{prefix}_annotations belong together")
                for prefix, given in files.items()
            ),
            (
                not (self.dataset or (files["train"] and files["val"])),
                "give --dataset, or --train_images, --train_annotations, --val_images and --val_annotations",
            ),
        ]
        return [message for is_so, message in checks if is_so]


def parse_option(name: str, value: Any) -> Any:
    """Convert the value of an option to its type and check its range.

    Args:
        name (`str`): A field of [`FineTuningArguments`].
        value (`Any`): From Python, from YAML, or text from a command line; `FIELD=VALUE` for a mapping.

    Raises:
        InputError: If the value cannot be used.
    """
    if name not in OPTIONS:
        close = get_close_matches(name, OPTIONS, n=1)
        raise InputError(f"--{name}: option not found; {f'did you mean --{close[0]}?' if close else 'see --help'}")
    if value is None:
        raise InputError(f"--{name}: has no value; remove it to use the default")
    try:
        return OPTIONS[name].metadata["parse"](value)
    except ValueError as error:
        raise InputError(f"--{name}: {error}") from None


def default_of(name: str) -> Any:
    """Return the default of an option."""
    option = OPTIONS[name]
    return option.default if option.default_factory is MISSING else option.default_factory()


def reproduction_argv(arguments: FineTuningArguments) -> list[str]:
    """Return the command line arguments that repeat a run from its start: every option that is not at its default.

    Example:

    ```python
    >>> arguments = FineTuningArguments(model_name_or_path="m", dataset="d", output_dir="o", freeze=["stem"])
    >>> " ".join(reproduction_argv(arguments))
    '--model_name_or_path m --freeze stem --dataset d --output_dir o'

    ```
    """
    values = {name: value for name, value in vars(arguments).items() if value != default_of(name)}
    repeated = {name: value for name, value in values.items() if name not in _NOT_REPEATED}
    return [argument for name, value in repeated.items() for argument in (f"--{name}", *_value_argv(value))]


def _value_argv(value: Any) -> list[str]:
    """Return the arguments that follow an option on a command line."""
    if isinstance(value, bool):
        return []
    if isinstance(value, dict):
        return [f"{key}={each if isinstance(each, str) else json.dumps(each)}" for key, each in value.items()]
    return [str(each) for each in (value if isinstance(value, list) else [value])]


OPTIONS = {each.name: each for each in fields(FineTuningArguments)}
"""The fields of [`FineTuningArguments`] by name."""

_NOT_REPEATED = ("resume_from_checkpoint", "overwrite_output_dir")

RESUME_IGNORED_ARGS = {
    "output_dir", "resume_from_checkpoint", "overwrite_output_dir", "dataset", "streaming", "dataset_label",
    "report_to", "logging_steps", "dataloader_num_workers", "per_device_eval_batch_size", "eval_epochs", "eval_steps",
    "checkpointing_steps", "num_train_epochs", "max_train_steps", "early_stopping_patience",
    "gradient_checkpointing", "torch_compile", "config_name", "max_image_pixels",
    *(f"{prefix}_{kind}" for prefix in SPLIT_PREFIXES for kind in ("images", "annotations")),
}  # fmt: skip
"""Options that may differ when a run is resumed: where files are, how fast they are read, and how long the run is."""


def read_recipe(path: Path) -> dict[str, Any]:
    """Read a recipe: a YAML file with one entry per option, its name with dashes or underscores.

    Args:
        path (`Path`): The file. A list is the value of an option that takes several, `true` and `false` of a flag, and
            a mapping of `config_overrides`.

    Returns:
        `dict[str, Any]`: Values for [`FineTuningArguments`].

    Raises:
        InputError: If the file cannot be read, or an entry is unknown, duplicated or has an invalid value.
    """
    text = read_text(path)
    try:
        entries, tree = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise InputError(f"{path}: is not valid YAML ({' '.join(str(error).split())})") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path}: must have lines such as `num_train_epochs: 12`, got {type(entries).__name__}")
    names = [_option_name(key.value) for key, _ in tree.value]  # of duplicate entries, `entries` has only the last
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise InputError(f"{path}: {', '.join(f'--{name}' for name in sorted(duplicates))} is duplicated")
    options = {_option_name(key): value for key, value in entries.items()}
    try:
        return {name: parse_option(name, value) for name, value in options.items()}
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def _option_name(key: Any) -> str:
    return str(key).replace("-", "_")
