"""The compiled operator against the reference in float64: results, gradients, both forms, every dtype, odd sizes."""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from deformable_attention_accuracy import find_expected, relative_errors, rounded, run_form
from deformable_attention_inputs import Case, Inputs
from gpu_stages.rows import Row, Stage
from hf_dino import kernels
from hf_dino.deformable_attention_dino_detr import compute_sampling_locations, multi_scale_deformable_attention


FORMS = ("plain", "fused")
# Bounds of the relative errors of results and gradients, in the Euclidean norm. In 16 bits they are twice the error of
# rounding once, since the inputs were rounded as well.
BOUNDS = {
    "float32": (5e-6, 1e-5),
    "bfloat16": (2.0**-8, 2.0**-8),
    "float16": (2.0**-11, 2.0**-11),
    "float64": (1e-12, 1e-12),
}


class Odd(NamedTuple):
    """Sizes other than DINO's, for which the kernels have general code."""

    batch_size: int
    num_queries: int
    num_heads: int
    head_dim: int
    shapes: list[tuple[int, int]]
    num_points: int
    reference_size: int = 2


ODD = {
    "20 channels, 3 levels, boxes": Odd(2, 33, 3, 20, [(7, 9), (1, 5), (7, 1)], 3, 4),
    "7 channels, 1 level": Odd(1, 50, 3, 7, [(14, 13)], 8),
    "72 channels, 5 levels": Odd(2, 17, 2, 72, [(9, 8), (6, 5), (3, 4), (2, 1), (1, 1)], 4, 4),
    "1 channel, 1 point": Odd(2, 65, 8, 1, [(5, 5), (2, 2)], 1),
    "no images": Odd(0, 5, 8, 32, [(5, 6), (3, 3)], 4),
    "no queries": Odd(2, 0, 8, 32, [(5, 6), (3, 3)], 4),
}


def attend(form: str, device: str, levels: Any, value: torch.Tensor, *points: torch.Tensor) -> tuple[Any, ...]:
    operators: Any = kernels.operators(device)
    if form == "plain":
        return (operators.deformable_attention(value, levels.shapes, *points),)
    return operators.fused_deformable_attention(value, levels.shapes, *points)


def check_real(row: Row, form: str, case: Case, device: str) -> None:
    """Compare with the reference at a shape of DINO."""
    inputs = Inputs(case, device)
    expected = find_expected(form, inputs)
    errors = relative_errors(run_form(form, partial(attend, form, device), inputs, True), expected, inputs.off_lines)
    check_errors(row, errors, BOUNDS[case.dtype])


def check_errors(row: Row, errors: tuple[float, float], bounds: tuple[float, float]) -> None:
    """Record the errors of results and gradients, and whether they are within their bounds; NaN is not."""
    row["ok"] = all(error <= bound for error, bound in zip(errors, bounds))
    row |= {"forward_error": rounded(errors[0], 2), "gradient_error": rounded(errors[1], 2), "bounds": bounds}


def check_odd(row: Row, form: str, odd: Odd, dtype: torch.dtype, device: str, arranged: Callable[..., Any]) -> None:
    """Compare with the reference at other sizes, with tensors in the memory layout that `arranged` gives them."""
    tensors = [arranged(tensor.to(device)).detach().requires_grad_() for tensor in odd_tensors(odd, form, dtype)]
    results = compute(form, odd.shapes, tensors, device)
    doubles = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = compute(form, odd.shapes, doubles, None)
    errors = [largest_error(*pair) for pair in zip(results, expected)]
    check_errors(row, (errors[0], max(errors[1:])), BOUNDS[str(dtype).removeprefix("torch.")])


