"""Draw how DINO and its ancestors work: sampling points, anchors, query selections, positional attention, denoising.

Each drawing shows what a model computed, in its own tensors or by its own functions; nothing is a sketch.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.ops import box_convert

from ..boxes_dino_detr import inverse_sigmoid
from ..configuration_dino_detr import DinoDetrConfig
from ..denoising_dino_detr import contrastive_box_noise, denoising_attention_mask, plain_box_noise
from ..modeling_dino_detr import DinoDetrForObjectDetection
from ..visualization import font_path
from .figures import INK, LEVEL_COLORS, MARGIN, Canvas, around, level_names, relative, view_of, with_legend
from .recorder import Inspection, PositionalAttention


WIDTH, FONT_SIZE, GAP, MAX_MAP = 1280, 20, 10, 150  # pixels: of a grid of panels, and of a map of attention
POSITIVE, NEGATIVE, QUIET = "#00798c", "#d1495b", "#6b7686"
# of heads and objects: neighbors differ in lightness too
COLORS = ("#d1495b", "#33415c", "#e09f1f", "#00798c", "#a05195", "#3b7a2a", "#5b8ff9", "#7a4b1d")
BOUND, BLOCKED = "#e09f1f", "#eceef1"
_KIND_COLORS = (POSITIVE, NEGATIVE, "#33415c")  # of positive, negative and matching queries
FULL_COLOR = 5  # times its mean: the least weight that is drawn in full color, so that an even map is pale
SCORE = 0.3  # of queries that are drawn as detections


def draw_sampling_heads(
    image: Image.Image, inspection: Inspection, query: int, layer: int = -1, *, close_up: bool = False
) -> Image.Image:
    """Draw where each attention head of a decoder layer samples for one query: a panel per level, a color per head.

    Lines lead from the center of the reference box to the points; larger dots have larger weights. Thin lines are the
    cells of the level.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        inspection (`Inspection`): What was recorded.
        query (`int`): Index of the query.
        layer (`int`, *optional*, defaults to -1): Index of the decoder layer; by default, the last.
        close_up (`bool`, *optional*, defaults to `False`): Show only what is around the query's boxes.

    Example:

    ```python
    inspection = inspect_image(model, processor, image)
    draw_sampling_heads(image, inspection, inspection.scores[-1].max(axis=1).argmax(), layer=0).save("heads.png")
    ```
    """
    part = around(inspection, query) if close_up else None
    points, weights = inspection.sampling_points[layer, query], inspection.attention_weights[layer, query]
    box, strength = inspection.reference_boxes[:-1][layer, query], np.sqrt(relative(weights))
    levels = level_names(inspection)
    edge = _panel_edge(_columns(len(levels)))
    panels = []
    for level, _, _ in levels:
        canvas = Canvas(image, inspection, part, edge)
        canvas.cells(inspection.cell_sizes[level])
        canvas.box(box, INK, 1.4)
        _draw_points(canvas, (box[:2] + box[2:]) / 2, points[:, level], strength[:, level])
        panels.append(canvas.drawn())
    shares = weights.sum(axis=(0, 2)) / weights.sum()
    titles = [f"{name}: {share:.0%} of the weight" for (_, _, name), share in zip(levels, shares)]
    caption = f"Sampling points of decoder layer {_number(layer, inspection)}; larger: higher weight"
    entries = [(INK, "reference box"), *((color, f"head {head + 1}") for head, color in _numbered(len(points)))]
    return with_legend(arrange(panels, titles, _columns(len(levels))), caption, entries, FONT_SIZE)


def _draw_points(canvas: Canvas, center: np.ndarray, points: np.ndarray, strength: np.ndarray) -> None:
    """Draw the points `(num_heads, num_points, 2)` of one level, over lines from the center to them."""
    for head, color in _numbered(len(points)):
        for point in points[head]:
            canvas.path(np.stack([center, point]), color, 1.0)
    for head, color in _numbered(len(points)):
        for point, size in zip(points[head], strength[head]):
            canvas.dot(point, 1 + 6 * size, color)


def draw_anchors(
    image: Image.Image, inspection: Inspection, *, threshold: float = SCORE, max_objects: int = 8
) -> Image.Image:
    """Draw the anchors of detected objects before the decoder and after each layer: a panel each, a color per object.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        inspection (`Inspection`): What was recorded.
        threshold (`float`, *optional*, defaults to 0.3): Least score of a detected object; the best is always drawn.
        max_objects (`int`, *optional*, defaults to 8): How many of the best are drawn.

    Example:

    ```python
    draw_anchors(image, inspect_image(model, processor, image)).save("anchors.png")
    ```
    """
    queries = best_queries(inspection, threshold, max_objects)
    boxes = np.concatenate([inspection.reference_boxes[:1, queries], inspection.boxes[:, queries]])
    centers, edge = (boxes[..., :2] + boxes[..., 2:]) / 2, _panel_edge(_columns(len(boxes)))
    canvases = [Canvas(image, inspection, edge=edge) for _ in boxes]
    for step, canvas in enumerate(canvases):
        for index, color in _numbered(len(queries)):
            canvas.box(boxes[0, index], QUIET, 0.9)
            canvas.box(boxes[step, index], color, 1.2)
            canvas.path(centers[: step + 1, index], color, 0.8)
            canvas.dot(centers[step, index], 3, color)
    panels = [canvas.drawn() for canvas in canvases]
    labels = inspection.scores[-1, queries].argmax(axis=1)
    scores = [each[queries, labels].mean() for each in inspection.scores]
    titles = ["anchors", *(f"layer {layer}, mean score {score:.2f}" for layer, score in enumerate(scores, start=1))]
    caption = f"Boxes of the best queries ({len(queries)}), a color each; in gray their anchors"
    return with_legend(arrange(panels, titles, _columns(len(panels))), caption, [], FONT_SIZE)


def best_queries(inspection: Inspection, threshold: float, limit: int) -> np.ndarray:
    """Return the queries with the highest scores, descending: those of at least a threshold, but at least one."""
    scores = inspection.scores[-1].max(axis=1)
    best = np.argsort(-scores, kind="stable")[:limit]
    return best[: max(1, (scores[best] >= threshold).sum())]


def draw_query_selections(
    image: Image.Image, inspections: Mapping[str, Inspection], *, threshold: float = SCORE, max_objects: int = 8
) -> Image.Image:
    """Draw the initial anchors of several models beside each other, such as one for each query selection.

    A dot is the center of an anchor: colored by the level of its token or, if it is learned, gray. Boxes are the
    anchors of the queries that detect objects in the end.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        inspections (`dict[str, Inspection]`): What was recorded, by title.
        threshold (`float`, *optional*, defaults to 0.3): Least score of a detected object; the best is always drawn.
        max_objects (`int`, *optional*, defaults to 8): How many of the best are drawn.

    Example:

    ```python
    inspections = {name: inspect_image(model, processor, image) for name, model in models.items()}
    draw_query_selections(image, inspections).save("selections.png")
    ```
    """
    panels, edge = [], _panel_edge(max(2, len(inspections)))
    for inspection in inspections.values():
        canvas, anchors = Canvas(image, inspection, edge=edge), inspection.reference_boxes[0]
        colors = [LEVEL_COLORS[level % len(LEVEL_COLORS)] for level in inspection.token_levels]
        colors += [QUIET] * (len(anchors) - len(colors))
        for box, color in reversed(list(zip(anchors, colors))):
            canvas.dot((box[:2] + box[2:]) / 2, 3, color)
        for query in best_queries(inspection, threshold, max_objects):
            canvas.box(anchors[query], colors[query], 0.9)
        panels.append(canvas.drawn())
    names = {f"token of {name}": color for each in inspections.values() for _, color, name in level_names(each)}
    entries = [(color, name) for name, color in names.items()]
    entries += [(QUIET, "learned")] * any(not len(each.token_levels) for each in inspections.values())
    caption = "Initial anchors: centers of all, boxes of the queries with the best final scores"
    return with_legend(arrange(panels, list(inspections), len(panels)), caption, entries, FONT_SIZE)


def draw_positional_attention(
    image: Image.Image,
    attentions: Mapping[str, PositionalAttention],
    boxes: Sequence[Any],
    *,
    max_heads: int = 8,
) -> Image.Image:
    """Draw the positional attention of DETR, Conditional DETR and DAB-DETR beside each other: a row per query.

    A column is an attention head, the last one the mean over all heads of the whole attention, with content. A dot is
    the reference point, a box around it the anchor, and a thin box the prediction.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        attentions (`dict[str, PositionalAttention]`): What was recorded, by the name of the model.
        boxes (`list`): Boxes of objects, x0, y0, x1, y1 in pixels; of each model, the query that detects one is drawn.
        max_heads (`int`, *optional*, defaults to 8): How many heads are drawn.

    Example:

    ```python
    models = {"DETR": detr, "Conditional DETR": conditional_detr, "DAB-DETR": dab_detr}
    attentions = {name: inspect_positional_attention(each, processor, image) for name, each in models.items()}
    draw_positional_attention(image, attentions, [[40, 30, 160, 110]]).save("attention.png")
    ```
    """
    heads = min([max_heads, *(each.positional_logits.shape[1] for each in attentions.values())])
    edge = min(_panel_edge(heads + 1), MAX_MAP)
    panels, rows = [], []
    for name, attention in attentions.items():
        for number, box in enumerate(boxes, start=1):
            query = attention.find_query(box)
            maps = [*attention.positional_weights[query, :heads], attention.attention_weights[query].mean(axis=0)]
            panels += [_draw_attention(image, attention, query, each, edge) for each in maps]
            rows.append(f"{name}, object {number}")
    titles = [*(f"head {head + 1}" for head in range(heads)), "with content"]
    caption = "Cross-attention by position alone, each head by its own highest weight; last column: mean, with content"
    entries = [(INK, "reference point, anchor"), (POSITIVE, "predicted box")]
    return with_legend(arrange(panels, titles, heads + 1, rows), caption, entries, FONT_SIZE)


def _draw_attention(
    image: Image.Image, attention: PositionalAttention, query: int, weights: np.ndarray, edge: int
) -> Image.Image:
    canvas, anchor = Canvas(image, attention, edge=edge), attention.anchors[query]
    canvas.heat(weights / max(weights.max(), FULL_COLOR * weights.mean()), attention.extent)
    canvas.box(attention.boxes[query], POSITIVE, 0.9)
    center, size = anchor[:2], anchor[2:]
    if len(size):
        canvas.box(_box(center, size / 2), INK, 0.8)
    if len(center):
        canvas.dot(center, 5, INK)
    return canvas.drawn()


def draw_denoising_mask(
    model: DinoDetrForObjectDetection,
    labels: list[dict[str, torch.Tensor]],
    *,
    max_groups: int = 3,
    max_matching: int = 8,
) -> Image.Image:
    """Draw which queries attend to which in training, as the model makes the mask for a batch.

    Args:
        model (`DinoDetrForObjectDetection`): With any denoising strategy.
        labels (`list[dict[str, torch.Tensor]]`): Labels of a batch of images; see the model.
        max_groups (`int`, *optional*, defaults to 3): How many denoising groups are drawn.
        max_matching (`int`, *optional*, defaults to 8): How many matching queries are drawn.

    Example:

    ```python
    labels = [{"class_labels": torch.tensor([1, 0]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.4]] * 2)}]
    draw_denoising_mask(model, labels).save("mask.png")
    ```
    """
    matching, strategy = model.config.num_queries, model.model.denoising
    embeddings = torch.zeros(len(labels), matching, model.config.d_model, device=model.device)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        denoising: Any = strategy(labels, embeddings)
    copies, num_denoising = getattr(strategy, "copies_per_object", 1), denoising.inputs_embeds.shape[1]
    size, of = num_denoising // denoising.num_groups, denoising.num_groups * bool(num_denoising)
    can_attend = denoising_attention_mask(denoising.num_groups, size, matching).numpy()
    groups, some = min(max_groups, of), min(max_matching, matching)
    shown = np.concatenate([np.arange(groups * size), num_denoising + np.arange(some)])
    kinds = [index % size * copies // size for index in range(groups * size)] + [2] * some
    parts = [(size, f"group {group + 1}") for group in range(groups)] + [(some, "matching")]
    drawn = _draw_mask(can_attend[np.ix_(shown, shown)], kinds, parts)
    names = [*_COPIES[copies], "matching query"]
    entries = [(_KIND_COLORS[kind], name) for kind, name in zip(sorted(set(kinds)), names[-len(set(kinds)) :])]
    caption = (
        f"Queries (rows) attend to colored queries (columns); {groups} of {of} denoising groups, "
        f"{some} of {matching} matching queries"
    )
    return with_legend(drawn, caption, [*entries, (BLOCKED, "masked")], FONT_SIZE)


_COPIES = {1: ("noisy copy",), 2: ("positive copy", "negative copy")}  # by their number in a group


def _draw_mask(can_attend: np.ndarray, kinds: Sequence[int], parts: Sequence[tuple[int, str]]) -> Image.Image:
    """Draw a mask with names at the left and at the top; a colored strip beside it tells the kind of each query."""
    font = ImageFont.truetype(font_path(), FONT_SIZE)
    edge = max(4, 640 // len(kinds))  # pixels of a query
    strip = edge + GAP
    left, top = round(max(font.getlength(name) for _, name in parts) + strip + 2 * GAP), 2 * FONT_SIZE + strip
    side = edge * len(kinds)
    figure = Image.new("RGB", (max(left + side + GAP, 760), top + side + GAP), "white")
    draw = ImageDraw.Draw(figure)
    colors = [_KIND_COLORS[kind] for kind in kinds]
    for row, own in enumerate(colors):
        _draw_square(draw, left - strip, top + row * edge, edge, own)
        _draw_square(draw, left + row * edge, top - strip, edge, own)
        for column, color in enumerate(colors):
            shown = color if can_attend[row, column] else BLOCKED
            _draw_square(draw, left + column * edge, top + row * edge, edge, shown)
    start = 0
    for count, name in parts:
        middle, start = (start + count / 2) * edge, start + count
        short = name if font.getlength(name) < count * edge else name.split()[-1]
        draw.text((left - strip - GAP, top + middle), name, INK, font, anchor="rm")
        draw.text((left + middle, top - strip - GAP), short, INK, font, anchor="mb")
    for end in np.cumsum([count for count, _ in parts])[:-1] * edge - 1:
        draw.line((left - strip, top + end, left + side, top + end), INK, 2)
        draw.line((left + end, top - strip, left + end, top + side), INK, 2)
    return figure


def _draw_square(draw: ImageDraw.ImageDraw, x: int, y: int, edge: int, color: str) -> None:
    draw.rectangle((x, y, x + edge - 2, y + edge - 2), color)


def draw_box_noise(
    image: Image.Image, box: Any, *, scale: float | None = None, num_samples: int = 8, seed: int = 0
) -> Image.Image:
    """Draw noisy copies of a box, as DN-DETR and DINO make them, with the bounds of the noise.

    DN-DETR bounds the shift of the center and the change of width and height by λ, DINO the shift of both corners: by
    λ₁ = λ for positive copies, and between λ₁ and λ₂ = 2 λ for negative ones.

    Args:
        image (`PIL.Image.Image`): The image.
        box (`list[float]`): Box of an object, x0, y0, x1, y1 in pixels of the image.
        scale (`float`, *optional*): λ; by default, that of [`DinoDetrConfig`].
        num_samples (`int`, *optional*, defaults to 8): Copies of each kind.
        seed (`int`, *optional*, defaults to 0): Seed of the noise.

    Example:

    ```python
    >>> from PIL import Image
    >>> draw_box_noise(Image.new("RGB", (160, 120), "teal"), [40, 30, 90, 80]).size[0] > 1000
    True

    ```
    """
    scale = DinoDetrConfig().box_noise_scale if scale is None else scale
    samples = sample_noisy_boxes(box, image.size, scale, num_samples, seed)
    corners = np.asarray(box, float).reshape(2, 2)
    center, half = corners.mean(axis=0), (corners[1] - corners[0]) / 2
    near, far = ([_box(corner, scale * half * times) for corner in corners] for times in (1, 2))
    around_center = [_box(center, scale * half), _box(center, (1 + 2 * scale) * half)]  # centers; all of the copies
    part = view_of(np.stack([*far, *around_center]), image.size)
    panels = []
    for (name, boxes), bounds in zip(samples.items(), (around_center, near, [*near, *far])):
        canvas, color = Canvas(image, part=part, edge=_panel_edge(3)), NEGATIVE if name == "negative" else POSITIVE
        _draw_boxes(canvas, bounds, BOUND, 1.4)
        _draw_boxes(canvas, corners.reshape(1, 4), INK, 1.6)
        _draw_boxes(canvas, boxes, color, 0.7)
        points = boxes.reshape(-1, 2, 2)
        for point in (points.mean(axis=1) if name == "plain" else points).reshape(-1, 2):
            canvas.dot(point, 2.5, color)
        panels.append(canvas.drawn())
    titles = ["DN-DETR: center and size, up to λ", "DINO: positive, up to λ₁", "DINO: negative, λ₁ to λ₂"]
    caption = f"{num_samples} noisy copies of a box, λ₁ = {scale:g}, λ₂ = {2 * scale:g} of half its width and height"
    entries = [(INK, "object"), (BOUND, "bounds"), (POSITIVE, "trained to be the object")]
    return with_legend(arrange(panels, titles, 3), caption, [*entries, (NEGATIVE, "to be no object")], FONT_SIZE)


def _draw_boxes(canvas: Canvas, boxes: Iterable[np.ndarray], color: str, width: float) -> None:
    for box in boxes:
        canvas.box(box, color, width)


def sample_noisy_boxes(
    box: Any, image_size: tuple[int, int], scale: float, num_samples: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Sample noisy copies of a box by the functions that train DN-DETR (`plain`) and DINO (`positive`, `negative`).

    Returns:
        `dict[str, np.ndarray]`: By kind, `(num_samples, 4)`, x0, y0, x1, y1 in pixels of the image.

    Raises:
        ValueError: If the box has no area.

    Example:

    ```python
    >>> {name: boxes.shape for name, boxes in sample_noisy_boxes([40, 30, 90, 80], (160, 120), 0.4, 5).items()}
    {'plain': (5, 4), 'positive': (5, 4), 'negative': (5, 4)}

    ```
    """
    if not (box[0] < box[2] and box[1] < box[3]):
        raise ValueError(f"a box is x0, y0, x1, y1 with x0 < x1 and y0 < y1, got {[*box]}")
    size = torch.tensor(image_size).repeat(2)
    boxes = box_convert(torch.tensor([[*box]]) / size, "xyxy", "cxcywh").expand(num_samples, 2, 1, 4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        noisy = [plain_box_noise(boxes[:, 0], scale), *contrastive_box_noise(boxes[None], scale)[0].unbind(1)]
    # As the decoder gets them: a negative copy whose corners crossed becomes a line.
    seen = [box_convert(inverse_sigmoid(each[:, 0]).sigmoid(), "cxcywh", "xyxy") * size for each in noisy]
    return {name: each.numpy() for name, each in zip(("plain", "positive", "negative"), seen)}


def _box(center: np.ndarray, half: np.ndarray) -> np.ndarray:
    return np.concatenate([center - half, center + half])


def arrange(
    panels: Sequence[Image.Image], titles: Sequence[str], columns: int, rows: Sequence[str] = ()
) -> Image.Image:
    """Put panels of the same size in a grid: a title above each or, if rows have titles, above each column.

    Raises:
        ValueError: If there are none.
    """
    if not panels:
        raise ValueError("nothing to draw: give at least one model, and at least one box for its attention")
    font, line = ImageFont.truetype(font_path(), FONT_SIZE), round(1.5 * FONT_SIZE)
    width = max(panels[0].width, *(round(font.getlength(title)) for title in titles)) + GAP
    height, top = panels[0].height + line + GAP, line * bool(rows)
    figure = Image.new("RGB", (columns * width + GAP, top + -(-len(panels) // columns) * height), "white")
    draw = ImageDraw.Draw(figure)
    for index, panel in enumerate(panels):
        x, y = GAP + index % columns * width, top + line + index // columns * height
        figure.paste(panel, (x + (width - GAP - panel.width) // 2, y))
    for index, title in enumerate(titles):
        x, y = GAP + index % columns * width, index // columns * height
        draw.text((x + (width - GAP) / 2, y + line / 2), title, INK, font, anchor="mm")
    for row, title in enumerate(rows):
        draw.text((2 * GAP, top + row * height + line / 2), title, INK, font, anchor="lm")
    return figure


def _numbered(count: int) -> list[tuple[int, str]]:
    """Return a color for each of so many heads or objects."""
    return [(index, COLORS[index % len(COLORS)]) for index in range(count)]


def _number(layer: int, inspection: Inspection) -> int:
    """Return the number of a layer, from 1."""
    return range(1, len(inspection.boxes) + 1)[layer]


def _columns(count: int) -> int:
    return 3 if count in (5, 6, 9) else min(count, 4)


def _panel_edge(columns: int) -> int:
    """Return the longest edge of a panel, so that so many are as wide as a grid."""
    return int((WIDTH / columns - GAP) / (1 + 2 * MARGIN))
