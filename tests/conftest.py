"""A detector small enough to build in every test, images and labels to go with it, and where to find references."""

import shutil
from pathlib import Path

import pytest
import torch

from hf_dino import DinoDetrConfig, DinoDetrForObjectDetection, kernels


SHARED = Path(__file__).parents[2] / "shared"
FIXTURES = Path(__file__).parent / "fixtures"


SLOWEST_FILES = ("test_parity", "test_examples", "test_finetuning", "test_distributed", "test_faults", "test_kernels")


def pytest_configure(config):
    torch.set_num_threads(1)  # tests run on several processes


def pytest_collection_modifyitems(items):
    """Begin with what takes longest, so that in the end no test process is left alone with it."""
    items.sort(key=lambda item: not item.path.stem.startswith(SLOWEST_FILES))


@pytest.fixture
def shared() -> Path:
    """The folder of official references and real images that lies beside the project in development."""
    if not SHARED.is_dir():
        pytest.skip("needs the folder ../shared with official references and images")
    return SHARED


@pytest.fixture
def datasets_cache(tmp_path, monkeypatch) -> None:
    """What `datasets` keeps goes into the test's own folder."""
    import datasets  # not at the top: the tests that need a GPU run without it

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


TINY_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage3", "stage4"],
}

TINY_SWIN = {
    "model_type": "swin",
    "embed_dim": 8,
    "depths": [1, 1, 1, 1],
    "num_heads": [1, 1, 2, 2],
    "window_size": 4,
    "out_features": ["stage3", "stage4"],
}


def tiny_config(**overrides) -> DinoDetrConfig:
    """Two encoder and three decoder layers, 12 queries, 5 classes; three levels, one of them the neck's own."""
    fields = {
        "backbone_config": dict(TINY_RESNET),
        "num_feature_levels": 3,
        "d_model": 32,
        "encoder_layers": 2,
        "encoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "encoder_n_points": 2,
        "decoder_layers": 3,
        "decoder_ffn_dim": 48,
        "decoder_attention_heads": 4,
        "decoder_n_points": 2,
        "num_queries": 12,
        "num_denoising": 6,
        "id2label": {label: f"class {label}" for label in range(5)},
    }
    return DinoDetrConfig(**fields | overrides)


def tiny_model(seed: int = 0, **overrides) -> DinoDetrForObjectDetection:
    """A fresh model in evaluation mode whose heads already say something, unlike those of a truly fresh one."""
    torch.manual_seed(seed)
    model = DinoDetrForObjectDetection(tiny_config(**overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def make_labels(*counts: int, num_labels: int = 5, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Labels of images with so many objects each, all well inside."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "class_labels": torch.randint(num_labels, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.3 + torch.tensor([0.35, 0.35, 0.1, 0.1]),
        }
        for count in counts
    ]


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def kernel():
    """The compiled operators; a build that fails is a failure wherever there is a compiler."""
    if kernels.get_mode() == "off":
        pytest.skip("HF_DINO_KERNELS=off")
    found = kernels.operators("cpu")
    if found is None and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        pytest.skip("needs a C++ compiler")
    assert found is not None
    return found


CPU_CAPABILITIES = ("avx512", "avx2", "default")


@pytest.fixture(params=CPU_CAPABILITIES)
def cpu_capability(request, monkeypatch, kernel):
    return _set_cpu_capability(kernel, request.param, monkeypatch)


@pytest.fixture(params=["reference", *CPU_CAPABILITIES])
def backend(request, monkeypatch):
    """All that computes deformable attention on a CPU, in turn."""
    if request.param == "reference":
        monkeypatch.setitem(kernels._found, "cpu", None)
        return request.param
    return _set_cpu_capability(request.getfixturevalue("kernel"), request.param, monkeypatch)


def _set_cpu_capability(kernel, name, monkeypatch):
    monkeypatch.setenv("HF_DINO_CPU_CAPABILITY", name)
    try:
        kernel.registration.ops.cpu_vector_bytes()
    except RuntimeError:
        pytest.skip(f"this CPU has no {name}")
    return name
