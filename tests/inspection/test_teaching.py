"""Drawings that teach show what models compute: attention, masks and noise are compared with the models' own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert
from transformers import ResNetConfig

from helpers.models import TINY_RESNET, make_labels, tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.family import FAMILY
from hf_dino.inspection import (
    PositionalAttention,
    draw_anchors,
    draw_box_noise,
    draw_denoising_mask,
    draw_positional_attention,
    draw_query_selections,
    draw_sampling_heads,
    inspect_image,
    inspect_positional_attention,
    sample_noisy_boxes,
)
from hf_dino.inspection.figures import MARGIN
from hf_dino.inspection.teaching import (
    _KIND_COLORS,
    BLOCKED,
    COLORS,
    FONT_SIZE,
    GAP,
    _draw_attention,
    best_queries,
)


SIZE = (60, 30)  # resized to 128 x 64 pixels
PROCESSOR = DinoDetrImageProcessor(size={"height": 64, "width": 128})
PADDING = DinoDetrImageProcessor(size={"height": 64, "width": 128}, pad_size={"height": 128, "width": 192})
DENSE = ["detr", "conditional_detr", "dab_detr"]
CONTENT = ("q_content_proj", "q_pos_proj", "cross_attn_query_content_proj", "cross_attn_query_pos_proj")


def noise_image(seed: int, size: tuple[int, int] = SIZE) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def image():
    return noise_image(0)


@pytest.fixture(scope="module")
def inspection(image):
    return inspect_image(tiny_model(), PROCESSOR, image)


def dense_model(key: str):
    """Make a tiny ancestor of DINO whose weights are far from their initial values."""
    torch.manual_seed(0)
    sizes = {"encoder_layers": 1, "decoder_layers": 3, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_labels": 5}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 12}
    width = {"hidden_size" if key == "dab_detr" else "d_model": 32}
    backbone = ResNetConfig(**{name: value for name, value in TINY_RESNET.items() if name != "out_features"})
    model = FAMILY[key].make_model(backbone_config=backbone, attn_implementation="eager", **sizes, **heads, **width)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("processor", [PROCESSOR, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize("key", DENSE)
def test_both_parts_together_are_the_attention_of_the_model(key, processor, image):
    model, inputs = dense_model(key), processor(images=image, return_tensors="pt")
    with torch.no_grad():
        outputs = model(inputs["pixel_values"], inputs["pixel_mask"], output_attentions=True)
    for layer in range(3):
        attention = inspect_positional_attention(model, processor, image, layer)
        expected = outputs.cross_attentions[layer][0].transpose(0, 1).numpy()
        weights = attention.attention_weights
        np.testing.assert_allclose(weights.reshape(expected.shape), expected, atol=1e-6)
        assert weights.std() > 1e-3
        for each in (weights, attention.positional_weights):
            np.testing.assert_allclose(each.sum((-1, -2)), 1, rtol=1e-5)
            assert (each[..., 2:, :] == 0).all() and (each[..., 4:] == 0).all()  # of 2 x 4 cells, the rest is padding
    np.testing.assert_allclose(attention.extent, np.array(inputs["pixel_values"].shape[:1:-1]) / (128, 64) * SIZE)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("key", ["conditional_detr", "dab_detr"])
def test_without_content_the_attention_is_positional(key, layer, image):
    model = dense_model(key)
    for name, module in model.model.decoder.layers[layer].named_modules():
        if name.split(".")[-1] in CONTENT:
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    attention = inspect_positional_attention(model, PROCESSOR, image, layer)
    np.testing.assert_allclose(attention.attention_weights, attention.positional_weights, atol=1e-6)
    assert attention.positional_weights.std() > 1e-3


def test_positional_attention_of_detr_is_that_of_its_positions(image):
    model = dense_model("detr")
    first, second = (inspect_positional_attention(model, PROCESSOR, noise_image(seed), 1) for seed in (0, 1))
    assert (first.positional_logits == second.positional_logits).all()
    assert (first.content_logits != second.content_logits).any()
    torch.nn.init.zeros_(model.model.query_position_embeddings.weight)
    assert (inspect_positional_attention(model, PROCESSOR, noise_image(0), 1).positional_logits == 0).all()


def test_equal_projections_of_positions_attend_to_the_reference_point():
    model, image = dense_model("conditional_detr"), noise_image(0, (480, 320))
    processor = DinoDetrImageProcessor(size={"height": 320, "width": 480})  # 10 x 15 cells
    with torch.no_grad():
        model.model.decoder.ref_point_head.layers[-1].weight.mul_(30)
        for name in ("q_pos_sine_proj", "k_pos_proj", "q_pos_proj"):
            projection = getattr(model.model.decoder.layers[0].encoder_attn, name)
            projection.weight.copy_(torch.eye(32) * (name != "q_pos_proj"))
            projection.bias.zero_()
    attention = inspect_positional_attention(model, processor, image, 0)
    logits = attention.positional_logits.sum(axis=1).reshape(12, -1)  # over heads, of which half have y, half x
    row, column = np.unravel_index(logits.argmax(axis=1), (10, 15))
    found = (np.stack([column, row], axis=1) + 0.5) * 32
    assert np.ptp(attention.anchors, axis=0).min() > 64
    assert np.abs(found - attention.anchors).max() <= 32


def test_anchors_are_those_that_the_layer_reads(image):
    scale = np.array([*SIZE, *SIZE])
    assert inspect_positional_attention(dense_model("detr"), PROCESSOR, image).anchors.shape == (12, 0)
    model = dense_model("conditional_detr")
    with torch.no_grad():
        points = model.model.decoder.ref_point_head(model.model.query_position_embeddings.weight).sigmoid()
    attention = inspect_positional_attention(model, PROCESSOR, image)
    np.testing.assert_allclose(attention.anchors, points.numpy() * scale[:2], rtol=1e-5)
    model = dense_model("dab_detr")
    learned = model.model.query_refpoint_embeddings.weight.detach().sigmoid().numpy()
    first, last = (inspect_positional_attention(model, PROCESSOR, image, layer) for layer in (0, -1))
    np.testing.assert_allclose(first.anchors, learned * scale, rtol=1e-5)
    assert (first.anchors != last.anchors).any()


@pytest.mark.parametrize("key", DENSE)
def test_a_query_is_found_by_its_box(key, image):
    model = dense_model(key)
    attention = inspect_positional_attention(model, PROCESSOR, image)
    with torch.no_grad():
        boxes = model(**PROCESSOR(images=image, return_tensors="pt")).pred_boxes[0]
    corners = box_convert(boxes, "cxcywh", "xyxy").numpy() * [*SIZE, *SIZE]
    np.testing.assert_allclose(attention.boxes, corners, rtol=1e-5, atol=1e-5)
    assert attention.scores.shape == (12, 5) and (attention.scores > 0).all()
    certain = replace(attention, scores=np.full_like(attention.scores, 0.5))
    for query, box in enumerate(attention.boxes):
        assert certain.boxes[certain.find_query(box)] == pytest.approx(box) or certain.find_query(box) == query


def test_models_without_such_an_attention_are_refused(image):
    with pytest.raises(ValueError, match="'dino_detr': positional attention is that of detr, conditional_detr, dab-d"):
        inspect_positional_attention(tiny_model(), PROCESSOR, image)


@pytest.mark.parametrize(("size", "extent"), [((60, 30), (60, 30)), ((60, 30), (90, 60)), ((30, 60), (60, 60))])
def test_the_cell_with_the_highest_weight_is_colored_in_its_place(size, extent):
    logits = np.full((1, 1, 4, 6), -9.0, np.float32)
    logits[0, 0, 1, 2] = 0
    attention = PositionalAttention(
        size,
        np.array(extent, float),
        logits,
        np.zeros_like(logits),
        np.zeros((1, 0)),
        np.zeros((1, 4)),
        np.ones((1, 1)),
    )
    drawn = np.asarray(
        _draw_attention(Image.new("RGB", size, "gray"), attention, 0, attention.positional_weights[0, 0], 300)
    )
    margin = round(MARGIN * 300)
    inner = drawn[margin:-margin, margin:-margin].astype(int)
    rows, columns = np.nonzero(inner[..., 0] - inner[..., 1] > 60)
    cell, scale = np.array(extent) / (6, 4), 300 / max(size)
    found = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / scale
    np.testing.assert_allclose(found, np.concatenate([cell * (2, 1), cell * (3, 2)]), atol=2 / scale)


def test_an_even_map_is_pale():
    even = PositionalAttention(
        SIZE, np.array(SIZE, float), *np.zeros((2, 1, 1, 4, 6)), np.zeros((1, 2)), np.zeros((1, 4)), np.ones((1, 1))
    )
    white = Image.new("RGB", SIZE, "white")
    drawn = np.asarray(_draw_attention(white, even, 0, even.positional_weights[0, 0], 300))
    assert drawn[60:-20, 60:-20].min() > 100


def test_rows_of_attention_are_models_and_objects(image):
    attentions = {FAMILY[key].name: inspect_positional_attention(dense_model(key), PROCESSOR, image) for key in DENSE}
    one, two = (draw_positional_attention(image, attentions, [[5, 5, 20, 20]] * count) for count in (1, 2))
    assert one.width == two.width and two.height > 1.5 * one.height
    assert 700 < one.width < 1280
    few = draw_positional_attention(image, attentions, [[5, 5, 20, 20]], max_heads=1)
    assert few.width < one.width / 2


@pytest.mark.parametrize("denoising", ["contrastive", "plain", "none"])
def test_the_mask_drawn_is_the_one_that_decoder_layers_get(denoising):
    model, labels, masks = tiny_model(denoising=denoising), make_labels(2, 1), []
    model.model.decoder.layers[0].register_forward_pre_hook(lambda _, args: masks.append(args[4]))
    before = torch.get_rng_state()
    drawn = np.asarray(draw_denoising_mask(model, labels, max_groups=99, max_matching=99))
    assert torch.equal(torch.get_rng_state(), before)
    model.train()(torch.randn(2, 3, 64, 96), labels=labels)
    num_queries = model.config.num_queries
    mask = torch.zeros(1, 1, num_queries, num_queries) if masks[0] is None else masks[0]  # none hides nothing
    can_attend = (mask[0, 0] == 0).numpy()
    edge = 640 // len(can_attend)
    y, x = (np.flatnonzero(line) for line in colored_rows_and_columns(drawn[:400]))  # above the legend
    blocked = np.array(list(bytes.fromhex(BLOCKED[1:])))
    centers = [
        (np.arange(len(can_attend)) * edge) + start + edge // 2 for start in (y[0] + edge + GAP, x[0] + edge + GAP)
    ]
    cells = drawn[np.ix_(*centers)].astype(int)
    assert ((np.abs(cells - blocked).max(axis=-1) > 3) == can_attend).all()


def colored_rows_and_columns(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which rows and columns of an image have a color of a kind of query."""
    kinds = np.array([list(bytes.fromhex(color[1:])) for color in _KIND_COLORS])
    colored = (np.abs(drawn[:, :, None].astype(int) - kinds).max(axis=-1) == 0).any(axis=-1)
    return colored.any(axis=1), colored.any(axis=0)


