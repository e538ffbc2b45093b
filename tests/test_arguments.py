"""Sizes of images, numbers and fields as the command lines take them."""

import argparse

import pytest

from hf_dino.data import InputError
from hf_dino.utils.arguments import at_least, number_between, parse_config_override, parse_image_size


def test_image_sizes():
    assert parse_image_size("800") == {"shortest_edge": 800, "longest_edge": 1333}
    assert parse_image_size("480 600") == parse_image_size("480,600") == {"shortest_edge": 480, "longest_edge": 600}
    assert parse_image_size("192x256") == {"height": 192, "width": 256}


@pytest.mark.parametrize("size", ["axb", "8x", "8x8x8", "big", "800 1333 2000", "8x8 9"])
def test_what_is_no_image_size(size):
    with pytest.raises(InputError, match=f"image_size {size}: expected SHORTEST, SHORTEST,LONGEST or HEIGHTxWIDTH"):
        parse_image_size(size)


@pytest.mark.parametrize("size", ["0", "-5", "800 600", "0x8", "8x-8"])
def test_impossible_image_sizes(size):
    with pytest.raises(InputError, match=f"image_size {size}: must be positive, and LONGEST at least SHORTEST"):
        parse_image_size(size)


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (at_least(1), "x", "expected a whole number, got 'x'"),
        (at_least(1), "1.5", "expected a whole number, got '1.5'"),
        (number_between(0), "x", "expected a number, got 'x'"),
        (parse_config_override, "num_querys=1", r"has no field 'num_querys'; did you mean num_queries\?"),
        (parse_config_override, "xyz=1", "has no field 'xyz'; python -m pydoc hf_dino.DinoDetrConfig lists them"),
    ],
)
def test_what_cannot_be_read(read, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        read(text)
