from itertools import permutations

import pytest
import torch

from helpers.models import make_labels, tiny_config
from hf_dino.boxes_dino_detr import generalized_box_iou
from hf_dino.loss_dino_detr import (
    check_labels,
    compute_losses,
    dino_detr_loss,
    get_num_boxes,
    hungarian_match,
    matching_cost,
    pad_targets,
)


def make_predictions(batch_size, num_layers=3, num_queries=6, num_labels=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch_size, num_layers, num_queries, num_labels, generator=generator, dtype=torch.float64)
    boxes = torch.rand(batch_size, num_layers, num_queries, 4, generator=generator, dtype=torch.float64) * 0.4 + 0.2
    return logits.requires_grad_(), boxes.requires_grad_()


def slow_cost(logits, box, class_label, target, config):
    """Compute the cost of one query and one object as in the papers of DETR and DINO."""
    p = logits.sigmoid()[class_label].item()
    alpha, gamma = config.focal_alpha, config.focal_gamma
    focal = (
        alpha * (1 - p) ** gamma * -torch.tensor(p + 1e-8).log()
        - (1 - alpha) * p**gamma * -torch.tensor(1 - p + 1e-8).log()
    )
    overlap = generalized_box_iou(box, target)
    return config.class_cost * focal + config.bbox_cost * (box - target).abs().sum() - config.giou_cost * overlap


def test_matching_cost_is_the_papers():
    config = tiny_config()
    logits, boxes = make_predictions(1)
    label = make_labels(4)[0]
    cost = matching_cost(logits[0], boxes[0], label["class_labels"], label["boxes"], config)
    assert cost.shape == (3, 6, 4)
    for layer, query, index in [(0, 0, 0), (2, 5, 3), (1, 3, 2)]:
        expected = slow_cost(
            logits[0, layer, query],
            boxes[0, layer, query],
            label["class_labels"][index],
            label["boxes"][index],
            config,
        )
        torch.testing.assert_close(cost[layer, query, index], expected, rtol=1e-5, atol=1e-5, check_dtype=False)


@pytest.mark.parametrize("counts", [(3, 2), (0, 3), (3, 0), (0, 0), (1, 1)])
def test_match_is_the_cheapest_of_all_assignments(counts):
    config = tiny_config()
    logits, boxes = make_predictions(2)
    labels = make_labels(*counts)
    object_index = hungarian_match(logits, boxes, labels, config)
    assert object_index.shape == (2, 3, 6)
    for image, label in enumerate(labels):
        cost = matching_cost(logits[image], boxes[image], label["class_labels"], label["boxes"], config)
        for layer in range(3):
            count = counts[image]
            cheapest = min(
                sum(cost[layer, query, index].item() for index, query in enumerate(queries))
                for queries in permutations(range(6), count)
            )
            chosen = [(query, index) for query, index in enumerate(object_index[image, layer].tolist()) if index >= 0]
            assert sorted(index for _, index in chosen) == list(range(count))
            assert sum(cost[layer, query, index].item() for query, index in chosen) == pytest.approx(cheapest)


def test_match_of_an_image_does_not_depend_on_its_batch():
    config = tiny_config()
    logits, boxes = make_predictions(2)
    labels = make_labels(3, 2)
    together = hungarian_match(logits, boxes, labels, config)
    for image in range(2):
        alone = hungarian_match(logits[image : image + 1], boxes[image : image + 1], [labels[image]], config)
        assert torch.equal(alone[0], together[image])


def test_of_more_objects_than_queries_some_stay_without():
    logits, boxes = make_predictions(1)
    object_index = hungarian_match(logits, boxes, make_labels(10), tiny_config())
    assert (object_index >= 0).all() and all(len(set(layer.tolist())) == 6 for layer in object_index[0])


def test_match_survives_an_overflow_for_the_loss_to_report():
    logits, boxes = make_predictions(1)
    with torch.no_grad():
        logits[0, 0, 0] = float("nan")
    object_index = hungarian_match(logits, boxes, make_labels(2), tiny_config())
    targets = pad_targets(make_labels(2), 5)
    losses = compute_losses(logits, boxes, object_index, targets, torch.tensor(1.0), tiny_config())
    assert losses["loss_ce"].isnan().any()


def test_matching_takes_one_transfer_for_all_layers_and_images(monkeypatch):
    transfers = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: transfers.append(tensor.shape) or to_host(tensor))
    logits, boxes = make_predictions(3, num_layers=7)
    hungarian_match(logits, boxes, make_labels(2, 0, 4), tiny_config())
    assert transfers == [(7 * 6 * (2 + 0 + 4),)]


def slow_focal(logits, targets, alpha, gamma):
    p = logits.sigmoid()
    cross_entropy = -(targets * p.log() + (1 - targets) * (1 - p).log())
    p_of_truth = targets * p + (1 - targets) * (1 - p)
    return (targets * alpha + (1 - targets) * (1 - alpha)) * (1 - p_of_truth) ** gamma * cross_entropy


