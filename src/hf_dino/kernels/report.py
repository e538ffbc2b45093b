"""Report which kernels are used on this machine and why: `hf-dino kernels`."""

import shlex

import torch

from . import get_builder, get_mode, load, unsupported_reason
from .build import is_complete
from .compilers import KernelError, find_cpp_compiler, find_nvcc


def report_kernels(build: bool = False) -> int:
    """Print which kernels are used on this machine and why.

    Args:
        build (`bool`, *optional*, defaults to `False`): Compile what is not compiled yet, and load it.

    Returns:
        `int`: 1 if a kernel that is required or was to be compiled is missing, otherwise 0.

    Raises:
        ValueError: If `HF_DINO_KERNELS` is not auto, off or require.
    """
    print_line("HF_DINO_KERNELS", get_mode())
    print_line("PyTorch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")
    print_line("sources", get_builder().sources)
    print_line("cache", get_builder().cache)
    usable = [report_device(device_type, build) for device_type in device_types()]
    return 0 if all(usable) or not (build or get_mode() == "require") else 1


def device_types() -> list[str]:
    """Return the CPU, and CUDA where there is a GPU or one can be compiled for, as when a container image is made."""
    if not torch.cuda.is_available():
        try:
            find_nvcc()
        except KernelError:
            return ["cpu"]
    return ["cpu", "cuda"]


def report_device(device_type: str, build: bool) -> bool:
    """Print what is used on one type of device; return whether that can be the kernel."""
    print(f"\n{device_type}")
    builder = get_builder()
    try:
        if reason := unsupported_reason(device_type):
            raise KernelError(reason)
        entry = builder.get_or_build(device_type) if build else builder.entry(device_type)
        if build:
            load(entry)
        if not is_complete(entry):
            print_line("compiler", find_nvcc() if device_type == "cuda" else shlex.join(find_cpp_compiler()))
    except KernelError as error:
        print_line("used", f"the reference implementation in PyTorch: {error}")
        return False
    used = f"the kernel in {entry}" if is_complete(entry) else "the kernel, compiled at its first use or by --build"
    print_line("used", "the reference implementation in PyTorch: HF_DINO_KERNELS=off" if get_mode() == "off" else used)
    return True


def print_line(name: str, text: object) -> None:
    """Print one line of the report."""
    print(f"  {name:<16} {text}", flush=True)
