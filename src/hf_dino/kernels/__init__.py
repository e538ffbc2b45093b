"""Find the compiled operators: a prebuilt kernel, one that was compiled before, or one compiled now.

Nothing happens at import. The first use on a device looks, compiles if it must (less than a minute, once for this
PyTorch, compiler and sources) and remembers the outcome. Where it fails, one warning says why and what to install, and
the definition in plain PyTorch serves. `HF_DINO_KERNELS` says how much that matters:

    auto      use what can be had (the default)
    off       never look: the definition serves
    require   stop with a RuntimeError where `auto` would warn

`python -m hf_dino.kernels` tells what would be used on this machine and why; with `--build` it compiles.
"""

import functools
import importlib.util
import json
import logging
import os
import platform
import re
import sys
import threading
from pathlib import Path
from types import ModuleType

import torch

from .build import Builder
from .compilers import NAMESPACE, KernelError


logger = logging.getLogger(__name__)

MODES = ("auto", "off", "require")

_found: dict[str, ModuleType | KernelError | None] = {}
_warned: set[str] = set()
_lock = threading.Lock()


def operators(device: str | torch.device) -> ModuleType | None:
    """Return the Python side of the kernel, with operators for a device.

    Args:
        device (`str` or `torch.device`): Where the tensors are. The kernel is for `"cpu"` and `"cuda"`.

    Returns:
        The module `hf_dino_deformable_attention` of `kernels/torch-ext`, or `None` where the definition serves. After
        the first call for a type of device, this is a look-up.

    Raises:
        ValueError: If `HF_DINO_KERNELS` is none of auto, off and require.
        RuntimeError: If it is `require` and there are no operators for a CPU or a CUDA device.
    """
    device_type = torch.device(device).type
    _look_once(device_type)
    found = _found[device_type]
    if isinstance(found, KernelError):
        raise RuntimeError(f"HF_DINO_KERNELS=require, but there are no compiled operators: {found}") from found
    return found


@torch.compiler.assume_constant_result  # torch.compile runs it, and does not trace into it
def _look_once(device_type: str) -> None:
    if device_type not in _found:
        with _lock:
            if device_type not in _found:
                _found[device_type] = _find(device_type)


def mode() -> str:
    """Read `HF_DINO_KERNELS`.

    Raises:
        ValueError: If it is none of auto, off and require.
    """
    value = os.environ.get("HF_DINO_KERNELS", "auto")
    if value not in MODES:
        raise ValueError(f"HF_DINO_KERNELS must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {value!r}")
    return value


def _find(device_type: str) -> ModuleType | KernelError | None:
    how = mode()
    if how == "off" or device_type not in ("cpu", "cuda"):
        return None
    if reason := impossible(device_type):
        logger.info("Deformable attention runs in plain PyTorch: %s", reason)
        return KernelError(reason) if how == "require" else None
    try:
        return load(find_prebuilt(device_type) or default_builder().entry(device_type))
    except KernelError as error:
        if how == "require":
            return error
        _warn(error)
        return None


def _warn(error: KernelError) -> None:
    """Say once why the definition serves; CPU and GPU may share the reason."""
    if str(error) not in _warned:
        _warned.add(str(error))
        logger.warning(
            "Deformable attention runs in plain PyTorch, which is slower: %s\n"
            "(`python -m hf_dino.kernels` tells more; HF_DINO_KERNELS=off silences this.)",
            error,
        )


def impossible(device_type: str) -> str:
    """Say why nobody could compile the kernel here, whatever is installed; empty if that is not so."""
    if sys.platform not in ("linux", "darwin"):
        return f"the kernel is for Linux and macOS, not for {platform.system()}"
    if device_type == "cuda" and torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return ""


@functools.cache
def default_builder() -> Builder:
    """Make the builder of this process: sources of the wheel or of the checkout, cache in the user's cache folder."""
    packaged = Path(__file__).parents[1] / "kernel_sources"
    sources = packaged if packaged.is_dir() else Path(__file__).parents[3] / "kernels"
    try:
        home = Path.home()
    except RuntimeError:  # a user without a home, as in some containers: nothing can be kept
        home = Path(os.devnull)
    caches = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Builder(sources, Path(caches, "hf_dino", "kernels"))


def find_prebuilt(device_type: str) -> Path | None:
    """Find what kernel-builder made in the folder `build` beside the sources, for this machine and this PyTorch.

    Args:
        device_type (`str`): `"cpu"` or `"cuda"`.

    Returns:
        The folder of the newest variant that fits, such as `torch-stable-abi210-cu130-x86_64-linux`, or `None`.
    """
    machine = platform.machine().replace("arm64", "aarch64")  # as kernel-builder calls it on macOS
    variant = re.compile(rf"torch-stable-abi(\d)(\d+)-(cpu|cu(\d+)(\d))-{machine}-{platform.system().lower()}")
    fitting = []
    for path in default_builder().sources.glob("build/torch-stable-abi*"):
        match = variant.fullmatch(path.name)
        if match and _fits(match, device_type):
            fitting.append((int(match[2]), int(match[5] or 0), path))
    return max(fitting)[2] if fitting else None


def _fits(variant: re.Match[str], device_type: str) -> bool:
    abi, backend = (int(variant[1]), int(variant[2])), variant[3]
    if abi > _version(torch.__version__):
        return False
    if device_type == "cpu" or backend == "cpu":
        return device_type == backend
    major, minor = _version(str(torch.version.cuda))
    return int(variant[4]) == major and int(variant[5]) <= minor


def _version(text: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", text)[:2]
    return int(major), int(minor)


def load(folder: Path) -> ModuleType:
    """Import the kernel in a folder, or return it if it is imported, and load its libraries.

    The module gets the name that the `kernels` library gives it, so that either finds what the other has loaded:
    operators can be registered only once.

    Raises:
        KernelError: If it cannot be loaded.
    """
    try:
        name = json.loads((folder / "metadata.json").read_text())["id"]
        if name not in sys.modules:
            _import(name, folder / "__init__.py")
        _check_same_sources(sys.modules[name], folder)
        loaded = {Path(library).name for library in torch.ops.loaded_libraries}
        for library in sorted(folder.glob(f"{NAMESPACE}_*.so")):  # an entry for CUDA adds to one for the CPU
            if library.name not in loaded:
                torch.ops.load_library(library)
    except (OSError, ImportError, RuntimeError, ValueError, LookupError) as error:
        raise KernelError(f"the kernel in {folder} cannot be loaded: {error}") from error
    return sys.modules[name]


def _import(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[name])
    except BaseException:
        del sys.modules[name]
        raise


def _check_same_sources(module: ModuleType, folder: Path) -> None:
    loaded_from = Path(str(module.__file__)).parent
    if _sources(loaded_from) != _sources(folder):
        raise ImportError(f"one from other sources is loaded already, from {loaded_from}; restart Python")


def _sources(folder: Path) -> str | None:
    record = folder / "build.json"
    return json.loads(record.read_text())["sources"] if record.is_file() else None  # kernel-builder's has no record
