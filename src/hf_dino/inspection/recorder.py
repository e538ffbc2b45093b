"""Record one forward pass by hooks: the tokens that become queries, their boxes and the points that they sample.

The model is not changed. Only the class scores of the decoder layers and a top-k are computed a second time.
Of DETR, Conditional DETR and DAB-DETR, the cross-attention of a decoder layer is recorded instead.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from torchvision.ops import box_convert, box_iou
from transformers import BaseImageProcessor, PreTrainedModel

from ..deformable_attention_dino_detr import compute_sampling_locations
from ..query_selection_dino_detr import gen_encoder_output_proposals
from ..reference_points_dino_detr import cell_centers
from ..registration import DinoDetrConfig, DinoDetrForObjectDetection


Calls = list[tuple[tuple[Any, ...], Any]]  # arguments and output of each call of a module


@dataclass(frozen=True)
class Inspection:
    """What one forward pass did with one image. Points are (x, y), boxes are x0, y0, x1, y1, both in its pixels.

    Query `i` starts from token `i` of the encoder. With static query selection no tokens are selected: their arrays
    have length 0, and the first reference boxes are learned.

    Attributes:
        image_size (`tuple[int, int]`): Width and height of the image in pixels.
        token_points (`np.ndarray` of shape `(num_queries, 2)`): Centers of the selected tokens' cells.
        token_levels (`np.ndarray` of shape `(num_queries,)`): Their feature levels, from 0, the finest.
        token_scores (`np.ndarray` of shape `(num_queries,)`): The scores that they were selected by, descending.
        token_labels (`np.ndarray` of shape `(num_queries,)`): Their classes with the highest score.
        proposals (`np.ndarray` of shape `(num_queries, 4)`): Their boxes before the encoder's box head moves them.
        reference_boxes (`np.ndarray` of shape `(decoder_layers + 1, num_queries, 4)`):
            At `[layer]` the boxes that a layer looks around, at `[layer + 1]` those that it passes on.
        boxes (`np.ndarray` of shape `(decoder_layers, num_queries, 4)`): Boxes that each layer predicts; the last are
            the model's.
        scores (`np.ndarray` of shape `(decoder_layers, num_queries, num_labels)`): Class scores of each layer.
        sampling_points (`np.ndarray` of shape `(decoder_layers, num_queries, num_heads, num_levels, num_points, 2)`):
            Where each layer reads the feature levels.
        attention_weights (`np.ndarray` of shape `(decoder_layers, num_queries, num_heads, num_levels, num_points)`):
            Their weights, which sum to 1 over the levels and points of a head.
        cell_sizes (`np.ndarray` of shape `(num_levels, 2)`): Width and height of a cell of each level.
    """

    image_size: tuple[int, int]
    token_points: np.ndarray
    token_levels: np.ndarray
    token_scores: np.ndarray
    token_labels: np.ndarray
    proposals: np.ndarray
    reference_boxes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    sampling_points: np.ndarray
    attention_weights: np.ndarray
    cell_sizes: np.ndarray

    def find_query(self, box: Any, label: int, score: float) -> int:
        """Return the query whose final box and score of a class are those of a detection, or closest to them."""
        candidates = np.column_stack([self.boxes[-1], self.scores[-1, :, label]])
        return int(np.abs(candidates - [*box, score]).sum(axis=1).argmin())

    def keep_queries(self, queries: list[int]) -> "Inspection":
        """Return the decoder's part for some queries only, in this order; all selected tokens are kept."""
        names = ("reference_boxes", "boxes", "scores", "sampling_points", "attention_weights")
        return replace(self, **{name: getattr(self, name)[:, queries] for name in names})


