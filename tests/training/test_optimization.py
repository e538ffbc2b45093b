"""Parameter groups, schedules, what is frozen, and when a run stops early."""

import functools

import pytest
import torch
from torch import nn

from helpers.models import TINY_RESNET, TINY_SWIN, make_labels, tiny_config, tiny_model
from hf_dino import DinoDetrForObjectDetection
from hf_dino.data import InputError
from hf_dino.training.optim import (
    SCHEDULES,
    compile_layers,
    enable_gradient_checkpointing,
    freezable_stages,
    freeze,
    get_lr_multiplier,
    get_milestones,
    get_param_groups,
    scale_lr,
    should_stop_early,
)
from hf_dino.training_arguments import OPTIONS


def names_by_rate(model, **factors):
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = get_param_groups(model, 1e-3, **factors)
    return {group["lr"]: sorted(names[parameter] for parameter in group["params"]) for group in groups}


@pytest.mark.parametrize("backbone", [TINY_RESNET, TINY_SWIN])
@pytest.mark.parametrize("share", [True, False])
def test_every_parameter_that_trains_is_in_exactly_one_group(backbone, share):
    model = tiny_model(backbone_config=backbone, share_decoder_heads=share)
    freeze(model)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = names_by_rate(model, backbone_lr_multiplier=0.1, sampling_lr_multiplier=0.5)
    assert sorted(name for names in groups.values() for name in names) == sorted(trained)
    assert groups.keys() == {1e-3, 1e-4, 5e-4}
    assert groups[1e-4] == sorted(name for name in trained if ".backbone.body." in name)
    layers = [f"encoder.layers.{i}.self_attn" for i in range(2)] + [
        f"decoder.layers.{i}.encoder_attn" for i in range(3)
    ]
    assert groups[5e-4] == sorted(
        f"model.{layer}.sampling_offsets.{kind}" for layer in layers for kind in ("bias", "weight")
    )


def test_groups_of_the_same_rate_are_one():
    assert list(names_by_rate(tiny_model(), backbone_lr_multiplier=0.1)) == [1e-3, 1e-4]
    assert list(names_by_rate(tiny_model(), backbone_lr_multiplier=1, sampling_lr_multiplier=1)) == [1e-3]
    first, second = names_by_rate(tiny_model(), backbone_lr_multiplier=0.1, sampling_lr_multiplier=0.1).values()
    assert any("sampling_offsets" in name for name in second) and not any("sampling_offsets" in name for name in first)


def test_a_backbone_may_have_a_learning_rate_of_zero():
    groups = names_by_rate(tiny_model(), backbone_lr_multiplier=0.0)
    assert all(".backbone.body." in name for name in groups[0.0])


def test_nothing_to_train_is_an_error():
    with pytest.raises(InputError, match="nothing to train: every parameter of the model is frozen"):
        get_param_groups(tiny_model().requires_grad_(False), 1e-3, 0.1)


def test_the_learning_rate_decays_to_a_tenth_at_each_milestone():
    milestones = get_milestones([0.5, 11], total_steps=1200, steps_per_epoch=100)
    assert milestones == [600, 1100]
    factor = get_lr_multiplier("multi_step", total_steps=1200, milestones=milestones, warmup_steps=10)
    assert [factor(step) for step in (0, 9, 10, 599, 600, 1100)] == pytest.approx([0.1, 1, 1, 1, 0.1, 0.01])


def optimizer_of_torch():
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)


SCHEDULERS = {
    "multi_step": lambda optimizer: torch.optim.lr_scheduler.MultiStepLR(optimizer, [30, 80]),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100),
    "one_cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=100, pct_start=0.2
    ),
}


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_are_those_of_torch(name):
    optimizer = optimizer_of_torch()
    scheduler = SCHEDULERS[name](optimizer)
    expected = []
    for _ in range(100):
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step() if len(expected) < 100 else None
    factor = get_lr_multiplier(name, total_steps=100, milestones=[30, 80])
    assert [factor(step) for step in range(100)] == pytest.approx(expected, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_warms_up(name):
    cold = get_lr_multiplier(name, total_steps=50, milestones=[40])
    warm = get_lr_multiplier(name, total_steps=50, milestones=[40], warmup_steps=4)
    assert [warm(step) for step in range(4)] == pytest.approx([cold(step) * (step + 1) / 4 for step in range(4)])
    assert [warm(step) for step in range(4, 50)] == [cold(step) for step in range(4, 50)]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2, 4, 5, 6, 10])
def test_the_shortest_runs_have_a_rate_too(name, total_steps):
    factor = get_lr_multiplier(name, total_steps=total_steps)
    assert all(0 < factor(step) <= 1 for step in range(total_steps))
    assert 0 <= factor(total_steps + 5) <= 1


