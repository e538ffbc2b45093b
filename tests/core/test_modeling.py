"""Properties of the whole model, whatever its strategies."""

import copy
import io
import itertools
import logging
import math
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForObjectDetection

from helpers.models import make_labels, tiny_config, tiny_model
from hf_dino import DinoDetrForObjectDetection, DinoDetrImageProcessor, DinoDetrImageProcessorPil, modeling_dino_detr
from hf_dino.configuration_dino_detr import BOX_REFINEMENT_NAMES, DENOISING_NAMES, QUERY_SELECTION_NAMES
from hf_dino.loss_dino_detr import hungarian_match
from hf_dino.query_selection_dino_detr import gen_encoder_output_proposals


TINY_SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 2, 2, 2],
    "window_size": 3,
    "drop_path_rate": 0.0,
    "out_indices": [3, 4],
}

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def attending(implementation: str) -> DinoDetrForObjectDetection:
    """Make a model with this attention; transformers' ResNet has none and raises an error for any but "eager"."""
    return tiny_model(attn_implementation={"": implementation, "backbone_config": "eager"})


def train_step(model: DinoDetrForObjectDetection, pixel_values, labels, seed: int = 0, **kwargs):
    """Return outputs in training mode, with the same noise for the same seed."""
    torch.manual_seed(seed)
    return model.train()(pixel_values, labels=labels, **kwargs)


def gradients(model: nn.Module) -> dict[str, torch.Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}


def matching_terms(outputs) -> dict[str, torch.Tensor]:
    return {name: term.detach() for name, term in outputs.loss_dict.items() if "denoising" not in name}


# Outputs


def test_an_image_alone_gives_what_it_gives_in_a_batch(pixel_values):
    model = tiny_model()
    with torch.no_grad():
        together = model(pixel_values)
        for index in range(len(pixel_values)):
            alone = model(pixel_values[index : index + 1])
            for name in ("logits", "pred_boxes", "last_hidden_state", "enc_outputs_class"):
                torch.testing.assert_close(alone[name][0], together[name][index], rtol=0, atol=1e-5)


def test_no_mask_is_no_padding(pixel_values):
    model = tiny_model()
    with torch.no_grad():
        without, full = model(pixel_values), model(pixel_values, torch.ones_like(pixel_values[:, 0]))
    assert torch.equal(without.logits, full.logits)


def test_proposals_do_not_depend_on_padding():
    """Boxes are fractions of the unpadded image."""
    backbone = tiny_model().model.backbone
    padded, pixel_mask = torch.zeros(1, 3, 192, 256), torch.zeros(1, 192, 256)
    padded[:, :, :128, :64] = 1
    pixel_mask[:, :128, :64] = 1
    alone = padded[:, :, :128, :64]
    (boxes, valid_mask), (boxes_alone, valid_mask_alone) = (
        gen_encoder_output_proposals(backbone(pixels, mask))
        for pixels, mask in ((padded, pixel_mask), (alone, torch.ones_like(alone[:, 0])))
    )
    assert valid_mask_alone.any()
    torch.testing.assert_close(boxes[valid_mask], boxes_alone[valid_mask_alone])


def test_the_first_fields_are_a_contract(pixel_values):
    """The detection example of transformers reads the tuple by position."""
    model = tiny_model()
    with torch.no_grad():
        outputs = model(pixel_values, labels=make_labels(1, 2))
        as_tuple = model(pixel_values, labels=make_labels(1, 2), return_dict=False)
    assert list(outputs)[:5] == ["loss", "loss_dict", "logits", "pred_boxes", "auxiliary_outputs"]
    torch.testing.assert_close(as_tuple, outputs.to_tuple(), rtol=0, atol=0)


def test_the_bound_of_predicted_boxes_changes_nothing_else(pixel_values):
    """Reference points, and with them all queries, are those of the bound that all implementations have."""
    usual, other = (tiny_model(box_prediction_epsilon=epsilon) for epsilon in (1e-3, 0.3))
    with torch.no_grad():
        expected, found = usual(pixel_values), other(pixel_values)
    assert torch.equal(found.intermediate_reference_points, expected.intermediate_reference_points)
    assert torch.equal(found.logits, expected.logits)
    assert not torch.allclose(found.pred_boxes, expected.pred_boxes)