class Recorder:
    """Record what a model does with an image, in a `with` block in which it is called once.

    Args:
        model (`DinoDetrForObjectDetection`): In evaluation mode, on any device.

    Raises:
        ValueError: If it is another model.

    Example:

    ```python
    with Recorder(model) as recorder:
        detections = detect_objects(model, processor, image, threshold=0.3)
    inspection = recorder.inspection(image.size)
    ```
    """

    def __init__(self, model: DinoDetrForObjectDetection):
        if model.config.model_type != DinoDetrConfig.model_type:
            raise ValueError(
                f"a model of type {model.config.model_type!r} cannot be recorded, only {DinoDetrConfig.model_type!r}; "
                f"inspect_positional_attention takes {', '.join(_CROSS_ATTENTIONS)}"
            )
        self.model = model
        self.calls: dict[str, Calls] = {}
        self._hooks = ExitStack()

    def __enter__(self) -> "Recorder":
        core: Any = self.model.model
        attentions = [layer.encoder_attn for layer in core.decoder.layers]
        self._listen("backbone", [core.backbone])
        self._listen("token scores", core.query_selection.class_specific_layers())
        self._listen("sampling offsets", [attention.sampling_offsets for attention in attentions])
        self._listen("attention", attentions)
        self._listen("model", [core])
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.close()

    def _listen(self, name: str, modules: Sequence[nn.Module]) -> None:
        calls: Calls = []
        self.calls[name] = calls
        for module in modules:
            handle = module.register_forward_hook(lambda _, args, output: calls.append((args, output)))
            self._hooks.enter_context(handle)

    @torch.inference_mode()
    def inspection(self, image_size: tuple[int, int]) -> Inspection:
        """Return what was recorded.

        Args:
            image_size (`tuple[int, int]`): Width and height in pixels of the image before it was resized.

        Raises:
            ValueError: If the model was not called once with one image.
        """
        num_images = [len(output.features) for _, output in self.calls["backbone"]]
        if num_images != [1]:
            raise ValueError(f"record one call of the model with one image, got calls with {num_images} images")
        (((_, mask), levels),), ((_, output),) = self.calls["backbone"], self.calls["model"]
        size = mask.new_tensor(image_size, dtype=torch.float32)
        padded_size = size * _padding_factor(mask[0])
        states = output.intermediate_hidden_states.to(self.model.dtype)
        references = torch.cat([output.init_reference_points, output.intermediate_reference_points[0]])
        fields = {
            **self._tokens(levels, size, padded_size, output.enc_outputs_class),
            "reference_boxes": _to_corners(references, size),
            "boxes": _to_corners(output.intermediate_boxes[0], size),
            "scores": self.model.predict_classes(states, range(states.shape[1]))[0].sigmoid(),
            "sampling_points": torch.cat(self._sampling_locations()) * padded_size,
            "attention_weights": torch.cat([weights for _, (_, weights) in self.calls["attention"]]),
            "cell_sizes": padded_size / levels.spatial_shapes.flip(-1),
        }
        return Inspection(image_size, **{name: _to_numpy(each) for name, each in fields.items()})

    def _sampling_locations(self) -> list[torch.Tensor]:
        """Return (x, y) of each layer as fractions of the padded image, as the operator computes them."""
        calls = zip(self.calls["sampling offsets"], self.calls["attention"])
        return [
            compute_sampling_locations(offsets.view(*weights.shape, 2), reference_points, levels.spatial_shapes)
            for (_, offsets), ((*_, reference_points, levels), (_, weights)) in calls
        ]

    def _tokens(
        self, levels: Any, size: torch.Tensor, padded_size: torch.Tensor, class_logits: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Return what is recorded of the selected tokens; sizes are (width, height) in pixels of the image."""
        none = size.new_zeros(0)
        proposals, _ = gen_encoder_output_proposals(levels)
        ranking = [logits[0].amax(dim=-1) for _, logits in self.calls["token scores"]]  # none if static
        tokens = torch.cat([none.long(), *(each.topk(self.model.config.num_queries).indices for each in ranking)])
        centers = [
            cell_centers(height, width, size.device) / size.new_tensor([width, height])
            for height, width in levels.spatial_shapes_list
        ]
        return {
            "token_points": torch.cat(centers)[tokens] * padded_size,
            "token_levels": torch.bucketize(tokens, levels.level_start_index, right=True) - 1,
            "token_scores": torch.cat([none, *ranking])[tokens].sigmoid(),
            "token_labels": none.long() if class_logits is None else class_logits[0].argmax(dim=-1),
            "proposals": _to_corners(proposals[0, tokens], size),
        }


def inspect_image(model: DinoDetrForObjectDetection, processor: BaseImageProcessor, image: Image.Image) -> Inspection:
    """Record what a model does with an image, in one forward pass.

    Args:
        model (`DinoDetrForObjectDetection`): In evaluation mode, on any device.
        processor (`BaseImageProcessor`): The model's image processor.
        image (`PIL.Image.Image`): The image.

    Example:

    ```python
    inspection = inspect_image(model, processor, image)
    best = inspection.scores[-1].max(axis=1).argmax()
    draw_sampling_points(image, inspection, best).save("looked.png")
    ```
    """
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    with torch.inference_mode(), Recorder(model) as recorder:
        model(**inputs)
    return recorder.inspection(image.size)


@dataclass(frozen=True)
class PositionalAttention:
    """Cross-attention of a decoder layer of DETR, Conditional DETR or DAB-DETR to the cells of one image's map.

    Points are (x, y), boxes are x0, y0, x1, y1, both in pixels of the image. Logits are infinitely negative in the
    padding; their sum is what the model applies its softmax to.

    Attributes:
        image_size (`tuple[int, int]`): Width and height of the image in pixels.
        extent (`np.ndarray` of shape `(2,)`): Width and height that the map covers; with padding, more than the image.
        positional_logits (`np.ndarray` of shape `(num_queries, num_heads, height, width)`):
            Products of the positional part of the query with that of the key.
        content_logits (`np.ndarray` of shape `(num_queries, num_heads, height, width)`):
            All other products; in DETR, also those of the position of one with the content of the other.
        anchors (`np.ndarray` of shape `(num_queries, 0, 2 or 4)`):
            Reference points of Conditional DETR; center, width and height of the boxes that the layer of DAB-DETR
            looks around; DETR has none.
        boxes (`np.ndarray` of shape `(num_queries, 4)`): Boxes that the model predicts.
        scores (`np.ndarray` of shape `(num_queries, num_labels)`): Its class scores.
    """

    image_size: tuple[int, int]
    extent: np.ndarray
    positional_logits: np.ndarray
    content_logits: np.ndarray
    anchors: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray

    @property
    def positional_weights(self) -> np.ndarray:
        """Attention weights of the position alone, `(num_queries, num_heads, height, width)`."""
        return _softmax(self.positional_logits)

    @property
    def attention_weights(self) -> np.ndarray:
        """Attention weights of the model, `(num_queries, num_heads, height, width)`."""
        return _softmax(self.positional_logits + self.content_logits)

    def find_query(self, box: Any) -> int:
        """Return the query that detects what is in a box: its best score times its overlap with it is the highest."""
        overlap = box_iou(torch.tensor(self.boxes), torch.tensor([[*box]], dtype=torch.float32))[:, 0]
        return int((overlap.numpy() * self.scores.max(axis=1)).argmax())


Parts = tuple[torch.Tensor, torch.Tensor]  # logits of position and of content, (heads, queries, cells), not scaled


def _products(query: torch.Tensor, key: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Return `(heads, queries, cells)` for a query `(1, queries, dim)` and a key `(1, cells, dim)`."""
    heads = [each[0].unflatten(-1, (num_heads, -1)).transpose(0, 1) for each in (query, key)]
    return heads[0] @ heads[1].mT


def _added_parts(attention: Any, num_heads: int, inputs: dict[str, torch.Tensor]) -> Parts:
    """Split the logits of DETR, which adds positions to contents before it projects them."""
    query_position, key_position = inputs["position_embeddings"], inputs["encoder_position_embeddings"]
    query = attention.q_proj(inputs["hidden_states"] + query_position)
    key = attention.k_proj(inputs["key_value_states"] + key_position)
    positional = _products(
        nn.functional.linear(query_position, attention.q_proj.weight),
        nn.functional.linear(key_position, attention.k_proj.weight),
        num_heads,
    )
    return positional, _products(query, key, num_heads) - positional


def _concatenated_parts(
    attention: Any, num_heads: int, inputs: dict[str, torch.Tensor], query: str, key: str, key_position: str
) -> Parts:
    """Split the logits of Conditional DETR or DAB-DETR, which concatenate positions to contents, given their names."""
    content_query = getattr(attention, f"{query}_content_proj")(inputs["hidden_states"])
    content_key = getattr(attention, f"{key}_content_proj")(inputs["encoder_hidden_states"])
    positional_query = getattr(attention, f"{query}_pos_sine_proj")(inputs["query_sine_embed"])
    positional_key = getattr(attention, f"{key}_pos_proj")(inputs[key_position])
    added_position = getattr(attention, f"{query}_pos_proj")  # the first layer also adds positions to contents
    if added_position is not None:
        content_query = content_query + added_position(inputs["query_position_embeddings"])
        content_key = content_key + positional_key
    positional = _products(positional_query, positional_key, num_heads)
    return positional, _products(content_query, content_key, num_heads)


@dataclass(frozen=True)
class _CrossAttention:
    """Where a type of model has its cross-attention, and how its logits are split."""

    name: str  # in a decoder layer
    split: Callable[..., Parts]
    scaling: str = "scaling"  # in the cross-attention
    scores: Callable[[torch.Tensor], torch.Tensor] = torch.sigmoid  # of class logits


_CROSS_ATTENTIONS = {
    "detr": _CrossAttention("encoder_attn", _added_parts, scores=lambda logits: logits.softmax(dim=-1)[..., :-1]),
    "conditional_detr": _CrossAttention(
        "encoder_attn", partial(_concatenated_parts, query="q", key="k", key_position="encoder_position_embeddings")
    ),
    "dab-detr": _CrossAttention(
        "cross_attn",
        partial(_concatenated_parts, query="cross_attn_query", key="cross_attn_key", key_position="object_queries"),
        scaling="cross_attn.scaling",
    ),
}  # by `config.model_type`


def inspect_positional_attention(
    model: Any, processor: BaseImageProcessor, image: Image.Image, layer: int = -1
) -> PositionalAttention:
    """Record where a decoder layer of DETR, Conditional DETR or DAB-DETR attends to, and where by position alone.

    Args:
        model (`PreTrainedModel`): `DetrForObjectDetection`, `ConditionalDetrForObjectDetection` or
            `DabDetrForObjectDetection` of transformers in evaluation mode, or a class derived from them.
        processor (`BaseImageProcessor`): The model's image processor.
        image (`PIL.Image.Image`): The image.
        layer (`int`, *optional*, defaults to -1): Index of the decoder layer; by default, the last.

    Raises:
        ValueError: If the model is of another type.

    Example:

    ```python
    attentions = {"DETR": inspect_positional_attention(detr, processor, image)}
    draw_positional_attention(image, attentions, [box]).save("attention.png")
    ```
    """
    kind = _cross_attention_of(model)
    inputs = processor(images=image, return_tensors="pt").to(model.device)
    attention = getattr(model.model.decoder.layers[layer], kind.name)
    with torch.inference_mode():
        calls = _record_call(model, attention, inputs)
        logits = torch.stack(kind.split(attention, model.config.decoder_attention_heads, calls))
    mask, shape, boxes = inputs["pixel_mask"][0], calls["map"].shape[-2:], calls["outputs"].pred_boxes[0]
    is_padding = nn.functional.interpolate(mask[None, None].float(), shape)[0, 0] == 0  # as the models do
    logits = logits.transpose(1, 2).unflatten(-1, shape) * attrgetter(kind.scaling)(attention)
    logits = logits.masked_fill(is_padding, -torch.inf)
    # of Conditional DETR (queries, 1, 2), the same for all layers; of DAB-DETR (layers, 1, queries, 4)
    anchors = getattr(calls["decoder"], "reference_points", boxes[:, None, :0]).squeeze(1)
    anchors = anchors.expand(len(model.model.decoder.layers), *anchors.shape[-2:])[layer]
    size = boxes.new_tensor(image.size)
    fields = {
        "extent": size * _padding_factor(mask.bool()),
        "positional_logits": logits[0],
        "content_logits": logits[1],
        "anchors": anchors * size.repeat(anchors.shape[-1] // 2),
        "boxes": _to_corners(boxes, size),
        "scores": kind.scores(calls["outputs"].logits[0]),
    }
    return PositionalAttention(image.size, **{name: _to_numpy(each) for name, each in fields.items()})


def _cross_attention_of(model: PreTrainedModel) -> _CrossAttention:
    types = [getattr(base, "model_type", "") for base in type(model.config).__mro__]
    kinds = [_CROSS_ATTENTIONS[each] for each in types if each in _CROSS_ATTENTIONS]
    if not kinds:
        raise ValueError(f"model of type {types[0]!r}: positional attention is that of {', '.join(_CROSS_ATTENTIONS)}")
    return kinds[0]


def _record_call(model: Any, attention: nn.Module, inputs: Any) -> dict[str, Any]:
    """Run a model; return the arguments of a cross-attention, and the outputs of the decoder and of other parts."""
    calls: dict[str, Any] = {}
    with ExitStack() as hooks:
        for handle in (
            attention.register_forward_pre_hook(lambda _, args, named: calls.update(named), with_kwargs=True),
            model.model.decoder.register_forward_hook(lambda _, args, output: calls.update(decoder=output)),
            model.model.input_projection.register_forward_hook(lambda _, args, output: calls.update(map=output)),
        ):
            hooks.enter_context(handle)
        outputs = model(pixel_values=inputs["pixel_values"], pixel_mask=inputs["pixel_mask"])
    return {**calls, "outputs": outputs}


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Return the softmax over the last two axes."""
    odds = np.exp(logits - logits.max(axis=(-2, -1), keepdims=True))
    return odds / odds.sum(axis=(-2, -1), keepdims=True)


def _padding_factor(mask: torch.Tensor) -> torch.Tensor:
    """Return by what padding multiplied the (width, height) of an image, given its mask `(height, width)`."""
    height, width = mask.shape
    unpadded = torch.stack([mask.any(dim=0).sum(), mask.any(dim=1).sum()])
    return mask.new_tensor([width, height], dtype=torch.float32) / unpadded


def _to_corners(boxes: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """Turn center x, center y, width, height, fractions of an image of `size`, into corners in pixels."""
    return box_convert(boxes, "cxcywh", "xyxy") * size.repeat(2)


def _to_numpy(values: torch.Tensor) -> np.ndarray:
    return (values.float() if values.is_floating_point() else values).cpu().numpy()
