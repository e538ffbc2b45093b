"""Weights of pre-trained backbones are loaded into a new detector unchanged."""

import pytest
import torch
import torchvision
from transformers import DeformableDetrConfig, SwinConfig, SwinForImageClassification

from helpers.detectors import small_detector
from helpers.models import TINY_SWIN, tiny_config
from hf_dino import DinoDetrForObjectDetection, backbone_weights
from hf_dino.backbone_weights import load_backbone_weights
from hf_dino.data import InputError


RESNET18 = {
    "model_type": "resnet",
    "embedding_size": 64,
    "hidden_sizes": [64, 128, 256, 512],
    "depths": [2, 2, 2, 2],
    "layer_type": "basic",
    "out_features": ["stage3", "stage4"],
}


def detector(backbone_config):
    torch.manual_seed(0)
    return DinoDetrForObjectDetection(tiny_config(backbone_config=dict(backbone_config))).eval()


def test_torchvision_resnet_computes_the_same(monkeypatch):
    resnet = torchvision.models.resnet18().eval()
    for norm in (module for module in resnet.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.running_mean.uniform_(-0.1, 0.1)
    monkeypatch.setattr(
        backbone_weights, "get_model", lambda name, weights: {("resnet18", "IMAGENET1K_V1"): resnet}[name, weights]
    )
    model = detector(RESNET18)
    load_backbone_weights(model, "torchvision/resnet18")
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        stem = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(images))))
        layer3 = resnet.layer3(resnet.layer2(resnet.layer1(stem)))
        stage3, stage4 = model.model.backbone.body(images).feature_maps
        torch.testing.assert_close(stage3, layer3)
        torch.testing.assert_close(stage4, resnet.layer4(layer3))


def test_classifier_of_transformers_gives_its_backbone(tmp_path):
    classifier = SwinForImageClassification(SwinConfig(**TINY_SWIN))
    classifier.save_pretrained(tmp_path)
    model = detector(TINY_SWIN)
    load_backbone_weights(model, str(tmp_path))
    loaded = model.model.backbone.body.state_dict()
    for name, weight in classifier.state_dict().items():
        if name.startswith(("swin.embeddings", "swin.encoder")):
            torch.testing.assert_close(loaded[name], weight, rtol=0, atol=0)


def test_weights_of_another_backbone_are_refused(tmp_path):
    SwinForImageClassification(SwinConfig(**TINY_SWIN)).save_pretrained(tmp_path)
    for other in (RESNET18, {**TINY_SWIN, "embed_dim": 16}):
        before = detector(other)
        with pytest.raises(InputError, match="cannot be loaded as the weights of the backbone that the configuration"):
            load_backbone_weights(before, str(tmp_path))
    with pytest.raises(InputError, match="torchvision/resnet19: cannot be loaded"):
        load_backbone_weights(detector(RESNET18), "torchvision/resnet19")


def test_backbones_of_timm_take_the_weights_of_torchvision(monkeypatch, tmp_path):
    pytest.importorskip("timm")
    resnet = torchvision.models.resnet18()
    monkeypatch.setattr(backbone_weights, "get_model", lambda name, weights: resnet)
    backbone = {**DeformableDetrConfig().backbone_config.to_dict(), "backbone": "resnet18"}
    model = small_detector("deformable_detr", backbone_config=backbone)
    load_backbone_weights(model, "torchvision/resnet18")
    loaded = model.model.backbone.model.state_dict()
    assert all(resnet.state_dict()[name].equal(weight) for name, weight in loaded.items())
    with pytest.raises(InputError, match=r"a timm model \(it takes torchvision/resnet50 and the like"):
        load_backbone_weights(model, str(tmp_path))
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"torchvision/nosuch: cannot be loaded .* a timm model"):
        load_backbone_weights(model, "torchvision/nosuch")