def test_shapes_of_a_detection(pixel_values):
    with torch.no_grad():
        outputs = tiny_model()(pixel_values)
    assert outputs.loss is outputs.loss_dict is None
    assert outputs.logits.shape == (2, 12, 5)
    assert outputs.pred_boxes.shape == (2, 12, 4)
    assert outputs.intermediate_reference_points.shape == (2, 3, 12, 4)
    assert ((outputs.pred_boxes >= 0) & (outputs.pred_boxes <= 1)).all()


@pytest.mark.parametrize("share_decoder_heads", [True, False])
def test_earlier_layers_are_predicted_only_with_labels_or_in_training_mode(pixel_values, share_decoder_heads):
    model = tiny_model(share_decoder_heads=share_decoder_heads)
    calls = [count_calls(head) for head in model.class_embed]
    with torch.no_grad():
        outputs = model(pixel_values)
        assert sum(map(len, calls)) == 1
        assert outputs.auxiliary_outputs is None
        with_labels, in_training = model(pixel_values, labels=make_labels(1, 2)), model.train()(pixel_values)
    for other in (with_labels, in_training):
        assert torch.equal(other.logits, outputs.logits) and torch.equal(other.pred_boxes, outputs.pred_boxes)
        assert [layer["logits"].shape for layer in other.auxiliary_outputs] == [(2, 12, 5)] * 2
        assert [layer["pred_boxes"].shape for layer in other.auxiliary_outputs] == [(2, 12, 4)] * 2


def test_without_auxiliary_loss_only_the_last_layer_is_supervised(pixel_values):
    outputs = train_step(tiny_model(auxiliary_loss=False), pixel_values, make_labels(1, 2))
    assert outputs.auxiliary_outputs is None
    assert {name.removeprefix("loss_ce") for name in outputs.loss_dict if "loss_ce" in name} == {
        "",
        "_encoder",
        "_denoising",
    }


@pytest.mark.parametrize("route", ["argument", "config"])
def test_hidden_states_and_attentions(pixel_values, route):
    model = attending("eager")
    asked = {"output_hidden_states": True, "output_attentions": True}
    if route == "config":
        for name, value in asked.items():
            setattr(model.config, name, value)
    with torch.no_grad():
        outputs = model(pixel_values, **(asked if route == "argument" else {}))
        if route == "argument":
            assert model(pixel_values).encoder_hidden_states is None
    length = 6 * 8 + 3 * 4 + 2 * 2
    expected = {
        "encoder_hidden_states": [(2, length, 32)] * 3,
        "encoder_attentions": [(2, length, 4, 3, 2)] * 2,
        "decoder_hidden_states": [(2, 12, 32)] * 4,
        "decoder_attentions": [(2, 4, 12, 12)] * 3,
        "cross_attentions": [(2, 12, 4, 3, 2)] * 3,
    }
    assert {name: [tuple(tensor.shape) for tensor in outputs[name]] for name in expected} == expected
    assert torch.equal(outputs.encoder_hidden_states[-1], outputs.encoder_last_hidden_state)
    for name in ("decoder_attentions", "cross_attentions", "encoder_attentions"):
        weights = outputs[name][0]
        totals = weights.sum(dim=(-1, -2) if weights.ndim == 5 else -1)
        torch.testing.assert_close(totals, torch.ones_like(totals))


