"""`hf-dino info`: counts equal those by hand, parts add up to the whole, and no implementation changes them."""

import itertools
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers.command_line import hf_dino
from helpers.models import TINY_SWIN, tiny_config, tiny_model
from hf_dino import DinoDetrImageProcessor, kernels
from hf_dino.deformable_attention_dino_detr import multi_scale_deformable_attention
from hf_dino.hub import save_detector
from hf_dino.model_card import converted_card, finetuned_card
from hf_dino.model_info import (
    FLOPS_PER_SAMPLE,
    OTHER,
    PARTS,
    count_flops,
    count_parameters,
    flop_formulas,
    measure_forward,
    part_of,
    read_origin,
)
from hf_dino.utils.errors import InputError


ROOT = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT / "tests")))}


def flops_of(call) -> int:
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=flop_formulas(torch.device("cpu"))) as counter:
        call()
    return counter.get_total_flops()


# Counts by hand


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (7, 5, 3), (2, 32, 8)])
def test_linear_layers_count_two_per_multiply_add(rows, inputs, outputs):
    counts = count_flops(nn.Sequential(nn.Linear(inputs, outputs)), torch.randn(rows, inputs))
    assert counts == {OTHER: 2 * rows * inputs * outputs}


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(1, 1, 1), (3, 1, 1), (3, 2, 1), (3, 1, 2)])
def test_convolutions_count_two_per_multiply_add(kernel, stride, groups):
    layer = nn.Conv2d(4, 6, kernel, stride, groups=groups)
    image = torch.randn(2, 4, 9, 11)
    per_value = 2 * kernel * kernel * 4 // groups
    assert count_flops(nn.Sequential(layer), image).total() == layer(image).numel() * per_value


def test_attention_counts_its_two_matrix_products():
    query, key = torch.randn(2, 4, 7, 8), torch.randn(2, 4, 11, 8)
    expected = 2 * (2 * 4 * 7 * 11 * 8) * 2
    assert flops_of(lambda: nn.functional.scaled_dot_product_attention(query, key, key)) == expected


def operator_inputs(batch_size, num_queries, num_heads, head_dim, num_points, spatial_shapes):
    tokens = sum(height * width for height, width in spatial_shapes)
    value = torch.randn(batch_size, tokens, num_heads, head_dim)
    points = (batch_size, num_queries, num_heads, len(spatial_shapes), num_points)
    return value, spatial_shapes, torch.rand(*points, 2), torch.rand(*points)


SIZES = [(1, 1, 1, 1, 1, [(1, 1)]), (2, 5, 4, 8, 3, [(6, 8), (3, 4)]), (1, 9, 2, 4, 1, [(2, 2), (1, 1), (4, 3)])]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_deformable_attention_counts_as_by_hand(backend, sizes):
    """The sum over queries, heads, levels, points and channels of equation 3, one multiply-add at a time."""
    batch_size, num_queries, num_heads, head_dim, num_points, spatial_shapes = sizes
    by_hand = 0
    for _ in itertools.product(*map(range, (batch_size, num_queries, num_heads, len(spatial_shapes), num_points))):
        for _ in range(head_dim):
            by_hand += 2 * 4  # four cells, each times its bilinear weight
            by_hand += 2  # the sample times its attention weight
    operators = kernels.operators("cpu")
    attend = operators.deformable_attention if operators else multi_scale_deformable_attention
    assert flops_of(lambda: attend(*operator_inputs(*sizes))) == by_hand
    assert by_hand == FLOPS_PER_SAMPLE * head_dim * math.prod(sizes[:3]) * num_points * len(spatial_shapes)


# Parts


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"backbone_config": dict(TINY_SWIN)},
        {"share_decoder_heads": False},
        {"query_selection": "static", "denoising": "none"},
    ],
    ids=["resnet", "swin", "heads of their own", "static"],
)
def test_parts_add_up_to_the_whole(overrides, pixel_values):
    model = tiny_model(**overrides)
    flops = count_flops(model, pixel_values)
    assert flops.total() == flops_of(lambda: model(pixel_values)) > 0
    assert min(flops.values()) >= 0
    assert flops[OTHER] == 0
    parameters = count_parameters(model)
    assert parameters.total() == sum(parameter.numel() for parameter in model.parameters())
    assert OTHER not in parameters
    assert set(flops) | set(parameters) <= {*PARTS.values(), OTHER}


def test_flops_do_not_depend_on_the_kernel(pixel_values, kernel, monkeypatch):
    model = tiny_model()
    with_kernel = count_flops(model, pixel_values)
    monkeypatch.setitem(kernels._found, "cpu", None)
    assert count_flops(model, pixel_values) == with_kernel


