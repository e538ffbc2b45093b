"""Report which kernels are used on this machine and why: `hf-dino kernels`."""

import json
from contextlib import suppress
from pathlib import Path

import torch

from ..kernels import default_builder, find_prebuilt, impossible, load, mode
from .compilers import KernelError, find_compiler


def report_kernels(build: bool) -> int:
    """Print which implementation each type of device uses.

    Args:
        build (`bool`): Compile and load kernels that are not compiled yet.

    Returns:
        `int`: 1 if a kernel is missing that is required or was to be compiled, otherwise 0.

    Raises:
        ValueError: If the environment variable `HF_DINO_KERNELS` has an unknown value.
    """
    mode()
    print_line("PyTorch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")
    print_line("HF_DINO_KERNELS", mode())
    print_line("sources", default_builder().sources)
    print_line("cache", default_builder().cache)
    usable = [report(device_type, build) for device_type in device_types()]
    return 1 if not all(usable) and (build or mode() == "require") else 0


def device_types() -> list[str]:
    """The CPU; and CUDA where there is a GPU, or where one can be compiled for, as when a container image is made."""
    if torch.cuda.is_available():
        return ["cpu", "cuda"]
    with suppress(KernelError):
        if not impossible("cuda") and find_compiler("cuda"):
            return ["cpu", "cuda"]
    return ["cpu"]


def report(device_type: str, build: bool) -> bool:
    """Print what is used on one type of device; return whether that is the kernel."""
    print(f"\n{device_type}")
    try:
        kernel = find(device_type, build)
    except KernelError as error:
        print_line("used", f"the definition in PyTorch: {error}")
        return False
    with suppress(KernelError):
        print_line("compiler", find_compiler(device_type))
    if kernel is None and mode() == "off":
        print_line("used", "the definition in PyTorch: HF_DINO_KERNELS=off")
        return True
    if kernel is None:
        print_line("used", "the kernel, once it is compiled: the first use does that, or --build")
        return True
    print_line("kernel", kernel)
    if (kernel / "build.json").is_file():  # kernel-builder does not write one
        print_line("compiled in", f"{json.loads((kernel / 'build.json').read_text())['seconds']} s")
    print_line("used", "the definition in PyTorch: HF_DINO_KERNELS=off" if mode() == "off" else "the kernel")
    return True


def find(device_type: str, build: bool) -> Path | None:
    """Return the folder of the kernel, or `None` if it is still to be compiled.

    Raises:
        KernelError: If it is not there and cannot be compiled, or cannot be loaded.
    """
    if reason := impossible(device_type):
        raise KernelError(reason)
    if not build:
        return find_prebuilt(device_type) or default_builder().find(device_type)
    kernel = find_prebuilt(device_type) or default_builder().entry(device_type)
    load(kernel)
    return kernel


def print_line(name: str, text: object) -> None:
    """Print one line of the report."""
    print(f"  {name:<16} {text}", flush=True)
