"""Prepare a DINO model for inference on a CPU: the same detections in less time.

Measured and left out, because it takes as long or longer on a CPU: one matrix product for the value projections of all
decoder layers, for sampling offsets and attention weights, or for queries and keys of self-attention.
"""

import copy
import math
from collections.abc import Callable
from itertools import chain
from typing import Any, NoReturn

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from transformers import PreTrainedModel

from ..backbone_dino_detr import DinoDetrBackbone, DinoDetrFeatureLevels
from ..deformable_attention_dino_detr import DinoDetrMultiscaleDeformableAttention
from ..modeling_dino_detr import DinoDetrForObjectDetection, DinoDetrMLP


TOKENS_PER_CHUNK = 2048  # whose hidden states in an MLP, 16 MiB of 2,048 each, mostly stay in the cache of a CPU
BLOCK = ("convolution", "normalization", "activation")  # names in transformers' ResNet and its like
MAX_SIZES = 8  # of images, whose positions are kept: 19 MB each for 800 x 1066 pixels and d_model=256


def prepare_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a DINO model that takes less time on a CPU and differs by rounding errors only.

    Logits and boxes are equal within 1e-5 in float32, unless two encoder tokens have scores that are equal but for
    rounding: these may be selected in another order.

    Batch norms are folded into the convolutions before them, whose weights are stored with the channels last; linear
    layers are computed as 1 x 1 convolutions, MLPs in chunks of tokens; padding is not zeroed where there is none; and
    positions are kept for the last sizes of unpadded images.

    The model itself stays as it is. The copy shares all weights with it but those of the folded convolutions, so do
    not train either while both are in use. It can be neither trained, saved, moved nor converted.

    Args:
        model (`PreTrainedModel`): In either mode; the copy is in evaluation mode.

    Returns:
        The copy, or the model itself where there is nothing to gain: it is not on a CPU, not in float32 or float64, or
        not a `DinoDetrForObjectDetection`.

    Example:

    ```python
    model, processor = load_model_and_processor("runs/mine")
    detector = Detector(prepare_for_inference(model), processor)
    detect = pipeline("object-detection", model=prepare_for_inference(model), image_processor=processor)
    ```
    """
    if type(model) is not DinoDetrForObjectDetection or not _is_plain(model):
        return model
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    prepared = copy.deepcopy(model, shared).eval()
    fold_batch_norms(prepared.model.backbone.body)
    classes = PREPARED | (CONVOLVED if has_fast_convolutions(model) else {})
    for module in prepared.modules():
        module.__class__ = classes.get(type(module), type(module))
    return prepared


def _is_plain(model: nn.Module) -> bool:
    kinds = {(weight.device.type, weight.dtype) for weight in model.parameters()}
    return kinds in ({("cpu", torch.float32)}, {("cpu", torch.float64)})


def has_fast_convolutions(model: PreTrainedModel) -> bool:
    """Return whether oneDNN computes the convolutions of a model; it has none in float64."""
    return torch.backends.mkldnn.is_available() and model.dtype == torch.float32


def fold_batch_norms(body: nn.Module) -> None:
    """Replace the convolutions of transformers' ResNet and its like by ones that include the batch norm after them.

    A ReLU after a batch norm, or after the sum with a shortcut, overwrites its input, which nothing else reads.
    """
    for block in body.modules():
        convolution, norm, activation = (getattr(block, name, None) for name in BLOCK)
        if isinstance(activation, nn.ReLU) and (type(norm) is nn.BatchNorm2d or hasattr(block, "shortcut")):
            activation.inplace = True
        if type(convolution) is nn.Conv2d and type(norm) is nn.BatchNorm2d:
            folded = fuse_conv_bn_eval(convolution, norm).requires_grad_(False)
            block.convolution, block.normalization = folded.to(memory_format=torch.channels_last), nn.Identity()


class UnpaddedFeatureLevels(DinoDetrFeatureLevels):
    """Levels of a batch without padding."""


class PreparedBackbone(DinoDetrBackbone):
    """Keeps what does not depend on the pixels of unpadded images, for one image of each of the last sizes."""

    _known: dict[Any, DinoDetrFeatureLevels]

    def make_levels(
        self, features: torch.Tensor, shapes: list[tuple[int, int]], pixel_mask: torch.Tensor
    ) -> DinoDetrFeatureLevels:
        if not pixel_mask.all():
            return super().make_levels(features, shapes, pixel_mask)
        known = self.__dict__.setdefault("_known", {})
        key = (*shapes, features.dtype, features.device)
        if (levels := known.get(key)) is None:
            with torch.inference_mode(False), torch.no_grad():  # so that they can also be used outside of it
                levels = super().make_levels(features.new_empty(1, 0, 0), shapes, torch.ones_like(pixel_mask[:1]))
            known[key] = levels
            for oldest in list(known)[:-MAX_SIZES]:  # another thread may have removed it
                known.pop(oldest, None)
        batch_size = len(features)
        return UnpaddedFeatureLevels._make(
            levels._replace(
                features=features,
                position_embeddings=levels.position_embeddings.expand(batch_size, -1, -1),
                mask=levels.mask.expand(batch_size, -1),
                valid_ratios=levels.valid_ratios.expand(batch_size, -1, -1),
            )
        )


class PreparedLinear(nn.Linear):
    """Is computed as a 1 x 1 convolution, by oneDNN: PyTorch has MKL compute float32 matrix products.

    MKL takes as long on some CPUs and longer on others.
    """

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        num_rows = inputs.shape[:-1].numel()
        num_images = math.gcd(num_rows, 16)
        if num_rows == 0 or (num_images < 16 and torch.get_num_threads() == 1):
            return super().forward(inputs)  # in one thread, PyTorch has MKL compute convolutions of fewer images, too
        images = inputs.reshape(num_images, num_rows // num_images, 1, self.in_features).permute(0, 3, 1, 2)
        outputs = nn.functional.conv2d(images, self.weight[..., None, None], self.bias)  # channels last, as its input
        return outputs.permute(0, 2, 3, 1).reshape(*inputs.shape[:-1], self.out_features)


class PreparedMLP(DinoDetrMLP):
    """Applies both layers to a chunk of tokens before the next, so that its hidden states stay in the cache."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        apply = super().forward
        chunks = hidden_states.flatten(0, 1).split(TOKENS_PER_CHUNK)
        return torch.cat([apply(chunk) for chunk in chunks]).view_as(hidden_states)


