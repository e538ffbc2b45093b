"""A custom augmentation: `--augmentation examples/augmentations.py:microscope`."""

from collections.abc import Mapping

from torchvision.transforms import v2

from hf_dino.data import Augmentation, make_augmentation


def microscope(size: Mapping[str, int]) -> Augmentation:
    """Augment images without an up and a down: the official augmentation, other colors, and vertical flips.

    Args:
        size (`Mapping[str, int]`): As for `hf_dino.data.make_augmentation`.
    """
    photometric, upside_down = make_augmentation("photometric", size), v2.RandomVerticalFlip(0.5)
    return Augmentation(v2.Compose([upside_down, photometric.transform]), photometric.resizes)
