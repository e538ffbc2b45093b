"""Training from scratch starts for unlucky seeds too, and its benchmark can be interrupted."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch


BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module("from_scratch")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path)
    monkeypatch.setattr(benchmark, "NUM_IMAGES", 4)
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 1)
    yield benchmark
    for path in BENCHMARKS.rglob("*.py"):
        sys.modules.pop(".".join(path.relative_to(BENCHMARKS).with_suffix("").parts), None)


@pytest.fixture
def shapes(benchmark, tmp_path):
    return benchmark.generate_shapes(tmp_path / "shapes", num_train=3, num_val=1, num_test=0)


@pytest.fixture
def data(benchmark, shapes):
    return benchmark.read_images(shapes)


def test_a_run_that_was_measured_is_not_repeated(benchmark, shapes, capsys):
    arguments = ["--dataset", str(shapes), "--steps", "1", "--variants", "one_cycle", "full_rate", "--seeds"]
    benchmark.main([*arguments, "2"])
    benchmark.main([*arguments, "1", "2"])
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["variant"], row["seed"]) for row in printed] == [
        ("one_cycle", 2), ("full_rate", 2), ("one_cycle", 1), ("full_rate", 1),
    ]  # fmt: skip
    result = json.loads((benchmark.RESULTS / "from_scratch_shapes.json").read_text())
    assert sorted(map(str, result["rows"])) == sorted(map(str, printed))
    assert [(each["variant"], each["seeds"]) for each in result["summary"]] == [("one_cycle", 2), ("full_rate", 2)]
    first_step = {row["seed"]: row["box_loss"] for row in printed if row["variant"] == "full_rate"}
    assert first_step == {row["seed"]: row["box_loss"] for row in printed if row["variant"] == "one_cycle"}


def token_logits(model, data):
    """Return the mean class logits of each level, `(levels, num_labels)`."""
    kept = []
    selection = model.model.query_selection
    selection.class_embed.register_forward_hook(lambda _, args, output: kept.append(output))
    model.eval()(data.batch(0)[0])
    tokens = [level.mean(dim=(0, 1)) for level in kept[0].split([24 * 32, 12 * 16, 6 * 8], dim=1)]
    return torch.stack(tokens).detach()


def test_balanced_levels_have_equal_scores(benchmark, data):
    variant = benchmark.VARIANTS["one_cycle"]
    model = benchmark.make_model(variant, seed=3, num_labels=data.num_labels)
    before = token_logits(model, data)
    assert (before - before.mean(dim=0)).abs().max() > 0.05
    benchmark.balance_levels(model, data)
    after = token_logits(model, data)
    assert torch.allclose(after, after.mean(dim=0).expand_as(after), atol=1e-4)


def test_proposals_start_at_the_known_sizes(benchmark, data):
    model = benchmark.make_model(benchmark.VARIANTS["one_cycle"], seed=3, num_labels=data.num_labels)
    selection = model.model.query_selection
    benchmark.know_sizes(model, data)
    sizes = torch.cat([label["boxes"] for label in data.labels])[:, 2:].logit()
    middle = torch.tensor([0.1, 0.1]).logit() + selection.bbox_embed(torch.zeros(1, 128))[0, 2:]
    assert torch.allclose(middle, sizes.mean(dim=0), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [3, 10])  # all their first proposals are of the finest level, far too small
def test_at_full_rate_from_the_first_step_the_boxes_find_their_size(benchmark, monkeypatch, shared, seed):
    if not (shared / "data" / "bccd").is_dir():
        pytest.skip("needs ../shared/data/bccd")
    monkeypatch.setattr(benchmark, "NUM_IMAGES", 292)
    monkeypatch.setattr(benchmark, "BATCH_SIZE", 8)
    data = benchmark.read_images(shared / "data" / "bccd")
    row = benchmark.measure("full_rate", seed, data, steps=40)
    assert row["first_side"] == pytest.approx(0.05, abs=5e-3)
    assert row["last_side"] > 0.15
    assert row["box_loss"] < benchmark.THRESHOLD
