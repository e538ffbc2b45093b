"""What compiles C++ and CUDA on this machine, and with which flags.

`kernels/build.toml` gives the same sources and flags to Hugging Face's kernel-builder; a test compares the two.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch


NAMESPACE = "hf_dino_kernels"  # of the operators, `torch.ops.hf_dino_kernels`, and of the module around them

TORCH = Path(torch.__file__).parent
DEFINITIONS = [
    f"-DTORCH_EXTENSION_NAME={NAMESPACE}",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable ABI of PyTorch 2.10, the oldest that is supported
]
CPP_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden"]
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "--expt-relaxed-constexpr", "-DUSE_CUDA=1"]
LINK_FLAGS = {"linux": ["-shared"], "darwin": ["-shared", "-undefined", "dynamic_lookup"]}

# Each of these files holds one vector instruction set, and which one runs is decided at run time: no other file may
# be compiled for more than every processor has. On other architectures the two files are empty.
X86_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # where neither TORCH_CUDA_ARCH_LIST nor a GPU says more


class KernelError(RuntimeError):
    """Why there are no compiled operators, and what to do about it."""


@dataclass(frozen=True)
class CppCompiler:
    """A C++ compiler that takes the options of g++."""

    command: tuple[str, ...]  # more than one word where CXX has arguments, as in "ccache g++"
    version: str

    def __str__(self) -> str:
        return f"{shlex.join(self.command)}: {self.version}"

    def compile(self, source: Path, result: Path, include: Path) -> list[str]:
        """Return the command that compiles one file."""
        x86 = platform.machine() in ("x86_64", "AMD64")
        flags = [*CPP_FLAGS, *(X86_FLAGS.get(source.name, []) if x86 else []), *DEFINITIONS, *_includes(include)]
        return [*self.command, *flags, "-c", str(source), "-o", str(result)]

    def link(self, objects: list[Path], result: Path) -> list[str]:
        """Return the command that makes a library of what was compiled."""
        # without a run path: PyTorch, which loads the result, has loaded its own libraries by then
        libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
        return [*self.command, *LINK_FLAGS[sys.platform], "-o", str(result), *map(str, objects), *libraries]


@dataclass(frozen=True)
class CudaCompiler:
    """An nvcc, the GPUs to compile for, and the C++ compiler for what is around the kernels."""

    nvcc: str
    version: str  # "13.0"
    architectures: tuple[str, ...]  # "9.0", or "9.0+PTX" where later GPUs are to run it too
    host: CppCompiler

    def __str__(self) -> str:
        return f"{self.nvcc}: CUDA {self.version}, for {' '.join(self.architectures)}, with {self.host}"

    def compile(self, source: Path, result: Path, include: Path) -> list[str]:
        """Return the command that compiles one file."""
        named = len(self.host.command) == 1 and "CXX" in os.environ  # else nvcc chooses: it takes no launchers
        host = ["-ccbin", *self.host.command] if named else []
        flags = [*CUDA_FLAGS, *DEFINITIONS, *gencode_flags(self.architectures), *host, *_includes(include)]
        return [self.nvcc, *flags, "-c", str(source), "-o", str(result)]

    def link(self, objects: list[Path], result: Path) -> list[str]:
        """Return the command that makes a library of what was compiled."""
        return [*self.host.link(objects, result), "-ltorch_cuda", str(_cuda_runtime(self.nvcc))]


Compiler = CppCompiler | CudaCompiler


def find_compiler(device_type: str) -> Compiler:
    """Find what compiles for `"cpu"` or `"cuda"`.

    Raises:
        KernelError: If there is nothing, or nothing that suits this PyTorch and its GPUs.
    """
    return find_cuda_compiler() if device_type == "cuda" else find_cpp_compiler()


def find_cpp_compiler() -> CppCompiler:
    """Take `CXX`, or the first of g++, clang++ and c++ that is there.

    Raises:
        KernelError: If there is none.
    """
    named = shlex.split(os.environ.get("CXX", ""))
    for command in [named] if named else [["g++"], ["clang++"], ["c++"]]:
        if path := shutil.which(command[0]):
            version = _output(path, *command[1:], "--version").partition("\n")[0]
            return CppCompiler((path, *command[1:]), version)
    if named:
        raise KernelError(f"CXX={os.environ['CXX']} is not a program: let it name a C++ compiler, or unset it")
    raise KernelError(
        "there is no C++ compiler: install one (apt install g++, dnf install gcc-c++, conda install gxx, "
        "xcode-select --install), or name it in CXX"
    )


def find_cuda_compiler() -> CudaCompiler:
    """Take the nvcc of `CUDA_HOME` or `CUDA_PATH`, or of the PATH, or of the usual places.

    Raises:
        KernelError: If there is none, or none that suits this PyTorch and its GPUs.
    """
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(Path(home, "bin", "nvcc") for home in homes if home), shutil.which("nvcc")]
    for candidate in [*candidates, "/usr/local/cuda/bin/nvcc", *TORCH.parent.glob("nvidia/*/bin/nvcc")]:
        if candidate and os.access(candidate, os.X_OK):
            return _cuda_compiler(str(candidate))
    raise KernelError(f"there is no nvcc: {_toolkit_advice()}")


def _cuda_compiler(nvcc: str) -> CudaCompiler:
    printed = _output(nvcc, "--version")
    release = re.search(r"release (\d+\.\d+)", printed)
    if release is None:
        raise KernelError(f"{nvcc} --version does not say which it is, but: {printed or 'nothing'}")
    if _major(release[1]) != _major(str(torch.version.cuda)):
        raise KernelError(
            f"{nvcc} is of CUDA {release[1]}, but PyTorch {torch.__version__} of CUDA {torch.version.cuda}: "
            f"{_toolkit_advice()}"
        )
    known = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch"))
    architectures = choose_architectures(requested_architectures(), [".".join(name) for name in known])
    return CudaCompiler(nvcc, release[1], architectures, find_cpp_compiler())


def _toolkit_advice() -> str:
    return f"install the CUDA {_major(str(torch.version.cuda))} toolkit and let CUDA_HOME name its folder"


def requested_architectures() -> str:
    """Say for which GPUs to compile: `TORCH_CUDA_ARCH_LIST`, or the visible GPUs and later ones, or a default.

    Returns:
        `str`: As PyTorch writes it, such as `"8.0;9.0+PTX"`.
    """
    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return requested
    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURES
    visible = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(visible)) + "+PTX"


def choose_architectures(requested: str, known: list[str]) -> tuple[str, ...]:
    """Leave out what nvcc does not know; where that is a newer GPU, it runs the PTX of the newest that is left.

    Args:
        requested (`str`): As `TORCH_CUDA_ARCH_LIST` has it, `"8.0;9.0+PTX"` or `"8.0 9.0a"`.
        known (`list[str]`): What nvcc knows, such as `"9.0"`.

    Raises:
        KernelError: If the request cannot be read, or holds only GPUs that are older than all that nvcc knows.

    Example:

    ```python
    >>> choose_architectures("8.0;12.0", ["7.5", "8.0", "9.0"])
    ('8.0+PTX',)
    >>> choose_architectures("12.0", ["7.5", "8.0", "9.0"])
    ('9.0+PTX',)

    ```
    """
    names = requested.replace(";", " ").split()
    wrong = [name for name in names if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name)]
    if wrong or not names:
        raise KernelError(f"TORCH_CUDA_ARCH_LIST={requested!r} cannot be read: let it hold numbers, as in 8.0;9.0+PTX")
    newest = max(map(_number, names))
    kept = [name for name in names if _number(name) in map(_number, known)]
    kept = kept or [name for name in known if _number(name) < newest][-1:]
    if not kept:
        raise KernelError(f"nvcc compiles for {', '.join(known)}, no longer for {requested}: take an older toolkit")
    kept.sort(key=_number)
    if _number(kept[-1]) < newest:
        kept[-1] = kept[-1].removesuffix("+PTX") + "+PTX"
    return tuple(kept)


def gencode_flags(architectures: tuple[str, ...]) -> list[str]:
    """Turn architectures into flags of nvcc.

    Example:

    ```python
    >>> gencode_flags(("8.0", "9.0+PTX"))
    ['-gencode=arch=compute_80,code=sm_80', '-gencode=arch=compute_90,code=[sm_90,compute_90]']

    ```
    """
    flags = []
    for architecture in architectures:
        name = architecture.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{name},compute_{name}]" if architecture.endswith("+PTX") else f"sm_{name}"
        flags.append(f"-gencode=arch=compute_{name},code={code}")
    return flags


def _number(architecture: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", architecture)
    return int(major), int(minor)


def _major(version: str) -> str:
    return version.partition(".")[0]


def _includes(include: Path) -> list[str]:
    return [f"-I{include}", "-isystem", str(TORCH / "include")]


def _cuda_runtime(nvcc: str) -> Path:
    """Find the runtime library of the toolkit that nvcc belongs to, or else the one that PyTorch brings.

    Only nvcc knows its toolkit for certain: what the PATH finds may be a link, or a script that calls another. A
    toolkit may have the static library alone, with which nvcc links programs; PyTorch's is of the same major version.
    """
    top = re.search(r"TOP=(.+)", _output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull))
    home = Path(top[1] if top else Path(nvcc).parents[1]).resolve()
    folders = [home / name for name in ("lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib")]
    for folder in [*folders, *sorted(TORCH.parent.glob("nvidia/*/lib"))]:
        for library in sorted(folder.glob("libcudart.so*")):
            return library
    raise KernelError(f"the CUDA toolkit in {home} has no libcudart.so: install its part cuda-cudart-dev")


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{shlex.join(command)} does not run: {error}") from error
    return (done.stdout + done.stderr).strip()
