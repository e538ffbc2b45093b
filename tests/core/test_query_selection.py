import pytest
import torch

from helpers.models import tiny_config
from hf_dino.backbone_dino_detr import DinoDetrFeatureLevels
from hf_dino.query_selection_dino_detr import PROPOSAL_MARGIN, QUERY_SELECTIONS, gen_encoder_output_proposals
from hf_dino.reference_points_dino_detr import get_reference_points


def make_levels(*shapes, valid=(1.0, 1.0), batch_size=1) -> DinoDetrFeatureLevels:
    """Make levels without features, of images that fill the upper left (width, height) fraction of their canvas."""
    masks = []
    for height, width in shapes:
        mask = torch.zeros(batch_size, height, width, dtype=torch.bool)
        mask[:, : round(height * valid[1]), : round(width * valid[0])] = True
        masks.append(mask.flatten(1))
    ratios = torch.tensor(valid).expand(batch_size, len(shapes), 2)
    mask, lengths = torch.cat(masks, 1), torch.tensor(shapes).prod(dim=1)
    return DinoDetrFeatureLevels(
        features=torch.zeros(*mask.shape, 32),
        position_embeddings=torch.zeros(*mask.shape, 32),
        mask=mask,
        valid_ratios=ratios,
        spatial_shapes=torch.tensor(shapes),
        level_start_index=lengths.cumsum(0) - lengths,
        spatial_shapes_list=list(shapes),
    )


def test_reference_points_are_the_centers_of_cells_on_every_level():
    """As fractions of the padded maps: of two of four columns, the second has its center at 0.75 of the image."""
    points = get_reference_points(make_levels((2, 4), (1, 2), valid=(0.5, 1.0)))
    assert points.shape == (1, 10, 2, 2)
    torch.testing.assert_close(points[0, 1], torch.tensor([[0.375, 0.25], [0.375, 0.25]]))
    torch.testing.assert_close(points[0, 8], torch.tensor([[0.25, 0.5], [0.25, 0.5]]))


def test_proposals_sit_on_their_cells_and_double_with_each_level():
    boxes, valid_mask = gen_encoder_output_proposals(make_levels((2, 4), (1, 2)))
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.125, 0.25, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, 5], torch.tensor([0.375, 0.75, 0.05, 0.05]))  # row 1, column 1
    torch.testing.assert_close(boxes[0, 9], torch.tensor([0.75, 0.5, 0.1, 0.1]))  # level 1, column 1
    assert valid_mask.all()


def test_proposals_are_fractions_of_the_unpadded_image_and_invalid_in_the_padding():
    boxes, valid_mask = gen_encoder_output_proposals(make_levels((2, 4), valid=(0.5, 1.0)))
    torch.testing.assert_close(boxes[0, :2, 0], torch.tensor([0.25, 0.75]))
    assert valid_mask[0].tolist() == [True, True, False, False] * 2


def test_proposals_at_the_border_are_invalid():
    """The center of the first of 100 cells lies at 0.005, and of the last at 0.995."""
    _, valid_mask = gen_encoder_output_proposals(make_levels((1, 100)))
    assert valid_mask[0].tolist() == [False, *[True] * 98, False]


def test_whole_cells_decide_what_is_at_the_border_in_a_padded_image_too():
    """49.5 of 50 cells is 0.99, the border itself, and must not depend on how much padding follows."""
    alone = gen_encoder_output_proposals(make_levels((1, 50)))[1][0]
    for width in range(51, 90):
        padded = gen_encoder_output_proposals(make_levels((1, width), valid=(50 / width, 1.0)))[1][0]
        assert torch.equal(padded[:50], alone)


@pytest.mark.parametrize("reciprocal", [False, True])
def test_no_rounding_decides_what_is_at_the_border(reciprocal):
    """Cell i of n is inside if 0.01 < (i + 0.5) / n < 0.99, for any runtime's way to divide and for any size."""
    for size in [*range(1, 1500), *range(1550, 9000, 100)]:
        cell = torch.arange(size)
        inside = (50 * (2 * cell + 1) > size) & (50 * (2 * (size - cell) - 1) > size)
        edge, length = cell.float() + 0.5, torch.tensor(float(size))
        center = edge * (1 / length) if reciprocal else edge / length
        assert torch.equal((center > PROPOSAL_MARGIN) & (center < 1 - PROPOSAL_MARGIN), inside)
        assert reciprocal or torch.equal((center > 0.01) & (center < 1 - 0.01), inside)  # the official implementation


