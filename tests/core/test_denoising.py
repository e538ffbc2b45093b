import pytest
import torch

from helpers.models import make_labels, tiny_config
from hf_dino.denoising_dino_detr import (
    DENOISING_STRATEGIES,
    NO_OBJECT,
    NOT_SUPERVISED,
    contrastive_box_noise,
    denoising_attention_mask,
    make_decoder_attention_mask,
    plain_box_noise,
)
from hf_dino.modeling_dino_detr import DinoDetrSelfAttention


def make_queries(labels, strategy="contrastive", num_queries=12, max_num_objects=0, **overrides):
    config = tiny_config(denoising=strategy, **overrides)
    torch.manual_seed(0)
    module = DENOISING_STRATEGIES[strategy](config)
    if hasattr(module, "label_embed"):
        torch.nn.init.normal_(module.label_embed.weight)
    return module, module(labels, torch.zeros(len(labels), num_queries, config.d_model), max_num_objects)


def slow_mask(num_groups, group_size, num_queries):
    """Apply the rule of DN-DETR query by query."""
    total = num_groups * group_size + num_queries
    allowed = torch.zeros(total, total, dtype=torch.bool)
    for row in range(total):
        for column in range(total):
            column_is_matching = column >= num_groups * group_size
            same_group = row < num_groups * group_size and row // group_size == column // group_size
            allowed[row, column] = column_is_matching or (not column_is_matching and same_group)
    return allowed


@pytest.mark.parametrize("sizes", [(3, 2, 4), (1, 5, 2), (4, 0, 3), (2, 3, 0), (0, 0, 5)])
def test_attention_mask_is_the_rule(sizes):
    assert torch.equal(denoising_attention_mask(*sizes), slow_mask(*sizes))


def test_scores_are_masked_by_the_rule_or_not_at_all():
    """Without denoising queries a mask would hide nothing, at a cost that is quadratic in the number of queries."""
    _, denoising = make_queries(make_labels(3, 1))
    mask = make_decoder_attention_mask(denoising, 12, torch.float32)
    group_size = denoising.inputs_embeds.shape[1] // denoising.num_groups
    assert torch.equal(mask[0, 0] == 0, slow_mask(denoising.num_groups, group_size, 12))
    assert mask.min() == torch.finfo(torch.float32).min
    module, of_no_objects = make_queries(make_labels(0, 0))
    for none in (of_no_objects, module(None, torch.zeros(2, 12, 32))):
        assert make_decoder_attention_mask(none, 12, torch.float32) is None


@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_mask_is_a_mask_that_hides_nothing(attn_implementation, dtype):
    torch.manual_seed(0)
    attention = DinoDetrSelfAttention(tiny_config(attn_implementation=attn_implementation)).to(dtype)
    for queries in (7, 300, 1100):
        states, positions = torch.randn(2, 2, queries, 32, dtype=dtype).unbind()
        masked, _ = attention(states, positions, torch.zeros(1, 1, queries, queries, dtype=dtype))
        assert torch.equal(attention(states, positions, None)[0], masked)


@pytest.mark.parametrize("scale", [0.4, 1.0])
def test_contrastive_noise_is_below_lambda_or_between_lambda_and_two_lambda(scale):
    torch.manual_seed(0)
    box = torch.tensor([0.5, 0.5, 0.1, 0.2])  # small and central, so that nothing is clamped at the image's border
    noisy = contrastive_box_noise(box.expand(1, 500, 2, 3, 4), scale)

    def corners(boxes):
        return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)

    moved = (corners(noisy) - corners(box)).abs() / (box[2:].repeat(2) / 2)
    positive, negative = moved.unbind(dim=2)
    assert positive.max() <= scale * (1 + 1e-4) and positive.max() > 0.95 * scale and positive.min() < 0.05 * scale
    assert negative.min() >= scale * (1 - 1e-4) and negative.max() <= 2 * scale * (1 + 1e-4)
    assert negative.max() > 1.95 * scale
    assert ((corners(noisy) - corners(box)) > 0).float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_plain_noise_shifts_by_half_the_size_and_scales_the_size():
    torch.manual_seed(0)
    box, scale = torch.tensor([0.5, 0.5, 0.1, 0.2]), 0.4
    noisy = plain_box_noise(box.expand(5000, 4), scale)
    shift = (noisy[:, :2] - box[:2]).abs() / (box[2:] / 2)
    ratio = noisy[:, 2:] / box[2:]
    assert 0.95 * scale < shift.max() <= scale * (1 + 1e-4)
    assert 1 - scale - 1e-4 <= ratio.min() < 1 - 0.95 * scale and 1 + 0.95 * scale < ratio.max() <= 1 + scale + 1e-4


def test_without_noise_a_positive_query_is_its_object():
    labels = make_labels(2, 3)
    module, queries = make_queries(labels, label_noise_ratio=0, box_noise_scale=0)
    for image, label in enumerate(labels):
        index = queries.object_index[image]
        positive = index != NO_OBJECT
        torch.testing.assert_close(queries.reference_points[image][positive], label["boxes"][index[positive]])
        expected = module.label_embed.weight[label["class_labels"][index[positive]]]
        torch.testing.assert_close(queries.inputs_embeds[image][positive], expected)
        # every group has each object once as a positive query
        counts = index[positive].bincount(minlength=len(label["boxes"]))
        assert counts.tolist() == [queries.num_groups] * len(label["boxes"])