@pytest.mark.parametrize("counts", [(3, 2), (0, 3), (0, 0)])
def test_set_losses_are_the_sums_over_queries_and_objects(counts):
    config, num_boxes = tiny_config(), torch.tensor(5.0, dtype=torch.float64)
    logits, boxes = make_predictions(2)
    labels = make_labels(*counts)
    object_index = hungarian_match(logits, boxes, labels, config)
    losses = compute_losses(logits, boxes, object_index, pad_targets(labels, 5), num_boxes, config)
    for layer in range(3):
        expected = {"loss_ce": 0.0, "loss_bbox": 0.0, "loss_giou": 0.0}
        for image, label in enumerate(labels):
            one_hot = torch.zeros(6, 5, dtype=torch.float64)
            for query, index in enumerate(object_index[image, layer].tolist()):
                if index < 0:
                    continue
                one_hot[query, label["class_labels"][index]] = 1
                predicted, target = boxes[image, layer, query], label["boxes"][index]
                expected["loss_bbox"] += (predicted - target).abs().sum().item() / 5
                expected["loss_giou"] += (1 - generalized_box_iou(predicted, target)).item() / 5
            focal = slow_focal(logits[image, layer], one_hot, config.focal_alpha, config.focal_gamma)
            expected["loss_ce"] += focal.sum().item() / 5
        for kind, value in expected.items():
            assert losses[kind][layer].item() == pytest.approx(value, rel=1e-6, abs=1e-9)


def loss_of(labels, config=None, **changes):
    config = config or tiny_config()
    logits, boxes = make_predictions(len(labels), num_layers=4)  # an encoder's and three decoder layers'
    denoising_logits, denoising_boxes = make_predictions(len(labels), num_queries=4, seed=1)
    arguments = {
        "logits": logits,
        "pred_boxes": boxes,
        "denoising_logits": denoising_logits,
        "denoising_boxes": denoising_boxes,
        "denoising_object_index": torch.tensor(
            [[0, -1, 0, -1] if len(label["boxes"]) else [-1] * 4 for label in labels]
        ),
        "num_denoising_groups": 2,
        "labels": labels,
        "config": config,
        "num_boxes": get_num_boxes(labels, logits.device, average=True),
    }
    loss, terms = dino_detr_loss(**arguments | changes)
    return loss, terms, (logits, boxes, denoising_logits, denoising_boxes)


def test_terms_are_named_and_add_up_to_the_loss():
    config = tiny_config()
    loss, terms, _ = loss_of(make_labels(2, 3))
    suffixes = ["", "_0", "_1", "_encoder", "_denoising", "_denoising_0", "_denoising_1"]
    assert set(terms) == {f"loss_{kind}{suffix}" for kind in ("ce", "bbox", "giou") for suffix in suffixes}
    weights = {"ce": config.cls_loss_coefficient, "bbox": config.bbox_loss_coefficient}
    weights["giou"] = config.giou_loss_coefficient
    expected = sum(weights[name.split("_")[1]] * value for name, value in terms.items())
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0)])
def test_every_prediction_gets_a_finite_gradient(counts):
    loss, terms, predictions = loss_of(make_labels(*counts))
    gradients = torch.autograd.grad(loss, predictions)
    assert all(gradient.isfinite().all() for gradient in gradients)
    if not sum(counts):
        assert all(value == 0 for name, value in terms.items() if "bbox" in name or "giou" in name)


def test_no_denoising_queries_cost_nothing():
    no_queries = make_predictions(2, num_queries=0)
    index = torch.zeros(2, 0, dtype=torch.int64)
    names = ("denoising_logits", "denoising_boxes", "denoising_object_index")
    _, terms, _ = loss_of(make_labels(2, 3), **dict(zip(names, (*no_queries, index))))
    assert all(value == 0 for name, value in terms.items() if "denoising" in name)


def test_perfect_boxes_cost_nothing_and_the_matcher_finds_them():
    config = tiny_config()
    label = make_labels(3)[0]
    boxes = torch.rand(1, 1, 6, 4) * 0.1 + 0.8
    logits = torch.full((1, 1, 6, 5), -8.0)
    for query, index in ((4, 0), (1, 1), (3, 2)):
        boxes[0, 0, query] = label["boxes"][index]
        logits[0, 0, query, label["class_labels"][index]] = 8.0
    object_index = hungarian_match(logits, boxes, [label], config)
    assert object_index[0, 0].tolist() == [-1, 1, -1, 2, 0, -1]
    losses = compute_losses(logits, boxes, object_index, pad_targets([label], 5), torch.tensor(3.0), config)
    assert losses["loss_bbox"].item() == 0 and losses["loss_giou"].item() < 1e-3 and losses["loss_ce"].item() < 1e-3