def test_eager_attention_equals_sdpa(pixel_values):
    labels = make_labels(1, 3)
    results = []
    for implementation in ("eager", "sdpa"):
        model = attending(implementation)
        outputs = train_step(model, pixel_values, labels)
        outputs.loss.backward()
        results.append((outputs.logits, outputs.pred_boxes, outputs.loss, gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-5)


def test_the_same_seed_gives_the_same_step(pixel_values):
    results = []
    for _ in range(2):
        model = tiny_model(dropout=0.1)
        train_step(model, pixel_values, make_labels(1, 3)).loss.backward()
        results.append(gradients(model))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_too_small_an_image_is_named():
    with pytest.raises(ValueError, match=r"have 11 encoder tokens, too few to choose num_queries=12 .* larger images"):
        tiny_model()(torch.zeros(2, 3, 32, 64))


# Gradients


COMBINATIONS = list(itertools.product(DENOISING_NAMES, QUERY_SELECTION_NAMES, BOX_REFINEMENT_NAMES, (True, False)))


@pytest.mark.parametrize(("denoising", "query_selection", "box_refinement", "share_decoder_heads"), COMBINATIONS)
def test_a_gradient_reaches_every_parameter(
    pixel_values, denoising, query_selection, box_refinement, share_decoder_heads
):
    """Data-parallel training needs one for every parameter, also where no image has an object."""
    model = tiny_model(
        denoising=denoising,
        query_selection=query_selection,
        box_refinement=box_refinement,
        share_decoder_heads=share_decoder_heads,
    )
    for counts in ((2, 3), (0, 2), (0, 0)):
        model.zero_grad()
        outputs = train_step(model, pixel_values, make_labels(*counts))
        outputs.loss.backward()
        assert outputs.loss.isfinite()
        for name, gradient in gradients(model).items():
            assert gradient is not None, name
            assert gradient.isfinite().all(), name
            # A bias that is the same for all keys does not change the softmax.
            if counts == (2, 3) and not name.endswith("k_proj.bias"):
                assert gradient.any(), name


@pytest.mark.parametrize("strategy", BOX_REFINEMENT_NAMES)
def test_how_many_layers_a_box_loss_reaches(pixel_values, strategy):
    """DINO, figure 6: the boxes of a layer also train the box head of the layer before, but no earlier one."""
    model = tiny_model(box_refinement=strategy, share_decoder_heads=False)
    boxes = model.model(pixel_values).intermediate_boxes
    heads = model.model.decoder.bbox_embed

    def reaches(layer: int, head: int) -> bool:
        last = heads[head].layers[-1].weight
        (gradient,) = torch.autograd.grad(boxes[:, layer].sum(), last, retain_graph=True, allow_unused=True)
        return gradient is not None and bool(gradient.any())

    reached = [[reaches(layer, head) for head in range(3)] for layer in range(3)]
    twice = strategy == "look_forward_twice"
    assert reached == [[True, False, False], [twice, True, False], [False, twice, True]]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its successor is 5.23's
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("overrides", [{}, {"backbone_config": TINY_SWIN}], ids=["resnet", "swin"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(pixel_values, overrides, use_reentrant):
    results, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(**overrides)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        parts = model.model.backbone.body, model.model.encoder.layers, model.model.decoder.layers
        calls.append([count_calls(last_weighted(part)) for part in parts])
        outputs = train_step(model, pixel_values, make_labels(1, 3))
        outputs.loss.backward()
        results.append((outputs.loss, gradients(model)))
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)
    plain, recomputed = ([len(count) for count in each] for each in calls)
    assert plain == [1, 1, 1]
    assert min(recomputed) > 1


def last_weighted(part: nn.Module) -> nn.Module:
    return [module for module in part.modules() if isinstance(module, (nn.Conv2d, nn.Linear))][-1]


def count_calls(module: nn.Module) -> list[None]:
    calls: list[None] = []
    module.register_forward_pre_hook(lambda *_: calls.append(None))  # recomputing may stop before the call ends
    return calls


# Denoising


def test_denoising_changes_nothing_but_its_own_loss(pixel_values):
    labels = make_labels(2, 3)
    with_denoising = tiny_model()
    without = DinoDetrForObjectDetection(tiny_config(denoising="none"))
    missing = without.load_state_dict(with_denoising.state_dict(), strict=False)
    assert missing.unexpected_keys == ["model.denoising.label_embed.weight"]
    ours, plain = train_step(with_denoising, pixel_values, labels), train_step(without, pixel_values, labels)
    for name in ("logits", "pred_boxes", "enc_outputs_class", "intermediate_reference_points", "last_hidden_state"):
        assert ours[name].shape == plain[name].shape
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matching_terms(ours), matching_terms(plain), rtol=1e-4, atol=1e-5)
    assert all(term == 0 for name, term in plain.loss_dict.items() if "denoising" in name)
    assert ours.loss_dict["loss_bbox_denoising"] > 0


def test_plain_denoising_has_no_loss_but_that_of_the_copies(pixel_values):
    """An image costs the same alone and beside one with more objects, where it is filled up with empty queries."""
    model = tiny_model(denoising="plain", label_noise_ratio=0.0, box_noise_scale=0.0)
    # empty queries take part in self-attention, so that it must not mix queries
    for layer in model.model.decoder.layers:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    few, many = make_labels(1, 4)

    def total(*images: int) -> dict[str, torch.Tensor]:
        labels = [(few, many)[image] for image in images]
        terms = train_step(model, pixel_values[list(images)], labels).loss_dict
        count = sum(len(label["boxes"]) for label in labels)
        return {name: term.detach() * count for name, term in terms.items() if "denoising" in name}

    together, alone = total(0, 1), (total(0), total(1))
    torch.testing.assert_close(together, {name: alone[0][name] + alone[1][name] for name in together})


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_denoising_queries_do_not_leak_the_ground_truth(pixel_values, implementation):
    """Gradients show which query attends to which: matching queries to no denoising query, a group only to itself."""
    model = attending(implementation).train()
    made = []
    model.model.denoising.register_forward_hook(lambda *call: made.append(call[-1].inputs_embeds))
    outputs = model.model(pixel_values, labels=make_labels(3, 2))
    denoised = outputs.denoising.intermediate_hidden_states.unflatten(2, (outputs.denoising.num_groups, -1))
    assert denoised.shape[2] == 2

    def seen_by(states: torch.Tensor) -> list[bool]:
        (gradient,) = torch.autograd.grad(states.square().sum(), made[0], retain_graph=True)
        return [bool(group.any()) for group in gradient.unflatten(1, denoised.shape[2:4]).unbind(1)]

    assert seen_by(outputs.intermediate_hidden_states) == [False, False]
    assert seen_by(denoised[:, :, 0]) == [True, False]
    assert seen_by(denoised[:, :, 1]) == [False, True]


def test_other_labels_do_not_change_training_outputs(pixel_values):
    model = tiny_model()
    one, other = (train_step(model, pixel_values, make_labels(2, 3, seed=seed)) for seed in (0, 1))
    torch.testing.assert_close(one.logits, other.logits, rtol=0, atol=1e-6)
    torch.testing.assert_close(one.pred_boxes, other.pred_boxes, rtol=0, atol=1e-6)


def test_in_training_decoder_states_contain_the_denoising_queries_first(pixel_values):
    outputs = (
        attending("eager")
        .train()
        .model(pixel_values, labels=make_labels(3, 2), output_hidden_states=True, output_attentions=True)
    )
    num_denoising = outputs.denoising.intermediate_hidden_states.shape[2]
    assert num_denoising == 12
    assert outputs.decoder_hidden_states[-1].shape == (2, num_denoising + 12, 32)
    assert outputs.decoder_attentions[0].shape == (2, 4, num_denoising + 12, num_denoising + 12)
    assert outputs.cross_attentions[0].shape == (2, num_denoising + 12, 4, 3, 2)
    assert outputs.last_hidden_state.shape == (2, 12, 32)


def test_there_is_no_denoising_outside_training(pixel_values):
    outputs = tiny_model().model(pixel_values, labels=make_labels(2, 3))
    assert outputs.denoising.intermediate_boxes.shape == (2, 3, 0, 4)


@pytest.mark.parametrize("counts", [(7, 9), (20, 0)], ids=["than num_denoising", "than num_queries"])
def test_more_objects(pixel_values, counts):
    model = tiny_model()
    outputs = train_step(model, pixel_values, make_labels(*counts))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    assert outputs.logits.shape == (2, 12, 5)


# Query selection


def select(model: DinoDetrForObjectDetection, pixel_values: torch.Tensor):
    levels = model.model.backbone(pixel_values, torch.ones_like(pixel_values[:, 0]))
    memory = model.model.encoder(levels).last_hidden_state
    return model.model.query_selection(memory, levels)


def test_mixed_queries_have_learned_contents_and_positions_from_the_image(pixel_values):
    model = tiny_model(query_selection="mixed")
    queries = select(model, pixel_values)
    learned = model.model.query_selection.content_queries.weight
    assert torch.equal(queries.inputs_embeds, learned.expand(2, -1, -1))
    assert not torch.equal(queries.reference_points[0], queries.reference_points[1])
    assert not queries.reference_points.requires_grad


def test_pure_queries_come_from_the_image_without_a_gradient(pixel_values):
    queries = select(tiny_model(query_selection="pure"), pixel_values)
    assert not torch.equal(queries.inputs_embeds[0], queries.inputs_embeds[1])
    assert not torch.equal(queries.reference_points[0], queries.reference_points[1])
    assert not queries.inputs_embeds.requires_grad
    assert queries.enc_outputs_class.requires_grad


def test_static_queries_are_the_same_for_every_image(pixel_values):
    model = tiny_model(query_selection="static")
    queries = select(model, pixel_values)
    assert torch.equal(queries.inputs_embeds[0], queries.inputs_embeds[1])
    assert torch.equal(queries.reference_points[0], model.model.query_selection.anchors.weight.sigmoid())
    assert queries.enc_outputs_class is queries.enc_outputs_coord_logits is None
    outputs = train_step(model, pixel_values, make_labels(1, 2))
    assert not any("encoder" in name for name in outputs.loss_dict)


def test_conditional_queries_are_anchors_scaled_by_the_content_after_the_first_layer(pixel_values):
    model = tiny_model(positional_query="conditional")
    unscaled = DinoDetrForObjectDetection(tiny_config()).eval()
    missing = unscaled.load_state_dict(model.state_dict(), strict=False)
    assert all("query_scale" in key for key in missing.unexpected_keys) and not missing.missing_keys
    seen = []
    for layer in model.model.decoder.layers:
        layer.register_forward_pre_hook(lambda _, call: seen.append(call[:2]))
    embedded = []
    model.model.decoder.ref_point_head.register_forward_hook(lambda *call: embedded.append(call[-1]))
    scale = model.model.decoder.positional_query.query_scale
    with torch.no_grad():
        assert not torch.allclose(model(pixel_values).pred_boxes, unscaled(pixel_values).pred_boxes, atol=1e-3)
        factors = [torch.ones(()), *(scale(contents) for contents, _ in seen[1:])]
        for factor, anchor, (_, positions) in zip(factors, embedded, seen, strict=True):
            torch.testing.assert_close(positions, anchor * factor)
        scale.layers[-1].weight.zero_()
        scale.layers[-1].bias.fill_(1.0)
        torch.testing.assert_close(model(pixel_values).pred_boxes, unscaled(pixel_values).pred_boxes)


@pytest.mark.parametrize("decoder_norm", [True, False])
def test_heads_read_states_with_or_without_a_norm(pixel_values, decoder_norm):
    model = tiny_model(decoder_norm=decoder_norm)
    made = []
    model.model.decoder.layers[-1].register_forward_hook(lambda *call: made.append(call[-1]))
    with torch.no_grad():
        outputs = model(pixel_values)
        assert torch.equal(model.model.decoder.layer_norm(made[0]), outputs.last_hidden_state)
        torch.testing.assert_close(model.class_embed[0](outputs.last_hidden_state), outputs.logits)
    assert torch.equal(made[0], outputs.last_hidden_state) is not decoder_norm
    assert ("model.decoder.layer_norm.weight" in model.state_dict()) is decoder_norm
    if not decoder_norm:  # then the box that is passed on is the predicted one
        torch.testing.assert_close(outputs.pred_boxes, outputs.intermediate_reference_points[:, -1])


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("query_selection", QUERY_SELECTION_NAMES)
def test_inference_in_half_precision(pixel_values, dtype, query_selection):
    model = tiny_model(query_selection=query_selection)
    with torch.no_grad():
        expected, outputs = model(pixel_values), model.to(dtype)(pixel_values)
    assert outputs.logits.dtype == dtype
    for name in ("pred_boxes", "init_reference_points", "intermediate_reference_points"):
        assert outputs[name].dtype == torch.float32
    assert outputs.logits.isfinite().all()
    if query_selection == "static":  # otherwise, tokens with nearly equal scores swap places among the queries
        torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=0, atol=0.03)
        torch.testing.assert_close(outputs.logits.float(), expected.logits, rtol=0.05, atol=0.1)


