"""Draw what an [`Inspection`] recorded: over a faded image, with a legend below it that covers nothing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..visualization import font_path
from .recorder import Inspection


LONGEST_EDGE, LARGEST_EDGE = 800, 1280  # pixels; smaller images are enlarged, larger ones reduced
SMOOTHING = 2  # drawn so much larger, since Pillow's lines and circles have jagged edges
PANEL_STROKE = 0.3  # power of the size by which lines and dots of panels in a grid grow; those of others are in scale
MARGIN = 0.03  # part of the longest edge around the image, for what lies on or beyond its border
GRAY, FADED = 0.4, 0.35  # parts of gray and then of white in the image, from which the drawing stands out
MIN_VIEW = 48  # pixels of the image that a close-up shows at least
INK, HALO, CELL = "#1b1f24", (255, 255, 255, 210), (90, 98, 110, 130)

# of levels: hues that differ for color-blind readers too, dark enough on the faded image
LEVEL_COLORS = ("#d1495b", "#00798c", "#e09f1f", "#6a4c93", "#3b7a2a", "#33415c")
_REFINEMENT = np.array([[253, 174, 47], [226, 78, 66], [150, 30, 120], [48, 18, 100]])  # from early to late layers

_HEAT = np.stack([np.interp(np.linspace(0, 2, 256), range(4), each) for each in _REFINEMENT.T], -1).astype(np.uint8)
_OPACITY = (230 * np.linspace(0, 1, 256) ** 0.8).astype(np.uint8)


def draw_reference_points(
    image: Image.Image, inspection: Inspection, *, max_points: int = 300, proposals: bool = False
) -> Image.Image:
    """Draw the encoder's selected tokens: the better the score, the larger; a color for each feature level.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        inspection (`Inspection`): What was recorded.
        max_points (`int`, *optional*, defaults to 300): How many of the best tokens are drawn.
        proposals (`bool`, *optional*, defaults to `False`): Also draw the tokens' boxes before they are refined.
    """
    canvas = Canvas(image, inspection)
    points, levels = inspection.token_points[:max_points], inspection.token_levels[:max_points]
    strength = np.sqrt(relative(inspection.token_scores[:max_points]))
    for index in np.argsort(strength):
        color = LEVEL_COLORS[levels[index] % len(LEVEL_COLORS)]
        if proposals:
            canvas.box(inspection.proposals[index], color, 0.6)
        canvas.dot(points[index], 2 + 7 * strength[index], color)
    entries = [(color, f"{name}: {(levels == level).sum()}") for level, color, name in level_names(inspection)]
    caption = f"{len(points)} best of {len(inspection.token_points)} selected tokens; larger: higher score"
    if not len(inspection.token_points):
        caption, entries = "No tokens are selected: with static query selection, anchors are learned", []
    return canvas.finish(caption, entries)


def draw_sampling_points(
    image: Image.Image, inspection: Inspection, query: int, layer: int | None = None, *, close_up: bool = False
) -> Image.Image:
    """Draw where decoder layers sample the feature levels for one query: larger dots have larger weights.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        inspection (`Inspection`): What was recorded.
        query (`int`): Index of the query.
        layer (`int`, *optional*): Index of the decoder layer; by default, all of them.
        close_up (`bool`, *optional*, defaults to `False`): Show only what is around the query's boxes.
    """
    layers = range(len(inspection.boxes)) if layer is None else [layer]
    canvas = Canvas(image, inspection, around(inspection, query) if close_up else None)
    shape = inspection.attention_weights.shape[2:]
    weights = inspection.attention_weights[layers, query].reshape(-1)
    points = inspection.sampling_points[layers, query].reshape(-1, 2)
    levels = np.tile(np.broadcast_to(np.arange(shape[1])[:, None], shape).reshape(-1), len(layers))
    strength = np.sqrt(relative(weights))
    canvas.box(inspection.reference_boxes[layers[0], query], INK, 1.2)
    for index in np.argsort(strength):
        canvas.dot(points[index], 1 + 7 * strength[index], LEVEL_COLORS[levels[index] % len(LEVEL_COLORS)])
    shares = [weights[levels == level].sum() / weights.sum() for level in range(shape[1])]
    entries = [(color, f"{name}: {shares[level]:.0%}") for level, color, name in level_names(inspection)]
    where = "all decoder layers" if layer is None else f"decoder layer {layer + 1}"
    caption = f"{len(weights)} sampling points of {where}; larger: higher weight"
    return canvas.finish(caption, [(INK, "reference box"), *entries])


def draw_refinement(
    image: Image.Image, inspection: Inspection, query: int, *, label: int | None = None, close_up: bool = False
) -> Image.Image:
    """Draw how the box of one query moves from layer to layer, with the score of its class after each.

    Args:
        image (`PIL.Image.Image`): The inspected image.
        inspection (`Inspection`): What was recorded.
        query (`int`): Index of the query.
        label (`int`, *optional*): Class whose scores are shown; by default, the one with the highest score at last.
        close_up (`bool`, *optional*, defaults to `False`): Show only what is around the query's boxes.
    """
    canvas = Canvas(image, inspection, around(inspection, query) if close_up else None)
    if label is None:
        label = int(inspection.scores[-1, query].argmax())
    scores = inspection.scores[:, query, label]
    boxes = np.concatenate([inspection.reference_boxes[:1, query], inspection.boxes[:, query]])
    colors = ["#8d99ae", *_layer_colors(len(scores))]
    for box, color in zip(boxes, colors):
        canvas.box(box, color, 1.5)
    centers = (boxes[:, :2] + boxes[:, 2:]) / 2
    canvas.path(centers, INK)
    for center, color in zip(centers, colors):
        canvas.dot(center, 3, color)
    names = ["anchor", *(f"layer {layer}: {score:.2f}" for layer, score in enumerate(scores, start=1))]
    return canvas.finish(
        "Box of the query after each decoder layer, and the score of its class", list(zip(colors, names))
    )


def level_names(inspection: Inspection) -> list[tuple[int, str, str]]:
    """Return index, color and name of each feature level."""
    count = inspection.attention_weights.shape[3]
    ends = {0: " (finest)", count - 1: " (coarsest)"} if count > 1 else {}
    return [
        (level, LEVEL_COLORS[level % len(LEVEL_COLORS)], f"level {level + 1}{ends.get(level, '')}")
        for level in range(count)
    ]


def _layer_colors(count: int) -> list[str]:
    places = np.linspace(0, len(_REFINEMENT) - 1, count)
    channels = (np.interp(places, range(len(_REFINEMENT)), values) for values in _REFINEMENT.T)
    return ["#" + bytes(map(round, color)).hex() for color in zip(*channels)]


def relative(values: np.ndarray) -> np.ndarray:
    """Divide values by the largest."""
    return values / max(values.max(initial=0), np.finfo(np.float32).tiny)


def around(inspection: Inspection, query: int) -> np.ndarray:
    """Return the part of the image around all boxes of a query: x0, y0, x1, y1 in whole pixels."""
    boxes = np.concatenate([inspection.reference_boxes[:, query], inspection.boxes[:, query]])
    return view_of(boxes, inspection.image_size)


def view_of(boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
    """Return the part of an image around boxes: x0, y0, x1, y1 in whole pixels."""
    low, high = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    reach = np.maximum((high - low).max() * 0.75, MIN_VIEW / 2)
    center, size = (low + high) / 2, np.array(image_size)
    part = np.concatenate([np.floor(center - reach).clip(0, size - 1), np.ceil(center + reach).clip(1, size)])
    return part.astype(int)


class Canvas:
    """A faded image, or a part of it, with a drawing over it in the image's coordinates.

    Args:
        image (`PIL.Image.Image`): The image.
        inspection (`Inspection` or `PositionalAttention`, *optional*): Of this image.
        part (`np.ndarray`, *optional*): x0, y0, x1, y1 in whole pixels.
        edge (`int`, *optional*): Longest edge in pixels of a panel of a grid.
    """

    def __init__(
        self, image: Image.Image, inspection: Any = None, part: np.ndarray | None = None, edge: int | None = None
    ):
        if inspection is not None and image.size != inspection.image_size:
            raise ValueError(f"the image has {image.size} pixels, but the inspected one had {inspection.image_size}")
        x0, y0, x1, y1 = (0, 0, *image.size) if part is None else part.tolist()
        self.origin, shown_edge = np.array([x0, y0]), max(x1 - x0, y1 - y0)
        self.scale = edge / shown_edge if edge else min(max(1.0, LONGEST_EDGE / shown_edge), LARGEST_EDGE / shown_edge)
        size = max(1, round((x1 - x0) * self.scale)), max(1, round((y1 - y0) * self.scale))
        shown = image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
        shown = Image.blend(shown, shown.convert("L").convert("RGB"), GRAY)
        self.margin = round(MARGIN * max(size))
        framed = ImageOps.expand(Image.blend(shown, Image.new("RGB", size, "white"), FADED), self.margin, "white")
        self.image = framed.convert("RGBA")
        self.layer = Image.new("RGBA", (framed.width * SMOOTHING, framed.height * SMOOTHING), (255, 255, 255, 0))
        self.draw = ImageDraw.Draw(self.layer)
        # a pixel of an image of `LONGEST_EDGE`
        self.unit = SMOOTHING * (max(size) / LONGEST_EDGE) ** (PANEL_STROKE if edge else 1)

    def _at(self, points: np.ndarray) -> np.ndarray:
        return ((points - self.origin) * self.scale + self.margin) * SMOOTHING

    def box(self, box: np.ndarray, color: str, width: float) -> None:
        """Draw a box with a light border, in units of width."""
        x0, y0, x1, y1 = self._at(box.reshape(2, 2)).reshape(-1).tolist()
        corners = [(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0), (x1, y0)]
        self._line(corners, color, 2 * width)

    def path(self, points: np.ndarray, color: str, width: float = 1.2) -> None:
        """Draw a line through points."""
        self._line([tuple(point) for point in self._at(points).tolist()], color, width)

    def _line(self, points: Sequence[tuple[float, ...]], color: str, width: float) -> None:
        for fill, more in ((HALO, 2), (color, 0)):
            self.draw.line(points, fill, max(1, round((width + more) * self.unit)), joint="curve")

    def cells(self, size: np.ndarray) -> None:
        """Draw the borders of cells of a size, width and height, which begin at the image's upper left corner."""
        end = self.origin + (np.array(self.image.size) - 2 * self.margin) / self.scale
        for axis in (0, 1):
            first, last = np.ceil(self.origin[axis] / size[axis]), np.floor(end[axis] / size[axis])
            for place in np.arange(first, last + 1) * size[axis]:
                line = np.stack([self.origin, end]).astype(float)
                line[:, axis] = place
                self.draw.line([tuple(point) for point in self._at(line).tolist()], CELL, SMOOTHING)

    def heat(self, values: np.ndarray, extent: np.ndarray) -> None:
        """Color the cells of a map `(height, width)` of values in [0, 1], which covers `extent`: width and height.

        The image becomes gray and pale, so that all colors are of the map.
        """
        gray = self.image.convert("L").convert("RGBA")
        self.image = Image.blend(gray, Image.new("RGBA", gray.size, "white"), FADED)
        size = self.image.width - 2 * self.margin, self.image.height - 2 * self.margin
        shown = np.array(size) / self.scale / extent * values.shape[::-1]  # cells
        cells = Image.fromarray(np.round(255 * values).astype(np.uint8))
        box = (0, 0, *shown.clip(max=values.shape[::-1]).tolist())
        level = np.asarray(cells.resize(size, Image.Resampling.NEAREST, box=box))
        color, opacity = Image.fromarray(_HEAT[level]), Image.fromarray(_OPACITY[level])
        self.image.paste(color, (self.margin, self.margin), opacity)

    def dot(self, point: np.ndarray, radius: float, color: str) -> None:
        """Draw a dot with a light border."""
        x, y = self._at(point).tolist()
        for fill, size in ((HALO, radius + 0.8), (color, radius)):
            reach = size * self.unit
            self.draw.ellipse((x - reach, y - reach, x + reach, y + reach), fill)

    def drawn(self) -> Image.Image:
        """Return the drawing."""
        return Image.alpha_composite(self.image, self.layer.reduce(SMOOTHING)).convert("RGB")

    def finish(self, caption: str, entries: Sequence[tuple[str, str]]) -> Image.Image:
        """Return the drawing above its caption and legend."""
        drawn = self.drawn()
        return with_legend(drawn, caption, entries, max(13, round(max(drawn.size) / 36)))


