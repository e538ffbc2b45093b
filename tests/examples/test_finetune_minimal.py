"""The example with a loop of its own trains a small model on a small dataset, and stays a page."""

import ast
import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForObjectDetection

from helpers.models import TINY_RESNET, tiny_model
from hf_dino import DinoDetrImageProcessor
from hf_dino.data.shapes import OUTLINES, generate_shapes


EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_minimal.py"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    monkeypatch.delitem(sys.modules, EXAMPLE.stem, raising=False)
    module = importlib.import_module(EXAMPLE.stem)
    for name, value in {"NUM_EPOCHS": 2, "GLOBAL_BATCH_SIZE": 4, "GRADIENT_ACCUMULATION_STEPS": 2}.items():
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "NUM_WORKERS", 0)
    return module


def test_it_trains_evaluates_and_saves_a_model_that_loads(example, tmp_path, capsys):
    shapes = generate_shapes(tmp_path / "shapes", image_size=64, num_train=6, num_val=2, num_test=1)
    backbone = {**TINY_RESNET, "out_features": ["stage2", "stage3", "stage4"]}
    start = tiny_model(backbone_config=backbone, freeze_backbone_batch_norms=False)
    start.save_pretrained(tmp_path / "start")
    DinoDetrImageProcessor(size={"shortest_edge": 80, "longest_edge": 133}).save_pretrained(tmp_path / "start")
    ap = example.main(str(tmp_path / "start"), str(shapes), str(tmp_path / "result"))
    lines = [line for line in capsys.readouterr().out.splitlines() if "AP" in line and "loss" in line]
    assert [line.partition(":")[0] for line in lines] == ["step 2", "step 4"]
    assert lines[-1].endswith(f"AP {ap:.3f}")
    assert 0 <= ap <= 1

    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "result")
    assert set(model.config.label2id) == set(OUTLINES)
    assert dict(AutoImageProcessor.from_pretrained(tmp_path / "result").size) == {
        "shortest_edge": 80,
        "longest_edge": 133,
    }
    before, after = start.state_dict(), model.state_dict()
    trained = "model.encoder.layers.0.mlp.fc1.weight"
    assert not torch.equal(before[trained], after[trained])


def test_it_fits_on_a_page():
    text = EXAMPLE.read_text()
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert len(text.splitlines()) <= 150
    assert len(imports) <= 12
