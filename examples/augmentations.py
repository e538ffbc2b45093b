"""An augmentation of one's own: `--augmentation examples/augmentations.py:microscope`."""

from collections.abc import Mapping

from torchvision.transforms import v2

from hf_dino.data import Augmentation, make_augmentation


def microscope(size: Mapping[str, int]) -> Augmentation:
    """Images that have no up and down: the original's augmentation and other colors, upside down half of the time.

    Args:
        size (`Mapping[str, int]`): As for `hf_dino.data.make_augmentation`.
    """
    photometric, upside_down = make_augmentation("photometric", size), v2.RandomVerticalFlip(0.5)
    return Augmentation(v2.Compose([upside_down, photometric.transform]), photometric.resizes)