def test_few_groups_and_matching_queries_are_drawn_of_many():
    model = tiny_model(num_denoising=100)
    few = draw_denoising_mask(model, make_labels(2), max_groups=2, max_matching=3)
    assert few.width < 1000 and draw_denoising_mask(model, make_labels(0)).width < 1000


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_noisy_boxes_keep_to_the_bounds(scale):
    box, state = np.array([60.0, 50, 90, 80]), torch.get_rng_state()
    samples = sample_noisy_boxes(box, (160, 120), scale, 200)
    assert torch.equal(torch.get_rng_state(), state)
    half = np.array([15, 15, 15, 15])
    shift = {name: np.abs(each - box) / half for name, each in samples.items()}
    assert shift["positive"].max() <= scale + 1e-5 and shift["positive"].max() > 0.9 * scale
    straight = (samples["negative"][:, :2] + 1 < samples["negative"][:, 2:]).all(axis=1)
    assert straight.any() and (shift["negative"][straight] >= scale - 1e-4).all()
    assert (shift["negative"][straight] <= 2 * scale + 1e-4).all()
    centers = (samples["plain"][:, :2] + samples["plain"][:, 2:]) / 2
    assert (np.abs(centers - [75, 65]) <= 15 * scale + 1e-4).all()
    sides = (samples["plain"][:, 2:] - samples["plain"][:, :2]) / 30
    assert (np.abs(sides - 1) <= scale + 1e-4).all()
    again = sample_noisy_boxes(box, (160, 120), scale, 200)
    assert all((again[name] == samples[name]).all() for name in samples)
    assert (sample_noisy_boxes(box, (160, 120), scale, 200, seed=1)["plain"] != samples["plain"]).any()


