"""The compiled CPU operators equal the reference implementation: both forms, every dtype, every CPU capability."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.models import make_labels, tiny_config, tiny_model
from hf_dino import DinoDetrForObjectDetection, kernels
from hf_dino.deformable_attention_dino_detr import compute_sampling_locations, multi_scale_deformable_attention


KERNELS = Path(__file__).parents[2] / "kernels"

# levels (height, width), queries, heads, channels, points per level
SIZES = {
    "as in DINO": ([(7, 9), (4, 5), (2, 3), (1, 2)], 50, 8, 32, 4),
    "few queries": ([(40, 40), (20, 20)], 3, 2, 32, 4),
    "odd everywhere": ([(3, 4)], 5, 3, 7, 2),
    "one cell": ([(1, 1)], 4, 1, 20, 1),
    "rows and columns": ([(1, 6), (5, 1), (1, 1)], 9, 2, 48, 3),
    "five points": ([(9, 8), (3, 3)], 400, 2, 32, 5),
    "nine points": ([(9, 8), (3, 3)], 3, 2, 33, 9),
    "half a vector": ([(9, 8), (3, 3)], 5, 2, 32, 4),
    "a vector and a half": ([(9, 8), (3, 3), (2, 2)], 5, 2, 32, 4),
    "four points": ([(9, 8)], 5, 2, 32, 4),
}


def random_inputs(size="as in DINO", batch_size=2, dtype=torch.float64, seed=0):
    shapes, num_queries, num_heads, head_dim, num_points = SIZES[size]
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    points = (batch_size, num_queries, num_heads, len(shapes), num_points)
    value = random(batch_size, sum(h * w for h, w in shapes), num_heads, head_dim)
    locations = random(*points, 2) * 0.5 + 0.5  # some outside
    locations[:, ::3] = locations[:, ::3].round()  # some exactly on the border
    return value, shapes, locations, random(*points)


def random_references(inputs, width, seed=1):
    value, shapes, locations, _ = inputs
    generator = torch.Generator().manual_seed(seed)
    size = (*locations.shape[:2], len(shapes), width)
    return torch.rand(size, generator=generator, dtype=torch.float64).to(
        torch.promote_types(value.dtype, torch.float32)
    )


def fused_reference(value, shapes, reference_points, offsets, logits):
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    locations = compute_sampling_locations(offsets, reference_points, torch.tensor(shapes))
    return multi_scale_deformable_attention(value, shapes, locations, weights), weights


def outputs_and_gradients(function, *inputs):
    """Return outputs, and the gradients of the sum of all outputs times fixed random numbers."""
    leaves = [i.detach().clone().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(7)
    grads = [torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype) for o in outputs]
    wanted = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    return [*outputs, *torch.autograd.grad(outputs, wanted, grads)]


def assert_equal_to(results, expected, tolerance):
    for result, right in zip(results, expected, strict=True):
        assert result.dtype == right.dtype
        error = (result - right).abs().max() if right.numel() else torch.zeros(())
        assert error <= tolerance * right.abs().max().clamp(min=1) if right.numel() else True


TOLERANCES = {torch.float64: 1e-13, torch.float32: 1e-5}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_the_reference_with_its_gradients(kernel, cpu_capability, size, dtype):
    for batch_size in (1, 2):
        inputs = random_inputs(size, batch_size, dtype)
        results = outputs_and_gradients(kernel.deformable_attention, *inputs)
        expected = outputs_and_gradients(multi_scale_deformable_attention, *inputs)
        assert_equal_to(results, expected, TOLERANCES[dtype])


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("size", SIZES)
def test_fused_equals_the_reference_with_its_gradients(kernel, cpu_capability, size, dtype, width):
    value, shapes, locations, logits = inputs = random_inputs(size, 2, dtype)
    references = random_references(inputs, width)
    arguments = (value, shapes, references, 3 * locations, 2 * logits)
    results = outputs_and_gradients(kernel.fused_deformable_attention, *arguments)
    assert_equal_to(results, outputs_and_gradients(fused_reference, *arguments), 10 * TOLERANCES[dtype])


def test_gradcheck(kernel, cpu_capability):
    value, shapes, locations, weights = random_inputs("odd everywhere", batch_size=1)
    locations = locations + 0.01  # not where the gradient has a kink
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, x, w: kernel.deformable_attention(v, shapes, x, w), leaves)
    for width in (2, 4):
        references = random_references((value, shapes, locations, weights), width).requires_grad_()
        leaves = [value, references, locations.detach().requires_grad_(), weights]
        assert torch.autograd.gradcheck(
            lambda v, r, o, w: kernel.fused_deformable_attention(v, shapes, r, o, w), leaves
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_points", [True, False])
@pytest.mark.parametrize("size", ["as in DINO", "odd everywhere", "few queries"])
def test_16_bits_are_rounded_once(kernel, cpu_capability, size, dtype, wide_points):
    """Check that the error is at most twice that of the reference in float32, rounded to 16 bits at the end."""
    value, shapes, locations, weights = random_inputs(size, 2, dtype)
    points = [tensor.float() if wide_points else tensor for tensor in (locations, weights)]
    results = outputs_and_gradients(kernel.deformable_attention, value, shapes, *points)
    exact = [tensor.double() for tensor in (value, *points)]
    right = outputs_and_gradients(multi_scale_deformable_attention, exact[0], shapes, *exact[1:])
    wide = [tensor.float() for tensor in exact]
    once = outputs_and_gradients(multi_scale_deformable_attention, wide[0], shapes, *wide[1:])
    # the incoming gradient is rounded for ours only, so the backward pass starts from what ours got
    for result, exactly, reference in zip(results[:1], right[:1], once[:1]):
        assert result.dtype == dtype
        allowed = (reference.to(dtype).double() - exactly).abs().max()
        assert (result.double() - exactly).abs().max() <= 2 * allowed
    for result, exactly in zip(results[1:], right[1:]):
        precision = torch.finfo(dtype).eps
        assert (result.double() - exactly).norm() <= precision * exactly.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_numbers_of_every_kind_survive(kernel, cpu_capability, dtype):
    """Read every 16-bit number back by a weight of one on its cell: subnormal, infinite, NaN."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    value = numbers.view(1, 1, 1, -1)
    output = kernel.deformable_attention(
        value, [(1, 1)], torch.full((1, 1, 1, 1, 1, 2), 0.5), torch.ones(1, 1, 1, 1, 1)
    )
    finite = numbers.isfinite()
    assert torch.equal(output.flatten()[finite], numbers[finite])
    assert not output.flatten()[~finite].isfinite().any()


