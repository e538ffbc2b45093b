"""DN-DETR with dense attention: DAB-DETR in evaluation, and denoising queries that leak nothing in training."""

import copy
import pickle

import pytest
import torch
from PIL import Image
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForObjectDetection,
    ConditionalDetrImageProcessor,
    DabDetrConfig,
    DabDetrForObjectDetection,
    ResNetConfig,
    pipeline,
)

from helpers.models import TINY_RESNET, make_labels
from hf_dino import DnDetrConfig, DnDetrForObjectDetection
from hf_dino.ancestor_initialization import initialize_as_authors, rules_of
from hf_dino.denoising_dino_detr import NO_OBJECT
from hf_dino.loss_dino_detr import DinoDetrEffectiveBatch, dino_detr_loss


SIZES = {
    "hidden_size": 32,
    "encoder_layers": 2,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "decoder_layers": 3,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "num_queries": 12,
}
NO_NOISE = {"label_noise_ratio": 0.0, "box_noise_scale": 0.0}
TERMS = ("loss_ce", "loss_bbox", "loss_giou")


def make_config(config_class=DnDetrConfig, **fields):
    backbone = ResNetConfig(**{**TINY_RESNET, "out_features": ["stage4"]})
    id2label = {label: f"class {label}" for label in range(5)}
    return config_class(**{**SIZES, "backbone_config": backbone, "id2label": id2label, **fields})


def perturb(model):
    """Make the heads of a new model say something."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def make_model(seed=0, **fields):
    torch.manual_seed(seed)
    return perturb(DnDetrForObjectDetection(make_config(**fields))).eval()


def dab_detr_like(model):
    """Return transformers' DAB-DETR with the weights of a DN-DETR and the contents of its queries."""
    dab = DabDetrForObjectDetection(make_config(DabDetrConfig, auxiliary_loss=True, dropout=0.0)).eval()
    weights = model.state_dict()
    new = ("denoising.label_embed.weight", "unknown_class.weight")
    dab.load_state_dict({name: value for name, value in weights.items() if name not in new})
    content = weights["unknown_class.weight"].clone()
    content[:, -1] = 0  # the indicator of matching queries

    def set_contents(decoder, args, kwargs):
        return args, {**kwargs, "inputs_embeds": kwargs["inputs_embeds"] + content}

    dab.model.decoder.register_forward_pre_hook(set_contents, with_kwargs=True)
    return dab


@pytest.fixture
def pixel_mask():
    mask = torch.ones(2, 96, 128)
    mask[1, 64:] = 0
    mask[1, :, 96:] = 0
    return mask


def decode(model, pixel_values, denoising):
    return model.encode_and_decode(pixel_values, None, denoising)[1].intermediate_hidden_states


def make_denoising(model, labels, seed=0):
    torch.manual_seed(seed)
    contents = model.unknown_class.weight.expand(len(labels), model.config.num_queries, -1)
    return model.denoising(labels, contents)


@torch.no_grad()
def test_in_evaluation_it_is_dab_detr(pixel_values, pixel_mask):
    model = make_model()
    recorded = {"output_attentions": True, "output_hidden_states": True}
    ours = model(pixel_values, pixel_mask, **recorded)
    theirs = dab_detr_like(model)(pixel_values, pixel_mask, **recorded)
    assert ours.keys() == theirs.keys() and ours.pred_boxes.std() > 0.05
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-6, rtol=0)


@torch.no_grad()
def test_loss_without_denoising_is_that_of_dab_detr(pixel_values, pixel_mask):
    model, labels = make_model(), make_labels(3, 1)
    ours = model(pixel_values, pixel_mask, labels)
    theirs = dab_detr_like(model)(pixel_values, pixel_mask, labels=labels)
    for suffix in ("", "_0", "_1"):
        for term in ("loss_ce", "loss_bbox"):
            torch.testing.assert_close(ours.loss_dict[term + suffix], theirs.loss_dict[term + suffix])
        # Ours adds 1e-6 to both divisors, as the official implementation, and boxes have an area of 0.01 or more.
        giou = "loss_giou" + suffix
        torch.testing.assert_close(ours.loss_dict[giou], theirs.loss_dict[giou], atol=2e-4, rtol=0)
        assert not ours.loss_dict[f"loss_bbox_denoising{suffix}"]
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=0)
    for layer, expected in zip(ours.auxiliary_outputs, theirs.auxiliary_outputs, strict=True):
        torch.testing.assert_close(layer, expected, atol=1e-6, rtol=0)