def half_precision_warnings(caplog, monkeypatch, is_native: bool, forward) -> list[str]:
    """Run `forward` as on a CPU with or without instructions for half precision; return the warnings."""
    monkeypatch.setattr(modeling_dino_detr, "is_native_on_cpu", lambda dtype: is_native or dtype == torch.float32)
    monkeypatch.setattr(modeling_dino_detr.logger, "propagate", True)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    type(modeling_dino_detr.logger).warning_once.cache_clear()
    caplog.clear()
    with torch.no_grad():
        forward()
    return [record.getMessage() for record in caplog.records if "float32" in record.getMessage()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("route", ["parameters", "autocast"])
def test_half_precision_on_a_cpu_without_it_warns_once(pixel_values, caplog, monkeypatch, dtype, route):
    model = tiny_model().to(dtype if route == "parameters" else torch.float32)

    def forward_twice():
        with torch.autocast("cpu", dtype, enabled=route == "autocast"):
            model(pixel_values)
            model(pixel_values)

    (message,) = half_precision_warnings(caplog, monkeypatch, False, forward_twice)
    assert str(dtype) in message
    assert "call `model.float()`" in message
    assert "drop `--mixed_precision`" in message
    assert half_precision_warnings(caplog, monkeypatch, True, forward_twice) == []


@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_float32_does_not_warn(pixel_values, caplog, monkeypatch):
    model = tiny_model()
    assert half_precision_warnings(caplog, monkeypatch, False, lambda: model(pixel_values)) == []
    with torch.autocast("cuda", torch.bfloat16):  # of another device
        assert half_precision_warnings(caplog, monkeypatch, False, lambda: model(pixel_values)) == []


@pytest.mark.parametrize("answer", [True, False])
def test_onednn_decides_what_is_native(monkeypatch, answer):
    """Where PyTorch has no such operators, nothing is known and nothing is warned of."""
    monkeypatch.setattr(torch.ops, "mkldnn", SimpleNamespace(_is_mkldnn_bf16_supported=lambda: answer))
    is_native = modeling_dino_detr.is_native_on_cpu.__wrapped__
    assert is_native(torch.bfloat16) is answer
    assert is_native(torch.float16) is is_native(torch.float32) is True


def test_training_under_autocast(pixel_values):
    model = tiny_model()
    expected = train_step(model, pixel_values, make_labels(2, 3)).loss
    with torch.autocast("cpu", torch.bfloat16):
        outputs = train_step(model, pixel_values, make_labels(2, 3))
    outputs.loss.backward()
    assert outputs.pred_boxes.dtype == outputs.loss.dtype == torch.float32
    torch.testing.assert_close(outputs.loss, expected, rtol=0.05, atol=0)
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())


