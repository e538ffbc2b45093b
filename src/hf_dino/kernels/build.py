"""Compile the kernel into a private cache, once for all processes.

An entry of the cache is laid out as kernel-builder lays out a build variant; the `kernels` library loads it as well:

    cpu-<what it is made from>-<what compiled it>/
    ├── __init__.py, …              the Python side, copied from kernels/torch-ext
    ├── _ops.py                     loads the libraries beside it
    ├── hf_dino_kernels_cpu.so      an entry for CUDA has both: the schema is in this one
    ├── hf_dino_kernels_cuda.so
    ├── metadata.json               for the `kernels` library; has a digest of every other file
    └── build.json, build.log       how it was made

An entry is made in a temporary folder and moved to its place as the last step: it is whole, or it is not there.
"""

import base64
import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ..utils.io import write_json
from .compilers import (
    CPP_FLAGS,
    CUDA_FLAGS,
    DEFINITIONS,
    NAMESPACE,
    X86_FLAGS,
    Compiler,
    CudaCompiler,
    KernelError,
    find_compiler,
    requested_architectures,
)


logger = logging.getLogger(__name__)

NAME = "hf-dino-deformable-attention"  # as in kernels/build.toml, and so is the version
VERSION = 1
PACKAGE = Path("torch-ext", NAME.replace("-", "_"))
SOURCES = {"cpu": ("torch-ext/torch_binding.cpp", "csrc/cpu/*.cpp"), "cuda": ("csrc/cuda/*.cu",)}
TIME_LIMIT = 600  # seconds for one build
SHOWN_LINES = 15  # of what a compiler prints before it fails

OPS_PY = f'''"""The operators of the libraries beside this file, which hf_dino.kernels compiled."""

from pathlib import Path

import torch


for library in sorted(Path(__file__).parent.glob("{NAMESPACE}_*.so")):  # cpu before cuda: the schema comes first
    torch.ops.load_library(library)

ops = torch.ops.{NAMESPACE}


def add_op_namespace_prefix(name: str) -> str:
    return f"{NAMESPACE}::{{name}}"
'''