def with_legend(drawn: Image.Image, caption: str, entries: Sequence[tuple[str, str]], font_size: int) -> Image.Image:
    """Put a caption and a legend, of colors and names, below a drawing."""
    legend = _legend(drawn.width, font_size, caption, entries)
    figure = Image.new("RGB", (drawn.width, drawn.height + legend.height), "white")
    figure.paste(drawn, (0, 0))
    figure.paste(legend, (0, drawn.height))
    return figure


def _legend(width: int, size: int, caption: str, entries: Sequence[tuple[str, str]]) -> Image.Image:
    """Draw a caption, and names behind dots of their colors, in as many lines as they need."""
    font = ImageFont.truetype(font_path(), size)
    lines: list[list[tuple[float, str, str]]] = []  # x, color and text of each item
    for items, gap in (([("", word) for word in caption.split()], 0.3), (entries, 1.2)):
        x = float(width)
        for color, text in items:
            needed = font.getlength(text) + (1.2 * bool(color)) * size
            if x + needed > width - 0.4 * size:
                x = 0.6 * size
                lines.append([])
            lines[-1].append((x, color, text))
            x += needed + gap * size
    legend = Image.new("RGB", (width, round((1.6 * len(lines) + 0.6) * size)), "white")
    draw = ImageDraw.Draw(legend)
    for number, line in enumerate(lines):
        y = (1.6 * number + 1.1) * size
        for x, color, text in line:
            if color:
                draw.ellipse((x, y - 0.4 * size, x + 0.8 * size, y + 0.4 * size), color)
            draw.text((x + 1.2 * size * bool(color), y), text, INK, font, anchor="lm")
    return legend