@torch.no_grad()
def test_matching_queries_see_no_label_and_no_noise(pixel_values):
    model = make_model()
    expected = model(pixel_values, labels=make_labels(2, 3))
    model.train()
    others = [make_labels(2, 3, seed=1), make_labels(7, 0), make_labels(0, 0)]
    for seed, labels in enumerate([make_labels(2, 3), *others]):
        torch.manual_seed(seed)
        outputs = model(pixel_values, labels=labels)
        for name in ("logits", "pred_boxes", "auxiliary_outputs", "last_hidden_state"):
            torch.testing.assert_close(outputs[name], expected[name], atol=1e-5, rtol=0)


@torch.no_grad()
def test_groups_do_not_see_one_another_but_the_matching_queries(pixel_values):
    model = make_model()
    denoising = make_denoising(model, make_labels(2, 2))
    states = decode(model, pixel_values, denoising)
    contents, anchors = denoising.inputs_embeds.clone(), denoising.reference_points.clone()
    contents[:, 2] += 1  # the first query of the second group
    anchors[:, 2] = 0.9
    changed = decode(model, pixel_values, denoising._replace(inputs_embeds=contents, reference_points=anchors))
    difference = (changed - states).abs().amax(dim=(0, 1, 3))
    assert difference[2] > 0.1 and difference[3] > 1e-3
    assert difference[[0, 1, *range(4, 22)]].max() < 1e-5
    changed = decode(model, pixel_values, denoising._replace(matching_queries=denoising.matching_queries + 1))
    assert (changed - states).abs().amax(dim=(0, 1, 3)).min() > 1e-3


@torch.no_grad()
def test_a_batch_gives_what_its_images_give(pixel_values):
    model = make_model()
    batch = model(pixel_values)
    for image, single in enumerate(pixel_values):
        outputs = model(single[None])
        for name in ("logits", "pred_boxes"):
            torch.testing.assert_close(outputs[name][0], batch[name][image], atol=1e-5, rtol=0)


@pytest.mark.parametrize("counts", [(2, 1), (2, 0), (0, 0)])
@pytest.mark.parametrize("fields", [{}, {"auxiliary_loss": False}])
def test_gradient_reaches_every_parameter(pixel_values, counts, fields):
    model = make_model(**fields).train()
    outputs = model(pixel_values, labels=make_labels(*counts))
    outputs.loss.backward()
    assert outputs.loss.isfinite()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without  # which data-parallel training would wait for
    zero = [name for name, parameter in model.named_parameters() if not parameter.grad.any()]
    assert not zero or not sum(counts)


@torch.no_grad()
def test_without_noise_a_new_model_restores_the_boxes(pixel_values):
    """Its box head predicts no change, so that each layer returns the anchors."""
    torch.manual_seed(0)
    for fields, is_exact in ((NO_NOISE, True), ({}, False)):
        model = DnDetrForObjectDetection(make_config(**fields)).train()
        terms = model(pixel_values, labels=make_labels(2, 3)).loss_dict
        for suffix in ("", "_0", "_1"):
            assert (terms[f"loss_bbox_denoising{suffix}"] < 1e-5) == is_exact
            assert (terms[f"loss_giou_denoising{suffix}"] < 1e-3) == is_exact


@torch.no_grad()
def test_denoising_terms_are_means_over_real_copies(pixel_values):
    model, labels, given = make_model().train(), make_labels(3, 1), {}

    def record(**arguments):
        given.update(arguments)
        return dino_detr_loss(**arguments)

    model.loss_function = record
    terms = model(pixel_values, labels=labels).loss_dict
    index = given["denoising_object_index"]
    assert index.shape == (2, 15) and (index > NO_OBJECT).sum() == 5 * 4
    for layer, suffix in enumerate(("_0", "_1", "")):
        sums = dict.fromkeys(TERMS, 0.0)
        for image, query in (index > NO_OBJECT).nonzero().tolist():
            label, logits = labels[image], given["denoising_logits"][image, layer, query]
            one_hot = torch.eye(5)[label["class_labels"][index[image, query]]]
            box, target = given["denoising_boxes"][image, layer, query], label["boxes"][index[image, query]]
            corners = [box_convert(each[None], "cxcywh", "xyxy") for each in (box, target)]
            sums["loss_ce"] += sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2).sum()
            sums["loss_bbox"] += (box - target).abs().sum()
            sums["loss_giou"] += 1 - generalized_box_iou(*corners).item()
        for term, total in sums.items():
            assert terms[f"{term}_denoising{suffix}"].item() == pytest.approx(float(total) / (5 * 4), rel=1e-3)


def test_a_micro_batch_is_normalized_by_the_effective_batch(pixel_values):
    model, labels = make_model(**NO_NOISE).train(), make_labels(2, 1)
    alone = model(pixel_values, labels=labels).loss
    whole = model(pixel_values, labels=labels, effective_batch=DinoDetrEffectiveBatch(num_boxes=6.0))
    torch.testing.assert_close(whole.loss, alone / 2)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")  # its successor is 5.23's