# Saving, compiling, exporting


@pytest.mark.parametrize("overrides", [{}, {"backbone_config": TINY_SWIN}], ids=["resnet", "swin"])
def test_saved_and_loaded_it_is_the_same(pixel_values, tmp_path, overrides):
    from safetensors.torch import load_file

    model = tiny_model(**overrides)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(pixel_values).logits, model(pixel_values).logits, rtol=0, atol=0)
    # Trainer resumes like this and would not notice a renamed key
    fresh = DinoDetrForObjectDetection(tiny_config(**overrides))
    report = fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert not report.missing_keys


STRATEGIES = [
    *({"query_selection": name} for name in QUERY_SELECTION_NAMES),
    *({"denoising": name} for name in DENOISING_NAMES),
    *({"box_refinement": name} for name in BOX_REFINEMENT_NAMES),
    {"share_decoder_heads": False},
    {"backbone_config": TINY_SWIN},
]


@torch.no_grad()
def with_states(model, pixel_values):
    return model(pixel_values, output_hidden_states=True, output_attentions=True)


@pytest.mark.parametrize("overrides", STRATEGIES, ids=str)
def test_a_pickled_or_copied_model_is_the_same(pixel_values, overrides):
    model = tiny_model(**overrides)
    expected = with_states(model, pixel_values)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = (pickle.loads(pickle.dumps(model)), copy.deepcopy(model), torch.load(file, weights_only=False), model)
    for each in copies:  # the model itself records its states as before, too
        torch.testing.assert_close(
            with_states(each, pixel_values).to_tuple(), expected.to_tuple(), rtol=0, atol=0, equal_nan=True
        )
    losses = [train_step(each, pixel_values, make_labels(1, 2)).loss.item() for each in copies]
    assert len(set(losses)) == 1


