"""Verify that an exported file computes what its model computes, and that it is the file that was verified."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..exported import QuerySelectionMode, open_session
from ..registration import DinoDetrForObjectDetection
from ..utils.errors import BrokenInputError
from .formats import format_of
from .program import digest, model_digest


MAX_BOX_DIFFERENCE, MAX_LOGIT_DIFFERENCE = 1e-5, 2e-4
MAX_TIE_DIFFERENCE = 1e-4
"""Scores of encoder tokens that are closer than this may change their ranks."""

SHAPES = ((1, 320, 352), (3, 320, 352), (2, 224, 416), (1, 480, 333), (2, 400, 256))
"""Batches that a file is verified on: number of images, height, width in pixels."""


class DifferenceError(BrokenInputError):
    """Raised if a file does not compute what its model computes."""


@dataclass(frozen=True)
class Comparison:
    """Largest differences of a file from its model on one batch.

    Args:
        shape (`tuple[int, int, int]`): Number of images, height, width.
        boxes, logits (`float`): Of the raw outputs of all queries, after the ranks of query selection are aligned.
        ranks (`int`): Number of queries whose encoder token had another rank.
        ties (`float`): Largest difference between the scores of two tokens that changed places.
    """

    shape: tuple[int, int, int]
    boxes: float
    logits: float
    ranks: int
    ties: float

    @property
    def is_equal(self) -> bool:
        """Return whether all differences, which may be NaN, are within their bounds."""
        return (
            self.boxes <= MAX_BOX_DIFFERENCE
            and self.logits <= MAX_LOGIT_DIFFERENCE
            and self.ties <= MAX_TIE_DIFFERENCE
        )

    def __str__(self) -> str:
        """Return the differences in words."""
        return (
            f"boxes by {self.boxes:.1e} (at most {MAX_BOX_DIFFERENCE:.0e}), logits by {self.logits:.1e} (at most "
            f"{MAX_LOGIT_DIFFERENCE:.0e}), scores of tokens in changed places by {self.ties:.1e} (at most "
            f"{MAX_TIE_DIFFERENCE:.0e})"
        )


def verify(path: Path, model: DinoDetrForObjectDetection) -> list[Comparison]:
    """Compare an exported file with its model on several batches of padded images of noise.

    Mixed query selection gives each learned content query to a rank. Where the scores of two encoder tokens tie, a
    right file may swap their ranks, and with them all that follows. So the model is made to select the tokens of the
    file, by which raw outputs agree, and tokens may differ only where their scores tie.

    Outputs do not show every weight: scaling a whole convolution in front of a group norm changes none of them. So the
    digests of the model's weights and of the file's contents must also be those that were stored at the export.

    A file of lower precision was verified in float32 before its precision was reduced, and judged by AP; of it, only
    the digests are compared.

    Args:
        path (`Path`): An exported file or directory.
        model (`DinoDetrForObjectDetection`): The model; it is compared on the CPU, in float32 and evaluation mode.

    Returns:
        `list[Comparison]`: The differences on each batch, all within their bounds.

    Raises:
        DifferenceError: If a difference exceeds its bound, or the weights of the file or of the model have changed.
    """
    model = copy.deepcopy(model).cpu().float().eval()
    session = open_session(path, with_selection=True)
    facts = session.facts
    if (facts["model_sha256"], facts["config"]["num_queries"]) != (model_digest(model), model.config.num_queries):
        raise DifferenceError(f"{path}: was exported from a model with other weights")
    comparisons = []
    for index, (batch_size, height, width) in enumerate(SHAPES if facts["precision"] == "float32" else ()):
        shape = batch_size, max(height, facts["least_size"]), max(width, facts["least_size"])
        comparison = compare(session.run, model, make_inputs(shape, seed=index))
        if not comparison.is_equal:
            size = " x ".join(map(str, shape))
            raise DifferenceError(f"the exported file differs from the model on {size} images: {comparison}")
        comparisons.append(comparison)
    if facts["content_sha256"] != _content_digest(path):
        raise DifferenceError(f"{path}: its weights were changed after the export")
    return comparisons


def _content_digest(path: Path) -> str:
    format = format_of(path)
    return digest(format.contents(format.load(path)))


def make_inputs(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images of noise and their masks; all but the first image are padded to the right and below."""
    batch_size, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(batch_size, height, width, dtype=torch.int64)
    for index in range(batch_size):
        mask[index, : height - height * index // 5, : width - width * index // 4] = 1
    return torch.randn(batch_size, 3, height, width, generator=generator) * mask[:, None], mask


@torch.no_grad()
def compare(
    run: Callable[..., list[Any]], model: DinoDetrForObjectDetection, inputs: tuple[torch.Tensor, torch.Tensor]
) -> Comparison:
    """Compare an exported model, which also returns the selected tokens, with its model."""
    logits, boxes, *selected = (torch.as_tensor(output) for output in run(*inputs))
    with QuerySelectionMode() as free:
        model(*inputs)
    with QuerySelectionMode(*(tokens.long() for tokens in selected)) as forced:
        expected = model(*inputs)
    ranks, ties = 0, 0.0
    for scores, own, theirs in zip(free.scores, free.selected, forced.selected, strict=True):
        ranks += int((own != theirs).sum())
        ties = max(ties, float((scores.gather(1, own) - scores.gather(1, theirs)).abs().max()))
        if any(len(set(row)) < len(row) for row in theirs.tolist()):
            ties = math.inf  # a token that is selected twice
    return Comparison(
        shape=(inputs[0].shape[0], inputs[0].shape[2], inputs[0].shape[3]),
        boxes=float((boxes - expected.pred_boxes).abs().max()),
        logits=float((logits - expected.logits).abs().max()),
        ranks=ranks,
        ties=ties,
    )
