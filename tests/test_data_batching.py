"""Who sees which picture when: training order, equal sizes for evaluation."""

from itertools import chain

import pytest

from hf_dino.data import InputError, SameSizeBatchSampler, TrainingBatchSampler, steps_per_epoch


def batches(length, step_size, **options):
    return list(TrainingBatchSampler(length, step_size, **{"seed": 0, "epoch": 0, **options}))


def test_an_epoch_shows_every_picture():
    epoch = batches(10, 4)
    assert [len(batch) for batch in epoch] == [4, 4, 4]
    assert len(epoch) == steps_per_epoch(10, 4)
    flat = list(chain(*epoch))
    assert sorted(flat[:10]) == list(range(10))
    assert flat[10:] == flat[:2], "the last step is filled up from the beginning"


def test_order_depends_on_seed_and_epoch_only():
    assert batches(10, 4) == batches(10, 4)
    assert batches(10, 4) != batches(10, 4, epoch=1)
    assert batches(10, 4) != batches(10, 4, seed=1)


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_step_sees_the_same_pictures_however_it_is_shared_out(world_size, accumulation):
    whole = batches(11, 4)
    shares = [
        batches(11, 4, rank=rank, world_size=world_size, accumulation=accumulation) for rank in range(world_size)
    ]
    for step, pictures in enumerate(whole):
        parts = [share[step * accumulation : (step + 1) * accumulation] for share in shares]
        assert sorted(chain(*chain(*parts))) == sorted(pictures)


def test_resuming_leaves_out_the_steps_that_are_done():
    assert batches(10, 4, first_step=2, accumulation=2) == batches(10, 4, accumulation=2)[4:]


def test_fewer_pictures_than_a_step_needs():
    (batch,) = batches(3, 8)
    assert len(batch) == 8
    assert set(batch) == {0, 1, 2}


def test_uneven_shares_are_an_error():
    with pytest.raises(
        InputError, match=r"a batch of 6 .* 2 processes x 2 accumulated batches; choose a multiple of 4"
    ):
        batches(10, 6, world_size=2, accumulation=2)


def test_evaluation_batches_have_one_size_and_cover_everything_once():
    shapes = [(4, 6), (6, 4), (4, 6), (8, 8), (4, 6), (6, 4)]
    for world_size in (1, 2, 5):
        shares = [list(SameSizeBatchSampler(shapes, 2, rank, world_size)) for rank in range(world_size)]
        everything = [batch for share in shares for batch in share]
        assert sorted(chain(*everything)) == list(range(6))
        assert all(len({shapes[index] for index in batch}) == 1 and len(batch) <= 2 for batch in everything)
    assert next(iter(SameSizeBatchSampler(shapes, 2))) == [3], "the largest first"
    assert list(SameSizeBatchSampler([], 2)) == []
