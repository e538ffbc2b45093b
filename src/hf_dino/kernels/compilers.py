"""Find the compilers of this machine and make their command lines.

`kernels/build.toml` gives the same sources and flags to Hugging Face's kernel-builder; a test compares the two.
`torch.utils.cpp_extension` is not used: it has one set of flags for all C++ files, where each vector instruction set
needs its own, and it needs ninja and setuptools.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
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

# Each of these files is for one vector instruction set, and which one runs is decided at run time: no other file may
# be compiled for more than every CPU has. On other architectures the two files are empty.
X86_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"  # where there is neither TORCH_CUDA_ARCH_LIST nor a GPU


class KernelError(RuntimeError):
    """Raised if there are no compiled operators. The message says why, and what to do about it."""


def find_cpp_compiler() -> list[str]:
    """Return the command of the C++ compiler: `CXX`, or the first of g++, clang++ and c++ on the PATH.

    Raises:
        KernelError: If there is none.
    """
    requested = shlex.split(os.environ.get("CXX", ""))  # may have arguments, as in "ccache g++"
    for command in [requested] if requested else [["g++"], ["clang++"], ["c++"]]:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    if requested:
        raise KernelError(f"CXX={os.environ['CXX']} is not a program: set it to a C++ compiler, or unset it")
    raise KernelError(
        "C++ compiler not found: install one (apt install g++, dnf install gcc-c++, conda install gxx, "
        "xcode-select --install), or set CXX to its path"
    )


def find_nvcc() -> str:
    """Return the nvcc of `CUDA_HOME` or `CUDA_PATH`, of the PATH, or of the default install locations.

    Raises:
        KernelError: If there is none, or it is of another major version than this PyTorch.
    """
    wanted = str(torch.version.cuda).partition(".")[0]
    advice = f"install the CUDA {wanted} toolkit and set CUDA_HOME to its directory"
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [*(Path(home, "bin", "nvcc") for home in homes if home), shutil.which("nvcc")]
    for nvcc in [*candidates, "/usr/local/cuda/bin/nvcc", *TORCH.parent.glob("nvidia/*/bin/nvcc")]:
        if nvcc and os.access(nvcc, os.X_OK):
            break
    else:
        raise KernelError(f"nvcc not found: {advice}")
    printed = _output(str(nvcc), "--version")
    release = re.search(r"release ((\d+)\.\d+)", printed)
    if release is None:
        raise KernelError(f"{nvcc} --version does not print a release, but: {printed or 'nothing'}")
    if release[2] != wanted:
        raise KernelError(f"{nvcc} is of CUDA {release[1]}, but PyTorch of CUDA {torch.version.cuda}: {advice}")
    return str(nvcc)


def compile_command(source: Path, result: Path, include: Path) -> list[str]:
    """Return the command that compiles one .cpp or .cu file.

    Raises:
        KernelError: If there is no compiler, or none that suits this PyTorch and its GPUs.
    """
    common = [*DEFINITIONS, f"-I{include}", "-isystem", str(TORCH / "include"), "-c", str(source), "-o", str(result)]
    host = find_cpp_compiler()
    if source.suffix == ".cu":
        nvcc = find_nvcc()
        known = re.findall(r"compute_(\d+)(\d)\b", _output(nvcc, "--list-gpu-arch"))
        architectures = choose_architectures(requested_architectures(), [".".join(name) for name in known])
        named = len(host) == 1 and "CXX" in os.environ  # else nvcc chooses: it does not take launchers
        return [nvcc, *CUDA_FLAGS, *gencode_flags(architectures), *(["-ccbin", *host] if named else []), *common]
    x86 = platform.machine() in ("x86_64", "AMD64")
    return [*host, *CPP_FLAGS, *(X86_FLAGS.get(source.name, []) if x86 else []), *common]


def link_command(objects: list[Path], library: Path, device_type: str) -> list[str]:
    """Return the command that links compiled files to a library for `"cpu"` or `"cuda"`.

    Raises:
        KernelError: If there is no compiler.
    """
    # Without a run path, and without the CUDA runtime: PyTorch has loaded its own by the time it loads the library.
    libraries = ["-ltorch_cpu", "-lc10", *(["-ltorch_cuda"] if device_type == "cuda" else [])]
    linked = [*map(str, objects), f"-L{TORCH / 'lib'}", *libraries]
    return [*find_cpp_compiler(), *LINK_FLAGS[sys.platform], "-o", str(library), *linked]


def requested_architectures() -> str:
    """Return the GPUs to compile for: `TORCH_CUDA_ARCH_LIST`, or the visible GPUs and later ones, or a default.

    Returns:
        `str`: As PyTorch writes it, such as `"8.0;9.0+PTX"`.
    """
    if requested := os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return requested
    if not torch.cuda.is_available():
        return DEFAULT_ARCHITECTURES
    visible = {torch.cuda.get_device_capability(device) for device in range(torch.cuda.device_count())}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(visible)) + "+PTX"


def read_architectures(requested: str) -> list[str]:
    """Split a list of architectures at semicolons and spaces.

    Raises:
        KernelError: If it cannot be read.
    """
    names = requested.replace(";", " ").split()
    if not names or not all(re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", name) for name in names):
        raise KernelError(f"TORCH_CUDA_ARCH_LIST={requested!r} is not a list of architectures such as 8.0;9.0+PTX")
    return names


def runs_on(architecture: str, compiled: list[str]) -> bool:
    """Return whether code that was compiled for some architectures runs on another one.

    Binary code runs on later GPUs of the same major version, and PTX on all later GPUs.
    """
    wanted = _number(architecture)
    older = [name for name in compiled if _number(name) <= wanted]
    return any(name.endswith("+PTX") or _number(name)[0] == wanted[0] for name in older)


def choose_architectures(requested: str, known: list[str]) -> list[str]:
    """Leave out what nvcc does not know. A newer GPU runs the PTX of the newest architecture that is left.

    Args:
        requested (`str`): As `TORCH_CUDA_ARCH_LIST` has it, `"8.0;9.0+PTX"` or `"8.0 9.0a"`.
        known (`list[str]`): The architectures that nvcc knows, in order, such as `"9.0"`.

    Raises:
        KernelError: If the request cannot be read, or has only GPUs that are older than all that nvcc knows.
    """
    names = read_architectures(requested)
    newest = max(map(_number, names))
    kept = [name for name in names if _number(name) in map(_number, known)]
    kept = kept or [name for name in known if _number(name) < newest][-1:]
    if not kept:
        raise KernelError(f"nvcc compiles for {', '.join(known)}, no longer for {requested}: install an older toolkit")
    kept.sort(key=_number)
    if _number(kept[-1]) < newest:
        kept[-1] = kept[-1].removesuffix("+PTX") + "+PTX"
    return kept


def gencode_flags(architectures: list[str]) -> list[str]:
    """Return the flags with which nvcc compiles for some architectures, such as `"8.0"` or `"9.0+PTX"`."""
    flags = []
    for architecture in architectures:
        number = architecture.removesuffix("+PTX").replace(".", "")
        code = f"[sm_{number},compute_{number}]" if architecture.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
    return flags


def _number(architecture: str) -> tuple[int, int]:
    major, minor = re.findall(r"\d+", architecture)
    return int(major), int(minor)


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelError(f"{shlex.join(command)} does not run: {error}") from error
    return (done.stdout + done.stderr).strip()
