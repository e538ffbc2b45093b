"""Model cards have valid metadata, keep measured and quoted results apart, and show no local paths."""

import pytest
from huggingface_hub import ModelCard

from helpers.models import tiny_config
from hf_dino import DinoDetrConfig
from hf_dino.model_card import add_results, converted_card, finetuned_card, training_command


SIZE = {"shortest_edge": 800, "longest_edge": 1333}
SWIN_LARGE = {"model_type": "swin", "embed_dim": 192, "depths": [2, 2, 18, 2], "out_indices": [2, 3, 4]}


def converted(config: DinoDetrConfig, **given) -> ModelCard:
    source = {"checkpoint": "checkpoint.pth", "sha256": "a" * 64, "weights": "model", "size": SIZE}
    return ModelCard(converted_card(config, **source | given))


def finetuned(config: DinoDetrConfig, **given) -> ModelCard:
    training = {"metrics": {}, "dataset": "Blood cells", "command": "python train.py", "base_model": None}
    return ModelCard(finetuned_card(config, **training | given))


def test_converted_card_has_metadata_and_provenance():
    card = converted(DinoDetrConfig(), epochs=12)
    data = card.data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "object-detection")
    for words in ("ResNet-50", "4 feature levels", "checkpoint.pth", "a" * 64, "12 epochs", "800", "1333"):
        assert words in card.text


def test_published_number_is_quoted_and_not_claimed_as_measured():
    card = converted(DinoDetrConfig(), published_ap=0.49, published_hash_known=True)
    assert "| 0.490 | **published** by the authors, **not measured here** |" in card.text
    assert "recognized by its SHA-256" in card.text
    assert "model-index" not in card.content


def test_published_file_is_called_official():
    card = converted(DinoDetrConfig(), published_ap=0.49, coco=True)
    data = card.data.to_dict()
    assert (data["license"], data["datasets"]) == ("apache-2.0", ["detection-datasets/coco"])
    assert "the official checkpoint `checkpoint.pth` of [IDEA-Research/DINO]" in card.text
    assert "released by IDEA-Research under Apache-2.0" in card.text
    assert "assumed to be COCO" not in card.text


def test_unknown_file_is_called_nothing_that_it_may_not_be():
    card = converted(DinoDetrConfig(), coco=True)
    assert not {"license", "datasets"} & card.data.to_dict().keys()
    assert "official checkpoint" not in card.text
    assert "released by IDEA-Research" not in card.text
    assert "`checkpoint.pth`, a checkpoint in the format of [IDEA-Research/DINO]" in card.text
    assert "add the license that applies to the weights" in card.text
    assert "No published result is known" in card.text
    assert "91 classes are assumed to be COCO's" in card.text


@pytest.mark.parametrize(("backbone", "words"), [(None, False), (SWIN_LARGE, True)], ids=["resnet", "swin"])
def test_license_of_swin_is_named_where_there_is_a_swin(backbone, words):
    card = converted(DinoDetrConfig(backbone_config=backbone), published_ap=0.5)
    assert ("MIT license" in card.text) is words


def test_unused_and_unnamed_labels_are_explained():
    gaps = DinoDetrConfig(id2label={0: "N/A", 1: "cat", 2: "N/A"})
    assert "of which 1 are used; 0, 2 are unused" in converted(gaps).text
    unnamed = DinoDetrConfig(id2label={0: "class_0", 1: "class_1"})
    assert "does not contain their names" in converted(unnamed).text
    assert "class 0, class 1" in converted(tiny_config()).text


def test_ema_weights_are_named():
    assert "ema_model" in converted(DinoDetrConfig(), weights="ema_model").text


def test_measured_numbers_enter_the_model_index():
    card = finetuned(tiny_config(), metrics={"ap": 0.5312, "ap50": 0.82}, split="test")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["ap"].metric_value == 0.5312
    assert results["ap"].metric_name == "AP@[.50:.95]"
    assert (results["ap50"].dataset_name, results["ap50"].dataset_split) == ("Blood cells", "test")
    assert "| AP@[.50:.95] | 0.531 |" in card.text
    assert "**Measured** with pycocotools on Blood cells, test" in card.text


def test_numbers_that_are_not_coco_s_are_marked_in_text_and_index():
    card = finetuned(tiny_config(), metrics={"ap": 0.5, "ar_500": 0.75}, max_detections=500)
    assert [result.metric_name for result in card.data.eval_results] == [
        "AP@[.50:.95] (500 detections per class and image)",
        "AR 500 (500 detections per class and image)",
    ]
    assert "instead of 100: not comparable with COCO's metrics.\n\n| metric | value |" in card.text
    assert "| AR 500 | 0.750 |" in card.text
    assert "not comparable" not in finetuned(tiny_config(), metrics={"ap": 0.5}, max_detections=100).text


def test_absent_measurements_are_left_out():
    card = finetuned(tiny_config(), metrics={"ap": 0.5, "ap_large": -1.0, "ap_small": float("nan")})
    assert [result.metric_type for result in card.data.eval_results] == ["ap"]
    assert "Nothing was measured" in finetuned(tiny_config(), metrics={"ap": -1}).text