class Builder:
    """Finds what is compiled, or compiles it.

    Args:
        sources (`Path`): The folder that holds csrc and torch-ext.
        cache (`Path`): Where entries are kept; made if it does not exist, for its owner only.
        time_limit (`float`): Seconds for one build, and for waiting for another process that builds.
    """

    def __init__(self, sources: Path, cache: Path, time_limit: float = TIME_LIMIT):
        self.sources = sources
        self.cache = cache
        self.time_limit = time_limit
        self._failures: dict[str, KernelError] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def find(self, device_type: str) -> Path | None:
        """Return the entry for `"cpu"` or `"cuda"`, or `None` if it is still to be compiled.

        Raises:
            KernelError: If it is not there, and there is no compiler either.
        """
        try:
            entry = self.cache / self._name(device_type, find_compiler(device_type))
        except KernelError:
            if entry_of_other := self._compiled_elsewhere(device_type):
                return entry_of_other
            raise
        return entry if is_whole(entry) else None

    def entry(self, device_type: str) -> Path:
        """Return the entry for `"cpu"` or `"cuda"`, compiled if need be. A failure is remembered, not repeated.

        Raises:
            KernelError: If it is not there and cannot be compiled.
        """
        if error := self._failures.get(device_type):
            raise error
        try:
            return self.find(device_type) or self._make(device_type, find_compiler(device_type))
        except KernelError as error:
            self._failures[device_type] = error
            raise

    def _inputs(self, device_type: str) -> dict[str, str]:
        flags = [*CPP_FLAGS, X86_FLAGS, *DEFINITIONS, *(CUDA_FLAGS if device_type == "cuda" else [])]
        return {
            "sources": digest_of(self.sources),
            "torch": torch.__version__,
            "platform": f"{platform.system()} {platform.machine()}",
            "flags": str(flags),
            "architectures": requested_architectures() if device_type == "cuda" else "",
        }

    def _name(self, device_type: str, compiler: Compiler) -> str:
        return f"{device_type}-{short_hash(self._inputs(device_type))}-{short_hash(compiler)}"

    def _compiled_elsewhere(self, device_type: str) -> Path | None:
        """Find an entry by a compiler that is not here, as in a container image that is made in two stages."""
        entries = self.cache.glob(f"{device_type}-{short_hash(self._inputs(device_type))}-????????")
        return next(filter(is_whole, sorted(entries)), None)

    def _make(self, device_type: str, compiler: Compiler) -> Path:
        others = [self.entry("cpu")] if device_type == "cuda" else []
        try:
            return self._make_in(self.cache, device_type, compiler, others)
        except OSError as error:
            return self._make_in_private(error, device_type, compiler, others)

    def _make_in(self, cache: Path, device_type: str, compiler: Compiler, others: list[Path]) -> Path:
        entry = cache / self._name(device_type, compiler)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with locked(entry.with_suffix(".lock"), self.time_limit):
            if not is_whole(entry):  # else another process was faster
                self._build(entry, device_type, compiler, others)
        return entry

    def _make_in_private(self, reason: OSError, device_type: str, compiler: Compiler, others: list[Path]) -> Path:
        """Compile for this process only."""
        try:
            folder = self._temporary or tempfile.TemporaryDirectory(prefix="hf_dino-", ignore_cleanup_errors=True)
            entry = self._make_in(Path(folder.name), device_type, compiler, others)
        except OSError as error:
            raise KernelError(
                f"no folder can be written, not {self.cache} ({reason}) and no other ({error})"
            ) from error
        if self._temporary is None:
            logger.warning(
                "The operators of hf_dino were compiled for this process only, since %s cannot be written (%s). Let "
                "XDG_CACHE_HOME name a folder that can, and they are compiled once.",
                self.cache,
                str(reason),
            )
        self._temporary = folder
        return entry

    def _build(self, entry: Path, device_type: str, compiler: Compiler, others: list[Path]) -> None:
        start = time.monotonic()
        for leftover in entry.parent.glob(f"{entry.name}.*.tmp"):  # of builds that were killed: the lock is ours
            shutil.rmtree(leftover, ignore_errors=True)
        with tempfile.TemporaryDirectory(
            prefix=f"{entry.name}.", suffix=".tmp", dir=entry.parent, ignore_cleanup_errors=True
        ) as work:
            draft = Path(work, "entry")
            shutil.copytree(self.sources / PACKAGE, draft, ignore=shutil.ignore_patterns("__pycache__"))
            for library in (path for other in others for path in other.glob("*.so")):
                shutil.copy(library, draft)
            log = self._compile(device_type, compiler, draft, Path(work), start + self.time_limit)
            (draft / "build.log").write_text(log)
            (draft / "_ops.py").write_text(OPS_PY)
            made_from = {**self._inputs(device_type), "compiler": str(compiler)}
            write_json(draft / "build.json", {**made_from, "seconds": round(time.monotonic() - start, 1)})
            write_json(draft / "metadata.json", metadata(draft, device_type, compiler))
            shutil.rmtree(entry, ignore_errors=True)  # a damaged one
            os.replace(draft, entry)

    def _compile(self, device_type: str, compiler: Compiler, draft: Path, work: Path, deadline: float) -> str:
        sources = [path for pattern in SOURCES[device_type] for path in sorted(self.sources.glob(pattern))]
        # Of a function that several files instantiate the linker keeps the first: let it be one that always runs.
        sources.sort(key=lambda source: source.name in X86_FLAGS)
        objects = [work / f"{source.name}.o" for source in sources]
        compile_all = [compiler.compile(*pair, self.sources / "csrc") for pair in zip(sources, objects)]
        link = compiler.link(objects, draft / f"{NAMESPACE}_{device_type}.so")
        return run_all(compile_all, work, deadline) + run_all([link], work, deadline)