def test_outputs_config_and_processors_can_be_pickled(pixel_values):
    model = tiny_model().train()
    with torch.no_grad():
        for outputs in (model(pixel_values, labels=make_labels(1, 2)), model.model(pixel_values)):
            again = pickle.loads(pickle.dumps(outputs))
            assert type(again) is type(outputs)
            assert list(again) == list(outputs)
    for each in (model.config, DinoDetrImageProcessor(), DinoDetrImageProcessorPil()):
        for again in (pickle.loads(pickle.dumps(each)), copy.deepcopy(each)):
            assert again.to_dict() == each.to_dict()


@pytest.mark.slow
def test_a_spawned_process_can_be_given_a_model(pixel_values):
    model = tiny_model()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        logits = pool.submit(with_states, model, pixel_values).result().logits
    torch.testing.assert_close(logits, with_states(model, pixel_values).logits, rtol=0, atol=0)


def test_fine_tuning_on_other_classes_starts_with_a_fresh_class_head(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    names = {0: "cat", 1: "dog"}
    loaded = DinoDetrForObjectDetection.from_pretrained(tmp_path, id2label=names, ignore_mismatched_sizes=True)
    assert loaded.class_embed[0].weight.shape == (2, 32)
    assert (loaded.class_embed[0].bias == loaded.class_embed[0].bias[0]).all()
    assert loaded.class_embed[0].bias[0].item() == pytest.approx(-4.595, abs=1e-3)
    assert torch.equal(loaded.model.decoder.layer_norm.weight, model.model.decoder.layer_norm.weight)


def test_it_compiles_as_one_graph(pixel_values):
    model = tiny_model()
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(pixel_values).logits, model(pixel_values).logits)