def odd_tensors(odd: Odd, form: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Return `value` and the other inputs. Locations avoid the lines between cells, where gradients jump."""
    generator = torch.Generator().manual_seed(0)
    normal = partial(torch.randn, generator=generator, dtype=torch.float64)
    batch_size, num_queries, num_heads, head_dim, shapes, num_points, reference_size = odd
    num_cells = sum(height * width for height, width in shapes)
    points = (batch_size, num_queries, num_heads, len(shapes), num_points)
    value = normal(batch_size, num_cells, num_heads, head_dim).to(dtype)
    logits = normal(*points).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    if form == "plain":
        cells = torch.randint(-2, 12, (*points, 2), generator=generator)
        inside = 0.1 + 0.8 * torch.rand(*points, 2, generator=generator, dtype=torch.float64)
        sizes = torch.tensor(shapes).flip(1)[:, None]  # (x, y)
        return [value, ((cells + inside + 0.5) / sizes).to(wide), logits.to(wide)]
    references = torch.rand(batch_size, num_queries, len(shapes), reference_size, generator=generator)
    return [value, references.to(wide), normal(*points, 2).to(dtype), logits]


def compute(form: str, shapes: list[tuple[int, int]], tensors: list[torch.Tensor], device: str | None) -> list[Any]:
    """Return the output and the gradients of all tensors, from the reference if `device` is `None`."""
    value, *points = tensors
    if device is None:
        output = reference(form, shapes, value, points)
    else:
        function = getattr(kernels.operators(device), {"plain": "", "fused": "fused_"}[form] + "deformable_attention")
        results = function(value, shapes, *points)
        output = results if form == "plain" else results[0]
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    return [output, *torch.autograd.grad(output, tensors, weights.to(output))]


def reference(form: str, shapes: list[tuple[int, int]], value: torch.Tensor, points: list[Any]) -> torch.Tensor:
    if form == "plain":
        return multi_scale_deformable_attention(value, shapes, *points)
    references, offsets, logits = points
    weights = logits.flatten(3).softmax(-1).view_as(logits)
    locations = compute_sampling_locations(offsets, references, torch.tensor(shapes, device=value.device))
    return multi_scale_deformable_attention(value, shapes, locations, weights)


def largest_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the relative error in the Euclidean norm; 0 for two empty tensors, NaN for different shapes."""
    if result.shape != expected.shape:
        return float("nan")
    scale = expected.norm()
    return ((result.double() - expected).norm() / scale.clamp(min=torch.finfo(torch.float64).tiny)).item()


def check_deterministic(row: Row, form: str, case: Case, device: str) -> None:
    """Check that three runs in deterministic mode are bitwise equal and correct."""
    inputs = Inputs(case, device)
    expected = find_expected(form, inputs)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [run_form(form, partial(attend, form, device), inputs, True) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    check_errors(row, relative_errors(runs[0], expected, inputs.off_lines), BOUNDS[case.dtype])
    row["equal_bits"] = all(same_bits(runs[0], other) for other in runs[1:])
    row["ok"] = row["ok"] and row["equal_bits"]


def same_bits(one: Any, other: Any) -> bool:
    pairs = zip(itertools.chain(*one), itertools.chain(*other))
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs)


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy that is not contiguous: its numbers are in every second element of memory."""
    return torch.stack([tensor, torch.zeros_like(tensor)], dim=-1)[..., 0]


def make_checks(device: str, image_size: tuple[int, int]) -> dict[str, Callable[[Row], None]]:
    """Return the checks by name, the most important first."""
    checks: dict[str, Callable[[Row], None]] = {}
    for dtype, shape, form in itertools.product(BOUNDS, ("encoder-4scale", "decoder-900"), FORMS):
        case = Case(shape, 2 if shape.startswith("decoder") else 1, dtype, image_size)
        checks[f"{form} {shape} {dtype}"] = partial(check_real, form=form, case=case, device=device)
    for form in FORMS:
        case = Case("encoder-5scale", 1, "float32", image_size)
        checks[f"{form} encoder-5scale float32"] = partial(check_real, form=form, case=case, device=device)
        for dtype in ("float32", "bfloat16"):
            case = Case("decoder-900", 2, dtype, image_size)
            checks[f"{form} deterministic {dtype}"] = partial(check_deterministic, form=form, case=case, device=device)
    options: dict[str, Any] = {"device": device}
    for (name, odd), dtype, form in itertools.product(ODD.items(), ("float32", "bfloat16"), FORMS):
        given = {"form": form, "odd": odd, "dtype": getattr(torch, dtype), "arranged": lambda tensor: tensor}
        checks[f"{form} {name} {dtype}"] = partial(check_odd, **options, **given)
    for form in FORMS:
        given = {"form": form, "odd": next(iter(ODD.values())), "dtype": torch.float32, "arranged": scattered}
        checks[f"{form} not contiguous"] = partial(check_odd, **options, **given)
    return checks


def main(stage: Stage) -> None:
    checks = make_checks(stage.device, (64, 96) if stage.dry_run else (800, 1333))
    for name in stage.todo(checks):
        with stage.rows.case(name) as row:
            checks[name](row)
