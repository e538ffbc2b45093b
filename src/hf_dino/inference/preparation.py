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
from transformers.models.resnet.modeling_resnet import (
    ResNetBasicLayer,
    ResNetBottleNeckLayer,
    ResNetShortCut,
    ResNetStage,
)

from ..backbone_dino_detr import DinoDetrBackbone, DinoDetrFeatureLevels
from ..deformable_attention_dino_detr import DinoDetrMultiscaleDeformableAttention
from ..modeling_dino_detr import DinoDetrEncoderLayer, DinoDetrForObjectDetection, DinoDetrMLP


TOKENS_PER_CHUNK = 2048  # whose hidden states in an MLP, 16 MiB of 2,048 each, mostly stay in the cache of a CPU
BLOCK = ("convolution", "normalization", "activation")  # names in transformers' ResNet and its like
MAX_SIZES = 8  # of images, whose positions are kept: 19 MB each for 800 x 1066 pixels and d_model=256


def prepare_for_inference(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a DINO model that takes less time on a CPU and differs by rounding errors only.

    Logits and boxes are equal within 1e-5 in float32, unless two encoder tokens have scores that are equal but for
    rounding: these may be selected in another order.

    Batch norms are folded into the convolutions before them, whose weights are stored with the channels last; the last
    convolution of a ResNet's block adds to the shortcut in place; linear layers are computed as 1 x 1 convolutions,
    the encoder's MLPs in chunks of tokens; padding is not zeroed where there is none; and positions are kept for the
    last sizes of unpadded images. Hooks of the last modules inside a block are not called, and an output of a block
    that a hook keeps is overwritten.

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
    classes = dict(PREPARED)
    if has_fast_convolutions(model):
        classes |= CONVOLVED
        add_in_place(prepared.model.backbone.body)
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


def add_in_place(body: nn.Module) -> None:
    """Have the last convolution of a folded ResNet's blocks add to the shortcut, where nothing else reads that."""
    stages: list[Any] = [stage for stage in body.modules() if type(stage) is ResNetStage]
    for stage in stages:
        before = None  # the first block may have the output of another stage as its shortcut
        for block in stage.layers:
            kind = type(block)
            if kind in ADDED_IN_PLACE and _can_add_in_place(block, before):
                block.__class__ = ADDED_IN_PLACE[kind]
            before = kind


def _can_add_in_place(block: Any, before: type[nn.Module] | None) -> bool:
    """Return whether a block ends in a folded convolution and a ReLU, and its shortcut in a tensor of its own."""
    last = block.layer[-1]
    is_folded = type(last.convolution) is nn.Conv2d and type(last.normalization) is nn.Identity
    owns_shortcut = type(block.shortcut) is ResNetShortCut or before in ADDED_IN_PLACE
    return is_folded and isinstance(block.activation, nn.ReLU) and owns_shortcut


class AddedInPlace(nn.Module):
    """A block of a ResNet that computes `relu(shortcut(x) + layer(x))` without a new tensor for the sum.

    PyTorch has no public operator that adds a convolution to a tensor; this one is what `torch.compile` uses.
    """

    layer: nn.Sequential
    shortcut: nn.Module

    def forward(self, hidden_state: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return super().forward(hidden_state)
        residual = self.shortcut(hidden_state)
        last: Any = self.layer[-1].convolution
        total = torch.ops.mkldnn._convolution_pointwise_.binary(
            residual,
            self.layer[:-1](hidden_state),
            last.weight,
            last.bias,
            last.padding,
            last.stride,
            last.dilation,
            last.groups,
            "add",
            1.0,
            None,  # oneDNN's ReLU would turn NaN into 0
            [],
            None,
        )
        return total.relu_()


class PreparedBasicLayer(AddedInPlace, ResNetBasicLayer):
    """Two 3 x 3 convolutions and a shortcut."""


class PreparedBottleNeckLayer(AddedInPlace, ResNetBottleNeckLayer):
    """A 3 x 3 convolution between two of 1 x 1, and a shortcut."""


ADDED_IN_PLACE: dict[type[nn.Module], type[nn.Module]] = {
    prepared.__bases__[1]: prepared for prepared in (PreparedBasicLayer, PreparedBottleNeckLayer)
}


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


class PreparedEncoderLayer(DinoDetrEncoderLayer):
    """Applies the MLP to a chunk of tokens before the next, in place, so that its hidden states stay in the cache."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: torch.Tensor,
        reference_points: torch.Tensor,
        levels: DinoDetrFeatureLevels,
    ) -> torch.Tensor:
        if torch.is_grad_enabled() or type(self.mlp) is not DinoDetrMLP:
            return super().forward(hidden_states, position_embeddings, reference_points, levels)
        attended, _ = self.self_attn(hidden_states, position_embeddings, hidden_states, reference_points, levels)
        hidden_states = self.self_attn_layer_norm(hidden_states + attended)
        for tokens in hidden_states.view(-1, hidden_states.shape[-1]).split(TOKENS_PER_CHUNK):
            tokens += self.mlp(tokens)
        return self.final_layer_norm(hidden_states)


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
        PreparedEncoderLayer,
        PreparedDeformableAttention,
        PreparedForObjectDetection,
    )
    for base in prepared.__bases__
}
CONVOLVED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: PreparedLinear}
