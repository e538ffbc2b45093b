"""Optimiser settings, and what is frozen."""

import pytest
import torch
from torch import nn

from conftest import tiny_model
from hf_dino.data import InputError
from hf_dino.training import (
    drop_steps,
    freeze_stem,
    learning_rate_factor,
    parameter_groups,
    parse_size,
    set_learning_rate,
)


class Detector(nn.Module):
    """Parameters named as in the model."""

    def __init__(self):
        super().__init__()
        self.model = nn.ModuleDict(
            {
                "backbone": nn.ModuleDict({"body": nn.Linear(2, 2), "projections": nn.Linear(2, 2)}),
                "head": nn.Linear(2, 1),
            }
        )
        self.model["backbone"]["body"].bias.requires_grad_(False)


def test_only_the_backbone_itself_learns_slower():
    model = Detector()
    others, backbone = parameter_groups(model, 1e-3, 0.1)
    assert (others["lr"], backbone["lr"]) == (1e-3, pytest.approx(1e-4))
    body, projections = model.model["backbone"]["body"], model.model["backbone"]["projections"]
    assert [id(p) for p in backbone["params"]] == [id(body.weight)], "and what is frozen is in no group"
    assert id(projections.weight) in {id(p) for p in others["params"]}
    assert len(others["params"]) == 4


def test_schedule():
    drops = drop_steps([0.5, 11], total_steps=1200, steps_per_epoch=100)
    assert drops == [600, 1100]
    factors = [learning_rate_factor(step, drop_steps=drops, warmup_steps=10) for step in (0, 9, 10, 599, 600, 1100)]
    assert factors == pytest.approx([0.1, 1, 1, 1, 0.1, 0.01])
    optimizer = torch.optim.AdamW(parameter_groups(Detector(), 1e-3, 0.1))
    for _ in range(2):  # from the initial rate, not from the last
        set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-5])


@pytest.mark.parametrize("pretrained", [True, False])
def test_the_stem_of_a_pretrained_resnet_is_left_alone(pretrained):
    model = tiny_model(freeze_batch_norm=pretrained)
    trained_before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze_stem(model)
    frozen = trained_before - {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    first_layers = ("model.backbone.body.embedder.", "model.backbone.body.encoder.stages.0.")
    assert frozen == ({name for name in trained_before if name.startswith(first_layers)} if pretrained else set())
    assert bool(frozen) == pretrained


def test_image_sizes():
    assert parse_size(["800"]) == {"shortest_edge": 800, "longest_edge": 1333}
    assert parse_size(["480", "600"]) == {"shortest_edge": 480, "longest_edge": 600}
    assert parse_size(["192x256"]) == {"height": 192, "width": 256}


@pytest.mark.parametrize("size", ["axb", "8x", "8x8x8", "big", "800 1333 2000", "8x8 9"])
def test_what_is_no_image_size(size):
    with pytest.raises(InputError, match=f"--image-size {size}: expected SHORTEST, SHORTEST LONGEST or HEIGHTxWIDTH"):
        parse_size(size.split())


@pytest.mark.parametrize("size", ["0", "-5", "800 600", "0x8", "8x-8"])
def test_impossible_image_sizes(size):
    with pytest.raises(InputError, match=f"--image-size {size}: must be positive, and LONGEST not less than SHORTEST"):
        parse_size(size.split())
