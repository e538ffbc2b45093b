"""The CUDA backend against the PyTorch reference: on the CPU, compiled for it and run lane by lane, and on a GPU."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_dino.deformable_attention_dino_detr import compute_sampling_locations, multi_scale_deformable_attention


KERNELS = Path(__file__).parents[2] / "kernels"
TORCH = Path(torch.__file__).parent
OPERATORS = KERNELS / "csrc" / "cuda" / "deformable_attention.cu"
STABLE_ABI = ["-std=c++17", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DUSE_CUDA"]
# Set by the test that runs this file once more: options of the C++ compiler that make it watch every access.
SANITIZER = os.environ.get("HF_DINO_TEST_SANITIZER", "").split()


@dataclass(frozen=True)
class Backend:
    operators: Any
    device: str


@pytest.fixture(scope="session")
def emulated(tmp_path_factory) -> Backend:
    compiler = shutil.which("g++")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs g++ on Linux to compile the CUDA code for the CPU")
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "cuda_on_cpu.so"
    sources = KERNELS / "tests" / "cuda_on_cpu"
    folders = [f"-I{sources}", f"-I{TORCH / 'include'}"]
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    options = ["-O1", "-g1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", *SANITIZER]
    command = [compiler, *STABLE_ABI, "-DTORCH_EXTENSION_NAME=hf_dino_cuda_on_cpu", *options, *folders]
    subprocess.run([*command, sources / "operators.cpp", *libraries, "-o", library], check=True)
    torch.ops.load_library(library)
    return Backend(torch.ops.hf_dino_cuda_on_cpu, "cpu")


@pytest.fixture(scope="session")
def gpu() -> Backend:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    from hf_dino.kernels import operators

    assert operators("cuda") is not None
    return Backend(torch.ops.hf_dino_kernels, "cuda")


@pytest.fixture(params=["emulated", pytest.param("gpu", marks=pytest.mark.gpu)])
def backend(request) -> Backend:
    return request.getfixturevalue(request.param)


@dataclass(frozen=True)
class Inputs:
    """What the operators take; both forms and the gradients of their results."""

    shapes: list[tuple[int, int]]
    value: torch.Tensor
    locations: torch.Tensor
    weights: torch.Tensor
    references: torch.Tensor
    offsets: torch.Tensor
    logits: torch.Tensor
    grad_output: torch.Tensor
    grad_weights: torch.Tensor

    @property
    def flat_shapes(self) -> list[int]:
        return [length for shape in self.shapes for length in shape]

    def map(self, function) -> "Inputs":
        tensors = {field.name: function(getattr(self, field.name)) for field in fields(self) if field.name != "shapes"}
        return replace(self, **tensors)


@dataclass(frozen=True)
class Case:
    batch_size: int
    num_queries: int
    num_heads: int
    head_dim: int
    shapes: tuple[tuple[int, int], ...]
    num_points: int
    reference_size: int


USUAL_LEVELS = ((5, 6), (3, 4), (2, 2), (1, 1))
CASES = {
    "usual": Case(2, 23, 3, 32, USUAL_LEVELS, 4, 2),
    "usual, boxes": Case(3, 2, 8, 32, USUAL_LEVELS, 4, 4),
    "padded channels": Case(2, 3, 1, 20, ((3, 4), (1, 5), (7, 1)), 3, 4),
    "odd channels, one level": Case(1, 3, 3, 7, ((4, 3),), 8, 2),
    "several strips, five levels": Case(1, 2, 2, 72, ((3, 4), (2, 3), (1, 2), (2, 1), (1, 1)), 4, 4),
    "one channel, one point": Case(2, 5, 8, 1, ((1, 1), (2, 2)), 1, 2),
    "more points of a level than lanes": Case(1, 2, 1, 32, ((3, 3),), 16, 4),
}
DTYPES = {  # of value, and of points and weights
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float16": (torch.float16, torch.float32),
    "float16 points": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.float32),
    "bfloat16 points": (torch.bfloat16, torch.bfloat16),
}
# relative to the largest number of a result; 16 bits: twice what rounding once may change
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def make_inputs(case: Case, dtype=torch.float32, points_dtype=torch.float32, device="cpu") -> Inputs:
    generator = torch.Generator().manual_seed(0)
    points = (case.batch_size, case.num_queries, case.num_heads, len(case.shapes), case.num_points)
    sequence = sum(height * width for height, width in case.shapes)
    compute = torch.promote_types(dtype, torch.float32)

    def normal(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape, dtype):
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return Inputs(
        shapes=list(case.shapes),
        value=normal(case.batch_size, sequence, case.num_heads, case.head_dim),
        locations=uniform(*points, 2, dtype=points_dtype) * 1.4 - 0.2,  # some are outside
        weights=normal(*points, dtype=points_dtype),
        references=uniform(case.batch_size, case.num_queries, len(case.shapes), case.reference_size, dtype=compute),
        offsets=2 * normal(*points, 2, dtype=points_dtype),
        logits=normal(*points, dtype=points_dtype),
        grad_output=normal(case.batch_size, case.num_queries, case.num_heads * case.head_dim),
        grad_weights=normal(*points, dtype=points_dtype),
    ).map(lambda tensor: tensor.to(device))


def plain(backend: Backend, inputs: Inputs, deterministic=False) -> list[torch.Tensor]:
    """Output, and gradients of value, locations and weights."""
    operators, points = backend.operators, (inputs.value, inputs.flat_shapes, inputs.locations, inputs.weights)
    output = operators.deformable_attention(*points)
    return [output, *operators.deformable_attention_backward(inputs.grad_output, *points, deterministic)]


def fused(backend: Backend, inputs: Inputs, deterministic=False) -> list[torch.Tensor]:
    """Output, weights, and gradients of value, reference points, offsets and logits."""
    operators, value, shapes = backend.operators, inputs.value, inputs.flat_shapes
    points = (inputs.references, inputs.offsets)
    output, weights = operators.fused_deformable_attention(value, shapes, *points, inputs.logits)
    gradients = operators.fused_deformable_attention_backward(
        inputs.grad_output, inputs.grad_weights, value, shapes, *points, weights, deterministic
    )
    return [output, weights, *gradients]


def exact_plain(inputs: Inputs) -> list[torch.Tensor]:
    inputs = inputs.map(lambda tensor: tensor.detach().double())
    leaves = [tensor.requires_grad_() for tensor in (inputs.value, inputs.locations, inputs.weights)]
    output = multi_scale_deformable_attention(inputs.value, inputs.shapes, inputs.locations, inputs.weights)
    return [output, *torch.autograd.grad(output, leaves, inputs.grad_output)]


def exact_fused(inputs: Inputs) -> list[torch.Tensor]:
    inputs = inputs.map(lambda tensor: tensor.detach().double())
    leaves = [tensor.requires_grad_() for tensor in (inputs.value, inputs.references, inputs.offsets, inputs.logits)]
    shapes = torch.tensor(inputs.shapes, device=inputs.value.device)
    weights = inputs.logits.flatten(3).softmax(-1).view_as(inputs.logits)
    locations = compute_sampling_locations(inputs.offsets, inputs.references, shapes)
    output = multi_scale_deformable_attention(inputs.value, inputs.shapes, locations, weights)
    gradients = torch.autograd.grad((output, weights), leaves, (inputs.grad_output, inputs.grad_weights))
    return [output, weights, *gradients]


def assert_close(results: list[torch.Tensor], exact: list[torch.Tensor], points_dtype=torch.float64):
    """Gradients of float32 tensors, too, depend on attention weights that were rounded to the dtype of the points."""
    assert len(results) == len(exact)
    for index, (result, expected) in enumerate(zip(results, exact)):
        tolerance = max(TOLERANCE[result.dtype], TOLERANCE[points_dtype])
        error = (result.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance, f"result {index}: error {error:.2e} above {tolerance:.0e}"


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_definition_with_its_gradients(backend, case, dtypes):
    inputs = make_inputs(case, *dtypes, backend.device)
    assert_close(plain(backend, inputs), exact_plain(inputs))
    assert_close(fused(backend, inputs), exact_fused(inputs), dtypes[1])


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", [CASES["usual"], CASES["padded channels"]], ids=["usual", "padded channels"])
def test_deterministic_mode_equals_the_definition(backend, case, dtypes):
    inputs = make_inputs(case, *dtypes, backend.device)
    assert_close(plain(backend, inputs, deterministic=True), exact_plain(inputs))
    assert_close(fused(backend, inputs, deterministic=True), exact_fused(inputs), dtypes[1])


def bits(tensors: list[torch.Tensor]) -> list[bytes]:
    return [tensor.cpu().view(torch.uint8).numpy().tobytes() for tensor in tensors]


def test_deterministic_mode_gives_the_same_bits(backend):
    inputs = make_inputs(replace(CASES["usual"], num_queries=120), device=backend.device)
    for operator in (plain, fused):
        runs = {tuple(bits(operator(backend, inputs, deterministic=True))) for _ in range(3)}
        assert len(runs) == 1


def test_order_of_blocks_matters_to_the_fast_mode_alone(emulated):
    """What the test above relies on: without the deterministic mode, another order of blocks gives other bits."""
    inputs = make_inputs(replace(CASES["usual"], num_queries=120))
    runs = [bits(plain(emulated, inputs)) for _ in range(3)]
    assert len({grad_value for _, grad_value, _, _ in runs}) > 1
    assert len({tuple(others) for _, _, *others in runs}) == 1  # only the gradient of value is summed by many


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e30])
def test_deterministic_mode_adapts_to_the_scale(backend, scale):
    inputs = make_inputs(CASES["usual"], device=backend.device)
    expected = plain(backend, inputs)[1]
    scaled = replace(inputs, grad_output=inputs.grad_output * scale)
    torch.testing.assert_close(plain(backend, scaled, True)[1] / scale, expected, rtol=1e-5, atol=1e-6)


def test_deterministic_mode_shows_gradients_that_are_not_finite(backend):
    inputs = make_inputs(CASES["usual"], device=backend.device)
    for number in (float("nan"), float("inf")):
        inputs.grad_output[0, 0, 0] = number
        assert plain(backend, inputs, deterministic=True)[1].isnan().all()


def test_gradient_of_the_weights_is_optional(backend):
    inputs = make_inputs(CASES["usual"], device=backend.device)
    points = (inputs.value, inputs.flat_shapes, inputs.references, inputs.offsets)
    weights = backend.operators.fused_deformable_attention(*points, inputs.logits)[1]
    backward = backend.operators.fused_deformable_attention_backward
    without = backward(inputs.grad_output, None, *points, weights, True)
    zeros = backward(inputs.grad_output, torch.zeros_like(weights), *points, weights, True)
    assert bits(without) == bits(zeros)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_points_on_cells_and_borders(backend, dtype):
    """Where a gradient jumps, it is the one of PyTorch's `grid_sample`."""
    cells = torch.tensor([-1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 3.0, 3.5, 4.0, 4.5], dtype=dtype)
    grid = (torch.cartesian_prod(cells, cells) + 0.5) / 4  # exact in a map of 4 x 4 cells
    inputs = make_inputs(Case(1, len(grid), 1, 8, ((4, 4),), 1, 2), dtype, dtype)
    inputs = replace(inputs, locations=grid.view(inputs.locations.shape)).map(lambda tensor: tensor.to(backend.device))
    assert_close(plain(backend, inputs), exact_plain(inputs))


