"""Exported files compute what their model computes; a file that does not is found and never gets its name."""

import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from PIL import Image

from helpers.command_line import documented_keys, exit_status, hf_dino
from helpers.data_formats import write_shapes
from helpers.models import tiny_model
from hf_dino import DinoDetrImageProcessor, export
from hf_dino.export import FORMATS, compare, describe, export_model, make_inputs, make_program, verification
from hf_dino.export.program import digest, model_digest
from hf_dino.exported import FACTS, METADATA_KEY, ExportedDetector, QuerySelectionMode, load_exported
from hf_dino.inference import detect_objects
from hf_dino.kernels import operators


onnx = pytest.importorskip("onnx", reason="needs the extra `export`")
pytest.importorskip("onnxscript", reason="needs the extra `export`")
pytest.importorskip("onnxruntime", reason="needs the extra `export`")


@pytest.fixture(scope="module")
def model():
    names = dict(enumerate(("circle", "cross", "square", "star", "triangle")))  # of the shapes dataset
    return tiny_model(encoder_layers=1, decoder_layers=1, num_feature_levels=2, id2label=names)


@pytest.fixture(scope="module")
def processor():
    return DinoDetrImageProcessor(size={"shortest_edge": 96, "longest_edge": 160}, image_mean=[0.5, 0.4, 0.3])


@pytest.fixture(scope="module")
def program(model):
    return make_program(model)


@pytest.fixture(scope="module")
def written(model, processor, program, tmp_path_factory):
    """Return a function that writes the model in a format, once."""
    paths = {}

    def write(name: str) -> Path:
        if name not in paths:
            paths[name] = tmp_path_factory.mktemp(name) / f"model{FORMATS[name].suffix}"
            if name == "aoti":  # of a program of its own
                export_model(model, processor, paths[name], format=name, origin="OWNER/NAME")
                return paths[name]
            if not FORMATS[name].suffix:
                paths[name].mkdir()
            facts = describe(model, processor, program, "OWNER/NAME")
            FORMATS[name].write(FORMATS[name].convert(program), paths[name], facts)
        return paths[name]

    return write


def slow(format: str):
    return pytest.param(format, marks=pytest.mark.slow)


def require(format: str) -> None:
    for package in FORMATS[format].packages:
        pytest.importorskip(package, reason=f"needs the extra `{FORMATS[format].extra}`")


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino"), slow("aoti")])
def test_all_raw_outputs_equal_those_of_the_model(format, written, model):
    require(format)
    comparisons = export.verify(written(format), model)
    assert len({each.shape for each in comparisons}) == 5 and len({each.shape[0] for each in comparisons}) == 3
    for each in comparisons:
        assert each.boxes <= 1e-5 and each.logits <= 2e-4 and each.ties <= 1e-4
    pixel_values, mask = make_inputs((2, 97, 131), seed=9)
    with torch.no_grad():
        expected = model(pixel_values, mask)
    found = ExportedDetector(written(format))(pixel_values, mask)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.logits, expected.logits, atol=2e-4, rtol=0)


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino"), slow("aoti")])
def test_an_exported_model_detects_what_the_model_detects(format, written, model, processor):
    require(format)
    detector, own_processor = load_exported(written(format))
    assert own_processor.to_dict() == processor.to_dict()
    assert detector.config.to_dict() | {"auto_map": 0} == model.config.to_dict() | {"auto_map": 0}
    image = Image.effect_mandelbrot((160, 120), (-3, -2.5, 2, 2.5), 100).convert("RGB")
    expected, found = (detect_objects(*each, image, 0.0) for each in ((model, processor), (detector, own_processor)))
    assert len(expected) == len(found) > 10
    for ours, theirs in zip(expected, found, strict=True):
        assert ours["name"] == theirs["name"]
        assert theirs["box"] == pytest.approx(ours["box"], abs=0.01)
        assert theirs["score"] == pytest.approx(ours["score"], abs=1e-4)


