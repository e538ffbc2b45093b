"""Order of the images in training, equal sizes in evaluation, and workers that end with their program."""

import signal
import subprocess
import sys
import textwrap
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from helpers.coco_files import annotation, write_coco
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import (
    DetectionDataset,
    InputError,
    TrainingBatchSampler,
    TrainingCollator,
    make_augmentation,
    predict_batch_shapes,
    read_coco,
    steps_per_epoch,
    training_loader,
)
from hf_dino.data.loaders import SameSizeBatchSampler


def batches(length, step_size, **options):
    return list(TrainingBatchSampler(length, step_size, **{"seed": 0, "epoch": 0, **options}))


def test_an_epoch_shows_every_image():
    epoch = batches(10, 4)
    assert [len(batch) for batch in epoch] == [4, 4, 4]
    assert len(epoch) == steps_per_epoch(10, 4)
    flat = list(chain(*epoch))
    assert sorted(flat[:10]) == list(range(10))
    assert flat[10:] == flat[:2], "the last step is filled with the first images"


def test_order_depends_on_seed_and_epoch_only():
    assert batches(10, 4) == batches(10, 4)
    assert batches(10, 4) != batches(10, 4, epoch=1)
    assert batches(10, 4) != batches(10, 4, seed=1)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_step_sees_the_same_images_however_it_is_split(world_size, accumulation):
    whole = batches(11, 4)
    shares = [
        batches(11, 4, rank=rank, world_size=world_size, gradient_accumulation_steps=accumulation)
        for rank in range(world_size)
    ]
    for step, images in enumerate(whole):
        parts = [share[step * accumulation : (step + 1) * accumulation] for share in shares]
        assert sorted(chain(*chain(*parts))) == sorted(images)


def test_resuming_skips_the_completed_steps():
    assert (
        batches(10, 4, first_step=2, gradient_accumulation_steps=2)
        == batches(10, 4, gradient_accumulation_steps=2)[4:]
    )


def test_fewer_images_than_a_step_needs():
    (batch,) = batches(3, 8)
    assert len(batch) == 8
    assert set(batch) == {0, 1, 2}


def test_a_global_batch_that_cannot_be_split_evenly_is_an_error():
    with pytest.raises(
        InputError, match=r"a global batch of 6 .* 2 processes x 2 accumulated batches. Choose a multiple of 4"
    ):
        batches(10, 6, world_size=2, gradient_accumulation_steps=2)


SHAPES = [(int(height), int(width)) for height, width in np.random.default_rng(0).integers(20, 90, (50, 2))]


def padded(batches):
    """Pixels that batches of images of `SHAPES` have, over those that images have."""
    sizes = [np.array([SHAPES[index] for index in batch]) for batch in batches]
    return sum(len(size) * size.max(axis=0).prod() for size in sizes) / sum(size.prod(axis=1).sum() for size in sizes)