@pytest.mark.parametrize("case", [CASES["usual"], CASES["padded channels"]], ids=["usual", "padded channels"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0**31])
def test_points_without_a_place_contribute_nothing(backend, case, number):
    inputs = make_inputs(case, device=backend.device)
    lost = torch.zeros_like(inputs.weights, dtype=torch.bool).flatten()
    lost[::3] = True
    lost = lost.view_as(inputs.weights)
    axis = torch.tensor([True, False], device=backend.device)
    strange = replace(inputs, locations=inputs.locations.masked_fill(lost[..., None] & axis, number))
    output, grad_value, grad_locations, grad_weights = plain(backend, strange)

    exact = exact_plain(replace(inputs, weights=inputs.weights.masked_fill(lost, 0)))
    assert_close([output, grad_value], exact[:2])
    assert not grad_locations[lost].any()
    assert not grad_weights[lost].any()
    exact[3][lost] = 0
    assert_close([grad_locations, grad_weights], exact[2:])


EMPTY = {
    "no images": replace(CASES["usual"], batch_size=0),
    "no queries": replace(CASES["usual"], num_queries=0),
    "no heads": replace(CASES["usual"], num_heads=0),
}


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("case", EMPTY.values(), ids=EMPTY)
def test_empty_inputs(backend, case, deterministic):
    inputs = make_inputs(case, device=backend.device)
    output, *gradients = plain(backend, inputs, deterministic)
    assert output.shape == inputs.grad_output.shape
    assert [gradient.shape for gradient in gradients] == [
        tensor.shape for tensor in (inputs.value, inputs.locations, inputs.weights)
    ]
    assert not any(tensor.any() for tensor in (output, *gradients))

    output, weights, *gradients = fused(backend, inputs, deterministic)
    torch.testing.assert_close(weights, inputs.logits.flatten(3).softmax(-1).view_as(weights))
    assert [gradient.shape for gradient in gradients] == [
        tensor.shape for tensor in (inputs.value, inputs.references, inputs.offsets, inputs.logits)
    ]
    assert not any(tensor.any() for tensor in (output, *gradients[:3]))


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers at every other place of memory."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


