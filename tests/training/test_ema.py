"""The average of the weights: what it is, that it comes and goes without a trace, and that a resumed run goes on."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from helpers.models import make_labels, tiny_model
from hf_dino.training.ema import ExponentialMovingAverage, get_decay


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    torch.testing.assert_close(first, second, rtol=0, atol=0)


class Network(nn.Module):
    """A frozen layer, one that learns, and a batch norm with statistics."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.frozen = nn.Linear(3, 4).requires_grad_(False)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, values):
        return self.head(self.norm(self.frozen(values)))


def steps(model, optimizer, average, first, last):
    for step in range(first, last):
        values = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        model(values).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()


def test_the_average_is_that_of_the_definition():
    model = Network()
    average = ExponentialMovingAverage(model, decay=0.8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = {name: value.double() for name, value in weights(model).items()}
    for step in range(50):
        steps(model, optimizer, average, step, step + 1)
        decay = min(0.8, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    with average.average_parameters():
        averaged = weights(model)
    averaged.pop("norm.num_batches_tracked")  # counted, not averaged
    assert averaged.keys() == {name for name in expected if name != "norm.num_batches_tracked"}
    for name, value in averaged.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(averaged["norm.running_mean"], model.norm.running_mean), "buffers are averaged too"


def test_the_ramp_never_falls_and_ends_at_the_decay():
    ramp = [get_decay(updates, 0.999) for updates in range(12_000)]
    assert ramp == sorted(ramp)
    assert ramp[0] == 0.1
    assert ramp[-1] == 0.999
    assert get_decay(10**9, 0.999) == 0.999


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_wrong_decays(decay):
    with pytest.raises(ValueError, match="decay must be at least 0 and less than 1"):
        ExponentialMovingAverage(Network(), decay)


def test_frozen_weights_cost_nothing():
    average = ExponentialMovingAverage(Network(), 0.9)
    assert not [name for name in average.state_dict()["shadow"] if name.startswith("frozen")]


def test_trained_weights_come_back_even_after_an_error():
    model = Network()
    average = ExponentialMovingAverage(model, 0.9)
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1), average, 0, 3)
    before, places = weights(model), [parameter.data_ptr() for parameter in model.parameters()]

    def interrupted():
        with average.average_parameters():
            assert not torch.equal(model.head.weight, before["head.weight"])
            assert_same(model.frozen.weight, before["frozen.weight"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert_same(weights(model), before)
    assert [parameter.data_ptr() for parameter in model.parameters()] == places, "not even copied"


def test_a_model_of_lower_precision_is_averaged_in_float32():
    model = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.ones_(model.weight)
    average = ExponentialMovingAverage(model, 0.999)
    average.updates = 10**6
    nn.init.constant_(model.weight, 2.0)
    for _ in range(100):  # each moves it by less than bfloat16 can tell
        average.update()
    with average.average_parameters():
        assert model.weight.dtype == torch.bfloat16
        assert model.weight.item() == pytest.approx(2 - 0.999**100, abs=0.01)


def start(decay=0.9):
    accelerator = Accelerator(cpu=True)
    model = Network()
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=0.1))
    average = ExponentialMovingAverage(accelerator.unwrap_model(model), decay)
    accelerator.register_for_checkpointing(average)
    return accelerator, model, optimizer, average


def test_a_resumed_run_has_the_same_average_bit_for_bit(tmp_path):
    accelerator, model, optimizer, average = start()
    steps(model, optimizer, average, 0, 5)
    accelerator.save_state(str(tmp_path / "state"))
    steps(model, optimizer, average, 5, 12)

    accelerator, resumed, optimizer, resumed_average = start()
    accelerator.load_state(str(tmp_path / "state"))
    steps(resumed, optimizer, resumed_average, 5, 12)
    assert_same(weights(resumed), weights(model))
    assert resumed_average.updates == average.updates == 12
    assert_same(resumed_average.state_dict()["shadow"], average.state_dict()["shadow"])


def test_the_state_of_another_model_is_refused():
    state = ExponentialMovingAverage(Network(), 0.9).state_dict()
    with pytest.raises(ValueError, match="averaged weights are of another model, which differs in bias"):
        ExponentialMovingAverage(Network().head, 0.9).load_state_dict(state)
    wider = Network()
    wider.head = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"which differs in head\.bias"):
        ExponentialMovingAverage(wider, 0.9).load_state_dict(state)


def test_a_detector_is_evaluated_and_saved_with_its_average(tmp_path, pixel_values):
    model = tiny_model(freeze_backbone_batch_norms=False).train()
    average = ExponentialMovingAverage(model, 0.9)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        model(pixel_values, labels=make_labels(2, 1)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update()
    model.eval()
    trained = model(pixel_values).logits
    with average.average_parameters():
        averaged = model(pixel_values).logits
        model.save_pretrained(tmp_path)
    assert not torch.equal(averaged, trained)
    assert_same(model(pixel_values).logits, trained)
    assert_same(type(model).from_pretrained(tmp_path)(pixel_values).logits, averaged)
