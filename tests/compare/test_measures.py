"""Measures look at a model from outside: they are what they are said to be, and leave no trace."""

import json

import numpy as np
import pytest
import torch

from hf_dino.compare import matching_changes
from hf_dino.compare.measures import Probe, count_found, count_right, read_measures, shares
from hf_dino.denoising_dino_detr import DinoDetrDenoising
from hf_dino.detectors import detect, model_class_of
from hf_dino.family import FAMILY, tiny_fields


LABELS = [
    {
        "image_id": torch.tensor([7]),
        "class_labels": torch.tensor([0, 2]),
        "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]]),
    },
    {"image_id": torch.tensor([9]), "class_labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)},
]


def batch():
    images = torch.randn(2, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": images, "pixel_mask": torch.ones(2, 128, 128, dtype=torch.int64), "labels": LABELS}


def make_model(row):
    torch.manual_seed(0)
    config = FAMILY[row].make_config(**tiny_fields(row), id2label={0: "a", 1: "b", 2: "c"})
    return model_class_of(config)(config).eval()


@pytest.fixture(scope="module", params=FAMILY)
def model(request):
    return make_model(request.param), FAMILY[request.param]


@torch.no_grad()
def probe(model):
    with Probe(model) as each:
        return list(each.run(batch()))


def test_each_row_of_the_family_is_measured(model):
    network, member = model
    first, second = probe(network)
    assert [first[0], second[0]] == [7, 9]
    assert sorted(index for index in first[1] if index >= 0) == [0, 1], "each object is matched to one query"
    assert set(second[1]) == {-1}
    counts = first[2]
    has_denoising = any(isinstance(module, DinoDetrDenoising) for module in network.modules())
    assert has_denoising == (counts.get("denoising_queries", 0) > 0)
    assert ("recall_points" in counts) == (member.name != "DETR")
    assert second[2]["objects"] == second[2].get("denoising_queries", 0) == 0


def test_measuring_leaves_no_trace(model):
    network, _ = model
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        expected = detect(network, network.config, batch()).logits
    state = torch.get_rng_state()
    with torch.random.fork_rng(devices=[]):
        assert probe(network) == probe(network), "the same noise each time"
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert not any(module.training for module in network.modules())
    hooks = [*network.get_submodule("model")._forward_hooks, *network.get_submodule("model.decoder")._forward_hooks]
    with torch.no_grad():
        assert torch.equal(detect(network, network.config, batch()).logits, expected)
    assert not hooks


@pytest.mark.parametrize("row", ["dino_4scale", "dn_deformable_detr", "dn_detr"])
def test_a_perfect_decoder_is_right_about_all_copies_and_noise_alone_about_some(row):
    """With the answer in place of the prediction, all positive queries are right; without noise, all are before."""
    network = make_model(row)
    answers = {}

    def tell(model, output):
        objects = instance.seen["queries"].object_index[0].clamp(min=0)
        logits = torch.nn.functional.one_hot(LABELS[0]["class_labels"][objects], 3).float()
        boxes = LABELS[0]["boxes"][objects]
        answers["queries"] = int((instance.seen["queries"].object_index[0] >= 0).sum())
        return logits.expand(2, -1, -1), boxes.expand(2, -1, -1)

    with torch.no_grad(), Probe(network) as instance:
        instance.reading = instance.reading._replace(denoised=tell)
        first, _ = instance.run(batch())
    counts = first[2]
    assert counts["denoising_after"] == counts["denoising_queries"] == answers["queries"]
    assert 0 < counts["denoising_before"] < counts["denoising_queries"]
    for module in network.modules():
        if isinstance(module, DinoDetrDenoising):
            module.label_noise_probability, module.box_noise_scale = 0.0, 0.0
    counts = probe(network)[0][2]
    assert counts["denoising_before"] == counts["denoising_queries"]


@pytest.mark.parametrize("size", [2, 4])
def test_found_objects_are_those_of_a_slow_count(size):
    random = torch.Generator().manual_seed(size)
    references = torch.rand(30, size, generator=random)
    boxes = torch.rand(9, 4, generator=random) * 0.4 + 0.1
    found = count_found(references, boxes)
    inside = 0
    for x, y, w, h in boxes.tolist():
        inside += any(abs(r[0] - x) <= w / 2 and abs(r[1] - y) <= h / 2 for r in references.tolist())
    assert found["recall_points"] == inside
    assert ("recall_boxes" in found) == (size == 4)
    assert count_found(boxes, boxes) == {"recall_points": 9, "recall_boxes": 9}
    assert set(count_found(references, boxes[:0]).values()) == {0}
    assert count_found(references[:, :0], boxes) == {}


def test_right_queries_have_class_and_box():
    label = LABELS[0]
    objects = torch.tensor([0, 1, 1, -1, -2])
    classes = label["class_labels"][objects.clamp(min=0)]
    boxes = label["boxes"][objects.clamp(min=0)]
    assert count_right(classes, boxes, objects, label) == 3, "negative queries and empty slots do not count"
    assert count_right(classes + torch.tensor([1, 0, 0, 0, 0]), boxes, objects, label) == 2
    assert count_right(classes, boxes * torch.tensor([1, 1, 0.6, 0.6]), objects, label) == 0


def test_instability_counts_each_query_that_changed():
    matched = np.array([[0, 1, -1, -1], [-1, 0, -1, -1]])
    assert matching_changes(None, matched) is None
    assert matching_changes(matched, matched) == 0
    assert matching_changes(matched, np.roll(matched, 2, axis=1)) == (4 + 2) / 2, "twice the objects at most"
    assert matching_changes(matched, matched[:, [1, 0, 2, 3]]) == (2 + 2) / 2


def test_shares_of_nothing_are_unknown():
    assert set(shares({"objects": 0, "recall_points": 0}).values()) == {None}


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        "[]\n",
        '{"step": 4}\n',
        '{"step": "x", "ap": 1}\n',
        '{"step": 4, "ap": null}\n',
        '{"step": 4, "ap": 0.5, "ap50": "x"}\n',
    ],
)
def test_rows_up_to_a_damaged_one_are_read(tmp_path, damage):
    row = {"step": 2, "ap": 0.5, "recall_boxes": None}
    (tmp_path / "measures.jsonl").write_text(json.dumps(row) + "\n" + damage)
    assert read_measures(tmp_path) == [row]
