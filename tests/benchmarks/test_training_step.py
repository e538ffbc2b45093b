"""The benchmark of a training step splits the step without changing it, and sees what the host waits for."""

import importlib
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.models import make_labels, tiny_model
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.setattr(importlib.import_module("common.machine"), "RESULTS", tmp_path)
    benchmark = importlib.import_module("training_step")
    for module in (benchmark, importlib.import_module("forward")):
        monkeypatch.setattr(module, "make_ours", make_small)
    yield benchmark
    for path in BENCHMARKS.rglob("*.py"):
        sys.modules.pop(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts), None)


def make_small():
    return tiny_model(id2label={label: str(label) for label in range(91)})


def run_once(candidates, rounds, device, warm_up=1):
    for build, _ in candidates.values():
        build()()
    return {"median_seconds": dict.fromkeys(candidates, 0.5)}


def test_time_within_something_else_counts_for_itself(benchmark, monkeypatch):
    now = iter([0.0, 1.0, 11.0, 13.0, 43.0, 46.0])
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    watch = benchmark.Stopwatch()
    with watch("outer"):
        with watch("inner"):
            pass
        with watch("inner"):
            pass
    assert watch.seconds == {"outer": 1 + 2 + 3, "inner": 10 + 30}


def test_the_step_in_two_backward_passes_has_the_gradients_of_one(benchmark, pixel_values):
    labels, gradients = make_labels(3, 0), []
    for separately in (False, True):
        model = tiny_model().train()
        separate = benchmark.SeparateLoss(model.loss_function)
        if separately:
            model.loss_function = separate
        torch.manual_seed(0)
        model(pixel_values, labels=labels).loss.backward()
        if separately:
            assert all(parameter.grad is None for parameter in model.parameters())
            separate.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_the_matcher_and_the_losses_read_from_the_device_once(benchmark, pixel_values):
    """Whatever the number of layers and images; before it, the labels' check reads one flag."""
    for counts, layers in (((3, 1), 3), ((2, 0), 2), ((0, 0), 3)):
        model, watch = tiny_model(decoder_layers=layers).train(), benchmark.Stopwatch()
        model.loss_function = benchmark.timed(watch, "losses", model.loss_function)
        with watch("model"), benchmark.HostSyncs(watch) as syncs:
            model(pixel_values, labels=make_labels(*counts))
        assert syncs.calls == ["model: __bool__", "losses: cpu"]


def test_reads_are_seen(benchmark):
    watch, numbers = benchmark.Stopwatch(), torch.arange(2)
    with watch("part"), benchmark.HostSyncs(watch) as syncs:
        if numbers[0] == 0 and int(numbers[1]) == numbers[1].item():
            numbers.tolist()
    assert syncs.calls == [f"part: {name}" for name in ("__bool__", "__int__", "item", "tolist")]


def test_a_small_run_says_it_all(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "interleave", run_once)
    for module in (benchmark, importlib.import_module("forward")):
        monkeypatch.setattr(module, "make_transformers", make_small)
    monkeypatch.setenv("HF_DINO_KERNELS", "off")  # the reference would do here
    benchmark.main(["--height=96", "--width=128", "--rounds=1", "--loader-steps=3"])
    result = json.loads((tmp_path / "training_step.json").read_text())
    models = ["hf_dino", "hf_dino_reference", "transformers", "transformers_frozen"]
    assert result["samples_per_second"] == dict.fromkeys(models, 4.0)
    parts = result["parts_of_hf_dino"]
    assert {"forward, backbone", "forward, decoder", "matcher", "losses", "backward", "optimizer"} <= parts[
        "percent"
    ].keys()
    assert sum(parts["percent"].values()) == pytest.approx(100, abs=0.1)
    of_losses = sum(parts["percent"][name] for name in ("matcher", "losses", "losses, backward"))
    assert parts["matcher_and_losses_percent"] == pytest.approx(of_losses, abs=0.02)
    assert parts["host_syncs"] == ["forward, the rest: __bool__", "matcher: cpu"]
    waiting = result["waiting_for_two_workers"]
    assert waiting["steps"] == 3
    assert 0 <= waiting["percent_of_the_time_waited"] <= 100
    assert waiting["seconds_per_batch_of_the_loader_alone"] > 0


def test_the_peer_can_take_the_step(benchmark):
    """With what it needs: labels of the same form, and a loss that reaches its parameters."""
    forward = importlib.import_module("forward")
    peer = partial(forward.make_transformers, **forward.SMALL)
    assert len(peer().model.encoder.layers) == 1
    benchmark.make_same_step(peer, benchmark.random_batch(96, 128, 2, 3))()


@pytest.mark.parametrize("trained", ["", "123"])
def test_both_models_train_the_same_stages_of_the_resnet(benchmark, trained):
    forward = importlib.import_module("forward")
    stages = []
    for make in (
        partial(DinoDetrForObjectDetection, DinoDetrConfig(**forward.SMALL)),
        partial(forward.make_transformers, **forward.SMALL),
    ):
        model = make()
        benchmark.train_stages(model, trained)
        convolutions = {name: weight for name, weight in model.named_parameters() if ".convolution." in name}
        stages.append({name.split(".", 3)[3]: weight.requires_grad for name, weight in convolutions.items()})
        assert all(weight.requires_grad for name, weight in model.named_parameters() if ".input_proj." in name)
    assert stages[0] == stages[1]
    assert {name.split(".")[2] for name, is_trained in stages[0].items() if is_trained} == set(trained)


def test_the_wait_for_data_can_be_left_out(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "interleave", run_once)
    monkeypatch.setattr(benchmark, "profile", lambda *given: {})
    for module in (benchmark, importlib.import_module("forward")):
        monkeypatch.setattr(module, "make_transformers", make_small)
    monkeypatch.setenv("HF_DINO_KERNELS", "off")
    benchmark.main(["--height=96", "--width=128", "--loader-steps=0"])
    result = json.loads((tmp_path / "training_step.json").read_text())
    assert "waiting_for_two_workers" not in result
    assert "--loader-steps 0" in result["command"]


@pytest.mark.parametrize("steps", [1, -1])
def test_a_wait_that_cannot_be_measured_is_refused(benchmark, capsys, steps):
    with pytest.raises(SystemExit):
        benchmark.main([f"--loader-steps={steps}"])
    assert f"--loader-steps must be 0 or at least 2, not {steps}" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--rounds=0", "--warm-up=0", "--warm-up=-1"])
def test_too_few_steps_are_refused(benchmark, capsys, option):
    with pytest.raises(SystemExit):
        benchmark.main([option])
    assert "--rounds and --warm-up must be at least 1" in capsys.readouterr().err


def test_runs_to_warm_up_do_not_count(benchmark):
    class Settles:
        def __init__(self):
            self.answers = iter([(9.0, 5.0), (8.0, 5.0), (3.0, 6.0), (1.0, 6.0), (2.0, 7.0)])

        def run(self):
            return next(self.answers)

    interleave = importlib.import_module("common.interleave")
    assert interleave.measure({"ours": Settles()}, rounds=3, warm_up=2) == ({"ours": 2.0}, {"ours": 7.0})