def test_it_exports(pixel_values):
    model = tiny_model()
    with torch.no_grad():
        exported = torch.export.export(model, (pixel_values, torch.ones_like(pixel_values[:, 0])))
        torch.testing.assert_close(
            exported.module()(pixel_values, torch.ones_like(pixel_values[:, 0])).logits, model(pixel_values).logits
        )


# Invalid labels


def invalid_labels(**changes) -> list[dict[str, torch.Tensor]]:
    """Return labels of two images, with a change of the second object of the second."""
    labels = make_labels(1, 3)
    labels[1]["image_id"] = torch.tensor([139])
    for name, value in changes.items():
        labels[1][name][1] = torch.tensor(value)
    return labels


def without_boxes() -> list[dict[str, torch.Tensor]]:
    labels = make_labels(1, 3)
    del labels[1]["boxes"]
    return labels


def with_a_missing_box() -> list[dict[str, torch.Tensor]]:
    labels = make_labels(1, 3)
    labels[1]["boxes"] = labels[1]["boxes"][:2]
    return labels


NAN = float("nan")


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (
            invalid_labels(class_labels=5),
            r"labels\[1\] \(image_id \[139\]\): class_labels\[1\] is 5, but .* 5 labels, 0 to 4",
        ),
        (invalid_labels(class_labels=-1), r"labels\[1\] \(image_id \[139\]\): class_labels\[1\] is -1"),
        (
            invalid_labels(boxes=[NAN, 0.5, 0.1, 0.1]),
            r"labels\[1\] \(image_id \[139\]\): boxes\[1\] is \[nan, .*fractions",
        ),
        (invalid_labels(boxes=[50.0, 60.0, 20.0, 30.0]), r"boxes\[1\] is \[50.0, 60.0, 20.0, 30.0\], .* fractions"),
        (invalid_labels(boxes=[0.5, 0.5, 0.0, 0.1]), r"boxes\[1\] is .*with positive width and height"),
        (invalid_labels(boxes=[0.5, 0.5, 0.1, -0.1]), r"boxes\[1\] is .*with positive width and height"),
        (without_boxes(), r"labels\[1\] must have 'class_labels' and 'boxes', got \['class_labels'\]"),
        (with_a_missing_box(), r"labels\[1\]: boxes must have the shape .* got \(2, 4\) for 3 class_labels"),
        (make_labels(1, 2, 3), "one entry per image: got 3 for 2 images"),
    ],
    ids=[
        "class too high",
        "class negative",
        "not a number",
        "pixels",
        "no width",
        "negative height",
        "no boxes",
        "a missing box",
        "an additional image",
    ],
)
def test_invalid_labels_are_named(pixel_values, labels, message, training):
    with pytest.raises(ValueError, match=message):
        tiny_model().train(training)(pixel_values, labels=labels)