def test_nothing_to_draw_is_refused(image):
    attention = inspect_positional_attention(dense_model("detr"), PROCESSOR, image)
    for draw in (
        lambda: draw_positional_attention(image, {"DETR": attention}, []),
        lambda: draw_positional_attention(image, {}, [[5, 5, 20, 20]]),
        lambda: draw_query_selections(image, {}),
    ):
        with pytest.raises(ValueError, match="nothing to draw"):
            draw()
    with pytest.raises(ValueError, match="x0 < x1 and y0 < y1, got"):
        draw_box_noise(image, [20, 5, 5, 20])


def test_noise_of_a_box_at_the_border_is_drawn():
    drawn = draw_box_noise(Image.new("RGB", (160, 120), "teal"), [0, 0, 40, 30], scale=1.0, num_samples=3)
    assert abs(drawn.width - 1280) < 40


def test_best_queries_are_the_detections_but_never_none(inspection):
    scores = np.zeros_like(inspection.scores)
    scores[-1, [3, 5, 7], 1] = [0.5, 0.9, 0.2]
    changed = replace(inspection, scores=scores)
    assert best_queries(changed, 0.3, 8).tolist() == [5, 3]
    assert best_queries(changed, 0.3, 1).tolist() == [5]
    assert best_queries(changed, 0.95, 8).tolist() == [5]


