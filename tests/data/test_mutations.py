"""Mutated exports: no traceback, no long message, and nothing that reads otherwise without a message."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from helpers.mutations import EXPORTS, IMAGES, Mutation, mutate, objects_of, write_export
from hf_dino.data import InputError, ReadOptions, check_data, read_data


NUM_MUTATIONS = {"coco": 70, "voc": 60, "yolo": 60, "datasets": 10}  # in `make test`
NUM_MORE = {"coco": 900, "voc": 700, "yolo": 700, "datasets": 150}  # in `make test-all`


class Outcome(NamedTuple):
    """What a dataset was read as, and what was said about it."""

    content: dict[str, dict[str, Any]]
    messages: list[str]
    errors: list[str]


@contextmanager
def log_messages() -> Iterator[list[str]]:
    """Collect what the package logs."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("hf_dino")
    logger.addHandler(handler)
    try:
        yield messages
    finally:
        logger.removeHandler(handler)


def read(folder: Path) -> Outcome:
    """Read and check a directory as `hf-dino data check` does."""
    errors: list[str] = []
    with log_messages() as messages:
        try:
            splits = read_data(folder, options=ReadOptions(on_error=errors.append))
            report = check_data(splits, num_workers=1)
        except InputError as error:
            return Outcome({}, messages, [*errors, str(error)])
    content = {
        split: {
            _stem(image.path): sorted(
                (data.categories[int(id_)], *(round(float(side), 2) for side in box), int(crowd))
                for id_, box, crowd in zip(image.category_ids, image.boxes, image.iscrowd, strict=True)
            )
            for image in data.images
        }
        for split, data in splits.items()
    }
    return Outcome(content, [*messages, *report.warnings], [*errors, *report.errors])


def _stem(path: Any) -> str:
    return Path(getattr(path, "file_name", None) or str(path)).stem


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> dict[str, Outcome]:
    outcomes = {}
    for form, make in EXPORTS.items():
        folder = tmp_path_factory.mktemp(form)
        write_export(make(), folder)
        outcomes[form] = read(folder)
    return outcomes


@pytest.mark.parametrize("form", EXPORTS)
def test_the_exports_themselves_are_read_exactly(originals, form):
    assert originals[form].errors == []
    crowds = form in ("coco", "voc")
    assert originals[form].content == {
        split: {
            Path(name).stem: sorted((label, *map(float, box), crowd) for label, box, crowd in objects_of(name, crowds))
            for name in IMAGES["val" if split == "validation" else split]
        }
        for split in ("train", "validation")
    }


def fault(mutation: Mutation, original: Outcome, mutated: Outcome) -> str | None:
    """Return what is wrong with how a mutated export was read."""
    if long := [message for message in mutated.messages + mutated.errors if len(message.splitlines()) > 3]:
        return f"a message of {len(long[0].splitlines())} lines: {long[0]}"
    if mutated.errors or mutated.content == original.content:
        return None
    if not set(mutated.messages) - set(original.messages):
        return f"read otherwise without a word: {differences(original, mutated)}"
    changed = {name for _, name, *_ in differences(original, mutated)}
    new_messages = " ".join(set(mutated.messages) - set(original.messages))
    classes = {repr(label) for label in _classes(mutated) - _classes(original)}
    if mutation.images is not None and not any(name in new_messages for name in changed | classes):
        return f"the message names neither the image {changed} nor a class: {new_messages}"
    if mutation.images is not None and not changed <= {Path(name).stem for name in mutation.images}:
        return f"other images read otherwise: {differences(original, mutated)}"
    return None


def _classes(outcome: Outcome) -> set[str]:
    """Return the class names of all objects."""
    return {object_[0] for images in outcome.content.values() for objects in images.values() for object_ in objects}


def differences(original: Outcome, mutated: Outcome) -> list[tuple[Any, ...]]:
    """Return split, image, and both contents of each image that reads otherwise."""
    both = [outcome.content for outcome in (original, mutated)]
    keys = {(split, name) for content in both for split, images in content.items() for name in images}
    pairs = [(*key, *(content.get(key[0], {}).get(key[1]) for content in both)) for key in sorted(keys)]
    return [pair for pair in pairs if pair[2] != pair[3]]


def check_mutations(form: str, seeds: range, original: Outcome, folder: Path) -> None:
    faults = []
    for seed in seeds:
        mutation = mutate(form, seed)
        write_export(mutation.export, folder / str(seed))
        try:
            found = fault(mutation, original, read(folder / str(seed)))
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        if found:
            faults.append(f"{form} {seed}, {mutation.description}: {found}"[:700])
    assert not faults, f"{len(faults)} of {len(seeds)}:\n" + "\n".join(faults)


@pytest.mark.parametrize("form", EXPORTS)
def test_mutations_are_never_read_without_a_word(form, originals, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    check_mutations(form, range(NUM_MUTATIONS[form]), originals[form], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("form", EXPORTS)
def test_more_mutations_are_never_read_without_a_word(form, originals, tmp_path):
    seeds = range(NUM_MUTATIONS[form], NUM_MUTATIONS[form] + NUM_MORE[form])
    check_mutations(form, seeds, originals[form], tmp_path)


def test_a_mutation_is_repeatable():
    assert mutate("coco", 3) == mutate("coco", 3)
    assert len({mutate("coco", seed).description for seed in range(50)}) > 40, "seeds differ"