def test_rates_follow_the_initial_one_not_the_last():
    optimizer = torch.optim.AdamW(get_param_groups(tiny_model(), 1e-3, 0.1))
    for _ in range(2):
        scale_lr(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([5e-4, 5e-5])


BACKBONES = {
    "resnet": (TINY_RESNET, "model.backbone.body.embedder.", "model.backbone.body.encoder.stages.{}."),
    "swin": (TINY_SWIN, "model.backbone.body.swin.embeddings.", "model.backbone.body.swin.encoder.layers.{}."),
    "timm": ("test_resnet", "model.backbone.body._backbone.", "model.backbone.body._backbone.layer{}."),
}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_stages_have_the_same_names_in_all_backbones(backbone):
    if backbone == "timm":
        pytest.importorskip("timm")
    config, start, stage = BACKBONES[backbone]
    model = tiny_model(backbone_config=config, freeze_backbone_batch_norms=False)
    stages = freezable_stages(model)
    assert list(stages) == ["stem", "backbone", *(f"backbone.stage{i}" for i in range(1, 5)), "encoder", "decoder"]
    first = 1 if backbone == "timm" else 0
    for number in range(4):
        assert stages[f"backbone.stage{number + 1}"]
        assert all(name.startswith(stage.format(number + first)) for name in stages[f"backbone.stage{number + 1}"])
    assert set(stages["backbone.stage1"]) < set(stages["stem"]) < set(stages["backbone"])
    assert all(name.startswith((start, stage.format(first))) for name in stages["stem"])
    assert all(
        stages[part] and all(n.startswith(f"model.{part}.") for n in stages[part]) for part in ("encoder", "decoder")
    )


def frozen_by(stages, **overrides):
    model = tiny_model(**overrides)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    freeze(model, stages)
    return before - {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize("pretrained", [True, False])
def test_by_default_the_stem_of_a_pretrained_resnet_is_frozen(pretrained):
    by_default = frozen_by(None, freeze_backbone_batch_norms=pretrained)
    assert by_default == (frozen_by(["stem"], freeze_backbone_batch_norms=True) if pretrained else set())
    first_layers = ("model.backbone.body.embedder.", "model.backbone.body.encoder.stages.0.")
    assert all(name.startswith(first_layers) for name in by_default) and bool(by_default) == pretrained
    assert frozen_by(None, backbone_config=TINY_SWIN) == frozen_by([]) == set()


def test_an_unknown_stage_is_an_error_that_names_those_there_are():
    with pytest.raises(InputError, match=r"no stage backbone\.stage5 to freeze; it has stem, backbone, .*, decoder"):
        freeze(tiny_model(), ["decoder", "backbone.stage5"])


def test_frozen_stages_do_not_change_and_everything_else_is_trained(pixel_values):
    model = tiny_model(freeze_backbone_batch_norms=False).train()
    stages = ["backbone.stage2", "encoder"]
    freeze(model, stages)
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(get_param_groups(model, 1e-2, 1.0), weight_decay=0.1)
    for _ in range(2):
        model(pixel_values, labels=make_labels(2, 3)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    frozen = ("model.backbone.body.encoder.stages.1.", "model.encoder.")
    assert changed == {name for name in before if not name.startswith(frozen)}, "statistics of batch norms included"


def test_batch_norms_are_frozen_at_once_and_thaw_with_their_weights():
    model = DinoDetrForObjectDetection(tiny_config(freeze_backbone_batch_norms=False)).train()
    norms = model.model.backbone.batch_norms()
    assert all(norm.training for norm in norms)
    freeze(model, ["backbone"])
    assert not any(norm.training for norm in norms)
    model.requires_grad_(True).train()
    assert all(norm.training for norm in norms)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_train_the_same_and_are_compiled_once(monkeypatch, checkpointing):
    # everything but generating and compiling C++
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    model, compiled = (tiny_model(label_noise_ratio=0.0, box_noise_scale=0.0).train() for _ in range(2))
    compile_layers(compiled)
    if checkpointing:
        enable_gradient_checkpointing(compiled)
    for size, counts in (((96, 128), (2, 3)), ((128, 96), (0, 0)), ((160, 96), (4, 1))):
        pixel_values, labels = torch.randn(2, 3, *size), make_labels(*counts)
        losses = [each(pixel_values, labels=labels).loss for each in (model, compiled)]
        for loss in losses:
            loss.backward()
        torch.testing.assert_close(losses[1], losses[0])
    for parameter, expected in zip(compiled.parameters(), model.parameters()):
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-3, atol=1e-3)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    if not checkpointing:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2, "one for each kind of layer"


@pytest.mark.parametrize(
    ("scores", "patience", "stops"),
    [
        ([], 1, False),
        ([0.3], 1, False),
        ([0.3, 0.2], 1, True),
        ([0.3, 0.3], 1, True),
        ([0.3, 0.2, 0.31], 1, False),
        ([0.3, 0.2, 0.31, 0.1, 0.3], 2, True),
        ([0.3, 0.2, 0.31, 0.1, 0.3], 3, False),
        ([0.0, 0.0, 0.0], 2, True),
        ([0.3, 0.2, 0.1], None, False),
    ],
)
def test_a_run_stops_when_nothing_improves(scores, patience, stops):
    assert should_stop_early(scores, patience) is stops


def test_the_options_name_the_schedules_there_are():
    parse = OPTIONS["lr_scheduler_type"].metadata["parse"]
    assert [parse(name) for name in SCHEDULES] == list(SCHEDULES)
    assert list(SCHEDULES) == ["multi_step", "cosine", "one_cycle"]