def test_gradient_checkpointing_changes_no_gradient(pixel_values):
    gradients = []
    for is_checkpointed in (False, True):
        model = make_model(**NO_NOISE).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(pixel_values, labels=make_labels(2, 1)).loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("config_class", [DnDetrConfig, DabDetrConfig])
def test_initial_weights_are_those_of_the_official_implementation(config_class):
    torch.manual_seed(0)
    config = make_config(config_class, hidden_size=64, num_queries=300, initializer_bias_prior_prob=0.01)
    model = AutoModelForObjectDetection.from_config(config)
    if config_class is DabDetrConfig:
        initialize_as_authors(model, rules_of(model.config))
    anchors = model.model.query_refpoint_embeddings.weight
    assert anchors.std().item() == pytest.approx(1, abs=0.1)
    layer, width = model.model.encoder.layers[0], 64
    assert layer.self_attn.q_proj.weight.abs().max().item() == pytest.approx((6 / (4 * width)) ** 0.5, rel=0.01)
    assert layer.fc1.weight.abs().max().item() == pytest.approx((6 / (width + 48)) ** 0.5, rel=0.01)
    assert not layer.self_attn.out_proj.bias.any() and layer.fc1.bias.any()
    torch.testing.assert_close(model.class_embed.bias.sigmoid(), torch.full((5,), 0.01))
    assert not model.bbox_predictor.layers[-1].weight.any()
    assert model.model.decoder.bbox_embed.layers[0].weight is model.bbox_predictor.layers[0].weight


def test_a_saved_model_is_opened_by_the_auto_classes(pixel_values, tmp_path):
    model = make_model()
    model(pixel_values, labels=make_labels(2, 1))
    model.save_pretrained(tmp_path)
    ConditionalDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 128}).save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DnDetrConfig)
    assert isinstance(AutoImageProcessor.from_pretrained(tmp_path), ConditionalDetrImageProcessor)
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path)
    assert isinstance(loaded, DnDetrForObjectDetection)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    for labels, is_training in ((None, False), (make_labels(2, 1), True)):
        results = []
        for each in (model.train(is_training), loaded.train(is_training)):
            torch.manual_seed(0)
            results.append(each(pixel_values, labels=labels))
        torch.testing.assert_close(results[0].pred_boxes, results[1].pred_boxes, rtol=0, atol=0)
        assert results[0].loss == results[1].loss

    detect = pipeline("object-detection", model=str(tmp_path), threshold=0.0)
    found = detect(Image.new("RGB", (120, 90), "red"))
    assert found and {"score", "label", "box"} <= found[0].keys() and found[0]["label"].startswith("class ")


def test_weights_of_dab_detr_can_be_loaded(tmp_path):
    torch.manual_seed(0)
    dab = perturb(DabDetrForObjectDetection(make_config(DabDetrConfig)))
    dab.save_pretrained(tmp_path)
    model, info = DnDetrForObjectDetection.from_pretrained(tmp_path, config=make_config(), output_loading_info=True)
    assert set(info["missing_keys"]) == {"denoising.label_embed.weight", "unknown_class.weight"}
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    weights = model.state_dict()
    torch.testing.assert_close({name: weights[name] for name in dab.state_dict()}, dict(dab.state_dict()))
    assert weights["denoising.label_embed.weight"].std().item() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_that_was_trained_can_be_copied(pixel_values, duplicate):
    model, results = make_model().train(), []
    model(pixel_values, labels=make_labels(2, 1)).loss.backward()
    for each in (model, duplicate(model)):
        torch.manual_seed(0)
        results.append(each(pixel_values, labels=make_labels(3, 0)).loss)
    assert results[0] == results[1]


def test_training_reduces_the_loss(pixel_values):
    torch.manual_seed(0)
    model, labels = DnDetrForObjectDetection(make_config()).train(), make_labels(2, 1)
    optimizer, history = torch.optim.AdamW(model.parameters(), lr=2e-3), []
    for _ in range(20):
        outputs = model(pixel_values, labels=labels)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
        history.append({"loss": outputs.loss, **outputs.loss_dict})
    for name in ("loss", "loss_ce", "loss_bbox", "loss_giou", "loss_ce_denoising"):
        assert history[-1][name] < 0.8 * history[0][name]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_patterns": 3}, "num_patterns must be between 0 and 0, got 3"),
        ({"num_denoising_groups": 0}, "num_denoising_groups must be between 1 and inf, got 0"),
        ({"label_noise_ratio": 1.5}, "label_noise_ratio must be between 0 and 1, got 1.5"),
    ],
)
def test_a_field_out_of_range_is_an_error(fields, message):
    with pytest.raises(ValueError, match=message):
        make_config(**fields)


def test_labels_are_checked(pixel_values):
    with pytest.raises(ValueError, match="one entry per image"):
        make_model()(pixel_values, labels=make_labels(1))
