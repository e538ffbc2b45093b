"""The example that compares the family tells its story, with tiny settings."""

import importlib

import pytest

from helpers import comparisons
from hf_dino.data.shapes import generate_shapes


@pytest.mark.slow
def test_the_comparison_of_the_family_runs_and_continues(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend("examples")
    example = importlib.import_module("compare_family")
    rows = {name: example.FAMILY[name] for name in ("detr", "dino_4scale")}
    monkeypatch.setattr(example, "FAMILY", rows)
    monkeypatch.setattr(example, "SETTINGS", comparisons.SETTINGS)
    monkeypatch.setattr(example, "SEEDS", 1)

    def generate(output):
        return generate_shapes(output, image_size=64, num_train=6, num_val=4, num_test=1)

    monkeypatch.setattr("hf_dino.compare.plan.generate_shapes", generate)
    output = tmp_path / "family"
    example.main(output)
    told = capsys.readouterr().out
    assert "dino_4scale - detr: AP" in told
    assert (output / "report.html").is_file()
    assert {path.name for path in (output / "rows").iterdir()} == {"detr", "dino_4scale"}
    measured = (output / "speed.json").read_bytes()
    example.main(output)
    assert "dino_4scale, seed 0" not in capsys.readouterr().out, "what is finished is not trained again"
    assert (output / "speed.json").read_bytes() == measured


def test_failed_trainings_end_the_example_with_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("examples")
    example = importlib.import_module("compare_family")
    comparisons.make_up(tmp_path, rows=("detr",), seeds=1)
    monkeypatch.setattr(example, "compare", lambda *_, **__: {"run": "no disk"})
    monkeypatch.setattr(example, "measure_comparison", lambda *_: None)
    with pytest.raises(SystemExit, match="trainings failed, the first: no disk"):
        example.main(tmp_path)