@pytest.mark.parametrize("sizes", [(0, 5), (2, 0)])
def test_empty(kernel, cpu_capability, sizes):
    batch_size, num_queries = sizes
    value, shapes, locations, weights = random_inputs()
    value, locations, weights = (
        value[:batch_size],
        locations[:batch_size, :num_queries],
        weights[:batch_size, :num_queries],
    )
    references = torch.rand(batch_size, num_queries, len(shapes), 4, dtype=torch.float64)
    results = outputs_and_gradients(kernel.deformable_attention, value, shapes, locations, weights)
    assert results[0].shape == (batch_size, num_queries, 8 * 32)
    assert results[1].abs().sum() == 0
    results = outputs_and_gradients(kernel.fused_deformable_attention, value, shapes, references, locations, weights)
    assert results[1].shape == weights.shape
    assert results[2].abs().sum() == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_locations_that_are_nowhere_read_zero(kernel, cpu_capability, dtype, bad):
    value, shapes, locations, weights = random_inputs(dtype=dtype)
    for axis in (0, 1):
        nowhere = locations.clone()
        nowhere[..., 1, axis] = bad
        without = weights.clone()
        without[..., 1] = 0
        for function in (kernel.deformable_attention, multi_scale_deformable_attention):
            output = function(value, shapes, nowhere, weights)
            assert_equal_to([output], [function(value, shapes, locations, without)], 1e-6)
        _, grad_value, grad_locations, grad_weights = outputs_and_gradients(
            kernel.deformable_attention, value, shapes, nowhere, weights
        )
        assert grad_value.isfinite().all()
        assert grad_weights[..., 1].abs().max() == 0
        assert grad_locations[..., 1, :].abs().max() == 0