class PreparedDeformableAttention(DinoDetrMultiscaleDeformableAttention):
    """Zeroes no padding where there is none."""

    def project_values(self, memory: torch.Tensor, levels: DinoDetrFeatureLevels) -> torch.Tensor:
        if isinstance(levels, UnpaddedFeatureLevels):
            return self.value_proj(memory)
        return super().project_values(memory, levels)


class PreparedForObjectDetection(DinoDetrForObjectDetection):
    """Can be neither trained nor saved, and stays where it is."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "PreparedForObjectDetection":
        moved = fn(torch.empty(1, dtype=self.dtype))  # what `to`, `half`, `cuda` and their like would do
        if moved.device.type != "cpu" or moved.dtype != self.dtype:
            raise RuntimeError(
                "a prepared model can be neither moved nor converted; prepare the one that it was made from"
            )
        return super()._apply(fn, recurse)

    def train(self, mode: bool = True) -> "PreparedForObjectDetection":
        if mode:
            raise RuntimeError("a prepared model cannot be trained; train the model it was made from")
        return super().train(mode)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError("a prepared model cannot be saved; save the model it was made from")

    push_to_hub = save_pretrained  # would create a repository first


PreparedForObjectDetection.__name__ = DinoDetrForObjectDetection.__name__  # transformers' pipeline looks at it

PREPARED: dict[type[nn.Module], type[nn.Module]] = {
    base: prepared
    for prepared in (
        PreparedBackbone,
        PreparedMLP,
        PreparedDeformableAttention,
        PreparedForObjectDetection,
    )
    for base in prepared.__bases__
}
CONVOLVED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PreparedLinear}