def test_an_image_with_fewer_objects_is_filled_up_with_empty_queries():
    _, queries = make_queries(make_labels(0, 3))
    assert (queries.object_index[0] == NO_OBJECT).all()
    assert queries.inputs_embeds[0].abs().sum() == 0
    assert (queries.reference_points[0] == 0.5).all()


COUNTS = [(100, (3, 7)), (10, (3, 7)), (10, (1,)), (7, (7,)), (3, (2, 0))]


@pytest.mark.parametrize(("num_denoising", "counts"), COUNTS)
def test_num_denoising_is_divided_into_groups(num_denoising, counts):
    """In the official implementation a dn_number below 50 is a number of groups, which gives thousands of queries."""
    _, queries = make_queries(make_labels(*counts), num_denoising=num_denoising)
    assert queries.num_groups == num_denoising // max(counts)
    assert queries.inputs_embeds.shape[1] == queries.num_groups * max(counts) * 2 <= num_denoising * 2


@pytest.mark.parametrize(("num_denoising", "counts"), COUNTS)
def test_plain_groups_are_as_many_for_any_images(num_denoising, counts):
    for given, groups in (({}, 5), ({"num_denoising_groups": 3}, 3)):
        _, queries = make_queries(make_labels(*counts), "plain", num_denoising=num_denoising, **given)
        assert queries.num_groups == groups
        assert queries.inputs_embeds.shape[1] == groups * max(counts)


@pytest.mark.parametrize(("strategy", "queries_per_object"), [("contrastive", 2), ("plain", 5)])
def test_a_crowded_image_has_no_more_than_num_denoising(strategy, queries_per_object):
    torch.manual_seed(0)
    _, queries = make_queries(make_labels(500, 2), strategy, num_denoising=20)
    assert queries.inputs_embeds.shape[1] == 20 * queries_per_object
    chosen = queries.object_index[0][queries.object_index[0] > NO_OBJECT]
    assert len(chosen.unique()) == 20 and chosen.max() > 20  # a choice, not the first ones


def test_plain_contents_end_with_what_they_are():
    labels, config = make_labels(1, 3), tiny_config(denoising="plain")
    module = DENOISING_STRATEGIES["plain"](config)
    torch.nn.init.normal_(module.label_embed.weight)
    matching = torch.randn(2, 12, config.d_model)
    queries = module(labels, matching)
    assert torch.equal(queries.inputs_embeds[..., -1], (queries.object_index > NO_OBJECT).float())
    assert (queries.object_index[0] == NOT_SUPERVISED).sum() == 5 * 2
    for given in (labels, None):  # None in inference
        marked = module(given, matching).matching_queries
        assert torch.equal(marked[..., :-1], matching[..., :-1]) and (marked[..., -1] == 0).all()


@pytest.mark.parametrize("strategy", ["contrastive", "none"])
def test_other_contents_are_all_content(strategy):
    module, _ = make_queries(make_labels(1), strategy)
    matching = torch.randn(1, 12, 32)
    assert module(make_labels(3), matching).matching_queries is matching


@pytest.mark.parametrize("strategy", list(DENOISING_STRATEGIES))
@pytest.mark.parametrize("counts", [(2, 0), (0, 0)])
@pytest.mark.parametrize("max_num_objects", [4, 50])
def test_a_batch_of_a_step_has_the_queries_that_it_would_have_in_the_effective_batch(
    strategy, counts, max_num_objects
):
    settings = {"label_noise_ratio": 0, "box_noise_scale": 0, "num_denoising": 9}
    _, whole = make_queries(make_labels(*counts, max_num_objects), strategy, **settings)
    _, part = make_queries(make_labels(*counts), strategy, max_num_objects=max_num_objects, **settings)
    assert part.num_groups == whole.num_groups
    for name in ("inputs_embeds", "reference_points", "object_index"):
        assert torch.equal(getattr(part, name), getattr(whole, name)[: len(counts)])


@pytest.mark.parametrize(("strategy", "probability"), [("contrastive", 0.5), ("plain", 1.0)])
def test_classes_are_noised_as_often_as_in_the_papers_code(strategy, probability):
    module, _ = make_queries(make_labels(1), strategy, label_noise_ratio=1.0)
    classes = torch.full((20000,), 2)
    changed = (module.add_label_noise(classes) != classes).float().mean().item()
    assert changed == pytest.approx(probability * 4 / 5, abs=0.02)  # one in five stays the same


@pytest.mark.parametrize("strategy", list(DENOISING_STRATEGIES))
def test_no_objects_are_no_queries_but_a_gradient(strategy):
    module, queries = make_queries(make_labels(0, 0), strategy)
    assert queries.inputs_embeds.shape == (2, 0, 32) and queries.reference_points.shape == (2, 0, 4)
    if strategy != "none":
        queries.inputs_embeds.sum().backward()
        assert module.label_embed.weight.grad is not None
    assert make_queries(make_labels(2, 3), "none")[1].inputs_embeds.shape == (2, 0, 32)