def test_inputs_and_gradients_need_not_be_contiguous(kernel):
    value, shapes, locations, weights = random_inputs()
    references = random_references((value, shapes, locations, weights), 4)

    def strided(tensor):
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)

    for function, inputs in (
        (kernel.deformable_attention, (value, shapes, locations, weights)),
        (kernel.fused_deformable_attention, (value, shapes, references, locations, weights)),
    ):
        leaves = [strided(i).requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
        assert not leaves[0].is_contiguous()
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        output = function(*leaves)
        output = output[0] if isinstance(output, tuple) else output
        expanded = torch.ones(1, 1, 1, dtype=output.dtype).expand_as(output)
        grads = torch.autograd.grad(output, tensors, expanded)
        other = [i.clone().requires_grad_() if isinstance(i, torch.Tensor) else i for i in inputs]
        expected = function(*other)
        expected = expected[0] if isinstance(expected, tuple) else expected
        assert torch.equal(output, expected)
        right = torch.autograd.grad(expected.sum(), [leaf for leaf in other if isinstance(leaf, torch.Tensor)])
        assert all(map(torch.equal, grads, right))


@pytest.mark.parametrize("size", ["as in DINO", "five points"])
def test_the_number_of_threads_changes_no_bit(kernel, cpu_capability, size):
    inputs = random_inputs(size, batch_size=1, dtype=torch.float32)
    references = random_references(inputs, 4)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3, 9):
            torch.set_num_threads(number)
            results.append(
                outputs_and_gradients(kernel.deformable_attention, *inputs)
                + outputs_and_gradients(kernel.fused_deformable_attention, *inputs[:2], references, *inputs[2:])
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def changed(**changes):
    value, shapes, locations, weights = random_inputs("odd everywhere", dtype=torch.float32)
    inputs = {"value": value, "shapes": shapes, "locations": locations, "weights": weights}
    return {name: changes.get(name, lambda old: old)(old) for name, old in inputs.items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shapes": lambda s: [(3, 5)]}, "cover more positions than value has: 12"),
        ({"shapes": lambda s: [(3, 3)]}, "cover 9 positions but value has 12"),
        ({"shapes": lambda s: [(0, 4)]}, "must not be empty"),
        ({"shapes": lambda s: [(-3, -4)]}, "must not be empty"),
        ({"shapes": lambda s: [(2**40, 2**40)]}, "cover more positions"),
        ({"shapes": lambda s: []}, "height and width of each level"),
        ({"shapes": lambda s: [(1, 1)] * 12}, "1 levels, but value and spatial_shapes for 2, 3 and 12"),
        ({"shapes": lambda s: [(1, 1)] * 40}, "at most 32 levels"),
        ({"value": lambda v: v[0]}, "but has 3 axes"),
        ({"value": lambda v: v[:, :, :2]}, "3 heads"),
        ({"value": lambda v: v[:1]}, "2 images"),
        ({"value": lambda v: v.int()}, "float32, float64, float16 or bfloat16"),
        ({"locations": lambda x: x[..., 0]}, "but have 5 axes"),
        ({"locations": lambda x: x[..., :1]}, "batch, queries, heads, levels, points, 2"),
        ({"weights": lambda w: w[..., :1]}, "disagree: axis 4 is 1 and 2 long"),
        ({"weights": lambda w: w[:, :3]}, "disagree: axis 1 is 3 and 5 long"),
        ({"weights": lambda w: w[0]}, "attention weights must be"),
        ({"value": lambda v: v[..., :0]}, "there must be channels and points, but there are 0 and 2"),
        ({"locations": lambda x: x[..., :0, :], "weights": lambda w: w[..., :0]}, "but there are 7 and 0"),
        ({"value": lambda v: v[:, :1].expand(-1, 2**40, -1, -1)}, "too many positions"),
    ],
)
def test_inputs_that_disagree_are_named(kernel, changes, message):
    with pytest.raises(RuntimeError, match=message):
        kernel.deformable_attention(*changed(**changes).values())


@pytest.mark.parametrize(
    ("references", "message"),
    [
        (torch.rand(2, 5, 1, 3), "2 or 4"),
        (torch.rand(2, 4, 1, 2), "4 queries"),
        (torch.rand(2, 5, 2, 2), "2 levels"),
        (torch.rand(2, 5, 2), "2 or 4"),
    ],
)
def test_reference_points_that_disagree_are_named(kernel, references, message):
    value, shapes, offsets, logits = changed().values()
    with pytest.raises(RuntimeError, match=message):
        kernel.fused_deformable_attention(value, shapes, references, offsets, logits)


def test_dtypes_may_be_mixed(kernel):
    """Mix dtypes as autocast does: what is beside 16-bit values is computed with in 32 bits."""
    value, shapes, locations, weights = random_inputs(dtype=torch.float32)
    references = random_references((value, shapes, locations, weights), 2)
    expected = kernel.fused_deformable_attention(value, shapes, references, locations, weights)
    output, attention_weights = kernel.fused_deformable_attention(
        value.bfloat16(), shapes, references, locations, weights.bfloat16()
    )
    assert output.dtype == torch.bfloat16
    assert attention_weights.dtype == torch.bfloat16
    assert (output - expected[0]).abs().max() < 0.1
    output = kernel.deformable_attention(value.double(), shapes, locations, weights)
    assert output.dtype == torch.float64