def encoder_flops_by_hand() -> int:
    """Linear layers and sampling: the levels of a 96 x 128 image have strides of 16, 32 and 64."""
    config = tiny_config()
    tokens = 6 * 8 + 3 * 4 + 2 * 2
    points = config.encoder_attention_heads * 3 * config.encoder_n_points
    d_model, inner = config.d_model, config.encoder_ffn_dim
    linear = 2 * tokens * (2 * d_model * d_model + 3 * points * d_model + 2 * d_model * inner)
    sampling = FLOPS_PER_SAMPLE * tokens * points * (d_model // config.encoder_attention_heads)
    return config.encoder_layers * (linear + sampling)


def test_flops_of_the_encoder_are_those_of_its_layers(pixel_values):
    assert count_flops(tiny_model(), pixel_values[:1])["encoder"] == encoder_flops_by_hand()


def test_first_forward_pass_of_a_process_counts_all():
    """Although it is what loads the kernel."""
    code = (
        "import torch\nfrom helpers.models import tiny_model\nfrom hf_dino.model_info import count_flops\n"
        "print(count_flops(tiny_model(), torch.zeros(1, 3, 96, 128))['encoder'])"
    )
    counted = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    assert int(counted.stdout) == encoder_flops_by_hand()


def test_flops_of_images_add_up(pixel_values):
    model = tiny_model()
    one = count_flops(model, pixel_values[:1])
    assert {part: 2 * flops for part, flops in one.items()} == count_flops(model, pixel_values)


@pytest.mark.parametrize(
    ("name", "part"), [("model.backbone.body2", "neck"), ("model.encoder2.x", OTHER), ("class_embed.0.bias", "heads")]
)
def test_names_are_compared_by_whole_components(name, part):
    assert part_of(name) == part


# Memory and time


class Spender(nn.Module):
    """Hold the given number of bytes for a moment."""

    def __init__(self, num_bytes: int):
        super().__init__()
        self.num_bytes = num_bytes

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.ones(self.num_bytes // 4).sum()


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux")
def test_peak_memory_is_what_a_forward_pass_holds():
    image = torch.zeros(1)
    spent = 64 << 20
    measure_forward(Spender(spent), image)
    seconds, peak = measure_forward(Spender(spent), image)
    assert 0.95 * spent <= peak <= 1.2 * spent  # Linux counts pages with some delay
    assert 0 < seconds < 10


def test_memory_of_a_system_that_does_not_tell_is_unknown(monkeypatch):
    monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(FileNotFoundError))
    assert measure_forward(Spender(4), torch.zeros(1))[1] is None


# Origin and command


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = tiny_model()
    processor = DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160})
    card = finetuned_card(model.config, metrics={}, dataset="shapes", command="train", base_model="me/base")
    folder = tmp_path_factory.mktemp("model")
    save_detector(folder, model, processor, card)
    return folder


def test_origin_of_a_trained_model_is_that_of_its_card(folder):
    assert read_origin(str(folder)) == "Trained from me/base on shapes"


def test_origin_of_a_converted_model_is_that_of_its_card(tmp_path):
    card = converted_card(
        tiny_config(), checkpoint="x.pth", sha256="0" * 64, weights="model", size={"height": 1, "width": 2}
    )
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    origin = read_origin(str(tmp_path))
    assert origin.startswith("Converted from x.pth, a checkpoint in the format of IDEA-Research/DINO, SHA-256 000")
    assert not set("`[]\n") & set(origin)


@pytest.mark.parametrize("card", [None, "", "# A model\n\nTrained models are fun."], ids=["none", "empty", "other"])
def test_origin_without_our_card_is_unknown(tmp_path, card):
    if card is not None:
        (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert read_origin(str(tmp_path)) is None


def test_origin_of_a_hub_model_is_read_from_the_hub(folder, monkeypatch):
    monkeypatch.setattr("hf_dino.model_info.hf_hub_download", lambda model, name: folder / name)
    assert read_origin("me/model") == "Trained from me/base on shapes"


def test_command_reports_all(folder, capsys):
    assert hf_dino(["info", folder, "--image_size", "96x128", "--device", "cpu"]) == 0
    report = capsys.readouterr().out
    model = tiny_model()
    flops = count_flops(model, torch.randn(1, 3, 96, 128))
    for part, parameters in count_parameters(model).items():
        assert re.search(
            rf"^  {re.escape(part)} +{parameters:,} +{flops[part] / 1e9:.3f}$", report, flags=re.MULTILINE
        )
    assert re.search(rf"^  total +{model.num_parameters():,} +{flops.total() / 1e9:.3f}$", report, flags=re.MULTILINE)
    for text in ("Trained from me/base on shapes", "5: class 0, class 1", "shortest_edge 96", torch.__version__):
        assert text in report
    assert re.search(
        r"^  forward +96x128 on cpu in torch.float32: [\d.e-]+ s, peak memory", report, flags=re.MULTILINE
    )
    assert re.search(r"^  kernel +(/|none)", report, flags=re.MULTILINE)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ("800", "expected HEIGHTxWIDTH"),
        ("ax1", "--image_size ax1"),
        ("0x5", "positive"),
        ("16x16", "is too small"),
        ("16x80", r"too small .*10 encoder tokens"),
    ],
)
def test_unusable_image_size_is_an_error(folder, size, message):
    with pytest.raises(InputError, match=message):
        hf_dino(["info", folder, "--image_size", size])


def test_directory_that_is_not_a_model_is_an_error(tmp_path):
    with pytest.raises(InputError, match="is not a model directory"):
        hf_dino(["info", tmp_path])
