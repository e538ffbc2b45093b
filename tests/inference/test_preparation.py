"""A prepared model detects what its model detects, and leaves it as it is."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import DeformableDetrForObjectDetection, pipeline

from helpers.models import TINY_SWIN, make_labels, tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.family import FAMILY, tiny_fields
from hf_dino.inference import preparation, prepare_for_inference


BODIES = {
    "resnet": {
        "model_type": "resnet",
        "embedding_size": 8,
        "hidden_sizes": [16, 24, 32, 48],
        "depths": [1, 2, 1, 1],
        "layer_type": "bottleneck",
        "out_features": ["stage3", "stage4"],
    },
    "resnet_basic": {  # no shortcut in the first stage: its first block must not overwrite the stem's output
        "model_type": "resnet",
        "embedding_size": 16,
        "hidden_sizes": [16, 24, 32, 48],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
        "out_features": ["stem", "stage1", "stage4"],
    },
    "convnext": {
        "model_type": "convnext",
        "num_stages": 4,
        "hidden_sizes": [8, 8, 16, 16],
        "depths": [1, 1, 1, 1],
        "out_features": ["stage3", "stage4"],
    },
    "swin": TINY_SWIN,
}
STRATEGIES = {
    "dab": {"query_selection": "static", "positional_query": "conditional", "decoder_norm": False},
    "pure": {"query_selection": "pure", "denoising": "plain", "box_refinement": "look_forward_once"},
    "shared_heads": {"share_decoder_heads": True},
    "no_denoising": {"denoising": "none"},
    "no_extra_level": {"num_feature_levels": 2},
    "two_extra_levels": {"num_feature_levels": 4},
}
DINO_ROWS = [key for key, member in FAMILY.items() if member.model_class == "DinoDetrForObjectDetection"]


def live_model(**overrides) -> nn.Module:
    """A model whose batch norms do something."""
    model = tiny_model(**overrides)
    for norm in model.model.backbone.batch_norms():
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.3)
        nn.init.normal_(norm.running_mean, std=0.3)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return model


def images(batch_size=1, height=96, width=128, seed=0):
    return torch.randn(batch_size, 3, height, width, generator=torch.Generator().manual_seed(seed))


def padded_mask(pixel_values, *sizes):
    mask = torch.zeros_like(pixel_values[:, 0])
    for row, (height, width) in zip(mask, sizes, strict=True):
        row[:height, :width] = 1
    return mask


@torch.no_grad()
def assert_same(prepared, model, *inputs, tolerance=1e-5, **options):
    got, wanted = prepared(*inputs, **options), model(*inputs, **options)
    for name in ("logits", "pred_boxes"):
        torch.testing.assert_close(got[name], wanted[name], atol=tolerance, rtol=0)
    return got, wanted


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_equals_the_model_with_every_backbone_padded_or_not(body):
    model = live_model(backbone_config=body)
    prepared = prepare_for_inference(model)
    batch = images(2)
    assert_same(prepared, model, batch)
    assert_same(prepared, model, batch, torch.ones_like(batch[:, 0]))
    assert_same(prepared, model, batch, padded_mask(batch, (96, 100), (64, 128)))
    assert_same(prepared, model, batch[:1])


@pytest.mark.parametrize("fields", STRATEGIES.values(), ids=STRATEGIES)
def test_equals_the_model_with_every_strategy(fields):
    model = live_model(**fields).double()  # levels of a few cells are ill-conditioned in float32
    batch = images(2).double()
    prepared = prepare_for_inference(model)
    assert_same(prepared, model, batch, tolerance=1e-10)
    assert_same(prepared, model, batch, padded_mask(batch, (96, 100), (96, 128)), tolerance=1e-10)


@pytest.mark.parametrize("key", DINO_ROWS)
def test_equals_each_row_of_the_family(key):
    torch.manual_seed(0)
    model = FAMILY[key].make_model(**tiny_fields(key), num_labels=3).eval()
    assert_same(prepare_for_inference(model), model, images(1, 128, 160))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_returns_the_same_hidden_states_and_attentions(attention):
    model = live_model()
    model.set_attn_implementation(attention)
    options = {"output_hidden_states": True, "output_attentions": attention == "eager"}
    got, wanted = assert_same(prepare_for_inference(model), model, images(2), **options)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-4, rtol=1e-4)


def test_the_sizes_of_earlier_images_do_not_matter(monkeypatch):
    monkeypatch.setattr(preparation, "MAX_SIZES", 2)
    model = live_model()
    prepared = prepare_for_inference(model)
    for width in (96, 128, 160, 128, 96):
        assert_same(prepared, model, images(1, 96, width))
        assert_same(prepared, model, images(2, 96, width, seed=1))
        assert len(prepared.model.backbone._known) <= 2
    batch = images(2)
    assert_same(prepared, model, batch, padded_mask(batch, (96, 90), (90, 128)))
    assert_same(prepared, model, batch)


def test_positions_of_a_size_are_computed_once(monkeypatch):
    prepared, computed = prepare_for_inference(live_model()), []
    sines = preparation.DinoDetrBackbone.make_levels

    def counting(self, features, shapes, pixel_mask):
        computed.append(shapes)
        return sines(self, features, shapes, pixel_mask)

    monkeypatch.setattr(preparation.DinoDetrBackbone, "make_levels", counting)
    for batch_size in (1, 2, 1):
        prepared(images(batch_size))
    assert len(computed) == 1
    prepared(images(), padded_mask(images(), (96, 100)))
    assert len(computed) == 2


def test_chunks_of_tokens_do_not_matter(monkeypatch):
    model = live_model()
    for size in (1, 7, 10_000):
        monkeypatch.setattr(preparation, "TOKENS_PER_CHUNK", size)
        assert_same(prepare_for_inference(model), model, images(2))


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize("name", ["resnet", "resnet_basic"])
def test_blocks_of_a_resnet_overwrite_nothing_that_is_read_later(name):
    model = live_model(backbone_config=BODIES[name])
    body, prepared = (each.model.backbone.body for each in (model, prepare_for_inference(model)))
    kinds = [type(block).__name__ for stage in prepared.encoder.stages for block in stage.layers]
    num_plain = sum(not kind.startswith("Prepared") for kind in kinds)
    assert num_plain == (name == "resnet_basic")

    wanted = [feature_map.detach() for feature_map in body(images(2)).feature_maps]
    for context in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with context():
            got = prepared(images(2)).feature_maps
        for feature_map, expected in zip(got, wanted, strict=True):
            torch.testing.assert_close(feature_map, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


def test_blocks_that_are_replaced_stay_so():
    """A first block that returns its input leaves the stage before it as the shortcut of the second block."""

    class Passes(nn.Module):
        shortcut = nn.Identity()

        def forward(self, hidden_state):
            return hidden_state

    model = live_model(backbone_config=BODIES["resnet_basic"])
    model.model.backbone.body.encoder.stages[0].layers[0] = Passes()
    body, prepared = (each.model.backbone.body for each in (model, prepare_for_inference(model)))
    with torch.no_grad():
        wanted, got = body(images()).feature_maps, prepared(images()).feature_maps
    for feature_map, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(feature_map, expected, atol=1e-5 * float(expected.abs().max()), rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("name", ["resnet", "resnet_basic"])
def test_what_is_not_a_number_stays_so(name):
    model = live_model(backbone_config=BODIES[name])
    pixel_values = images()
    pixel_values[0, 0, 50, 50] = float("nan")
    for body in (model.model.backbone.body, prepare_for_inference(model).model.backbone.body):
        assert all(feature_map.isnan().any() for feature_map in body(pixel_values).feature_maps)


@torch.no_grad()
def test_another_mlp_gets_all_tokens_of_an_image(monkeypatch):
    class MixesTokens(nn.Module):
        def forward(self, hidden_states):
            return hidden_states.mean(dim=1, keepdim=True).expand_as(hidden_states)

    monkeypatch.setattr(preparation, "TOKENS_PER_CHUNK", 7)
    model = live_model()
    for layer in model.model.encoder.layers:
        layer.mlp = MixesTokens()
    assert_same(prepare_for_inference(model), model, images(2))


def test_gradients_can_be_taken_after_inference_mode():
    prepared = prepare_for_inference(live_model())
    with torch.inference_mode():
        wanted = prepared(images()).pred_boxes.clone()
    pixel_values = images().requires_grad_()
    boxes = prepared(pixel_values).pred_boxes
    boxes.sum().backward()
    assert pixel_values.grad.abs().sum() > 0
    torch.testing.assert_close(boxes.detach(), wanted)


def test_threads_may_run_it_at_once():
    model = live_model()
    prepared = prepare_for_inference(model)
    batches = [images(1, 96, 96 + 32 * (number % 4), number) for number in range(12)]

    @torch.inference_mode()
    def boxes(pixel_values):
        return prepared(pixel_values).pred_boxes

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(boxes, batches))
    for pixel_values, got in zip(batches, found, strict=True):
        torch.testing.assert_close(got, boxes(pixel_values))


def test_the_model_stays_as_it_is_and_shares_its_weights():
    model = live_model()
    before = {name: (weight, weight.clone(), weight.stride()) for name, weight in model.state_dict().items()}
    types, pixel_values = [type(module) for module in model.modules()], images(2)
    with torch.no_grad():
        wanted = model(pixel_values).logits
        prepared = prepare_for_inference(model)
        prepared(pixel_values)
        assert torch.equal(model(pixel_values).logits, wanted)
    for name, weight in model.state_dict().items():
        assert weight.data_ptr() == before[name][0].data_ptr()
        assert torch.equal(weight, before[name][1]) and weight.stride() == before[name][2]
    assert [type(module) for module in model.modules()] == types
    assert all(weight.requires_grad for weight in model.model.encoder.parameters())

    own = {name for name, weight in prepared.named_parameters() if weight.data_ptr() not in _pointers(model)}
    assert own
    assert all(name.startswith("model.backbone.body.") and ".convolution." in name for name in own)
    assert not prepared.model.backbone.batch_norms()
    model.train()
    loss = model(pixel_values, labels=make_labels(1, 2)).loss
    loss.backward()
    assert loss.isfinite()
    assert not prepared.training


def _pointers(model):
    return {weight.data_ptr() for weight in model.parameters()}


def test_a_model_in_training_mode_stays_so():
    model = live_model().train()
    prepared = prepare_for_inference(model)
    assert model.training and not prepared.training
    assert_same(prepared, model.eval(), images())


def test_copies_and_pickles_work_alone():
    model = live_model()
    prepared = prepare_for_inference(model)
    prepared(images())
    for other in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_same(other, model, images(2, 96, 160))


def test_losses_in_evaluation_mode_are_the_same():
    model = live_model()
    got, wanted = assert_same(prepare_for_inference(model), model, images(2), labels=make_labels(1, 2))
    torch.testing.assert_close(got.loss, wanted.loss)


def test_double_precision():
    model = live_model().double()
    assert_same(prepare_for_inference(model), model, images(2).double(), tolerance=1e-10)


@torch.no_grad()
def test_autocast_is_as_precise_as_that_of_the_model():
    model = live_model(query_selection="static")  # selected tokens might change their order
    prepared, wanted = prepare_for_inference(model), model(images(4))
    with torch.autocast("cpu", torch.bfloat16):
        got, of_the_model = prepared(images(4)), model(images(4))
    assert got.pred_boxes.dtype == torch.float32
    for name in ("logits", "pred_boxes"):
        error, limit = ((outputs[name] - wanted[name]).abs().mean() for outputs in (got, of_the_model))
        assert 0 < error < 1.5 * limit


def test_training_and_saving_are_refused(tmp_path):
    prepared = prepare_for_inference(live_model())
    assert prepared.eval() is prepared
    assert prepared.train(False) is prepared
    with pytest.raises(RuntimeError, match="cannot be trained; train the model it was made from"):
        prepared.train()
    with pytest.raises(RuntimeError, match="cannot be saved; save the model it was made from"):
        prepared.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="cannot be saved; save the model it was made from"):
        prepared.push_to_hub("me/mine")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("shape", [(0, 6), (1, 6), (32, 6), (2, 40, 6), (37, 6), (2, 0, 3, 6), (6,)], ids=str)
def test_a_linear_layer_is_the_same_as_a_convolution(shape, num_threads):
    linear, inputs = nn.Linear(6, 5), torch.randn(*shape).transpose(0, -2) if len(shape) > 2 else torch.randn(shape)
    prepared = copy.deepcopy(linear)
    prepared.__class__ = preparation.PreparedLinear
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        torch.testing.assert_close(prepared(inputs), linear(inputs))
    finally:
        torch.set_num_threads(before)


def test_a_layer_of_another_class_is_called():
    class Adapter(nn.Linear):
        def forward(self, inputs):
            return super().forward(inputs) + 1

    model = live_model()
    for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
        layer.mlp.fc1.__class__ = Adapter
    assert_same(prepare_for_inference(model), model, images())


@pytest.mark.parametrize(
    "move", [lambda model: model.half(), lambda model: model.to(torch.float64), lambda model: model.to("meta")]
)
def test_it_is_neither_moved_nor_converted(move):
    prepared = prepare_for_inference(live_model())
    with pytest.raises(RuntimeError, match="neither moved nor converted; prepare the one"):
        move(prepared)
    assert_same(prepared.to("cpu"), prepared.float(), images())


def test_the_pipeline_of_transformers_takes_it(caplog):
    model, processor = live_model(), DinoDetrImageProcessor(size={"height": 96, "width": 128})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    wanted, got = (
        pipeline("object-detection", model=detector, image_processor=processor)(image, threshold=0.0)
        for detector in (model, prepare_for_inference(model))
    )
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    assert [found["box"] for found in got] == [found["box"] for found in wanted]
    assert [found["score"] for found in got] == pytest.approx([found["score"] for found in wanted], abs=1e-5)


def test_other_models_are_returned_as_they_are():
    fields = tiny_fields("deformable_detr")
    others = [
        FAMILY["deformable_detr"].make_model(**fields),
        live_model().bfloat16(),
        live_model().half(),
        live_model().to("meta"),
        live_model().model,
        prepare_for_inference(live_model()),
    ]
    assert isinstance(others[0], DeformableDetrForObjectDetection)
    for other in others:
        assert prepare_for_inference(other) is other