def make_selection(strategy, num_queries=6, **overrides):
    torch.manual_seed(0)
    selection = QUERY_SELECTIONS[strategy](tiny_config(query_selection=strategy, num_queries=num_queries, **overrides))
    for parameter in selection.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    levels = make_levels((3, 4), (2, 2), batch_size=2)
    return selection, torch.randn(2, 16, 32, requires_grad=True), levels


@pytest.mark.parametrize("num_ranking_labels", [0, 3])
@pytest.mark.parametrize("strategy", ["mixed", "pure"])
def test_the_tokens_with_the_best_class_are_selected_and_their_boxes_refined(strategy, num_ranking_labels):
    selection, memory, levels = make_selection(strategy, num_ranking_labels=num_ranking_labels)
    queries = selection(memory, levels)
    tokens = selection.enc_output_norm(selection.enc_output(memory))
    scores = selection.class_embed(tokens)
    proposals, _ = gen_encoder_output_proposals(levels)
    for image in range(2):
        order = scores[image].amax(-1).argsort(descending=True)[:6]
        torch.testing.assert_close(queries.enc_outputs_class[image], scores[image][order, :5])
        refined = selection.bbox_embed(tokens[image][order]) + torch.logit(proposals[image][order])
        torch.testing.assert_close(queries.enc_outputs_coord_logits[image], refined)
        torch.testing.assert_close(queries.reference_points[image], refined.sigmoid())
        if strategy == "pure":
            torch.testing.assert_close(queries.inputs_embeds[image], tokens[image][order])
        else:
            torch.testing.assert_close(queries.inputs_embeds[image], selection.content_queries.weight)


@pytest.mark.parametrize("strategy", ["mixed", "pure"])
def test_queries_made_of_tokens_do_not_train_them_but_the_encoder_outputs_do(strategy):
    selection, memory, levels = make_selection(strategy)
    queries = selection(memory, levels)
    assert not queries.reference_points.requires_grad
    assert queries.inputs_embeds.requires_grad == (strategy == "mixed")  # learned, not from the tokens
    outputs = queries.enc_outputs_class.sum() + queries.enc_outputs_coord_logits.sigmoid().sum()
    (gradient,) = torch.autograd.grad(outputs, memory)
    assert gradient.abs().sum() > 0


def test_static_queries_are_learned_and_the_same_for_every_image():
    selection, memory, levels = make_selection("static")
    queries = selection(memory, levels)
    assert queries.enc_outputs_class is None and queries.enc_outputs_coord_logits is None
    torch.testing.assert_close(queries.reference_points[0], selection.anchors.weight.sigmoid())
    assert torch.equal(queries.reference_points[0], queries.reference_points[1])
    (queries.reference_points.sum() + queries.inputs_embeds.sum()).backward()
    assert selection.anchors.weight.grad.abs().sum() > 0 and selection.content_queries.weight.grad.abs().sum() > 0


def test_too_few_tokens_are_an_error_that_says_what_to_do():
    selection, memory, levels = make_selection("mixed", num_queries=17)
    with pytest.raises(ValueError, match=r"16 encoder tokens, too few to choose num_queries=17 .* larger images"):
        selection(memory, levels)


def test_invalid_proposals_are_scored_without_their_memory_and_have_the_box_of_ones():
    selection, memory, _ = make_selection("mixed", num_queries=16)
    levels = make_levels((3, 4), (2, 2), valid=(0.5, 1.0), batch_size=2)
    queries = selection(memory, levels)
    num_invalid = (~gen_encoder_output_proposals(levels)[1][0]).sum().item()
    assert num_invalid == 8
    assert queries.reference_points.isfinite().all()
    assert (queries.reference_points == 1).all(dim=-1).sum(dim=1).tolist() == [num_invalid] * 2
    zero = selection.class_embed(selection.enc_output_norm(selection.enc_output(torch.zeros(32))))
    is_zero = torch.isclose(queries.enc_outputs_class, zero, atol=1e-5).all(dim=-1)
    assert torch.equal(is_zero, (queries.reference_points == 1).all(dim=-1))
    boxes = queries.enc_outputs_coord_logits.sigmoid()
    (gradient,) = torch.autograd.grad(boxes.sum(), memory)
    assert gradient.isfinite().all()
