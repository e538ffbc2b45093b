"""Fixtures of all tests: references, images, and every implementation of the operator in turn."""

import shutil
from pathlib import Path

import pytest
import torch

from helpers.models import CPU_CAPABILITIES
from helpers.paths import SHARED
from hf_dino import kernels


SLOWEST_FILES = (
    "test_parity",
    "test_examples",
    "test_finetuning",
    "test_distributed",
    "test_faults",
    "test_operator",
    "test_gpu_run",
)


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
