"""Sizes of images and fields of the configuration as the command line takes them."""

import pytest

from hf_dino.data import InputError
from hf_dino.hub import check_config_field, parse_image_size


def test_image_sizes():
    assert parse_image_size(["800"]) == {"shortest_edge": 800, "longest_edge": 1333}
    assert parse_image_size(["480", "600"]) == {"shortest_edge": 480, "longest_edge": 600}
    assert parse_image_size(["192x256"]) == {"height": 192, "width": 256}


@pytest.mark.parametrize("size", ["axb", "8x", "8x8x8", "big", "800 1333 2000", "8x8 9"])
def test_what_is_no_image_size(size):
    with pytest.raises(InputError, match=f"--image_size {size}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH"):
        parse_image_size(size.split())


@pytest.mark.parametrize("size", ["0", "-5", "800 600", "0x8", "8x-8"])
def test_impossible_image_sizes(size):
    with pytest.raises(InputError, match=f"--image_size {size}: must be positive, and LONGEST not less than SHORTEST"):
        parse_image_size(size.split())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("num_querys", r"has no field 'num_querys'; did you mean num_queries\?"),
        *((name, f"^{name} cannot be set: the classes are those") for name in ("id2label", "label2id", "num_labels")),
        ("xyz", "has no field 'xyz'; python -m pydoc hf_dino.DinoDetrConfig lists them"),
    ],
)
def test_fields_that_cannot_be_set(name, message):
    with pytest.raises(InputError, match=message):
        check_config_field(name)