def test_count_is_of_all_images_and_at_least_one():
    assert get_num_boxes(make_labels(2, 3), torch.device("cpu"), average=True) == 5
    assert get_num_boxes(make_labels(0, 0), torch.device("cpu"), average=True) == 1


def test_the_loss_of_an_effective_batch_is_the_mean_over_its_batches():
    labels = make_labels(2, 5, 0, 1)
    queries = torch.tensor([[0, -1, 0, -1], [0, -1, 0, -1], [-1] * 4, [0, -1, 0, -1]])
    whole, _, predictions = loss_of(labels, denoising_object_index=queries)
    names = ("logits", "pred_boxes", "denoising_logits", "denoising_boxes")
    parts = []
    for first in (0, 2):
        part = {name: tensor[first : first + 2] for name, tensor in zip(names, predictions)}
        index = queries[first : first + 2]
        parts.append(loss_of(labels[first : first + 2], denoising_object_index=index, num_boxes=8 / 2, **part)[0])
    torch.testing.assert_close(sum(parts) / 2, whole, rtol=1e-12, atol=0)


def corrupt(labels, image, **entries):
    return [label | entries if index == image else label for index, label in enumerate(labels)]


BOX = torch.tensor([[0.5, 0.5, 0.2, 0.2]])


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"class_labels": torch.tensor([5])}, r"labels\[1\] \(image_id \[42\]\): class_labels\[0\] is 5, .* 5 labels"),
        ({"class_labels": torch.tensor([-1])}, r"labels\[1\] .*: class_labels\[0\] is -1"),
        ({"boxes": BOX * float("nan")}, r"labels\[1\] \(image_id \[42\]\): boxes\[0\] is \[nan"),
        ({"boxes": BOX * float("inf")}, r"boxes\[0\] is \[inf"),
        ({"boxes": BOX * 640}, r"must be center x, center y, width, height as fractions of the image"),
        ({"boxes": BOX * torch.tensor([1, 1, 0, 1])}, "with positive width and height"),
        ({"class_labels": torch.tensor([1.0])}, r"labels\[1\]: class_labels must be integers, got torch.float32"),
        ({"boxes": BOX[0]}, r"boxes must have the shape \(number of class_labels, 4\), got \(4,\) for 1"),
        ({"boxes": torch.cat([BOX, BOX])}, r"got \(2, 4\) for 1 class_labels"),
        ({"boxes": BOX[:, :3]}, r"got \(1, 3\) for 1 class_labels"),
        ({"boxes": BOX.tolist()}, r"labels\[1\]: boxes must be a tensor, got list"),
        ({"class_labels": [1]}, r"labels\[1\]: class_labels must be a tensor, got list"),
        ({"class_labels": torch.tensor([[1]])}, r"labels\[1\]: class_labels must have the shape .*, got \(1, 1\)"),
        ({"class_labels": torch.tensor(1)}, r"labels\[1\]: class_labels must have the shape .*, got \(\)"),
        ({"class_labels": torch.tensor([True])}, r"class_labels must be integers, got torch.bool; .*\.long\(\)"),
        ({"class_labels": torch.tensor([1], dtype=torch.int32)}, r"got torch.int32; convert them by \.long\(\)"),
        ({"boxes": BOX.to("meta")}, r"labels\[1\]: boxes is on meta, but pixel_values is on cpu; move"),
        ({"class_labels": torch.tensor([1], device="meta")}, r"labels\[1\]: class_labels is on meta"),
    ],
)
def test_invalid_labels_are_reported_by_image(entries, message):
    labels = corrupt(make_labels(2, 1), 1, **{"image_id": torch.tensor([42])} | entries)
    with pytest.raises(ValueError, match=message):
        check_labels(labels, batch_size=2, num_labels=5, device=torch.device("cpu"))


def test_missing_labels_are_reported():
    with pytest.raises(ValueError, match="labels must have one entry per image: got 1 for 2 images"):
        check_labels(make_labels(1), batch_size=2, num_labels=5)
    with pytest.raises(ValueError, match=r"labels\[0\] must have 'class_labels' and 'boxes', got \['boxes'\]"):
        check_labels([{"boxes": BOX}], batch_size=1, num_labels=5)
    with pytest.raises(ValueError, match=r"labels\[0\] must have 'class_labels' and 'boxes', got NoneType"):
        check_labels([None], batch_size=1, num_labels=5)
    with pytest.raises(ValueError, match=r"labels must be a list with one dict per image, got one dict with"):
        check_labels(make_labels(1)[0], batch_size=2, num_labels=5)


def test_valid_labels_pass():
    touching = torch.cat([BOX, torch.tensor([[0.5, 0.5, 1.0, 1.0]])])
    check_labels(
        [{"class_labels": torch.tensor([0, 4]), "boxes": touching}, *make_labels(0)], batch_size=2, num_labels=5
    )