def run_all(commands: list[list[str]], work: Path, deadline: float) -> str:
    """Run commands side by side and return them with what they printed.

    No command outlives the call: when one fails, when time is up or when the user interrupts, the others are ended.

    Args:
        commands (`list[list[str]]`): Each a program with its arguments.
        work (`Path`): A folder for what they print.
        deadline (`float`): By the clock of `time.monotonic`.

    Raises:
        KernelError: If one fails, or if they take too long.
    """
    jobs = os.environ.get("MAX_JOBS", "")
    limit = max(1, int(jobs)) if jobs.isdecimal() else min(4, os.cpu_count() or 1)
    outputs = [work / f"{index}.log" for index in range(len(commands))]
    waiting, running = list(range(len(commands))), dict[int, subprocess.Popen[bytes]]()
    try:
        while waiting or running:
            while waiting and len(running) < limit:
                index = waiting.pop(0)
                running[index] = start_process(commands[index], outputs[index])
            time.sleep(0.01)
            for index in [index for index, process in running.items() if process.poll() is not None]:
                if running.pop(index).returncode != 0:
                    raise KernelError(failure(commands[index], outputs[index]))
            if time.monotonic() > deadline:
                raise KernelError("compiling takes too long: MAX_JOBS sets how many compilers run side by side")
    finally:
        for process in running.values():
            end_process(process)
    return "".join(f"{shlex.join(command)}\n{printed(output)}" for command, output in zip(commands, outputs))


def start_process(command: list[str], output: Path) -> "subprocess.Popen[bytes]":
    """Start a command in a session of its own, so that it can be ended with the processes that it starts."""
    with output.open("wb") as file:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def end_process(process: "subprocess.Popen[bytes]") -> None:
    """End a command and the processes that it started."""
    with suppress(ProcessLookupError, PermissionError):  # it has just ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failure(command: list[str], output: Path) -> str:
    """Say what failed, with the last lines that it printed."""
    lines = printed(output).splitlines()[-SHOWN_LINES:]
    return "\n    ".join(["this command failed:", shlex.join(command), *(lines or ["(it printed nothing)"])])


def printed(output: Path) -> str:
    """Read what a command printed; compilers quote sources in any encoding."""
    return output.read_text(errors="replace")


@contextmanager
def locked(path: Path, time_limit: float) -> Iterator[None]:
    """Hold a lock that one process can hold at a time; the system releases it when that process ends, or is killed.

    Raises:
        KernelError: If another process holds it for longer than `time_limit` seconds.
    """
    import fcntl  # not on Windows, where nothing is compiled

    deadline = time.monotonic() + time_limit
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise KernelError(f"another process has held {path} for {time_limit:.0f} s: end it") from None
                time.sleep(0.05)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a process was forked meanwhile


def metadata(entry: Path, device_type: str, compiler: Compiler) -> dict[str, object]:
    """Describe an entry in the words of the `kernels` library."""
    architectures = {"archs": list(compiler.architectures)} if isinstance(compiler, CudaCompiler) else {}
    return {
        "name": NAME,
        "id": NAMESPACE,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": device_type, **architectures},
        "digest": {"algorithm": "sha256", "files": digests(entry)},
    }


def digests(entry: Path) -> dict[str, str]:
    """Hash every file but metadata.json, as the `kernels` library does."""
    files = [path for path in sorted(entry.rglob("*")) if path.is_file() and path.parent.name != "__pycache__"]
    return {
        path.relative_to(entry).as_posix(): base64.b64encode(hashlib.sha256(path.read_bytes()).digest()).decode()
        for path in files
        if path.name != "metadata.json"
    }


def is_whole(entry: Path) -> bool:
    """Tell whether an entry is there, with no file missing or damaged: a library cut short would end the process."""
    try:
        recorded = json.loads((entry / "metadata.json").read_text())["digest"]["files"]
        return bool(recorded == digests(entry))
    except (OSError, ValueError, LookupError, TypeError):
        return False


def digest_of(sources: Path) -> str:
    """Hash all that is compiled, included or copied, with its names.

    Raises:
        KernelError: If it is not there.
    """
    files = [path for folder in ("csrc", "torch-ext") for path in sorted((sources / folder).rglob("*"))]
    files = [path for path in files if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py")]
    if not files:
        raise KernelError(f"the sources of the kernel are not in {sources}: install hf-dino anew")
    names_and_contents = [(path.relative_to(sources).as_posix(), path.read_bytes()) for path in files]
    return short_hash([*names_and_contents, OPS_PY])


def short_hash(content: object) -> str:
    """Eight letters, enough to tell the entries of one cache apart."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:8]