def shifted(tensor: torch.Tensor) -> torch.Tensor:
    """The same numbers, contiguous, but not where a vector may begin."""
    return torch.cat([tensor.new_zeros(1), tensor.flatten()])[1:].view(tensor.shape)


@pytest.mark.parametrize("arranged", [scattered, shifted])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_arrangement_in_memory(backend, arranged, dtype):
    inputs = make_inputs(CASES["usual"], dtype, dtype, backend.device)
    for operator in (plain, fused):
        expected = operator(backend, inputs, deterministic=True)
        assert bits(operator(backend, inputs.map(arranged), deterministic=True)) == bits(expected)
        assert_close(operator(backend, inputs.map(arranged)), [tensor.double() for tensor in expected], dtype)


def test_disagreeing_inputs_are_refused(backend):
    inputs = make_inputs(CASES["usual"], device=backend.device)
    forward = backend.operators.deformable_attention
    with pytest.raises(RuntimeError, match="cover 46 positions but value has 47"):
        forward(inputs.value, [5, 6, 3, 4, 2, 2], inputs.locations[:, :, :, :3], inputs.weights[:, :, :, :3])
    for operator in (plain, fused):
        with pytest.raises(RuntimeError, match="grad_output must be"):
            operator(backend, replace(inputs, grad_output=inputs.grad_output[:, :1]))
    with pytest.raises(RuntimeError, match="must have the dtype of value"):
        forward(inputs.value, inputs.flat_shapes, inputs.locations.half(), inputs.weights.half())