def test_cells_are_those_of_the_strides(image):
    inspection = inspect_image(tiny_model(), PADDING, image)
    np.testing.assert_allclose(inspection.cell_sizes, np.array([[16], [32], [64]]) * np.array(SIZE) / (128, 64))


def test_the_heaviest_point_of_each_level_has_the_color_of_its_head(image, inspection):
    drawn = np.asarray(draw_sampling_heads(image, inspection, 0, 0)).astype(int)
    weights, points = inspection.attention_weights[0, 0], inspection.sampling_points[0, 0]
    width = (drawn.shape[1] - GAP) // 3
    for level in range(3):
        head, point = np.unravel_index(weights[:, level].argmax(), weights[:, level].shape)
        x, y = points[head, level, point]
        if not (0 <= x < SIZE[0] and 0 <= y < SIZE[1]):
            continue
        edge = width - GAP
        inner = edge / (1 + 2 * MARGIN)
        column = GAP + level * width + (edge - inner) / 2 + x * inner / SIZE[0]
        row = 1.5 * FONT_SIZE + (edge - inner) / 2 + y * inner / SIZE[0]
        color = np.array(list(bytes.fromhex(COLORS[head][1:])))
        near = drawn[int(row) - 2 : int(row) + 3, int(column) - 2 : int(column) + 3].reshape(-1, 3)
        assert np.abs(near - color).max(axis=1).min() <= 40


DRAWINGS = {
    "heads": lambda image, inspection: draw_sampling_heads(image, inspection, 1, 0),
    "close-up of heads": lambda image, inspection: draw_sampling_heads(image, inspection, 1, close_up=True),
    "anchors": draw_anchors,
    "selections": lambda image, inspection: draw_query_selections(image, {"a": inspection, "b": inspection}),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
def test_drawings_of_images_of_every_size_are_legible(draw):
    for size, selection in [((40, 30), "mixed"), ((1600, 400), "static"), ((30, 300), "pure")]:
        image = Image.new("RGB", size, "teal")
        drawn = draw(image, inspect_image(tiny_model(query_selection=selection), PROCESSOR, image))
        assert drawn.mode == "RGB" and 250 <= max(drawn.size) <= 1800
        with pytest.raises(ValueError, match="the image has"):
            draw(image.resize((10, 10)), inspect_image(tiny_model(query_selection=selection), PROCESSOR, image))
