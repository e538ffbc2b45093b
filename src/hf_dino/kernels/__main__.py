"""Report which kernels are used on this machine and why: `python -m hf_dino.kernels [--build]`."""

import argparse
import shlex
import sys

import torch

from ..kernels import get_builder, get_mode, load, unsupported_reason
from .build import is_complete
from .compilers import KernelError, find_cpp_compiler, find_nvcc


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and report; return 1 if a kernel that is required or was to be built is missing."""
    parser = argparse.ArgumentParser(prog="python -m hf_dino.kernels", description=__doc__)
    parser.add_argument("--build", action="store_true", help="Compile what is not compiled yet, and load it.")
    build = parser.parse_args(arguments).build
    try:
        usable = report(build)
    except ValueError as error:
        parser.error(str(error))
    return 0 if usable or not (build or get_mode() == "require") else 1


def report(build: bool = False) -> bool:
    """Print which kernels are used on this machine and why.

    Args:
        build (`bool`): Whether to compile what is not compiled yet, and load it.

    Returns:
        `bool`: Whether the kernel can be used on every type of device.

    Raises:
        ValueError: If `HF_DINO_KERNELS` is not auto, off or require.
    """
    print_line("HF_DINO_KERNELS", get_mode())
    print_line("PyTorch", f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'no CUDA'}")
    print_line("sources", get_builder().sources)
    print_line("cache", get_builder().cache)
    usable = [report_device(device_type, build) for device_type in device_types()]
    return all(usable)


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


if __name__ == "__main__":
    sys.exit(main())
