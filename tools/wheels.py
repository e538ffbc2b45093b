"""Build wheels with the compiled kernel into dist/: `make wheels`, on Linux for x86-64.

    hf_dino-<version>-py3-none-manylinux_2_28_x86_64.whl          the package, with the kernel for CPUs
    hf_dino_cuda13-<version>-py3-none-manylinux_2_28_x86_64.whl   the kernel for CUDA alone, where nvcc is found

One build serves each Python, PyTorch from 2.10 on, whose stable ABI it uses, and Linux since glibc 2.28, which PyTorch
needs as well: like PyTorch it uses the libstdc++ of the system, so that exceptions pass between the two. Newer symbols
that the compilers of this machine bring in are in old_glibc.cpp or refused.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from hatchling.builders.wheel import WheelBuilder
from packaging.tags import platform_tags
from packaging.version import Version

from hf_dino.kernels import compilers
from hf_dino.kernels.build import Builder


if sys.version_info < (3, 11):
    raise SystemExit(
        f"make wheels needs Python 3.11 or later, not {sys.version.split()[0]}: PYTHON=/path/to/python3.11"
    )
import tomllib


ROOT = Path(__file__).parents[1]
PLATFORM = "manylinux_2_28_x86_64"
NEWEST = {"GLIBC": "2.28", "GLIBCXX": "3.4.24", "CXXABI": "1.3.11", "GCC": "7.0.0"}
"""Of the symbols that the platform has."""
UNVERSIONED = re.compile(r"(aoti_)?torch_|(__)?cuda|__gmon_start__|_ITM_")
"""Symbols of PyTorch's stable ABI and of the CUDA runtime, and those that may be missing."""
BUILD = tomllib.loads((ROOT / "kernels" / "build.toml").read_text(encoding="utf-8"))


class KernelWheel(WheelBuilder):
    """Build a wheel, of the project or of `config`, that also has an entry in the package `folder`."""

    def __init__(self, entry: Path, folder: str, config: dict[str, Any] | None = None):
        super().__init__(str(ROOT), config=config)
        self.included = {str(entry): f"{folder}/{entry.name}"}

    def get_default_build_data(self) -> dict[str, Any]:
        """Return what differs from wheels of Python alone."""
        data = super().get_default_build_data()
        return data | {"pure_python": False, "tag": f"py3-none-{PLATFORM}", "force_include": self.included}


def make_wheels(devices: list[str], output_dir: Path) -> None:
    """Build a wheel for each device.

    Raises:
        SystemExit: If this machine cannot run what is built.
        KernelError: If it cannot be compiled.
    """
    if PLATFORM not in platform_tags():
        raise SystemExit(f"wheels for {PLATFORM} cannot be built on {next(platform_tags())}")
    output_dir.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as name, TemporaryDirectory(dir=output_dir) as drafts:
        set_flags(Path(name))
        builder = Builder(ROOT / "kernels", Path(name, "cache"))
        for device in devices:
            wheel = WHEELS[device](make_entry(builder, device))
            draft = Path(next(wheel.build(directory=drafts)))
            print(draft.replace(output_dir / draft.name), flush=True)