# On a GPU


def to_cuda(labels: list[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    return [{name: tensor.cuda() for name, tensor in label.items()} for label in labels]


class TestGpu:
    pytestmark = gpu

    def test_equals_the_cpu(self, pixel_values):
        model, labels = tiny_model(label_noise_ratio=0, box_noise_scale=0), make_labels(2, 3)
        results = []
        for device, those in (("cpu", labels), ("cuda", to_cuda(labels))):
            model.to(device).zero_grad()
            with torch.backends.cudnn.flags(allow_tf32=False):
                outputs = train_step(model, pixel_values.to(device), those)
                outputs.loss.backward()
            loss_dict = {name: term.detach().cpu() for name, term in outputs.loss_dict.items()}
            results.append((loss_dict, {name: gradient.cpu() for name, gradient in gradients(model).items()}))
        torch.testing.assert_close(results[0], results[1], rtol=1e-2, atol=1e-3)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_inference_in_half_precision(self, pixel_values, dtype):
        model = tiny_model(query_selection="static").cuda()
        with torch.no_grad():
            expected, outputs = model(pixel_values.cuda()), model.to(dtype)(pixel_values.cuda())
        assert outputs.pred_boxes.dtype == torch.float32
        torch.testing.assert_close(outputs.pred_boxes, expected.pred_boxes, rtol=0, atol=0.03)

    def test_matching_takes_one_transfer(self):
        """For all layers and images: each transfer to the host waits for all work before it."""
        labels = to_cuda(make_labels(3, 0, 2))
        logits, boxes = torch.randn(3, 4, 12, 5, device="cuda"), torch.rand(3, 4, 12, 4, device="cuda")
        config = tiny_config()
        hungarian_match(logits, boxes, labels, config)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            hungarian_match(logits, boxes, labels, config)
            torch.cuda.synchronize()
        assert sum(event.count for event in profile.key_averages() if "Memcpy DtoH" in event.key) == 1

    def test_an_invalid_class_is_named_before_a_device_side_assertion(self, pixel_values):
        model = tiny_model().cuda()
        with pytest.raises(ValueError, match="class_labels"):
            train_step(model, pixel_values.cuda(), to_cuda(invalid_labels(class_labels=5)))
        assert train_step(model, pixel_values.cuda(), to_cuda(make_labels(1, 3))).loss.isfinite()


def test_one_attention_implementation_is_enough_for_a_backbone_without_attention(tmp_path, pixel_values):
    model = tiny_model()
    expected = model(pixel_values).logits
    model.save_pretrained(tmp_path)
    loaded = DinoDetrForObjectDetection.from_pretrained(tmp_path, attn_implementation="sdpa")
    for implementation in ("eager", "sdpa"):
        loaded.set_attn_implementation(implementation)
        assert loaded.model.decoder.config._attn_implementation == implementation
        torch.testing.assert_close(loaded(pixel_values).logits, expected)


@pytest.mark.parametrize("query_selection", ["mixed", "static"])
def test_reset_class_layers_changes_nothing_else(query_selection, tmp_path):
    tiny_model(query_selection=query_selection).save_pretrained(tmp_path)
    model = DinoDetrForObjectDetection.from_pretrained(tmp_path)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.reset_class_layers()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "class_embed" in name or "label_embed" in name}
    torch.testing.assert_close(model.class_embed[0].bias, torch.full((5,), -math.log(99)))


def test_an_empty_batch_goes_through(pixel_values):
    model = tiny_model()
    model.set_attn_implementation("eager")  # transformers' own function for sdpa cannot take one
    outputs = model(pixel_values[:0])
    assert outputs.logits.shape == (0, 12, 5)
    assert outputs.pred_boxes.shape == (0, 12, 4)
