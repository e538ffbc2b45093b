"""What a comparison trains: its settings, the same for all rows, and a directory for each row and seed."""

import json
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from ..data import DetectionSplit, ReadOptions, read_data
from ..data.dataset import to_annotation_array
from ..data.shapes import generate_shapes
from ..data.split import missing_split_message
from ..family import FAMILY, tiny_fields
from ..hub import parse_image_size
from ..training.checkpoint import data_fingerprint, lock_directory
from ..training_arguments import FineTuningArguments
from ..utils.errors import InputError
from ..utils.io import read_text, write_json


SHAPES = "shapes"
SETTINGS_FILE = "comparison.json"
_POLL_SECONDS = 0.2

SIZES = {"tiny": tiny_fields}
"""Functions that return the fields of a row that make its model as large as those of the other rows."""

RECIPE: dict[str, Any] = {
    "augmentation": "flip",
    "backbone_lr_multiplier": 1.0,
    "lr_milestones": [0.85],
}
"""Options of every run that are not options of the comparison: for small models trained from scratch."""


@dataclass(frozen=True)
class ComparisonSettings:
    """What all runs of a comparison have in common, and what must not change when it is continued.

    The defaults are the settings of the comparison in the docs, and of `hf-dino compare`.

    Attributes:
        size (`str`): Key of [`SIZES`]: width and depth of the models.
        max_train_steps (`int`): Optimizer steps of each run.
        evaluations (`int`): Number of evaluations of each run, evenly spaced, the last one at its end; fewer if the
            steps cannot be divided evenly.
        image_size (`str`): `HEIGHTxWIDTH` in pixels, as `--image_size` of `hf-dino train`.
        global_batch_size (`int`): Images per optimizer step.
        learning_rate (`float`): Peak learning rate.
    """

    size: str = "tiny"
    max_train_steps: int = 600
    evaluations: int = 8
    image_size: str = "160x160"
    global_batch_size: int = 8
    learning_rate: float = 4e-4

    def __post_init__(self) -> None:
        parse_image_size([self.image_size])
        if not 0 < self.evaluations <= self.max_train_steps:
            raise InputError(
                f"--evaluations {self.evaluations}: must be at least 1 and at most --max_train_steps, "
                f"{self.max_train_steps}"
            )

    @property
    def eval_steps(self) -> int:
        """Optimizer steps between two evaluations."""
        return -(-self.max_train_steps // self.evaluations)


class Run(NamedTuple):
    """A row of the comparison, trained with one seed.

    Attributes:
        row (`str`): Key of [`FAMILY`].
        seed (`int`): Seed of weights, data order, augmentation and noise.
        folder (`Path`): Output directory of the run.
    """

    row: str
    seed: int
    folder: Path

    @property
    def is_finished(self) -> bool:
        """Return whether the trained model was saved, which is the last thing that a run does."""
        return (self.folder / "config.json").is_file()

    @property
    def lock(self) -> Path:
        """The directory whose lock the process holds that trains the run; not in `folder`, which must begin empty."""
        return self.folder.parents[2] / "locks" / f"{self.row}-{self.seed}"


def run_folder(output_dir: Path, row: str, seed: int) -> Path:
    """Return the output directory of a run."""
    return output_dir / "rows" / row / f"seed_{seed}"


def plan_runs(output_dir: Path, rows: Sequence[str], seeds: int) -> list[Run]:
    """Return all runs, seed by seed, so that a comparison that is half done is complete for its first seeds.

    Example:

    ```python
    >>> [run[:2] for run in plan_runs(Path("out"), ["detr", "dino_4scale"], seeds=2)]
    [('detr', 0), ('dino_4scale', 0), ('detr', 1), ('dino_4scale', 1)]

    ```
    """
    return [Run(row, seed, run_folder(output_dir, row, seed)) for seed in range(seeds) for row in rows]


def find_runs(output_dir: Path) -> list[Run]:
    """Return the runs that were started, in the order of the family and of their seeds."""
    seeds = (
        (row, int(folder.name.removeprefix("seed_"))) for row in FAMILY for folder in _seed_folders(output_dir, row)
    )
    return [Run(row, seed, run_folder(output_dir, row, seed)) for row, seed in sorted(seeds, key=_order)]


def _seed_folders(output_dir: Path, row: str) -> list[Path]:
    return [path for path in (output_dir / "rows" / row).glob("seed_*") if path.name[5:].isdecimal()]


def _order(run: tuple[str, int]) -> tuple[int, int]:
    return list(FAMILY).index(run[0]), run[1]


def choose_rows(names: Sequence[str]) -> list[str]:
    """Return rows in the order of the family; no names or `all` are all of them.

    Raises:
        InputError: If a name is not a row.
    """
    if unknown := [name for name in names if name not in FAMILY and name != "all"]:
        raise InputError(f"--rows {unknown[0]}: must be all, or some of {', '.join(FAMILY)}")
    return [row for row in FAMILY if not names or "all" in names or row in names]


def prepare_comparison(output_dir: Path, dataset: str | None, settings: ComparisonSettings) -> str:
    """Write the settings of a new comparison, or check that they are those of the one in `output_dir`.

    Args:
        output_dir (`Path`): Directory of the comparison.
        dataset (`str`, *optional*): Dataset to train on; by default the one that the comparison began with. For a new
            one, `shapes` is generated in `output_dir`.
        settings (`ComparisonSettings`): Its settings.

    Returns:
        `str`: The dataset.

    Raises:
        InputError: If `output_dir` has other files or a comparison with other settings or data.
    """
    found = {path.name for path in output_dir.iterdir()} if output_dir.is_dir() else set()
    if SETTINGS_FILE not in found and not found <= {SHAPES, "locks"}:
        raise InputError(f"{output_dir}: has files that are not of a comparison; use a different --output_dir")
    data = fingerprint(_read(dataset)) if dataset else None  # before anything is written
    with wait_for_lock(output_dir / "locks" / "settings"):
        return _prepare(output_dir, dataset, data, settings)


def _prepare(output_dir: Path, dataset: str | None, data: str | None, settings: ComparisonSettings) -> str:
    path = output_dir / SETTINGS_FILE
    is_new = not path.is_file()
    before = {"dataset": dataset} if is_new else read_settings(output_dir)
    name = dataset_of(output_dir, dataset, before)
    models = {row: f"{zlib.crc32(repr(SIZES[settings.size](row)).encode()):08x}" for row in FAMILY}
    now = {**asdict(settings), "recipe": RECIPE, "models": models, "data": data or fingerprint(_read(name))}
    if is_new:
        write_json(path, {**now, "dataset": dataset})
    elif changed := describe_changes(before, now):
        raise InputError(
            f"{path}: a comparison continues with the settings it began with ({changed}); use those, or a different "
            "--output_dir"
        )
    return name


def dataset_of(output_dir: Path, dataset: str | None, settings: Mapping[str, Any]) -> str:
    """Return the dataset that is given or, in this order, that of the settings or `shapes`, which is generated."""
    return dataset or settings.get("dataset") or str(generate_shapes(output_dir / SHAPES))


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return what differs between two settings, or an empty text; what only one of them has does not count.

    Example:

    ```python
    >>> describe_changes({"size": "tiny", "evaluations": 12}, {"size": "tiny", "evaluations": 6})
    '--evaluations: 12 before, 6 now'

    ```
    """
    before, now = _flatten(before), _flatten(now)
    changed = (name for name in now if name in before and before[name] != now[name])
    return "; ".join(f"{name}: {before[name]!r} before, {now[name]!r} now" for name in changed)


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by the names that a message has for them: options, and the fields of each model."""
    options = {each.name: f"--{each.name}" for each in fields(ComparisonSettings)}
    models = {f"fields of {row}": checksum for row, checksum in settings.get("models", {}).items()}
    return {options.get(name, name): value for name, value in settings.items() if name != "models"} | models


def read_settings(output_dir: Path) -> dict[str, Any]:
    """Read the settings of a comparison.

    Raises:
        InputError: If there is none, or its file is damaged.
    """
    path = output_dir / SETTINGS_FILE
    try:
        settings = dict(json.loads(read_text(path)))
        for name, default in asdict(ComparisonSettings()).items():
            if type(default)(settings[name]) != settings[name]:  # as of 600 as text
                raise ValueError(f"{name} is {settings[name]!r}, not of type {type(default).__name__}")
        ComparisonSettings(**{each.name: settings[each.name] for each in fields(ComparisonSettings)})
        dict(settings.get("models", {}))
    except (ValueError, TypeError, LookupError) as error:
        if not path.is_file():
            raise InputError(f"{output_dir}: has no comparison ({SETTINGS_FILE} not found)") from None
        raise InputError(f"{path}: is damaged ({error})") from None
    return settings


def _read(dataset: str) -> dict[str, DetectionSplit]:
    splits = read_data(dataset)
    if message := missing_split_message(dataset, splits, ReadOptions()):
        raise InputError(f"{dataset}: {message}")
    return splits


def fingerprint(splits: Mapping[str, DetectionSplit]) -> str:
    """Compute a checksum of the images, categories and boxes of all splits."""
    texts = (f"{name} {data_fingerprint(split)} {_box_checksum(split):08x}" for name, split in sorted(splits.items()))
    return ", ".join(texts)


def _box_checksum(split: DetectionSplit) -> int:
    return zlib.crc32(to_annotation_array(split).tobytes())


def run_arguments(run: Run, dataset: str, settings: ComparisonSettings, **machine: Any) -> FineTuningArguments:
    """Return the options of a run, which is resumed if it was started.

    Args:
        run (`Run`): The row and its seed.
        dataset (`str`): From [`prepare_comparison`].
        settings (`ComparisonSettings`): Settings of the comparison.
        machine: Options that change no result, such as `dataloader_num_workers`.
    """
    return FineTuningArguments(
        architecture=run.row,
        config_overrides=SIZES[settings.size](run.row),
        dataset=dataset,
        output_dir=run.folder,
        resume_from_checkpoint=(run.folder / "checkpoints").is_dir(),
        seed=run.seed,
        image_size=[settings.image_size],
        global_batch_size=settings.global_batch_size,
        num_train_epochs=settings.max_train_steps,
        max_train_steps=settings.max_train_steps,
        eval_steps=settings.eval_steps,
        learning_rate=settings.learning_rate,
        **RECIPE,
        **machine,
    )


@contextmanager
def wait_for_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a directory, after waiting for other processes to release it."""
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_directory(folder))
                break
            except InputError:
                time.sleep(_POLL_SECONDS)
        yield