def set_flags(work: Path) -> None:
    """Make the compilers of this machine write code for all machines, without the paths of this one."""
    compat = work / "old_glibc.o"
    command = [*compilers.find_cpp_compiler(), *compilers.CPP_FLAGS, "-c", str(ROOT / "tools/old_glibc.cpp")]
    subprocess.run([*command, "-o", str(compat)], check=True)
    compilers.LINK_FLAGS["linux"] += ["-s", str(compat)]
    names = [f"-ffile-prefix-map={folder}=." for folder in (ROOT, compilers.TORCH)]
    compilers.CPP_FLAGS += names
    compilers.CUDA_FLAGS.append(f"-Xcompiler={','.join(names)}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = " ".join(BUILD["kernel"]["deformable_attention_cuda"]["cuda-capabilities"])


def make_entry(builder: Builder, device: str) -> Path:
    """Compile an entry, check its libraries, and return a copy that says what it is for."""
    compiled = builder.get_or_build(device)
    for library in compiled.glob("*.so"):
        check_symbols(library)
    built_for = {"platform": PLATFORM, "torch": BUILD["torch"]["stable-abi"][device]}
    if device == "cuda":
        built_for |= {"cuda": cuda_major(), "architectures": os.environ["TORCH_CUDA_ARCH_LIST"]}
    entry = compiled.with_name("-".join([*compiled.name.split("-")[:2], PLATFORM]))
    shutil.copytree(compiled, entry, ignore=shutil.ignore_patterns("build.log"))
    metadata = json.loads((entry / "metadata.json").read_text())
    (entry / "metadata.json").write_text(json.dumps(metadata | {"built_for": built_for}, indent=2))
    return entry


def check_symbols(library: Path) -> None:
    """Check that a library needs nothing that the platform or PyTorch's stable ABI lacks.

    Raises:
        SystemExit: If it does.
    """
    printed = subprocess.run(["objdump", "-T", library], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\*UND\*\s+\w+ +\(?([\w.]+?)\)? +(\S+)$", printed, re.MULTILINE)
    if refused := sorted(f"{name} ({version})" for version, name in needed if not is_allowed(version, name)):
        raise SystemExit(f"{library.name} needs newer symbols than {PLATFORM} has: {', '.join(refused)}")
    print(f"{library.name}: {len(needed)} symbols, none newer than {PLATFORM}")


def is_allowed(version: str, name: str) -> bool:
    """Return whether the platform has a symbol of a version such as `GLIBC_2.14`, or `Base` where it has none."""
    library, _, number = version.partition("_")
    if library == "Base":
        return bool(UNVERSIONED.match(name))
    return library in NEWEST and number[:1].isdigit() and Version(number) <= Version(NEWEST[library])


def cuda_major() -> str:
    """Return the major version of CUDA that is compiled for."""
    return str(torch.version.cuda).partition(".")[0]


def cpu_wheel(entry: Path) -> KernelWheel:
    """Return the wheel of the project, with an entry for the CPU."""
    return KernelWheel(entry, "hf_dino/prebuilt")


def cuda_wheel(entry: Path) -> KernelWheel:
    """Return a wheel that has an entry for CUDA and nothing else."""
    project = WheelBuilder(str(ROOT)).metadata
    config = {
        "project": {
            "name": f"hf-dino-cuda{cuda_major()}",
            "version": project.version,
            "description": f"The compiled kernel of hf-dino for CUDA {cuda_major()}",
            "license": project.core.license_expression,
            "license-files": ["LICENSE"],
            "requires-python": project.core.requires_python,
            "dependencies": [f"hf-dino=={project.version}"],
        },
        "tool": {"hatch": {"build": {"targets": {"wheel": {"bypass-selection": True}}}}},
    }
    return KernelWheel(entry, f"hf_dino_cuda{cuda_major()}", config)


WHEELS = {"cpu": cpu_wheel, "cuda": cuda_wheel}


def devices_to_compile_for() -> list[str]:
    """Return the CPU, and CUDA where nvcc is found."""
    with suppress(compilers.KernelError):
        return ["cpu", "cuda"] if compilers.find_nvcc() else []
    return ["cpu"]


def main() -> None:
    """Build the wheels that the command line asks for."""
    parser = argparse.ArgumentParser(description="Build wheels with the compiled kernel.")
    parser.add_argument(
        "--device", action="append", choices=WHEELS, help="may be repeated; default: all that can be compiled for here"
    )
    parser.add_argument(
        "--output_dir", type=Path, default=ROOT / "dist", help="directory of the wheels; default: dist"
    )
    options = parser.parse_args()
    try:
        make_wheels(options.device or devices_to_compile_for(), options.output_dir)
    except (compilers.KernelError, OSError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