@pytest.mark.slow
def test_no_access_out_of_bounds(emulated):
    """This file once more, with code that watches every access; PyTorch's memory, too, comes from its allocator."""
    runtimes = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")  # the second for exceptions, which the first hands on to it
    ]
    environment = os.environ | {
        "HF_DINO_TEST_SANITIZER": "-fsanitize=address,undefined -fno-sanitize-recover=all",
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
    }
    tests = [
        __file__,
        "-k",
        "emulated and not bfloat16 and not same_bits",
        "-m",
        "not slow",
        "-x",
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run([sys.executable, "-m", "pytest", *tests], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert " passed" in run.stdout


@pytest.mark.slow
def test_compiles_for_old_and_new_gpus_without_warnings_or_spills(tmp_path):
    compiler = shutil.which("nvcc")
    if compiler is None:
        pytest.skip("needs nvcc")
    architectures = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in (80, 90, 100)]
    options = ["-O3", "--expt-relaxed-constexpr", "-DTORCH_EXTENSION_NAME=hf_dino_kernels", "-Xptxas=-v"]
    folder = f"-I{TORCH / 'include'}"
    command = [compiler, *STABLE_ABI, *options, *architectures, folder, "-Xcompiler=-fPIC", "-c", OPERATORS]
    run = subprocess.run([*command, "-o", tmp_path / "operators.o"], capture_output=True, text=True)
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    assert "warning" not in report

    kernels = re.findall(
        r"Compiling entry function '(\S*UsualShape\S*)'.*?(\d+) bytes spill stores", report, re.DOTALL
    )
    assert len(kernels) == len(architectures) * 4 * 5  # two forms, forward and backward, five pairs of dtypes
    assert {kernel for kernel, spilled in kernels if spilled != "0"} == set()


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradcheck_on_the_gpu(gpu, deterministic, monkeypatch):
    from hf_dino.kernels import operators

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    package, case = operators("cuda"), Case(2, 3, 2, 4, ((3, 4), (2, 1)), 2, 4)
    inputs = make_inputs(case, torch.float64, torch.float64, "cuda").map(lambda tensor: tensor.requires_grad_())
    torch.use_deterministic_algorithms(deterministic)
    try:
        assert torch.autograd.gradcheck(
            lambda value, *points: package.deformable_attention(value, inputs.shapes, *points),
            (inputs.value, inputs.locations, inputs.weights),
            nondet_tol=0.0 if deterministic else 1e-12,
        )
        assert torch.autograd.gradcheck(
            lambda value, *points: package.fused_deformable_attention(value, inputs.shapes, *points),
            (inputs.value, inputs.references, inputs.offsets, inputs.logits),
            nondet_tol=0.0 if deterministic else 1e-12,
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
def test_registration_on_the_gpu(gpu):
    inputs = make_inputs(CASES["usual"], device="cuda")
    arguments = (inputs.value, inputs.flat_shapes, inputs.locations, inputs.weights)
    leaves = [item.requires_grad_() if isinstance(item, torch.Tensor) else item for item in arguments]
    torch.library.opcheck(gpu.operators.deformable_attention.default, tuple(leaves))


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [False, True])
def test_replays_in_a_cuda_graph(gpu, deterministic):
    inputs = make_inputs(CASES["usual"], device="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        plain(gpu, inputs, deterministic)  # what is set up at the first call is not captured
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = plain(gpu, inputs, deterministic) + fused(gpu, inputs, deterministic)

    inputs.value.normal_()
    inputs.grad_output.normal_()
    graph.replay()
    assert_close(captured, exact_plain(inputs) + exact_fused(inputs))


@pytest.mark.gpu
def test_runs_on_the_current_stream(gpu):
    """The inputs are written on a side stream after a long wait; another stream would read them too early."""
    written = make_inputs(CASES["usual"], device="cuda")
    inputs = written.map(torch.zeros_like)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        for field in fields(inputs):
            if field.name != "shapes":
                getattr(inputs, field.name).copy_(getattr(written, field.name))
        results = plain(gpu, inputs)
        torch.cuda.current_stream().synchronize()
    assert_close(results, exact_plain(written))


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors(gpu):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = make_inputs(CASES["usual"], device="cuda:1")
    results = plain(gpu, inputs)
    assert torch.cuda.current_device() == 0
    assert_close(results, exact_plain(inputs))


@pytest.mark.gpu
def test_large_batch(gpu):
    case = Case(64, 900, 8, 32, ((60, 60), (30, 30), (15, 15), (8, 8)), 4, 4)
    inputs = make_inputs(case, torch.bfloat16, torch.bfloat16, "cuda")
    results = fused(gpu, inputs)
    last = inputs.map(lambda tensor: tensor[-1:])
    assert_close([result[-1:] for result in results], exact_fused(last), torch.bfloat16)


@pytest.mark.gpu
def test_more_numbers_than_32_bits_count(gpu):
    """Only the last level is looked at; the one before it takes the numbers of `value` beyond 2^32."""
    if torch.cuda.get_device_properties(0).total_memory < 60e9:
        pytest.skip("needs 60 GB of memory")
    small = make_inputs(Case(1, 50, 8, 32, ((4, 5),), 4, 2), torch.float16, torch.float32, "cuda")
    height, width = 4096, 4097
    value = torch.zeros(1, height * width + 20, 8, 32, dtype=torch.float16, device="cuda")
    assert value.numel() > 2**32
    value[:, -20:] = small.value
    beside = torch.zeros_like(small.locations)
    inputs = replace(
        small,
        shapes=[(height, width), (4, 5)],
        value=value,
        locations=torch.cat([beside + 0.5, small.locations], dim=3),
        weights=torch.cat([beside[..., 0], small.weights], dim=3),
    )
    output, grad_value, grad_locations, grad_weights = plain(gpu, inputs)
    results = [output, grad_value[:, -20:], grad_locations[:, :, :, 1:], grad_weights[:, :, :, 1:]]
    assert_close(results, exact_plain(small))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_compute_sanitizer_finds_nothing(gpu, tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("needs compute-sanitizer")
    tests = [
        __file__,
        "-k",
        "gpu and (usual or padded) and (float32 or float16)",
        "-m",
        "gpu and not slow",
        "-x",
        "-q",
    ]
    watched = [sanitizer, "--tool", tool, "--error-exitcode", "1"]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    run = subprocess.run(
        [*watched, sys.executable, "-m", "pytest", *tests], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