def test_an_onnx_file_states_its_inputs_and_where_its_model_came_from(written, model, processor):
    file = onnx.load(written("onnx"))
    onnx.checker.check_model(file, full_check=True)
    assert file.opset_import[0].version >= 18

    def axes(value):
        return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]

    assert {each.name: axes(each) for each in file.graph.input} == {
        "pixel_values": ["batch", 3, "height", "width"],
        "pixel_mask": ["batch", "height", "width"],
    }
    assert {each.name: axes(each) for each in file.graph.output} == {
        "logits": ["batch", 12, 5],
        "pred_boxes": ["batch", 12, 4],
    }
    (entry,) = file.metadata_props
    facts = json.loads(entry.value)
    assert facts["id2label"] == {str(label): name for label, name in model.config.id2label.items()}
    assert facts["processor"]["image_mean"] == list(processor.image_mean)
    assert {"image_std", "size", "rescale_factor", "do_resize"} <= facts["processor"].keys()
    assert facts["origin"] == "OWNER/NAME" and facts["least_size"] >= facts["least_edge"] > 1


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino")])
def test_a_file_names_no_local_path(format, written):
    require(format)
    here = {str(Path(export.__file__).parents[2]), str(Path.home()), str(Path(torch.__file__).parent), sys.prefix}
    for path in (written(format), *written(format).rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        assert not [name for name in here if len(name) > 1 and name.encode() in content]
        assert b'.py"' not in content and b"stack_trace" not in content


def sabotaged(source: Path, target: Path, index: int) -> Path:
    """Change every second number in one weight of an ONNX file by 1 %; normalization would hide a change of all."""
    file = onnx.load(source)
    weights = [each for each in file.graph.initializer if len(each.dims) >= 2 and each.data_type == 1]
    array = onnx.numpy_helper.to_array(weights[index]).copy()
    array.flat[::2] *= 1.01
    weights[index].CopyFrom(onnx.numpy_helper.from_array(array, weights[index].name))
    onnx.save(file, target)
    return target


@pytest.mark.parametrize("index", [0, 10, 20, -1])
def test_a_weight_that_changed_by_1_percent_is_found(index, written, model, tmp_path):
    with pytest.raises(export.DifferenceError, match=r"differs from the model on \d x \d+ x \d+ images: boxes by"):
        export.verify(sabotaged(written("onnx"), tmp_path / "model.onnx", index), model)


def test_a_file_that_differs_never_gets_its_name(written, model, processor, tmp_path, monkeypatch):
    convert_to(sabotaged(written("onnx"), tmp_path / "wrong.onnx", 1), model, processor, monkeypatch)
    (tmp_path / "wrong.onnx").unlink()
    with pytest.raises(export.DifferenceError):
        export_model(model, processor, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def convert_to(file: Path, model, processor, monkeypatch) -> None:
    """Let the export to ONNX, which takes a while, make what is in a file."""
    proto = onnx.load(file)
    facts = json.loads(proto.metadata_props[0].value)
    monkeypatch.setattr(export, "make_program", lambda *_, **__: None)
    monkeypatch.setattr(export, "describe", lambda *_: facts)
    made = dataclasses.replace(FORMATS["onnx"], convert=lambda _: proto)
    monkeypatch.setitem(FORMATS, "onnx", made)


def test_verification_finds_a_change_of_any_weight_of_the_file(written, model, tmp_path, monkeypatch):
    """Outputs do not show all: scaling a whole convolution in front of a group norm changes none."""
    file, contents = onnx.load(written("onnx")), FORMATS["onnx"].contents
    stated = json.loads(file.metadata_props[0].value)["content_sha256"]
    assert digest(contents(file)) == stated
    weights = [(each, onnx.numpy_helper.to_array(each)) for each in file.graph.initializer if each.data_type == 1]
    weights = [
        (weight, array) for weight, array in weights if (array * 1.01 != array).any()
    ]  # not zeros and infinities
    assert len(weights) > 60
    for weight, array in weights:
        weight.CopyFrom(onnx.numpy_helper.from_array(array * array.dtype.type(1.01), weight.name))
        assert digest(contents(file)) != stated
        weight.CopyFrom(onnx.numpy_helper.from_array(array, weight.name))
    (convolution,) = (pair for pair in weights if pair[0].name.endswith("input_proj.0.0.weight"))
    convolution[0].CopyFrom(onnx.numpy_helper.from_array(convolution[1] * 2, convolution[0].name))
    onnx.save(file, tmp_path / "model.onnx")
    monkeypatch.setattr(verification, "SHAPES", ())
    with pytest.raises(export.DifferenceError, match="its weights were changed after the export"):
        export.verify(tmp_path / "model.onnx", model)


def test_verification_finds_a_change_of_any_weight_of_the_model(written, model):
    """Also of the label embedding, which only training reads, and of a norm that is folded into a convolution."""
    stated = ExportedDetector(written("onnx")).session.facts["model_sha256"]
    other = copy.deepcopy(model)
    assert model_digest(other) == stated
    weights = other.state_dict()
    for weight in [each for each in weights.values() if each.is_floating_point() and each.any()]:
        before = weight.clone()
        weight *= 1.01
        assert model_digest(other) != stated
        weight.copy_(before)
    weights["model.denoising.label_embed.weight"] *= 1.01
    with pytest.raises(export.DifferenceError, match="was exported from a model with other weights"):
        export.verify(written("onnx"), other)


def test_a_digest_depends_on_values_and_not_on_their_order():
    assert digest([b"a", b"b"]) == digest([b"b", b"a"]) != digest([b"a", b"a"]) != digest([b"a"])


def run_with_swapped_ranks(model, inputs, rank: int):
    """The outputs of a right export that ranks two neighboring tokens the other way around."""
    with torch.no_grad(), QuerySelectionMode() as own:
        model(*inputs)
    tokens = own.selected[0].clone()
    tokens[:, [rank, rank + 1]] = tokens[:, [rank + 1, rank]]
    with torch.no_grad(), QuerySelectionMode(tokens):
        outputs = model(*inputs)
    return outputs, tokens


def test_ranks_may_differ_where_scores_tie_and_nowhere_else(model):
    inputs = make_inputs((2, 96, 128), seed=0)
    outputs, tokens = run_with_swapped_ranks(model, inputs, rank=3)
    swapped = compare(lambda *_: [outputs.logits, outputs.pred_boxes, tokens], model, inputs)
    assert (swapped.ranks, swapped.boxes, swapped.logits) == (4, 0, 0)
    assert swapped.ties > 1e-4 and not swapped.is_equal
    with torch.no_grad(), QuerySelectionMode() as own:
        expected = model(*inputs)
    assert (outputs.logits - expected.logits).abs().max() > 2e-4  # so it is the alignment that makes them equal

    tied = copy.deepcopy(model)
    tied.model.query_selection.class_embed.weight.data *= 1e-6
    outputs, tokens = run_with_swapped_ranks(tied, inputs, rank=3)
    comparison = compare(lambda *_: [outputs.logits, outputs.pred_boxes, tokens], tied, inputs)
    assert comparison.ranks >= 4 and comparison.is_equal
    twice = own.selected[0].clone()
    twice[0, 1] = twice[0, 0]
    assert not compare(lambda *_: [expected.logits, expected.pred_boxes, twice], model, inputs).is_equal


def test_outputs_that_are_not_finite_are_not_equal(model):
    inputs = make_inputs((1, 96, 128), seed=0)
    with torch.no_grad(), QuerySelectionMode() as own:
        expected = model(*inputs)
    nan = torch.full_like(expected.logits, float("nan"))
    assert not compare(lambda *_: [nan, expected.pred_boxes, *own.selected], model, inputs).is_equal


@pytest.mark.parametrize("format", ["onnx", slow("pt2"), slow("openvino"), slow("aoti")])
def test_images_that_are_too_small_are_refused_with_the_least_size(format, written):
    require(format)
    detector = ExportedDetector(written(format))
    least = detector.session.facts["least_size"]
    assert detector(torch.zeros(1, 3, least, least)).logits.shape == (1, 12, 5)
    with pytest.raises(ValueError, match=f"cannot process an image of 16 x 400 pixels .*least {least} x {least}"):
        detector(torch.zeros(1, 3, 16, 400))


@pytest.mark.parametrize("name", ["gone.onnx", "notes.txt", "empty", "damaged.onnx", "damaged.pt2", "other.onnx"])
def test_what_is_not_an_exported_model_is_one_line(name, tmp_path):
    (tmp_path / "empty").mkdir()
    for damaged in ("notes.txt", "damaged.onnx", "damaged.pt2"):
        (tmp_path / damaged).write_text("no model")
    value = onnx.helper.make_tensor_value_info("a", 1, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Abs", ["a"], ["b"])], "g", [value], [])
    graph.output.append(onnx.helper.make_tensor_value_info("b", 1, [1]))
    other = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(ValueError, match=r"is not an exported model|is damaged, or was not written by") as raised:
        ExportedDetector(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", FACTS)
def test_a_file_of_an_earlier_version_is_one_line(name, written, tmp_path):
    file = onnx.load(written("onnx"))
    (entry,) = file.metadata_props
    facts = json.loads(entry.value)
    del facts[name]
    entry.value = json.dumps(facts)
    onnx.save(file, tmp_path / "old.onnx")
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:
        archive.writestr(f"model/extra/{METADATA_KEY}", json.dumps(facts))
    for path in (tmp_path / "old.onnx", tmp_path / "old.pt2"):
        with pytest.raises(ValueError, match=f"{path.name}: was written by an older hf_dino") as raised:
            ExportedDetector(path)
        assert "\n" not in str(raised.value)


def test_it_runs_on_the_cpu_and_says_so(written):
    detector = ExportedDetector(written("onnx"))
    assert detector.to("cpu") is detector and detector.device.type == "cpu"
    with pytest.raises(RuntimeError, match="run on the CPU"):
        detector.to("cuda")


@pytest.fixture
def folder(model, processor, tmp_path):
    model.save_pretrained(tmp_path / "tiny")
    processor.save_pretrained(tmp_path / "tiny")
    return tmp_path


def test_the_command_writes_a_verified_file(folder, written, model, processor, monkeypatch, capsys):
    convert_to(written("onnx"), model, processor, monkeypatch)
    target = folder / "new" / "model.onnx"
    assert hf_dino(["export", folder / "tiny", "--output", target]) == 0
    printed = capsys.readouterr().out
    assert "changed ranks" in printed and f"wrote {target}, " in printed
    assert sorted(path.name for path in target.parent.iterdir()) == ["model.onnx"]
    assert export.verify(target, model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--output=there.onnx"], "already exists; use a different path"),
        (["tiny", "--output=model.pt2"], "must end in .onnx"),
        (["tiny", "--format=pt2", "--output=model.onnx"], "must end in .pt2"),
        (["tiny", "--output=there.onnx/model.onnx"], "there.onnx"),
        (["tny", "--output=model.onnx"], "tny: is neither a directory nor a model on the Hub"),
        (["OWNER/nmae", "--output=model.onnx"], "is neither a directory nor a model on the Hub"),
        (["OWNER/nmae", "--output=new/model.onnx"], "is neither a directory nor a model on the Hub"),
        (["OWNER/nmae", "--output=ov", "--format=openvino"], "is neither a directory nor a model on the Hub"),
        (["OWNER/nmae", "--output=new/ov", "--format=openvino"], "is neither a directory nor a model on the Hub"),
        (["tiny", "--output=new/a.onnx", "--precision=float16"], "--precision float16: needs --dataset"),
        (["tiny", "--output=new/a.onnx", "--dataset=tiny"], "--dataset: is read only with --precision"),
        (
            ["tiny", "--output=a.pt2", "--format=pt2", "--precision=int8", "--dataset=d"],
            "not available with --format pt2",
        ),
        (["tiny", "--output=a.onnx", "--attention=compiled"], "only PyTorch has it"),
    ],
)
def test_wrong_use_is_one_line_and_status_2(arguments, message, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    Path("there.onnx").write_text("keep")
    before = sorted(path.name for path in folder.iterdir())
    assert exit_status(["export", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
    assert Path("there.onnx").read_text() == "keep"
    assert sorted(path.name for path in folder.iterdir()) == before


def test_an_unknown_format_lists_the_known_ones(folder, capsys):
    assert hf_dino(["export", folder / "tiny", "--output=a.tflite", "--format=tflite"]) == 2
    assert "'onnx', 'openvino', 'pt2', 'aoti'" in capsys.readouterr().err


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("openvino", "openvino")])
def test_a_missing_package_is_named_with_its_extra(format, package, folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    output = folder / f"model{FORMATS[format].suffix}"
    assert exit_status(["export", folder / "tiny", f"--format={format}", f"--output={output}"]) == 2
    line = f"--format {format} needs {package}: pip install 'hf-dino[{FORMATS[format].extra}]'"
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("name", [each for each in export.ATTENTIONS if each != "grid_sample"])
def test_each_form_computes_what_the_reference_implementation_computes(name):
    if name == "compiled" and operators("cpu") is None:
        pytest.skip("needs the compiled kernel")
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, 7), (3, 4), (1, 2)]
    value = torch.randn(2, 49, 4, 8, generator=generator, dtype=torch.float64)
    locations = torch.rand(2, 6, 4, 3, 2, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3
    locations[0, 0, 0, 0] = torch.tensor([[0.0, 1.0], [float("nan"), 0.5]])
    locations[0, 1, 0, 0] = torch.tensor([[float("inf"), 0.5], [0.5, -1e9]])
    weights = torch.rand(2, 6, 4, 3, 2, generator=generator, dtype=torch.float64)
    forms = (export.ATTENTIONS["grid_sample"], export.ATTENTIONS[name])
    expected, found = (attend(value, shapes, locations, weights) for attend in forms)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def detectors(folder, written, shapes, monkeypatch):
    """A directory with the model, `tiny`, its file, `model.onnx`, and images."""
    monkeypatch.chdir(folder)
    shutil.copy(written("onnx"), "model.onnx")
    Path("shapes").symlink_to(shapes)
    return folder


@pytest.mark.slow
def test_the_commands_run_a_file_that_is_compiled_for_this_machine(written, detectors, capfd):
    shutil.copy(written("aoti"), "model.pt2")
    attention = "compiled" if operators("cpu") else "grid_sample"
    capfd.readouterr()
    assert hf_dino(["verify", "model.pt2", "--model=tiny", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["attention"] == attention
    assert "is unchanged" in err and "CUDA" not in err
    assert_predicts_alike("tiny", "model.pt2", [])
    capfd.readouterr()
    assert hf_dino(["benchmark", "--model=tiny", "model.pt2", "--sizes=96x128", "--rounds=1", "--json"]) == 0
    assert "AOTInductor" in json.loads(capfd.readouterr().out)["candidates"][1]["runtime"]


@pytest.mark.parametrize(
    "options",
    [
        ["--threshold=0.015"],
        ["--classes=star,circle"],
        ["--top_k=3"],
        ["--nms=0.3"],
        ["--tile=64", "--tile_overlap=0.3"],
        ["--batch_size=1"],
    ],
    ids=lambda options: options[0],
)
def test_predict_with_a_file_finds_what_the_model_finds(options, detectors, capsys):
    assert_predicts_alike("tiny", "model.onnx", options)
    assert "model.onnx: runs in ONNX Runtime" in capsys.readouterr().err


def assert_predicts_alike(model: str, file: str, options: list[str]) -> None:
    """Run `predict` on the validation split with a model and its file."""
    results = []
    for name in (model, file):
        common = [f"--model={name}", f"--output=of-{name}", "--save=json", "--threshold=0", "--num_workers=0"]
        assert hf_dino(["predict", "shapes/val", *common, *options]) == 0
        results.append(json.loads(Path(f"of-{name}", "results.json").read_text()))
    expected, found = results
    assert expected.keys() == found.keys() and len(expected) == 3 and any(expected.values())
    for ours, theirs in zip(expected.values(), found.values(), strict=True):
        assert [each["name"] for each in ours] == [each["name"] for each in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert other["box"] == pytest.approx(one["box"], abs=0.01)
            assert other["score"] == pytest.approx(one["score"], abs=1e-4)


def test_evaluate_runs_a_file(detectors):
    for model in ("tiny", "model.onnx"):
        options = [f"--metrics_json={model}.json", "--split=validation", "--dataloader_num_workers=0"]
        assert hf_dino(["evaluate", f"--model={model}", "--data=shapes", *options]) == 0
    expected, found = (json.loads(Path(f"{name}.json").read_text()) for name in ("tiny", "model.onnx"))
    assert found["ap"] == pytest.approx(expected["ap"], abs=1e-6)
    with pytest.raises(ValueError, match="is an exported model; leave out --mixed_precision"):
        hf_dino(["evaluate", "--model=model.onnx", "--data=shapes", "--mixed_precision=bf16"])


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_the_installed_runtime_lacks_is_one_line(device, detectors):
    with pytest.raises(ValueError, match=f"--device {device}: the installed onnxruntime has only .*CPU") as raised:
        hf_dino(["predict", "shapes/val", "--model=model.onnx", "--output=out", f"--device={device}"])
    assert "\n" not in str(raised.value)


def test_a_runtime_that_falls_back_to_the_cpu_is_refused(written, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    session = onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda source, options, providers: session(source, options))
    with pytest.raises(ValueError, match="--device cuda:0: the installed onnxruntime has only CPUExecutionProvider"):
        load_exported(written("onnx"), device="cuda:0")


def test_verify_is_a_command(detectors, model, processor, capsys):
    assert hf_dino(["verify", "model.onnx", "--model=tiny", "--json"]) == 0
    out, err = capsys.readouterr()
    assert "changed ranks" in err and "model.onnx: was exported from these weights and is unchanged" in err
    facts = json.loads(out)
    assert facts.keys() <= documented_keys()["verify"]
    assert (facts["precision"], facts["ap_before"]) == ("float32", None)
    assert all(each.keys() <= documented_keys()["export"] for each in facts["differences"])
    other = copy.deepcopy(model)
    other.class_embed[0].bias.data += 0.1
    other.save_pretrained("other")
    processor.save_pretrained("other")
    with pytest.raises(export.DifferenceError, match="was exported from a model with other weights"):
        hf_dino(["verify", "model.onnx", "--model=other"])
    assert exit_status(["verify", "gone.onnx", "--model=tiny"]) == 2


def test_benchmark_is_a_table_of_this_machine(detectors, capsys):
    arguments = ["benchmark", "--model=tiny", "model.onnx", "--sizes", "96x128", "64x96", "--rounds=2"]
    assert hf_dino(arguments) == 0
    header, columns, ours, file = capsys.readouterr().out.splitlines()
    assert "1 thread, median of 2 rounds" in header
    assert columns.split() == ["runtime", "MB", "load", "s", "96x128", "64x96"]
    assert "PyTorch" in ours and "ONNX Runtime" in file and "float32" in file
    assert hf_dino([*arguments, "--json", "--data=shapes"]) == 0
    measured = json.loads(capsys.readouterr().out)
    for each in measured["candidates"]:
        assert each.keys() | measured.keys() <= documented_keys()["benchmark"]
        assert each["milliseconds"].keys() == {"96x128", "64x96"} and each["load_seconds"] > 0
        assert all(0 < time["median"] <= time["p90"] for time in each["milliseconds"].values())
    first, second = measured["candidates"]
    assert second["ap"] == pytest.approx(first["ap"], abs=1e-6)
    assert second["megabytes"] == pytest.approx(Path("model.onnx").stat().st_size / 1e6, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes=640"], "--sizes 640: expected HEIGHTxWIDTH"),
        (["--sizes=axb"], "--sizes axb: expected HEIGHTxWIDTH"),
        (["--sizes=0x64"], "--sizes 0x64: expected HEIGHTxWIDTH"),
        (["--sizes", "64x64", "8x8", "--rounds=1"], "--sizes 8x8: is too small"),
        (["gone.onnx"], "gone.onnx: is not an exported model"),
        (["--dataset=gone"], "gone"),
    ],
)
def test_wrong_use_of_benchmark_is_one_line_and_status_2(arguments, message, detectors, capsys):
    assert exit_status(["benchmark", "--model=tiny", *arguments]) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error: ")]
    assert message in line


@pytest.mark.parametrize("precision", ["float16", "int8", "int8_dynamic"])
def test_a_lower_precision_is_judged_by_ap_and_refused_above_the_loss(
    precision, detectors, model, processor, shapes, monkeypatch, capsys
):
    convert_to(Path("model.onnx"), model, processor, monkeypatch)
    scores = iter([0.5, 0.496, 0.5, 0.494, 0.5, float("nan")])
    judged = []
    monkeypatch.setattr(export, "average_precision", lambda *each: (judged.append(each), next(scores))[1])
    arguments = ["export", "tiny", f"--precision={precision}", "--dataset=shapes"]
    assert hf_dino([*arguments, "--output=small.onnx", "--json"]) == 0
    out, err = capsys.readouterr()
    assert f"{precision}: AP 0.5000 before, 0.4960 after, on {shapes.name}" in err
    assert json.loads(out).keys() <= documented_keys()["export"]
    assert json.loads(out)["ap_after"] == 0.496
    detector, _ = load_exported("small.onnx")
    facts = detector.session.facts
    assert (facts["precision"], facts["ap_before"], facts["ap_after"], facts["data"]) == (
        precision,
        0.5,
        0.496,
        shapes.name,
    )
    assert str(detectors) not in json.dumps(facts)
    assert (detector(torch.zeros(1, 3, 96, 96)).pred_boxes != judged[0][0](torch.zeros(1, 3, 96, 96)).pred_boxes).any()
    assert [each.image_id for each in judged[0][2].images] == [1, 2, 3]  # of validation, not of training
    before = sorted(Path().iterdir())
    for _ in range(2):
        with pytest.raises(export.PrecisionError, match=f"--precision {precision}: AP fell from 0.5000 to"):
            hf_dino([*arguments, "--output=refused.onnx"])
    assert sorted(Path().iterdir()) == before
    assert hf_dino(["verify", "small.onnx", "--model=tiny"]) == 0


def test_a_dataset_without_a_split_to_judge_on_is_status_2(detectors, shapes, capsys):
    for split in ("train", "val"):
        Path(split).mkdir()
        (Path(split) / split).symlink_to(shapes / split)
        (Path(split) / f"{split}.json").symlink_to(shapes / f"{split}.json")
    arguments = ["export", "tiny", "--output=a.onnx", "--precision=int8"]
    assert exit_status([*arguments, "--data=train"]) == 2
    assert "needs the splits train and validation (or test), it has train" in capsys.readouterr().err
    assert exit_status([*arguments, "--data=val"]) == 2
    assert "it has validation; make them with hf-dino data split" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_openvino_reduces_its_precision(precision, detectors, written):
    require("openvino")
    pytest.importorskip("nncf", reason="needs the extra `openvino`")
    data = export.read_precision_data("shapes", precision)
    wanted = FORMATS["openvino"]
    detector, processor = load_exported(written("openvino"))
    reduced = wanted.reduce[precision](wanted.load(written("openvino")), export.calibration_inputs(data, processor))
    Path("reduced").mkdir()
    wanted.write(reduced, Path("reduced"), detector.session.facts | {"precision": precision})
    assert Path("reduced/model.bin").stat().st_size < Path(written("openvino"), "model.bin").stat().st_size
    image = torch.rand(1, 3, 96, 128)
    found, expected = load_exported("reduced")[0](image), detector(image)
    assert 0 < (found.logits - expected.logits).abs().max() < 1


@pytest.mark.slow
def test_an_onnx_file_for_tensorrt_has_no_grid_sample(written, model, processor, tmp_path):
    comparisons = export_model(model, processor, tmp_path / "gather.onnx", attention="gather")
    assert max(each.boxes for each in comparisons) <= 1e-5
    operators = {node.op_type for node in onnx.load(tmp_path / "gather.onnx").graph.node}
    assert "GridSample" not in operators
    assert "GridSample" in {node.op_type for node in onnx.load(written("onnx")).graph.node}


RESNET = """
import resource, sys, torch
from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, DinoDetrImageProcessor
from hf_dino.export import export_model
torch.manual_seed(0)
model = DinoDetrForObjectDetection(DinoDetrConfig()).eval()
for each in export_model(model, DinoDetrImageProcessor(), sys.argv[1], format=sys.argv[2]):
    print(each)
    assert each.boxes <= 1e-5 and each.logits <= 2e-4
print(sum(each.nbytes for each in model.state_dict().values()))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "openvino"])
def test_a_resnet_50_is_exported_in_4_gib(format, tmp_path):
    require(format)
    command = [sys.executable, "-c", RESNET, str(tmp_path / f"model{FORMATS[format].suffix}"), format]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *_, weights, peak = done.stdout.split()
    assert float(peak) < 4
    files = [each for each in (tmp_path, *tmp_path.rglob("*")) if each.is_file()]
    assert sum(each.stat().st_size for each in files) <= 1.05 * int(weights)
