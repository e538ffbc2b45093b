"""Images and COCO annotations to pixels and labels, and outputs to boxes, on both backends."""

import logging
import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, box_iou
from transformers import AutoImageProcessor

from hf_dino import DinoDetrImageProcessor, DinoDetrImageProcessorPil, image_processing_dino_detr
from hf_dino.image_processing_dino_detr import get_size_with_aspect_ratio
from hf_dino.modeling_dino_detr import DinoDetrObjectDetectionOutput


BACKENDS = {"torchvision": DinoDetrImageProcessor, "pil": DinoDetrImageProcessorPil}
SMALL = {"shortest_edge": 40, "longest_edge": 67}
AS_IT_IS = {"do_resize": False, "do_rescale": False, "do_normalize": False}
NAN, INFINITY = float("nan"), float("inf")
IMAGENET_MEAN, IMAGENET_STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


@pytest.fixture(params=BACKENDS)
def processor(request):
    return BACKENDS[request.param](size=SMALL)


def make_image(width, height, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def annotate(*boxes, image_id=7, **fields):
    """Make an image's annotations in COCO's format; a field given as a list has one value per box."""
    annotations = []
    for index, box in enumerate(boxes):
        own = {name: value[index] if isinstance(value, list) else value for name, value in fields.items()}
        annotations.append({"category_id": 0, "bbox": box} | own)
    return {"image_id": image_id, "annotations": annotations}


def one_label(processor, image, target, **kwargs):
    return processor(images=image, annotations=target, return_tensors="pt", **kwargs)["labels"][0]


# Resizing


def exact_shape(height, width, shortest_edge, longest_edge):
    """Compute the size in exact fractions: the short side gets its limit, or as much as the long side allows."""
    short, long = sorted((height, width))
    if Fraction(long * shortest_edge, short) > longest_edge:
        shortest_edge = max(1, round(Fraction(longest_edge * short, long)))
    resized = {short: shortest_edge, long: shortest_edge * long // short} if short != long else {short: shortest_edge}
    return (height, width) if short == shortest_edge else (resized[height], resized[width])


@pytest.mark.parametrize("limits", [(800, 1333), (480, 1333), (40, 67), (600, 600)])
def test_sizes_are_the_official_ones(limits):
    rng = random.Random(0)
    shapes = [(rng.randint(1, 3000), rng.randint(1, 3000)) for _ in range(3000)]
    shapes += [(rng.randint(1, 5), rng.randint(1000, 9000)) for _ in range(100)]  # a strip never vanishes
    shapes += [(limits[0], limits[1]), (limits[1], limits[0]), limits[:1] * 2, (1, 1)]
    for shape in shapes:
        assert get_size_with_aspect_ratio(*shape, *limits) == exact_shape(*shape, *limits), shape


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (50, 50), (200, 31), (31, 200), (300, 2), (40, 67), (1, 1)])
def test_images_are_resized_to_the_official_size(processor, size):
    width, height = size
    shape = tuple(processor(images=make_image(*size), return_tensors="pt")["pixel_values"].shape[-2:])
    assert shape == exact_shape(height, width, *SMALL.values())


def test_a_fixed_size_is_taken_as_it_is(processor):
    encoded = processor(images=make_image(64, 48), size={"height": 30, "width": 33}, return_tensors="pt")
    assert encoded["pixel_values"].shape == (1, 3, 30, 33)


# Pixels


