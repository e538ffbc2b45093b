"""What is recorded is what the model did: recomputing from it gives the model's outputs. Drawings show it."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert

from helpers.detectors import small_detector
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.deformable_attention_dino_detr import (
    MultiScaleDeformableAttention,
    multi_scale_deformable_attention,
)
from hf_dino.exported import QuerySelectionMode
from hf_dino.inference import detect_objects
from hf_dino.inspection import (
    Recorder,
    draw_reference_points,
    draw_refinement,
    draw_sampling_points,
    inspect_image,
)
from hf_dino.inspection.figures import FADED, LEVEL_COLORS, MARGIN


SELECTIONS = ["mixed", "pure", "static"]
SIZE = (60, 30)  # resized to 128 x 64 pixels, multiples of all strides, and padded
PROCESSOR = DinoDetrImageProcessor(size={"height": 64, "width": 128}, pad_size={"height": 128, "width": 192})
PADDED, RESIZED = np.array([192, 128]), np.array([128, 64])


@pytest.fixture(scope="module")
def image():
    pixels = np.random.default_rng(0).integers(0, 256, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def forward(model, image):
    with torch.no_grad():
        return model(**PROCESSOR(images=image, return_tensors="pt"))


def corners(boxes):
    return (box_convert(boxes, "cxcywh", "xyxy") * torch.tensor([*SIZE, *SIZE])).detach().numpy()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_boxes_and_scores_are_the_models(selection, image):
    model = tiny_model(query_selection=selection)
    inspection, outputs = inspect_image(model, PROCESSOR, image), forward(model, image)
    assert (inspection.boxes[-1] == corners(outputs.pred_boxes[0])).all()
    assert (inspection.reference_boxes[0] == corners(outputs.init_reference_points[0])).all()
    assert (inspection.reference_boxes[1:] == corners(outputs.intermediate_reference_points[0])).all()
    torch.testing.assert_close(torch.tensor(inspection.scores[-1]), outputs.logits[0].sigmoid())
    assert inspection.image_size == image.size


@pytest.mark.parametrize("selection", SELECTIONS)
def test_recording_changes_nothing_and_ends(selection, image):
    model = tiny_model(query_selection=selection)
    before = forward(model, image)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with Recorder(model):
        recorded = forward(model, image)
    assert torch.equal(before.logits, recorded.logits)
    assert torch.equal(before.pred_boxes, recorded.pred_boxes)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class ReplacedOperator(MultiScaleDeformableAttention):
    """Another class of the same computation, as from the Hub, instead of the fused operator."""


@pytest.mark.parametrize("operator", [MultiScaleDeformableAttention, ReplacedOperator])
@pytest.mark.parametrize("selection", SELECTIONS)
def test_sampling_points_and_weights_give_what_each_layer_read(selection, operator, image):
    model = tiny_model(query_selection=selection)
    values, sampled, shapes = [], [], []
    for layer in model.model.decoder.layers:
        attention = layer.encoder_attn
        attention.attn = operator()
        attention.register_forward_pre_hook(lambda _, args: shapes.append(args[4]))
        attention.value_proj.register_forward_hook(lambda _, args, output: values.append(output.clone()))
        attention.output_proj.register_forward_pre_hook(lambda _, args: sampled.append(args[0]))
    inspection = inspect_image(model, PROCESSOR, image)
    # from pixels of the image to fractions of the padded one, by the known sizes
    locations = inspection.sampling_points * RESIZED / SIZE / PADDED
    for layer, (value, output, levels) in enumerate(zip(values, sampled, shapes, strict=True)):
        weights = torch.tensor(inspection.attention_weights[layer])[None]
        heads = value.masked_fill(~levels.mask[..., None], 0).unflatten(-1, (weights.shape[2], -1))
        points = torch.tensor(locations[layer], dtype=torch.float32)[None]
        again = multi_scale_deformable_attention(heads, levels.spatial_shapes_list, points, weights)
        torch.testing.assert_close(again, output, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:3]))


def test_points_without_offsets_are_the_centers_of_the_boxes_in_pixels_of_the_image(image):
    model = tiny_model()
    with torch.no_grad():
        for layer in model.model.decoder.layers:
            layer.encoder_attn.sampling_offsets.weight.zero_()
            layer.encoder_attn.sampling_offsets.bias.zero_()
    inspection = inspect_image(model, PROCESSOR, image)
    boxes = inspection.reference_boxes[:-1, :, None, None, None]
    centers = np.broadcast_to((boxes[..., :2] + boxes[..., 2:]) / 2, inspection.sampling_points.shape)
    np.testing.assert_allclose(inspection.sampling_points, centers, atol=1e-3)


@pytest.mark.parametrize("selection", ["mixed", "pure"])
def test_tokens_are_those_selected(selection, image):
    model = tiny_model(query_selection=selection)
    with QuerySelectionMode() as mode:
        outputs = forward(model, image)
    inspection = inspect_image(model, PROCESSOR, image)
    cells = []  # level, x and y of each token's center in pixels of the padded image
    for level, stride in enumerate((16, 32, 64)):
        for y in np.arange(stride / 2, PADDED[1], stride):
            cells += [(level, x, y) for x in np.arange(stride / 2, PADDED[0], stride)]
    chosen = np.array(cells)[mode.selected[0][0].numpy()]
    assert (inspection.token_levels == chosen[:, 0]).all()
    np.testing.assert_allclose(inspection.token_points, chosen[:, 1:] / RESIZED * SIZE, rtol=1e-5)
    np.testing.assert_allclose(inspection.token_scores, mode.scores[0][0][mode.selected[0][0]].sigmoid().numpy())
    assert (np.diff(inspection.token_scores) <= 0).all()
    assert (inspection.token_labels == outputs.enc_outputs_class[0].argmax(-1).numpy()).all()
    middles = (inspection.proposals[:, :2] + inspection.proposals[:, 2:]) / 2
    np.testing.assert_allclose(middles, inspection.token_points, atol=1e-3)
    width = 0.05 * SIZE[0] * 2**inspection.token_levels
    np.testing.assert_allclose(inspection.proposals[:, 2] - inspection.proposals[:, 0], width, rtol=1e-4)


def test_static_selection_has_no_tokens(image):
    inspection = inspect_image(tiny_model(query_selection="static"), PROCESSOR, image)
    assert not len(inspection.token_points)
    assert not len(inspection.token_labels)
    assert not len(inspection.proposals)


def test_scores_by_classes_of_another_dataset_still_rank_tokens(image):
    inspection = inspect_image(tiny_model(num_ranking_labels=3), PROCESSOR, image)
    assert (inspection.token_labels < 5).all()


def test_detections_are_found_among_the_queries(image):
    model = tiny_model()
    with Recorder(model) as recorder:
        detections = detect_objects(model, PROCESSOR, image, 0.0)
    inspection = recorder.inspection(image.size)
    queries = [inspection.find_query(each["box"], each["label"], each["score"]) for each in detections]
    kept = inspection.keep_queries(queries)
    assert len(detections) == model.config.num_queries * model.config.num_labels
    for index, each in enumerate(detections):
        np.testing.assert_allclose(kept.boxes[-1, index], each["box"], rtol=1e-6)
        np.testing.assert_allclose(kept.scores[-1, index, each["label"]], each["score"], rtol=1e-5)
    assert len(kept.sampling_points[0]) == len(detections)
    assert len(kept.token_points) == len(inspection.token_points)


def test_one_call_with_one_image_is_recorded(image):
    model = tiny_model()
    with Recorder(model) as twice:
        forward(model, image)
        forward(model, image)
    with pytest.raises(ValueError, match=r"one call of the model with one image, got calls with \[1, 1\] images"):
        twice.inspection(image.size)
    with Recorder(model) as batch:
        forward(model, [image, image])
    with pytest.raises(ValueError, match=r"\[2\] images"):
        batch.inspection(image.size)


DRAWINGS = {
    "points": lambda image, inspection: draw_reference_points(image, inspection, proposals=True),
    "sampling": lambda image, inspection: draw_sampling_points(image, inspection, 1, 0),
    "all layers": lambda image, inspection: draw_sampling_points(image, inspection, 1),
    "close-up": lambda image, inspection: draw_sampling_points(image, inspection, 1, 2, close_up=True),
    "refinement": lambda image, inspection: draw_refinement(image, inspection, 1),
    "close-up of refinement": lambda image, inspection: draw_refinement(image, inspection, 1, label=0, close_up=True),
}


@pytest.mark.parametrize("draw", DRAWINGS.values(), ids=DRAWINGS)
@pytest.mark.parametrize("selection", ["mixed", "static"])
def test_drawings_of_images_of_every_size_are_legible(draw, selection):
    model = tiny_model(query_selection=selection)
    for size in [(40, 30), (1600, 400), (30, 300)]:
        image = Image.new("RGB", size, "teal")
        drawn = draw(image, inspect_image(model, PROCESSOR, image))
        assert 800 <= max(drawn.size) <= 1280 * 1.8
        assert drawn.mode == "RGB"


def test_a_sampling_point_is_drawn_where_it_is(image):
    inspection = inspect_image(tiny_model(), PROCESSOR, image)
    drawn = np.asarray(draw_sampling_points(image, inspection, 0, 0))
    heaviest = np.unravel_index(inspection.attention_weights[0, 0].argmax(), inspection.attention_weights.shape[2:])
    scale = 800 / max(SIZE)
    x, y = np.rint(inspection.sampling_points[0, 0][heaviest] * scale + MARGIN * 800).astype(int)
    color = list(bytes.fromhex(LEVEL_COLORS[heaviest[1]][1:]))
    assert (np.abs(drawn[y, x].astype(int) - color) <= 2).all()


def test_the_legend_covers_nothing_of_the_image():
    white = Image.new("RGB", SIZE, "black")
    drawn = np.asarray(draw_reference_points(white, inspect_image(tiny_model(), PROCESSOR, white)), int)
    margin, height = round(MARGIN * 800), round(800 * SIZE[1] / SIZE[0])
    corners = drawn[margin, margin], drawn[margin + height - 1, -margin - 1]
    assert all(abs(value - 255 * FADED) <= 2 for corner in corners for value in corner)
    assert drawn[margin + height + margin :].min() < 100  # text
    assert (drawn[margin + height + margin - 2] == 255).all()


def test_an_image_of_another_size_is_refused(image):
    inspection = inspect_image(tiny_model(), PROCESSOR, image)
    with pytest.raises(ValueError, match="the image has"):
        draw_reference_points(image.resize((10, 10)), inspection)


def test_other_models_are_refused_before_they_are_hooked():
    model = small_detector("conditional_detr")
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(ValueError, match="'conditional_detr' cannot be recorded, only 'dino_detr'"):
        Recorder(model)
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
