"""Find and load the compiled operators, which come in a wheel or are compiled on first use.

Nothing happens at import. The first use on a type of device loads a prebuilt kernel that matches, or compiles one if
needed (less than a minute, once for these sources and this PyTorch), and remembers the outcome. Where that fails, one
warning says why and what to install, and the reference implementation in PyTorch is used. `HF_DINO_KERNELS` chooses:

    auto      use the compiled operators where possible (the default)
    off       always use the reference implementation
    require   raise a RuntimeError where `auto` would warn

`hf-dino kernels` reports what is used on this machine and why; with `--build` it compiles.
"""

import functools
import importlib.util
import logging
import os
import platform
import sys
import threading
from pathlib import Path
from types import ModuleType

import torch

from ..utils.io import cache_folder
from .build import Builder
from .compilers import NAMESPACE, KernelError
from .prebuilt import mismatch, prebuilt_entries


logger = logging.getLogger(__name__)

MODES = ("auto", "off", "require")

_found: dict[str, ModuleType | KernelError | None] = {}
_lock = threading.Lock()


def operators(device: str | torch.device) -> ModuleType | None:
    """Return the kernel's Python package, with operators for a device.

    Args:
        device (`str` or `torch.device`): Where the tensors are. The kernel is for `"cpu"` and `"cuda"`.

    Returns:
        The module `hf_dino_deformable_attention` of `kernels/torch-ext`, or `None` where the reference implementation
        is to be used. After the first call for a type of device, this is a look-up.

    Raises:
        ValueError: If `HF_DINO_KERNELS` is not auto, off or require.
        RuntimeError: If it is `require` and there are no operators for a CPU or a CUDA device.
    """
    device_type = torch.device(device).type
    _find_once(device_type)
    found = _found[device_type]
    if isinstance(found, KernelError):
        raise RuntimeError(f"HF_DINO_KERNELS=require, but there are no compiled operators: {found}") from found
    return found


@torch.compiler.assume_constant_result  # torch.compile runs it instead of tracing into it
def _find_once(device_type: str) -> None:
    if device_type not in _found:
        with _lock:
            if device_type not in _found:
                _found[device_type] = _find(device_type)


def _find(device_type: str) -> ModuleType | KernelError | None:
    mode = get_mode()
    if mode == "off" or device_type not in ("cpu", "cuda"):
        return None
    if reason := unsupported_reason(device_type):
        logger.info("Deformable attention runs in plain PyTorch: %s", reason)
        return KernelError(reason) if mode == "require" else None
    try:
        return load_or_build(device_type, get_builder())[1]
    except KernelError as error:
        if mode == "require":
            return error
        _warn_once(str(error))
        return None


@functools.cache  # the CPU and the GPU may share the reason
def _warn_once(reason: str) -> None:
    logger.warning(
        "Deformable attention runs in plain PyTorch, which is slower: %s\n"
        "(`hf-dino kernels` reports more; HF_DINO_KERNELS=off silences this.)",
        reason,
    )


def get_mode() -> str:
    """Read `HF_DINO_KERNELS`.

    Raises:
        ValueError: If it is not auto, off or require.
    """
    mode = os.environ.get("HF_DINO_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"HF_DINO_KERNELS must be {', '.join(MODES[:-1])} or {MODES[-1]}, not {mode!r}")
    return mode


def unsupported_reason(device_type: str) -> str:
    """Return why the kernel cannot be compiled here, whatever is installed, or an empty string if it can."""
    if sys.platform not in ("linux", "darwin"):
        return f"the kernel is for Linux and macOS, not for {platform.system()}"
    if device_type == "cuda" and torch.version.cuda is None:
        return f"PyTorch {torch.__version__} is built without CUDA"
    return ""


@functools.cache
def get_builder() -> Builder:
    """Return the builder of this process, for the sources of the wheel or of the checkout."""
    packaged = Path(__file__).parents[1] / "kernel_sources"
    sources = packaged if packaged.is_dir() else Path(__file__).parents[3] / "kernels"
    return Builder(sources, cache_folder("kernels"))


def load_or_build(device_type: str, builder: Builder) -> tuple[Path, ModuleType]:
    """Load a prebuilt kernel that matches, or else that of the cache, which is compiled if it is not there.

    Args:
        device_type (`str`): `"cpu"` or `"cuda"`.
        builder (`Builder`): Has the sources and the cache.

    Returns:
        The entry, and the kernel's Python package.

    Raises:
        KernelError: If there is no entry that can be loaded.
    """
    refused = []
    for entry in prebuilt_entries(device_type):
        if reason := mismatch(entry, builder.sources):
            refused.append(f"; the prebuilt kernel in {entry} is not used: {reason}")
            continue
        try:
            return entry, load(entry)
        except KernelError as error:
            logger.warning("%s; the kernel is compiled on this machine instead", error)
    try:
        entry = builder.get_or_build(device_type)
    except KernelError as error:
        raise KernelError("".join([str(error), *refused])) from error
    return entry, load(entry)


def load(entry: Path) -> ModuleType:
    """Import the kernel in an entry, or return it if it is imported, and load its libraries.

    The module gets the name that the `kernels` library gives it, so that each finds what the other has loaded:
    operators can be registered only once.

    Raises:
        KernelError: If it cannot be loaded.
    """
    try:
        module = sys.modules.get(NAMESPACE) or _import(entry / "__init__.py")
        _check_same_sources(module, entry)
        loaded = {Path(library).name for library in torch.ops.loaded_libraries}
        for library in sorted(entry.glob(f"{NAMESPACE}_*.so")):  # an entry for CUDA adds a library to one for the CPU
            if library.name not in loaded:
                torch.ops.load_library(library)
    except (OSError, ImportError, RuntimeError, ValueError, LookupError, AttributeError, SyntaxError) as error:
        reason = error.__cause__ or error  # PyTorch's own error does not have that of the system
        raise KernelError(f"the kernel in {entry} cannot be loaded: {reason}") from error
    return module


def _import(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(NAMESPACE, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[NAMESPACE] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[NAMESPACE])
    except BaseException:
        del sys.modules[NAMESPACE]
        raise
    return sys.modules[NAMESPACE]


def _check_same_sources(module: ModuleType, entry: Path) -> None:
    loaded_from = Path(str(module.__file__)).parent
    hash_of_sources = [path.name.split("-")[1:2] for path in (loaded_from, entry)]
    if hash_of_sources[0] != hash_of_sources[1]:
        raise ImportError(f"a kernel from other sources is loaded already, from {loaded_from}; restart Python")
