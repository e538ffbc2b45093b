"""The watch on the loss: what it averages, when it stops a run, and that it finds the cause."""

import copy
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from helpers.models import make_labels, tiny_model
from hf_dino.training.loss_monitor import LossMonitor, RandomState, find_first_nonfinite


INF, NAN = float("inf"), float("nan")


class SavedState:
    """Counts its calls, and takes the random number that the checkpoint would have."""

    def __init__(self):
        self.calls = 0

    def __call__(self):
        self.calls += 1
        self.number = torch.rand(1).item()
        return "saved in a safe place"


def make_monitor(model=None, with_scaler=False, **options):
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu") if with_scaler else None
    return LossMonitor(accelerator, model or tiny_model().train(), options.pop("on_failure", SavedState()), **options)


def batch_losses(value):
    terms = {name: torch.tensor(value) for name in ("loss_ce", "loss_bbox", "loss_giou", "loss_ce_0")}
    return torch.tensor(3 * value), terms


def make_batch(*image_ids, seed=0):
    pixel_values = torch.randn(len(image_ids), 3, 64, 96, generator=torch.Generator().manual_seed(seed))
    labels = make_labels(*[2] * len(image_ids))
    for label, image_id in zip(labels, image_ids, strict=True):
        label["image_id"] = torch.tensor([image_id])
    return {"pixel_values": pixel_values, "labels": labels}


def check(monitor, *values, step=0, norm=None):
    for value in values:
        monitor.begin(make_batch(step + 1))
        monitor.add(*batch_losses(value))
    return monitor.check(step, None if norm is None else torch.tensor(norm))


def test_monitor_averages_and_forgets():
    monitor = make_monitor()
    assert check(monitor, 1.0, 2.0) == {"loss": 4.5, "loss_ce": 1.5, "loss_bbox": 1.5, "loss_giou": 1.5}
    assert check(monitor, 3.0, norm=0.1)["loss"] == 9
    # over the steps, each of which counts once
    assert monitor.averages() == {"loss": 6.75, "loss_ce": 2.25, "loss_bbox": 2.25, "loss_giou": 2.25}
    check(monitor, 4.0)
    assert monitor.averages()["loss"] == 12
    assert monitor.averages() == {}


def test_where_a_scaler_leaves_steps_out_ten_in_a_row_may_be_wrong():
    monitor = make_monitor(with_scaler=True)
    for step in range(10):
        assert check(monitor, INF, step=step)["loss"] == INF
    assert monitor.averages() == {}
    check(monitor, 1.0)
    for step in range(10):
        check(monitor, 1.0, 1.0, step=step, norm=INF)
    assert monitor.averages()["loss"] == 3, "of what was learned from"
    assert monitor.on_failure.calls == 0
    with pytest.raises(FloatingPointError, match=r"step 10 .*loss is inf.* image_id 11"):
        check(monitor, INF, step=10)
    assert monitor.on_failure.calls == 1


def test_a_resumed_run_averages_what_the_whole_one_would_have():
    monitor, resumed = make_monitor(with_scaler=True), make_monitor(with_scaler=True)
    check(monitor, 1.0)
    for step in range(10):
        check(monitor, INF, step=step)
    resumed.load_state_dict(copy.deepcopy(monitor.state_dict()))
    for each in (monitor, resumed):
        with pytest.raises(FloatingPointError):
            check(each, INF)
        check(each, 2.0)
    averages = monitor.averages()
    assert resumed.averages() == averages
    assert averages["loss"] == 4.5, "of the steps before and after"


def step(monitor, model, *batches):
    """A step as a training does it, up to where the optimizer would take it."""
    for batch in batches:
        monitor.begin(batch)
        outputs = model(**batch)
        outputs.loss.backward()
        monitor.add(outputs.loss, outputs.loss_dict)
    return monitor.check(12, nn.utils.clip_grad_norm_(model.parameters(), 0.1))


def test_an_image_that_spoils_the_loss_is_named_and_the_state_before_it_is_saved():
    model = tiny_model().train()
    files = {41: "a/one.jpg", 7: "a/two.jpg"}
    monitor = make_monitor(model, files=files)
    good, bad = make_batch(3), make_batch(41, 7, seed=1)
    bad["pixel_values"][1, 0, 5, 5] = NAN
    torch.manual_seed(5)
    expected = torch.rand(1).item()
    torch.manual_seed(5)
    with pytest.raises(FloatingPointError) as raised:
        step(monitor, model, good, bad)
    text = str(raised.value)
    assert "step 12 (counted from 0): loss is nan" in text
    assert "for the images with image_id 41 (a/one.jpg), 7 (a/two.jpg); the first non-finite tensor is" in text
    assert "the input pixel_values" in text
    assert "saved in a safe place" in text
    assert "image_id 3" not in text
    assert monitor.on_failure.number == expected, "random numbers as before the step"


def test_a_step_that_is_fine_costs_no_random_numbers_and_keeps_nothing():
    model = tiny_model().train()
    monitor = make_monitor(model)
    torch.manual_seed(0)
    outputs = model(**make_batch(1))
    expected, number = outputs.loss.item(), torch.rand(1).item()
    torch.manual_seed(0)
    assert step(monitor, model, make_batch(1))["loss"] == expected
    assert torch.rand(1).item() == number
    assert not monitor._batches
    assert not monitor._losses


def spoil(value, in_gradient, module, inputs, output):
    """A hook that now and then makes a number of a layer's output, or of its gradient, `value`."""
    if torch.rand(1) < 0.5:  # found again only by who draws the same numbers
        return None
    if in_gradient:
        output.register_hook(lambda gradient: gradient * value)
        return None
    return output.index_fill(-1, torch.tensor([0]), value)


@pytest.mark.parametrize(
    ("place", "value", "in_gradient"),
    [
        ("encoder.layers.1.mlp.fc2", NAN, False),
        ("decoder.layers.0.mlp.fc1", INF, False),
        ("encoder.layers.0.self_attn.output_proj", NAN, True),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(place, value, in_gradient):
    model = tiny_model().train()
    model.model.get_submodule(place).register_forward_hook(partial(spoil, value, in_gradient))
    monitor = make_monitor(model)
    torch.manual_seed(0)
    steps = (step(monitor, model, make_batch(1)) for _ in range(20))
    with pytest.raises(FloatingPointError) as raised:
        list(steps)
    where = "the gradient of the output" if in_gradient else "the output"
    assert f"the first non-finite tensor is {where} of model.{place}.\n" in str(raised.value)
    assert ("the loss is finite" in str(raised.value)) == in_gradient


def test_a_weight_that_is_not_finite_is_named():
    model = tiny_model().train()
    model.model.encoder.layers[1].mlp.fc1.weight.data[0, 0] = INF
    with pytest.raises(FloatingPointError, match=r"is the weight model\.encoder\.layers\.1\.mlp\.fc1\.weight\.\n"):
        step(make_monitor(model), model, make_batch(1))


@pytest.mark.parametrize("overrides", [{}, {"query_selection": "pure"}, {"query_selection": "static"}])
def test_nothing_is_named_where_nothing_is_wrong(overrides):
    """Also where images are padded, whose positions outside have boxes at infinity on purpose."""
    model = tiny_model(**overrides).train()
    batch = make_batch(1, 2)
    mask = torch.ones(2, 64, 96)
    mask[1, 33:] = 0
    mask[1, :, 40:] = 0
    assert find_first_nonfinite(model, batch | {"pixel_mask": mask}, RandomState.capture()) is None
    hooks = [module._forward_hooks for module in model.modules()]
    assert not any(hooks)
