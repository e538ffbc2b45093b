"""Collectives give the same types on one process as on several."""

from accelerate import Accelerator

from hf_dino.utils.distributed import all_reduce_max


def test_maximum_of_a_bool_is_a_number():
    maximum = all_reduce_max(Accelerator(cpu=True), True)
    assert (maximum, type(maximum)) == (1, int)
