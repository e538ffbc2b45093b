"""Report which kernels are used on this machine and why: `hf-dino kernels`."""

import shlex
from typing import Any

import torch

from . import get_builder, get_mode, load_or_build, unsupported_reason
from .build import is_complete
from .compilers import KernelError, find_cpp_compiler, find_nvcc
from .prebuilt import mismatch, prebuilt_entries


_REFERENCE = "the reference implementation in PyTorch"


def report_kernels(build: bool = False, facts: dict[str, Any] | None = None) -> int:
    """Print which kernels are used on this machine and why.

    Args:
        build (`bool`, *optional*, defaults to `False`): Compile what is not compiled yet, and load it.
        facts (`dict[str, Any]`, *optional*): Receives what is printed.

    Returns:
        `int`: 1 if a kernel that is required or was to be compiled is missing, otherwise 0.

    Raises:
        ValueError: If `HF_DINO_KERNELS` is not auto, off or require.
    """
    facts = {} if facts is None else facts
    mode, builder = get_mode(), get_builder()
    facts |= {"mode": mode, "torch": torch.__version__, "cuda": torch.version.cuda}
    facts |= {"sources": str(builder.sources), "cache": str(builder.cache), "devices": {}}
    print_line("HF_DINO_KERNELS", mode)
    print_line("PyTorch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")
    print_line("sources", builder.sources)
    print_line("cache", builder.cache)
    for device_type in device_types():
        facts["devices"][device_type] = report_device(device_type, build)
    usable = [device["is_usable"] for device in facts["devices"].values()]
    return 0 if all(usable) or not (build or mode == "require") else 1


def device_types() -> list[str]:
    """Return the CPU, and CUDA where there is a GPU or a kernel for one, as when a container image is made."""
    if not (torch.cuda.is_available() or (torch.version.cuda and prebuilt_entries("cuda"))):
        try:
            find_nvcc()
        except KernelError:
            return ["cpu"]
    return ["cpu", "cuda"]


def report_device(device_type: str, build: bool) -> dict[str, Any]:
    """Print what is used on one type of device, and return it."""
    print(f"\n{device_type}")
    builder = get_builder()
    facts: dict[str, Any] = {"is_usable": False, "is_compiled": False, "entry": None, "compiler": None, "used": ""}
    facts["prebuilt"] = {}  # why each is not used, or an empty string
    try:
        if reason := unsupported_reason(device_type):
            raise KernelError(reason)
        prebuilt = {entry: mismatch(entry, builder.sources) for entry in prebuilt_entries(device_type)}
        for entry, reason in prebuilt.items():
            facts["prebuilt"][str(entry)] = reason
            print_line("prebuilt", f"{entry}: {f'not used, {reason}' if reason else 'matches'}")
        entry = next((entry for entry, reason in prebuilt.items() if not reason), builder.entry(device_type))
        if build:
            entry, _ = load_or_build(device_type, builder)
        facts |= {"entry": str(entry), "is_compiled": is_complete(entry)}
        if not is_complete(entry):
            facts["compiler"] = str(find_nvcc()) if device_type == "cuda" else shlex.join(find_cpp_compiler())
            print_line("compiler", facts["compiler"])
        used = (
            f"the kernel in {entry}" if is_complete(entry) else "the kernel, compiled at its first use or by --build"
        )
        is_off = get_mode() == "off"
        facts |= {"is_usable": True, "used": f"{_REFERENCE}: HF_DINO_KERNELS=off" if is_off else used}
    except KernelError as error:
        facts["used"] = f"{_REFERENCE}: {error}"
    print_line("used", facts["used"])
    return facts


def print_line(name: str, text: object) -> None:
    """Print one line of the report."""
    print(f"  {name:<16} {text}", flush=True)