@pytest.mark.parametrize(("length", "step_size"), [(50, 16), (48, 16), (3, 8), (20, 4)])
@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_grouping_by_shape_keeps_the_images_of_a_step(length, step_size, world_size, accumulation):
    whole = batches(length, step_size)
    parts = {"world_size": world_size, "gradient_accumulation_steps": accumulation, "get_shape": SHAPES.__getitem__}
    shares = [batches(length, step_size, rank=rank, **parts) for rank in range(world_size)]
    for step, images in enumerate(whole):
        mine = [share[step * accumulation : (step + 1) * accumulation] for share in shares]
        assert sorted(chain(*chain(*mine))) == sorted(images)
        assert {len(batch) for batch in chain(*mine)} == {step_size // world_size // accumulation}
    resumed = batches(length, step_size, rank=0, first_step=1, **parts)
    assert resumed == shares[0][accumulation:]


def test_grouping_by_shape_reduces_padding():
    options = {"gradient_accumulation_steps": 8, "epoch": 3}
    before, after = (batches(48, 16, **options, **more) for more in ({}, {"get_shape": SHAPES.__getitem__}))
    assert padded(before) > 1.4
    assert padded(after) < 1.25
    # tall before wide, and of each kind by length
    lengths = [width if width >= height else -height for height, width in (SHAPES[i] for i in chain(*after[:8]))]
    assert lengths == sorted(lengths)


def test_processes_get_similar_shapes_at_the_same_time():
    shares = [
        batches(48, 16, rank=rank, world_size=2, gradient_accumulation_steps=4, get_shape=SHAPES.__getitem__)
        for rank in (0, 1)
    ]
    together = [[*mine, *other] for mine, other in zip(*shares)]
    assert padded(together) < padded(batches(48, 16, gradient_accumulation_steps=4)), "even over the processes"


@pytest.mark.parametrize("name", ["dino", "photometric", "flip", "none"])
@pytest.mark.parametrize("size", [{"shortest_edge": 40, "longest_edge": 67}, {"height": 32, "width": 48}])
def test_predicted_shapes_are_those_of_the_batches(tmp_path, name, size):
    sizes = [(40, 60), (60, 40), (30, 90), (50, 50)]
    objects = [annotation(image_id, 7, [3, 4, 20, 15]) for image_id in (1, 3)]
    augmentation = make_augmentation(name, size)
    collate = TrainingCollator(DinoDetrImageProcessor(size=size), {3: 0, 7: 1}, 2, not augmentation.resizes)
    data = read_coco(*write_coco(tmp_path, objects, sizes=sizes))
    for epoch in range(3):
        images = DetectionDataset(data, augmentation, seed=5, epoch=epoch)
        get_shape = predict_batch_shapes(images, collate)
        for index in range(len(sizes)):
            assert collate([images[index]])["pixel_values"].shape[-2:] == get_shape(index)


def test_evaluation_batches_have_one_size_and_cover_everything_once():
    shapes = [(4, 6), (6, 4), (4, 6), (8, 8), (4, 6), (6, 4)]
    for world_size in (1, 2, 5):
        shares = [list(SameSizeBatchSampler(shapes, 2, rank, world_size)) for rank in range(world_size)]
        everything = [batch for share in shares for batch in share]
        assert sorted(chain(*everything)) == list(range(6))
        assert all(len({shapes[index] for index in batch}) == 1 and len(batch) <= 2 for batch in everything)
    assert next(iter(SameSizeBatchSampler(shapes, 2))) == [3], "the largest first"
    assert list(SameSizeBatchSampler([], 2)) == []


def collator(num_labels):
    return TrainingCollator(DinoDetrImageProcessor(size={"height": 32, "width": 32}), {3: 0, 7: 4}, num_labels, True)


def test_a_label_that_the_model_does_not_have_is_an_error(tmp_path):
    data = DetectionDataset(read_coco(*write_coco(tmp_path, [annotation(1, 7, [0, 0, 5, 5])])))
    assert collator(num_labels=5)([data[0]])["labels"][0]["class_labels"].tolist() == [4]
    with pytest.raises(InputError, match=r"image_id \[1\].*class_labels\[0\] is 4, but the model has 4 labels"):
        collator(num_labels=4)([data[0]])


def test_an_error_in_a_worker_is_one_line(tmp_path):
    images, file = write_coco(tmp_path, [])
    data = DetectionDataset(read_coco(images, file))
    Image.new("RGB", (5, 5)).save(images / "1.png")
    with pytest.raises(InputError) as here:
        data[0]
    loader = training_loader(data, collator(5), TrainingBatchSampler(1, 1, seed=0, epoch=0), num_workers=1)
    with pytest.raises(InputError) as there:
        list(loader)
    assert str(there.value) == str(here.value)
    assert "1.png: is annotated as 60 x 40 pixels" in str(here.value)


@pytest.mark.parametrize(("num_workers", "prefetch_factor"), [(0, None), (2, 8), (5, 4), (100, 2)])
def test_workers_prefetch_a_whole_step(tmp_path, num_workers, prefetch_factor):
    """Each worker makes one batch at a time."""
    data = DetectionDataset(read_coco(*write_coco(tmp_path, [])))
    sampler = TrainingBatchSampler(1, 16, seed=0, epoch=0, gradient_accumulation_steps=16)
    assert training_loader(data, collator(5), sampler, num_workers=num_workers).prefetch_factor == prefetch_factor


PROGRAM = """
import os, signal, subprocess
from hf_dino import DinoDetrImageProcessor
from hf_dino.data import DetectionDataset, TrainingBatchSampler, TrainingCollator, read_coco, training_loader
from hf_dino.data.loaders import STOP_SIGNALS

data = DetectionDataset(read_coco({images!r}, {file!r}))
data.split.images.extend(39 * data.split.images)
collate = TrainingCollator(DinoDetrImageProcessor(size={{"height": 32, "width": 32}}), {{}}, 1, True)
sampler = TrainingBatchSampler(40, 1, seed=0, epoch=0)

def main():
    batches = iter(training_loader(data, collate, sampler, num_workers=2))
{body}

main()
"""


def run_program(folder, body):
    """Run `body` with an iterator over 40 batches of an image, in a process group of its own."""
    images, file = write_coco(folder, [])
    program = PROGRAM.format(images=str(images), file=str(file), body=textwrap.indent(textwrap.dedent(body), "    "))
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, start_new_session=True)


def test_a_program_ends_with_its_error_although_the_traceback_holds_the_workers(tmp_path):
    """`multiprocessing` ends them with SIGTERM, which they ignore if it comes from elsewhere."""
    ended = run_program(tmp_path, "next(batches)\nraise RuntimeError('something else')")
    assert ended.stderr.endswith("RuntimeError: something else\n")
    assert ended.returncode == 1


def test_a_broken_image_in_a_worker_ends_the_program(tmp_path):
    body = f"""
    open({str(tmp_path / "images" / "1.png")!r}, "wb").write(b"broken")
    list(training_loader(data, collate, sampler, num_workers=2))
    """
    ended = run_program(tmp_path, body)
    assert "InputError: " in ended.stderr.splitlines()[-1]
    assert "1.png: cannot be read as an image (not a known image format)" in ended.stderr.splitlines()[-1]
    assert ended.returncode == 1


def test_workers_outlive_stop_signals_to_their_process_group(tmp_path):
    body = """
    next(batches), next(batches)  # one of each worker
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: print("received", int(number), flush=True))
        command = ["sh", "-c", f"kill -{int(number)} -{os.getpgid(0)}"]  # as a scheduler, not as the parent
        subprocess.run(command, check=True, start_new_session=True)
    print("batches", 2 + len(list(batches)))
    """
    ended = run_program(tmp_path, body)
    received = [f"received {int(number)}" for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    assert ended.stdout.splitlines() == [*received, "batches 40"], ended.stderr
    assert ended.returncode == 0