def test_second_derivatives_are_refused(kernel):
    value, shapes, locations, weights = random_inputs("odd everywhere")
    value.requires_grad_()
    for output in (
        kernel.deformable_attention(value, shapes, locations, weights),
        kernel.fused_deformable_attention(value, shapes, torch.rand(2, 5, 1, 2).double(), locations, weights)[0],
    ):
        grad_output = torch.randn_like(output).requires_grad_()
        (grad,) = torch.autograd.grad(output, value, grad_output, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once only"):
            grad.sum().backward()


def test_registration_passes_torchs_own_checks(kernel):
    value, shapes, locations, weights = random_inputs("odd everywhere", dtype=torch.float32)
    references = random_references((value, shapes, locations, weights), 4)
    flat = [length for shape in shapes for length in shape]
    leaves = [tensor.requires_grad_() for tensor in (value, references, locations, weights)]
    value, references, locations, weights = leaves
    ops = kernel.registration.ops
    torch.library.opcheck(ops.deformable_attention.default, (value, flat, locations, weights))
    torch.library.opcheck(ops.fused_deformable_attention.default, (value, flat, references, locations, weights))
    grad = torch.randn(2, 5, 21)
    detached = [tensor.detach() for tensor in leaves]
    value, references, locations, weights = detached
    torch.library.opcheck(ops.deformable_attention_backward.default, (grad, value, flat, locations, weights, False))
    torch.library.opcheck(
        ops.fused_deformable_attention_backward.default,
        (grad, weights, value, flat, references, locations, weights.softmax(-1), False),
    )


def test_the_layer_of_seven_arguments(kernel):
    value, shapes, locations, weights = random_inputs()
    layer = kernel.layers.MultiScaleDeformableAttention()
    assert not list(layer.parameters())
    starts = torch.tensor([0, *itertools.accumulate(h * w for h, w in shapes)][:-1])
    output = layer(value, torch.tensor(shapes), shapes, starts, locations, weights, 64)
    assert torch.equal(output, kernel.deformable_attention(value, shapes, locations, weights))


class TestModel:
    """Run the whole model with the compiled operators, and with the reference implementation."""

    @pytest.fixture(autouse=True)
    def _backends(self, kernel, monkeypatch):
        self.kernel, self.monkeypatch = kernel, monkeypatch

    def use(self, operators):
        self.monkeypatch.setitem(kernels._found, "cpu", operators)

    def count_calls(self):
        """Count how often the fused operator runs."""
        calls = []
        original = self.kernel.fused_deformable_attention
        self.monkeypatch.setattr(
            self.kernel, "fused_deformable_attention", lambda *args: calls.append(1) or original(*args)
        )
        return calls

    def test_uses_the_fused_operator_in_every_layer(self):
        self.use(self.kernel)
        calls = self.count_calls()
        tiny_model()(torch.randn(1, 3, 64, 96))
        assert len(calls) == 2 + 3  # encoder and decoder layers

    def test_outputs_and_gradients_are_the_same(self):
        results = []
        for operators in (self.kernel, None):
            self.use(operators)
            model = tiny_model(box_noise_scale=0.0, label_noise_ratio=0.0).train()
            pixel_values = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
            output = model(pixel_values, labels=make_labels(2, 3), output_attentions=True)
            output.loss.backward()
            grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            results.append((output.loss, output.logits, output.pred_boxes, *output.encoder_attentions, *grads))
        for ours, reference in zip(*results, strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-3, atol=2e-5)

    def test_a_layer_of_seven_arguments_can_take_its_place(self):
        class Other(torch.nn.Module):
            calls = 0

            def forward(self, value, shapes, shapes_list, starts, locations, weights, im2col_step):
                Other.calls += 1
                return multi_scale_deformable_attention(value, shapes_list, locations, weights)

        self.use(self.kernel)
        calls = self.count_calls()
        model = tiny_model()
        for layer in (*model.model.encoder.layers, *model.model.decoder.layers):
            layer.get_submodule("self_attn" if hasattr(layer.self_attn, "attn") else "encoder_attn").attn = Other()
        model(torch.randn(1, 3, 64, 96))
        assert Other.calls == 2 + 3
        assert not calls

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_16_bits_stay_close(self, dtype):
        pixel_values = torch.randn(1, 3, 64, 96)
        outputs = []
        for operators in (self.kernel, None):
            self.use(operators)
            with torch.no_grad():
                outputs.append(tiny_model().to(dtype)(pixel_values.to(dtype)).encoder_last_hidden_state.float())
        assert (outputs[0] - outputs[1]).abs().mean() < 0.02

    def test_autocast(self):
        self.use(self.kernel)
        model = tiny_model().train()
        with torch.autocast("cpu", torch.bfloat16):
            output = model(torch.randn(2, 3, 64, 96), labels=make_labels(2, 0))
        output.loss.backward()
        assert output.loss.isfinite()

    @pytest.mark.parametrize("compiled", [True, False])
    def test_compiles_without_a_graph_break(self, compiled):
        self.use(self.kernel if compiled else None)
        model, pixel_values = tiny_model(), torch.randn(1, 3, 64, 96)
        targets = []

        def backend(graph, _):
            targets.extend(str(node.target) for node in graph.graph.nodes)
            return graph

        with torch.no_grad():
            expected = model(pixel_values)
            output = torch.compile(model, fullgraph=True, backend=backend)(pixel_values)
        torch.testing.assert_close(output.logits, expected.logits)
        found = [target for target in targets if "fused_deformable_attention" in target]
        assert len(found) == (5 if compiled else 0)

    def test_exports(self):
        self.use(self.kernel)
        model, pixel_values = tiny_model(), torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            expected = model(pixel_values)
            program = torch.export.export(model, (pixel_values,))
            output = program.module()(pixel_values)
        torch.testing.assert_close(output.logits, expected.logits)
        assert "fused_deformable_attention" in str(program.graph)

    def test_meta_tensors_need_no_kernel(self):
        with torch.device("meta"):
            model = DinoDetrForObjectDetection(tiny_config()).eval()
        assert model(torch.empty(1, 3, 64, 96, device="meta")).logits.shape == (1, 12, 5)


@pytest.mark.slow
def test_address_sanitizer_finds_nothing(tmp_path, kernel):
    """Compile the CPU code to check every access, and run it on sizes that end next to the end of their memory."""
    compiler = os.environ.get("CXX", "g++")
    # with the library that throws exceptions, or the sanitizer ends the process at the first exception
    names = [f"-print-file-name={name}" for name in ("libasan.so", "libstdc++.so.6")]
    found = [subprocess.run([compiler, name], capture_output=True, text=True).stdout.strip() for name in names]
    if not Path(found[0]).is_absolute():
        pytest.skip("needs a compiler with the address sanitizer")
    script = tmp_path / "run.py"
    script.write_text(
        "import sys, torch\n"
        "from test_kernels import *\n"
        "from hf_dino import kernels\n"
        "from hf_dino.kernels.build import Builder\n"
        f"kernel = kernels.load(Builder(Path({str(KERNELS)!r}), Path(sys.argv[1])).get_or_build('cpu'))\n"
        "for name in SIZES:\n"
        "    for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16):\n"
        "        inputs = random_inputs(name, 2, dtype)\n"
        "        inputs[2][:, ::2] *= 1e6\n"
        "        inputs[2][:, 1::4] = float('nan')\n"
        "        outputs_and_gradients(kernel.deformable_attention, *inputs)\n"
        "        arguments = (*inputs[:2], random_references(inputs, 4), *inputs[2:])\n"
        "        outputs_and_gradients(kernel.fused_deformable_attention, *arguments)\n"
        "print('clean')\n"
    )
    environment = os.environ | {
        "CXX": f"{compiler} -fsanitize=address -fno-omit-frame-pointer -g1",
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": os.pathsep.join(map(str, (KERNELS.parent / "src", KERNELS.parent / "tests"))),
    }
    for capability in ("avx512", "avx2", "default"):
        finished = subprocess.run(
            [sys.executable, script, tmp_path / "cache"],
            env=environment | {"HF_DINO_CPU_CAPABILITY": capability},
            capture_output=True,
            text=True,
        )
        if "this CPU has at most" in finished.stderr:
            continue
        assert "clean" in finished.stdout, finished.stderr[-4000:]
    (log,) = (tmp_path / "cache").glob("*/build.log")
    assert "-fsanitize=address" in log.read_text()