def by_hand(image, shape):
    """Process an image as the official code: PIL's bilinear resize, 0 to 1, ImageNet's mean and deviation."""
    resized = image.convert("RGB").resize(shape[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(resized).transpose(2, 0, 1).astype(np.float32) / 255
    return torch.from_numpy((pixels - IMAGENET_MEAN[:, None, None]) / IMAGENET_STD[:, None, None])


@pytest.mark.parametrize(("backend", "tolerance"), [("pil", 1e-6), ("torchvision", 2e-2)])
@pytest.mark.parametrize("size", [(97, 61), (30, 44), (40, 50), (211, 40)])
def test_pixels_are_the_official_ones(backend, tolerance, size):
    image = make_image(*size)
    ours = BACKENDS[backend](size=SMALL)(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(
        ours, by_hand(image, exact_shape(size[1], size[0], *SMALL.values())), rtol=0, atol=tolerance
    )


def test_padding_lies_right_and_below_and_is_masked(processor):
    images = [make_image(60, 40, seed=0), make_image(40, 60, seed=1), make_image(40, 40, seed=2)]
    batch = processor(images=images, return_tensors="pt")
    assert batch["pixel_values"].shape == (3, 3, 60, 60)
    assert batch["pixel_mask"].shape == (3, 60, 60)
    for image, values, mask in zip(images, batch["pixel_values"], batch["pixel_mask"]):
        expected = torch.zeros_like(mask)
        expected[: image.height, : image.width] = 1
        assert torch.equal(mask, expected)
        assert not values[:, expected == 0].any()
        alone = processor(images=image, return_tensors="pt")["pixel_values"][0]
        assert torch.equal(values[:, : image.height, : image.width], alone)


def gray_16_bit():
    """Return gray values over the whole 16-bit range, and the same in 8 bits."""
    wide = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    return wide, (wide // 257).astype(np.uint8)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV"])
def test_pil_modes_are_what_pil_makes_of_them(processor, mode):
    image = make_image(50, 40).convert(mode)
    values = processor(images=image, return_tensors="pt", **AS_IT_IS)["pixel_values"][0]
    assert np.array_equal(values.numpy(), np.asarray(image.convert("RGB")).transpose(2, 0, 1))


@pytest.mark.parametrize(
    "make",
    [
        Image.fromarray,
        lambda wide: Image.fromarray(wide.astype(np.int32)),
        lambda wide: Image.frombytes("I;16B", (50, 40), wide.astype(">u2").tobytes()),
        lambda wide: wide[..., None],
        lambda wide: np.stack([wide] * 3, axis=-1),
        lambda wide: np.stack([wide] * 3, axis=0),
    ],
    ids=["I;16", "I", "I;16B", "gray array", "array, channels last", "array, channels first"],
)
def test_16_bits_are_scaled_not_clipped(processor, make):
    wide, values_8_bit = gray_16_bit()
    values = processor(images=make(wide), return_tensors="pt", **AS_IT_IS)["pixel_values"][0]
    assert np.array_equal(values.numpy(), np.stack([values_8_bit] * 3))


@pytest.mark.parametrize(
    "convert",
    [np.array, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1)],
    ids=["array", "tensor"],
)
def test_arrays_and_tensors_are_images_too(processor, convert):
    image = make_image(64, 48)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    assert torch.equal(processor(images=convert(image), return_tensors="pt")["pixel_values"], expected)


# Images that are not 8-bit


@pytest.fixture
def warned(caplog):
    """Return what was warned about since the last call; warnings that are given once may be given again."""
    type(image_processing_dino_detr.logger).warning_once.cache_clear()
    caplog.set_level(logging.WARNING)

    def messages():
        texts = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return texts

    return messages


def as_tensor(pixels):
    return torch.from_numpy(pixels).permute(2, 0, 1)


KINDS = {"array": lambda pixels: pixels, "array, channels first": lambda pixels: pixels.transpose(2, 0, 1)}
KINDS |= {"tensor": as_tensor, "double": lambda pixels: as_tensor(pixels).double()}
KINDS |= {"half": lambda pixels: as_tensor(pixels).half()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", [{}, {"do_resize": False}, {"do_normalize": False}], ids=str)
def test_floats_in_0_to_1_are_not_rescaled_again(processor, kind, options, warned):
    pixels = np.array(make_image(64, 48))
    expected = processor(images=KINDS[kind](pixels), return_tensors="pt", **options)["pixel_values"]
    assert not warned()
    images = [KINDS[kind](pixels / np.float32(255))] * 2
    values = processor(images=images, return_tensors="pt", **options)["pixel_values"]
    tolerance = 1e-6 if processor.backend == "pil" else 2e-2  # floats are resized without rounding to 8 bits
    torch.testing.assert_close(values, expected.expand(2, -1, -1, -1).to(values.dtype), rtol=0, atol=tolerance)
    (message,) = warned()
    assert "do_rescale=False" in message


def test_floats_that_are_said_to_be_rescaled_need_no_warning(processor, warned):
    pixels = np.array(make_image(64, 48))
    expected = processor(images=pixels, return_tensors="pt")["pixel_values"]
    values = processor(images=(pixels / 255).astype(np.float32), do_rescale=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 if processor.backend == "pil" else 2e-2)
    assert not warned()


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int32, np.int64, np.int16])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_whole_values_to_255_are_levels_in_any_dtype(processor, dtype, kind, warned):
    pixels = np.array(make_image(64, 48))
    expected = processor(images=pixels, return_tensors="pt")["pixel_values"]
    values = processor(images=KINDS[kind](pixels.astype(dtype)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-6 if processor.backend == "pil" else 2e-2)
    assert not warned()


def test_each_image_of_a_batch_has_its_own_scale(processor, warned):
    pixels = np.array(make_image(64, 48))
    unit, levels, dark = pixels / np.float32(255), pixels.astype(np.float32), (pixels > 99).astype(np.float32)
    batch = processor(images=[pixels, unit, levels, dark], return_tensors="pt", do_resize=False)
    assert len(warned()) == 1
    first, second, third, nearly_black = batch["pixel_values"]
    for other in (second, third):
        torch.testing.assert_close(other, first, rtol=0, atol=1e-5)
    as_8_bit = processor(images=dark.astype(np.uint8), return_tensors="pt", do_resize=False)["pixel_values"][0]
    torch.testing.assert_close(nearly_black, as_8_bit, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [bool, np.float32])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_zeros_and_ones_alone_are_black_and_white(processor, dtype, kind, warned):
    mask = np.array(make_image(64, 48)) > 99
    white = processor(images=np.where(mask, 255, 0).astype(np.uint8), return_tensors="pt", do_resize=False)
    values = processor(images=KINDS[kind](mask.astype(dtype)), return_tensors="pt", do_resize=False)
    torch.testing.assert_close(values["pixel_values"], white["pixel_values"], rtol=0, atol=1e-5)
    assert len(warned()) == (dtype is not bool)


def test_black_needs_no_scale(processor, warned):
    processor(images=np.zeros((48, 64, 3), dtype=np.float32), return_tensors="pt")
    assert not warned()


def alter(value):
    pixels = np.array(make_image(64, 48)) / 255
    pixels[0, 0, 0] = value
    return pixels.astype(np.float32)


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize(
    "pixels",
    [alter(-0.5), alter(NAN), alter(INFINITY), alter(1.5), alter(300), np.full((48, 64, 3), 4095, dtype=np.int32)],
    ids=["negative", "NaN", "infinite", "beyond 1", "beyond 255", "integers beyond 255"],
)
def test_values_in_no_known_range_are_an_error(processor, pixels, kind):
    with pytest.raises(ValueError, match=r"the image has \w+ values from .* to .*, but do_rescale needs 0 to 255"):
        processor(images=KINDS[kind](pixels), return_tensors="pt")


@pytest.mark.parametrize("kind", ["array", "tensor"])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_values_that_are_not_finite_are_an_error_on_any_scale(processor, kind, value):
    with pytest.raises(ValueError, match="values of an image are NaN or infinite"):
        processor(images=KINDS[kind](alter(value)), return_tensors="pt", **AS_IT_IS)


def test_normalized_images_are_taken_as_they_are(processor, warned):
    normalized = np.random.default_rng(0).normal(size=(3, 48, 64)).astype(np.float32)
    values = processor(images=normalized, return_tensors="pt", **AS_IT_IS)["pixel_values"][0]
    assert np.array_equal(values.numpy(), normalized)
    assert not warned()


def test_a_rounding_error_above_1_does_not_change_the_scale(processor, warned):
    assert processor(images=alter(1.0005), return_tensors="pt")["pixel_values"].max() < 2.7
    assert len(warned()) == 1


@pytest.mark.parametrize(
    "make",
    [Image.fromarray, lambda wide: wide[..., None], lambda wide: torch.from_numpy(wide)[None]],
    ids=["PIL", "array", "tensor"],
)
def test_16_bits_that_use_12_are_said_to_be_dark(processor, make, warned):
    wide, _ = gray_16_bit()
    for scale, num_warnings in ((1, 0), (16, 1)):
        image = make(wide // scale)
        values = processor(images=image, return_tensors="pt", **AS_IT_IS)["pixel_values"][0]
        assert np.array_equal(values.numpy(), np.stack([wide // scale // 257] * 3))
        messages = warned()
        assert len(messages) == num_warnings
        assert all("nearly black: scale them yourself" in message for message in messages)


# Labels


def test_boxes_are_fractions_of_the_unpadded_image(processor):
    """DETR processors of transformers give fractions of the padded batch; DINO's predictions are of the image."""
    sizes, boxes = [(64, 48), (48, 96), (100, 30)], [[8, 12, 16, 6], [0, 0, 48, 96], [90, 10, 10, 20]]
    images = [make_image(*size) for size in sizes]
    targets = [annotate(box, image_id=index, area=10.0) for index, box in enumerate(boxes)]
    batch = processor(images=images, annotations=targets, return_tensors="pt")
    for index, (label, (width, height), (x, y, w, h)) in enumerate(zip(batch["labels"], sizes, boxes)):
        resized = exact_shape(height, width, *SMALL.values())
        expected = torch.tensor([[(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]])
        torch.testing.assert_close(label["boxes"], expected)
        assert label["orig_size"].tolist() == [height, width]
        assert label["size"].tolist() == list(resized)
        assert int(batch["pixel_mask"][index].sum()) == resized[0] * resized[1]
        assert label["image_id"].tolist() == [index]
        assert label["area"].item() == pytest.approx(10.0 * resized[0] * resized[1] / (height * width), rel=1e-5)


def test_a_single_target_needs_no_list(processor):
    target = annotate([8, 12, 16, 6])
    alone, listed = (
        one_label(processor, make_image(64, 48), target),
        one_label(processor, [make_image(64, 48)], [target]),
    )
    assert alone.keys() == listed.keys()
    assert all(torch.equal(alone[key], listed[key]) for key in alone)


def test_category_ids_become_labels(processor):
    target = annotate([1, 1, 9, 9], [2, 2, 9, 9], [3, 3, 9, 9], category_id=[90, 1, 90])
    label = one_label(processor, make_image(64, 48), target, category_id_to_label={1: 0, 90: 1})
    assert label["class_labels"].tolist() == [1, 0, 1]
    assert label["class_labels"].dtype == torch.int64
    assert [annotation["category_id"] for annotation in target["annotations"]] == [90, 1, 90], "the caller's stay his"
    assert one_label(processor, make_image(64, 48), target)["class_labels"].tolist() == [90, 1, 90]


def test_an_unknown_category_id_is_an_error_that_names_it_and_its_image(processor):
    target = annotate([1, 1, 9, 9], category_id=12, image_id=139)
    with pytest.raises(ValueError, match=r"image_id 139: category_id 12 is not in category_id_to_label, .*\[1, 90\]"):
        one_label(processor, make_image(64, 48), target, category_id_to_label={1: 0, 90: 1})


def test_area_and_iscrowd_may_be_missing(processor):
    label = one_label(processor, make_image(40, 40), annotate([1, 2, 10, 20]))
    assert label["area"].tolist() == [200.0]
    assert label["iscrowd"].tolist() == [0]


def test_crowds_are_dropped_without_a_warning(processor, caplog):
    target = annotate([1, 1, 9, 9], [2, 2, 9, 9], [3, 3, 9, 9], category_id=[0, 1, 2], iscrowd=[0, 1, 0])
    assert one_label(processor, make_image(64, 48), target)["class_labels"].tolist() == [0, 2]
    assert not caplog.records


@pytest.mark.parametrize(
    "box",
    [[5, 5, 0, 9], [5, 5, 9, -3], [64, 5, 9, 9], [5, -20, 9, 9], [NAN, 5, 9, 9], [5, 5, NAN, 9], [INFINITY, 5, 9, 9]],
    ids=["no width", "negative height", "right of the image", "above it", "NaN corner", "NaN side", "infinite"],
)
def test_boxes_without_area_are_dropped_with_a_warning(processor, box, caplog):
    target = annotate([1, 1, 9, 9], box, [3, 3, 9, 9], category_id=[0, 1, 2], image_id=42)
    with caplog.at_level(logging.WARNING, logger="hf_dino"):
        label = one_label(processor, make_image(64, 48), target)
    assert label["class_labels"].tolist() == [0, 2]
    assert label["boxes"].shape == (2, 4)
    assert len(label["area"]) == 2
    assert [record.getMessage() for record in caplog.records] == [
        "image_id 42: 1 of 3 boxes have no area inside the image and are dropped"
    ]


def test_boxes_that_reach_out_are_clipped(processor, caplog):
    label = one_label(processor, make_image(64, 48), annotate([-16, -12, 48, 36], [32, 24, 1000, 1000]))
    torch.testing.assert_close(label["boxes"], torch.tensor([[0.25, 0.25, 0.5, 0.5], [0.75, 0.75, 0.5, 0.5]]))
    assert not caplog.records


def test_no_annotations_are_empty_labels_of_the_usual_shape(processor):
    batch = processor(
        images=[make_image(64, 48), make_image(48, 64)],
        annotations=[annotate(image_id=1), annotate([1, 1, 9, 9], image_id=2)],
        return_tensors="pt",
    )
    empty, full = batch["labels"]
    assert empty["boxes"].shape == (0, 4)
    assert empty["class_labels"].shape == empty["area"].shape == (0,)
    assert {key: value.dtype for key, value in empty.items()} == {key: value.dtype for key, value in full.items()}


@pytest.mark.parametrize(
    ("targets", "message"),
    [([], "number of images"), ([annotate()] * 2, "number of images"), ([{"image_id": 1}], "annotations")],
    ids=["none", "too many", "not annotations"],
)
def test_annotations_that_do_not_fit_are_an_error(processor, targets, message):
    with pytest.raises(ValueError, match=message):
        processor(images=[make_image(64, 48)], annotations=targets, return_tensors="pt")


@pytest.mark.parametrize(
    "box",
    [None, "1 2 3 4", [1, 2, 3], [1, 2, 3, 4, 5], ["1", "2", "3", "4"], [1, 2, 3, None], [[1, 2, 3, 4]], 4, []],
    ids=repr,
)
def test_a_box_that_is_not_4_numbers_is_an_error_that_names_its_image(processor, box):
    target = annotate([1, 1, 9, 9], box, image_id=139)
    with pytest.raises(
        ValueError, match=r"^image_id 139: an annotation must have .* a bbox of 4 numbers, got [^\n]*$"
    ):
        one_label(processor, make_image(64, 48), target)


@pytest.mark.parametrize("annotation", [None, {}, {"bbox": [1, 1, 9, 9]}, {"category_id": 1}, [1, 1, 9, 9]], ids=repr)
def test_an_annotation_that_lacks_an_entry_is_an_error_that_names_its_image(processor, annotation):
    with pytest.raises(ValueError, match=r"^image_id 139: an annotation must have a category_id and a bbox"):
        one_label(processor, make_image(64, 48), {"image_id": 139, "annotations": [annotation]})


@pytest.mark.parametrize("category_id", [None, "1", 1.5, True, NAN, [1]], ids=repr)
@pytest.mark.parametrize("mapping", [None, {1: 0}], ids=["labels", "mapped"])
def test_a_category_id_must_be_an_integer(processor, category_id, mapping):
    target = {"image_id": 7, "annotations": [{"bbox": [1, 1, 9, 9], "category_id": category_id}]}
    with pytest.raises(ValueError, match=r"^image_id 7: a category_id must be an integer, got "):
        one_label(processor, make_image(64, 48), target, category_id_to_label=mapping)


@pytest.mark.parametrize("category_id", [3, 3.0, np.int64(3), torch.tensor(3)], ids=repr)
def test_an_integer_may_be_of_any_type(processor, category_id):
    label = one_label(processor, make_image(64, 48), annotate([1, 1, 9, 9], category_id=category_id))
    assert label["class_labels"].tolist() == [3]


@pytest.mark.parametrize("image_id", ["a.jpg", None, 1.5])
def test_an_image_id_must_be_an_integer(processor, image_id):
    with pytest.raises(ValueError, match=r"^image_id must be an integer, got "):
        one_label(processor, make_image(64, 48), annotate([1, 1, 9, 9], image_id=image_id))


def test_null_is_no_area_and_no_crowd_and_text_may_be_a_number(processor, caplog):
    target = annotate([1, 1, 9, 10], [2, 2, 9, 9], [3, 3, 9, 9], area=None, iscrowd=[None, "1", "0"])
    label = one_label(processor, make_image(40, 40), target)
    assert label["area"].tolist() == [90.0, 81.0]
    assert not caplog.records


# Detections


def random_outputs(batch_size=2, num_queries=20, num_labels=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_queries, num_labels, generator=generator).to(dtype)
    centers = torch.rand(batch_size, num_queries, 2, generator=generator)
    sides = torch.rand(batch_size, num_queries, 2, generator=generator) * 0.5
    return DinoDetrObjectDetectionOutput(logits=logits, pred_boxes=torch.cat([centers, sides], dim=-1))


def detect_by_hand(logits, boxes, threshold, size, top_k):
    """One image's detections as a sorted list of (score, label, box), one query and class at a time."""
    height, width = size
    found = []
    for query_logits, (x, y, w, h) in zip(logits.double().tolist(), boxes.tolist()):
        corners = [(x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height]
        found += [(1 / (1 + np.exp(-logit)), label, corners) for label, logit in enumerate(query_logits)]
    return [each for each in sorted(found, key=lambda each: -each[0])[:top_k] if each[0] > threshold]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("threshold", "top_k"), [(0.0, 300), (0.0, 7), (0.6, 300), (0.6, 7), (1.0, 300)])
def test_detections_are_the_best_pairs_of_query_and_class(processor, threshold, top_k, dtype):
    outputs, sizes = random_outputs(), [(480, 640), (37, 900)]
    outputs.logits = outputs.logits.to(dtype)
    detections = processor.post_process_object_detection(outputs, threshold, sizes, top_k=top_k)
    for image_index, detection in enumerate(detections):
        logits, boxes = outputs.logits[image_index], outputs.pred_boxes[image_index]
        expected = detect_by_hand(logits, boxes, threshold, sizes[image_index], top_k)
        assert {name: value.shape for name, value in detection.items()} == {
            "scores": (len(expected),),
            "labels": (len(expected),),
            "boxes": (len(expected), 4),
        }
        torch.testing.assert_close(detection["scores"], torch.tensor([float(score) for score, _, _ in expected]))
        if dtype == torch.float32:  # in half precision many scores are equal, in any order
            assert detection["labels"].tolist() == [label for _, label, _ in expected]
            corners = torch.tensor([box for _, _, box in expected]).reshape(-1, 4)
            torch.testing.assert_close(detection["boxes"], corners, rtol=1e-4, atol=1e-3)


def test_target_sizes_may_be_a_list_or_a_tensor_or_left_out(processor):
    outputs, sizes = random_outputs(), [(480, 640), (37, 900)]
    listed = processor.post_process_object_detection(outputs, 0.0, sizes)
    as_tensor = processor.post_process_object_detection(outputs, 0.0, torch.tensor(sizes))
    fractions = processor.post_process_object_detection(outputs, 0.0)
    for (height, width), one, other, fraction in zip(sizes, listed, as_tensor, fractions):
        assert torch.equal(one["boxes"], other["boxes"])
        torch.testing.assert_close(fraction["boxes"] * torch.tensor([width, height, width, height]), one["boxes"])


@pytest.mark.parametrize("sizes", [[(480, 640)], [(480, 640)] * 3, [480, 640], torch.zeros(2, 3)])
def test_target_sizes_of_the_wrong_shape_are_an_error(processor, sizes):
    with pytest.raises(ValueError, match=r"target_sizes must be .* each of the 2 images, got a shape of"):
        processor.post_process_object_detection(random_outputs(), target_sizes=sizes)


@pytest.mark.parametrize("value", [NAN, INFINITY])
@pytest.mark.parametrize("name", ["logits", "pred_boxes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_outputs_that_are_not_finite_are_an_error_at_any_threshold(processor, name, value, dtype):
    outputs = random_outputs()
    outputs.logits = outputs.logits.to(dtype)
    outputs[name][1, -1, 0] = value
    for threshold in (0.0, 0.5, 1.0):
        with pytest.raises(FloatingPointError, match=r"scores or boxes are NaN or infinite: fp16 .*bf16.*checkpoint"):
            processor.post_process_object_detection(outputs, threshold, [(480, 640)] * 2, top_k=3)


def test_a_class_can_be_excluded_by_minus_infinity(processor):
    outputs = random_outputs()
    outputs.logits[..., 2] = -INFINITY
    for detections in processor.post_process_object_detection(outputs, 0.0):
        assert 2 not in detections["labels"].tolist()


def test_nms_leaves_out_what_overlaps_a_better_one_of_its_class(processor):
    outputs = random_outputs(num_queries=60, num_labels=2)
    everything = processor.post_process_object_detection(outputs, 0.0)
    thinned = processor.post_process_object_detection(outputs, 0.0, nms_iou_threshold=0.4)
    for all_of_them, kept in zip(everything, thinned):
        assert (kept["scores"].diff() <= 0).all()
        assert 0 < len(kept["scores"]) < len(all_of_them["scores"])
        overlap = box_iou(all_of_them["boxes"], kept["boxes"]) > 0.4
        rival = overlap & (all_of_them["labels"][:, None] == kept["labels"])
        rival &= all_of_them["scores"][:, None] <= kept["scores"]
        # each detection has a kept rival that is at least as good: a better one, or for kept ones only itself
        assert rival.any(dim=1).all()
        assert int(rival.any(dim=0).sum()) == len(kept["scores"])
        overlap_of_kept = box_iou(kept["boxes"], kept["boxes"]).fill_diagonal_(0)
        overlap_of_kept[kept["labels"][:, None] != kept["labels"]] = 0
        assert (overlap_of_kept <= 0.4).all()


def test_labels_and_detections_are_inverse(processor):
    """A prediction that equals the label comes back as the annotation it was made of."""
    sizes, boxes = [(64, 48), (48, 96)], [[8, 12, 16, 6], [4, 3, 30, 90]]
    targets = [annotate(box, category_id=3) for box in boxes]
    labels = processor([make_image(*size) for size in sizes], annotations=targets, return_tensors="pt")["labels"]
    outputs = DinoDetrObjectDetectionOutput(
        logits=torch.stack([torch.full((1, 5), -9.0).index_fill_(1, label["class_labels"], 9.0) for label in labels]),
        pred_boxes=torch.stack([label["boxes"] for label in labels]),
    )
    target_sizes = torch.stack([label["orig_size"] for label in labels])
    for box, detection in zip(boxes, processor.post_process_object_detection(outputs, 0.5, target_sizes)):
        assert detection["labels"].tolist() == [3]
        torch.testing.assert_close(box_convert(detection["boxes"], "xyxy", "xywh"), torch.tensor([box]).float())


# Saving


@pytest.mark.parametrize("saved_as", BACKENDS)
@pytest.mark.parametrize("loaded_as", BACKENDS)
def test_each_backend_loads_what_the_other_saved(saved_as, loaded_as, tmp_path):
    BACKENDS[saved_as](size=SMALL, image_mean=[0.5, 0.5, 0.5]).save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path, backend=loaded_as)
    assert type(loaded) is BACKENDS[loaded_as]
    expected = BACKENDS[loaded_as](size=SMALL, image_mean=[0.5, 0.5, 0.5])
    image = make_image(97, 61)
    for name, value in expected(images=image, return_tensors="pt").items():
        assert torch.equal(loaded(images=image, return_tensors="pt")[name], value)


def test_torchvision_is_the_default_and_the_published_size_too(tmp_path):
    DinoDetrImageProcessor().save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is DinoDetrImageProcessor
    assert (loaded.size["shortest_edge"], loaded.size["longest_edge"]) == (800, 1333)