def test_command_and_start_are_told(tmp_path):
    assert "python train.py" in finetuned(tiny_config()).text
    assert "from random weights" in finetuned(tiny_config()).text
    (tmp_path / "base").mkdir()
    local = finetuned(tiny_config(), base_model=str(tmp_path / "base"))
    assert "local model `base`" in local.text
    assert str(tmp_path) not in local.content
    assert local.data.base_model is None
    hub = finetuned(tiny_config(), base_model="someone/dino-r50")
    assert hub.data.base_model == "someone/dino-r50"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("torchvision/resnet50", "`torchvision/resnet50`"),
        ("someone/swin", "[someone/swin](https://huggingface.co/someone/swin)"),
        ("folder/of/swin", "the local model `swin`"),
    ],
)
def test_a_backbone_is_told_from_a_whole_model(name, words):
    card = finetuned(tiny_config(), backbone=name)
    assert f"Trained with the backbone from {words} and the rest from random weights on Blood cells" in card.text
    assert card.data.base_model is None


def test_the_command_is_the_one_that_starts_as_many_processes():
    assert training_command("train.py", ["--data", "my data"], num_processes=1) == "python train.py --data 'my data'"
    several = training_command("train.py", ["--data=mine"], num_processes=2)
    assert several == "accelerate launch --multi_gpu --num_processes 2 train.py --data=mine"


@pytest.mark.parametrize(
    ("argument", "shown"),
    [
        ("HERE/data/coco", "data/coco"),
        ("--data=HERE/data=2/my coco", "'--data=data=2/my coco'"),
        ("HERE", "."),
        ("ABOVE/other/coco", "path/to/coco"),
        ("--output_dir=ABOVE/it's mine/run", "--output_dir=path/to/run"),
        ("ABOVE/augmentations.py:strong", "path/to/augmentations.py:strong"),
        (
            'backbone_config={"name": "ABOVE/swin", "depth": 2}',
            '\'backbone_config={"name": "path/to/swin", "depth": 2}\'',
        ),
        ("data/coco", "data/coco"),
        ("./data", "./data"),
        ("../data", "../data"),
        ("someone/dino-r50", "someone/dino-r50"),
        ("https://example.com/a/b", "https://example.com/a/b"),
        ("1e-4", "1e-4"),
        ("num_queries=300", "num_queries=300"),
    ],
)
def test_the_command_shows_no_folders_of_its_author(tmp_path, monkeypatch, argument, shown):
    here = tmp_path / "project"
    here.mkdir()
    monkeypatch.chdir(here)
    argument = argument.replace("HERE", str(here)).replace("ABOVE", str(tmp_path))
    command = training_command(str(here / "train.py"), ["--option", argument], num_processes=1)
    assert command == f"python train.py --option {shown}"
    assert str(tmp_path) not in finetuned(tiny_config(), command=command).content


@pytest.mark.parametrize("size", [SIZE, {"height": 192, "width": 256}])
def test_preprocessing_names_the_size(size):
    text = converted(DinoDetrConfig(), size=size).text
    assert all(str(value) in text for value in size.values())


def test_usage_is_python():
    text = converted(DinoDetrConfig()).text
    code = text.split("```python\n")[1].split("```")[0]
    compile(code, "usage", "exec")
    assert "ImageOps.exif_transpose(" in code
    assert "import hf_dino" in text
    assert "trust_remote_code=True" in text


# Results that are measured later


@pytest.mark.parametrize(
    "card",
    [finetuned(DinoDetrConfig(), metrics={"ap": 0.5}, split="validation"), finetuned(DinoDetrConfig())]
    + [converted(DinoDetrConfig(), published_ap=0.49), ModelCard("A card by hand.\n")],
    ids=["measured", "not measured", "published", "by hand"],
)
def test_measured_results_are_added_to_any_card(card):
    once = ModelCard(add_results(card.content, {"ap": 0.25, "ap_small": -1.0}, "Blood cells", "test"))
    added = [each for each in once.data.eval_results if each.dataset_split == "test"]
    assert [(each.metric_type, each.metric_value, each.dataset_name) for each in added] == [
        ("ap", 0.25, "Blood cells")
    ]
    before = [each for each in card.data.eval_results or () if each.dataset_split != "test"]
    assert [each for each in once.data.eval_results if each.dataset_split != "test"] == before
    assert once.text.count("## Results on Blood cells, test\n") == 1
    assert "| AP@[.50:.95] | 0.250 |" in once.text
    assert "Nothing was measured" not in once.text
    kept = [line for line in card.text.splitlines() if line not in ("## Results", "Nothing was measured.")]
    assert set(kept) <= set(once.text.splitlines())


def test_a_card_without_a_name_gets_that_of_the_type():
    text = add_results("---\nlicense: mit\n---\n# Mine\n", {"ap": 0.5}, "Blood cells", model_type="rt_detr")
    assert ModelCard(text).data.model_name == "rt-detr-blood-cells"


def test_results_of_a_split_replace_earlier_ones():
    card = finetuned(DinoDetrConfig()).content
    once = add_results(card, {"ap": 0.25}, "Blood cells", "test")
    assert add_results(once, {"ap": 0.25}, "Blood cells", "test") == once
    assert (
        add_results(add_results(once, {"ap": 0.5}, "Blood cells", "test"), {"ap": 0.25}, "Blood cells", "test") == once
    )
    both = ModelCard(add_results(once, {"ap": 0.5}, "Blood cells", "validation"))
    assert {each.dataset_split: each.metric_value for each in both.data.eval_results} == {
        "test": 0.25,
        "validation": 0.5,
    }


def test_results_of_training_are_replaced_by_later_ones_of_the_same_split():
    card = finetuned(DinoDetrConfig(), metrics={"ap": 0.5}, split="test").content
    once = ModelCard(add_results(card, {"ap": 0.25}, "Blood cells", "test"))
    assert [each.metric_value for each in once.data.eval_results] == [0.25]
    assert once.text.count("**Measured**") == once.text.count("## Results") == 1
    assert "0.500" not in once.text
