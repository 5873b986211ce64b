"""Compiled code on disk, so that a second process start compiles nothing.

What PyTorch offers, measured on 2 CPU cores with four transformer blocks of 128 channels (PyTorch
2.13, first call of a new process, which makes 6 kernels):

* nothing kept: 15 to 21 s;
* ``torch.compiler.save_cache_artifacts`` and its counterpart: 12 s. On a CPU these hold Inductor's
  graphs but not the shared objects built from them, so every kernel is built again;
* Inductor's own folder, kept whole: 4 s. What is left is importing the compiler and tracing.

So the folder is kept whole, as one file for each set of facts. While something compiles, Inductor's
and Triton's folders point to a private folder of this process, filled from that file; `save` packs
it again. No process ever reads a file that another one is writing.

**Trust.** PyTorch's entries are pickles, generated Python and shared objects: loading them runs
code. The file around them is no pickle (a checksum, a line of JSON, the bytes), but a checksum says
only that it is whole, not who wrote it. Therefore an entry is read only if it belongs to this user
and nobody else may write to it, which makes it as trustworthy as the user's own Python packages;
anything else is ignored with a line in the log and built again.

**Traps.** CPU code is built with ``-march=native``, so the processor is part of the key. So is the
number of threads: CPU code is built for one, and Inductor's own key leaves it out in 2.11.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from .errors import CacheError, InputError, reason

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

SUFFIX = ".compiled"
_FORMAT = "compiled-code 1"
_NAME = re.compile(r"[\w@+=-][\w.@+=-]*(/[\w@+=-][\w.@+=-]*)*", re.ASCII)
_PREFIX, _OWNER = "compiled-code-", "owner.lock"
_BINARIES = (".so", ".cubin", ".hsaco", ".spv")

COMPILE_LOCK = threading.RLock()
"""Held while anything compiles or is packed: Inductor's folder is set for the whole process."""


class _BadEntryError(Exception):
    """An entry is not to be used; the message says why."""


@dataclass(frozen=True, slots=True)
class CacheEntry:
    """One file of a cache folder."""

    path: Path
    bytes: int
    modified: float
    """Seconds since 1970."""
    facts: Mapping[str, Any]
    """What the entry was compiled for; empty where it cannot be read."""
    files: int
    """Files packed in it."""
    problem: str | None
    """Why it would not be used, else None."""


# One file: "compiled-code 1 <sha256 of the rest>\n", one line of JSON, the packed bytes.


def pack(facts: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """The content of an entry."""
    names = sorted(files)
    header = {"facts": facts, "files": [[name, len(files[name])] for name in names]}
    lines = [json.dumps(header, sort_keys=True).encode() + b"\n", *(files[name] for name in names)]
    checksum = hashlib.sha256()
    for line in lines:
        checksum.update(line)
    return b"".join([f"{_FORMAT} {checksum.hexdigest()}\n".encode(), *lines])


def unpack(content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Facts and files of an entry.

    Raises:
        _BadEntryError: It is of another format, damaged, or names a file outside its folder.
    """
    first, newline, rest = content.partition(b"\n")
    if not newline or not first.startswith(_FORMAT.encode() + b" "):
        raise _BadEntryError("it is of another format")
    if first[len(_FORMAT) + 1 :].decode("ascii", "replace") != hashlib.sha256(rest).hexdigest():
        raise _BadEntryError("its checksum does not fit: it is damaged")
    try:
        line, _, packed = rest.partition(b"\n")
        header = json.loads(line)
        facts, sizes = dict(header["facts"]), [(str(name), int(n)) for name, n in header["files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise _BadEntryError("its header cannot be read") from error
    files, start = {}, 0
    for name, size in sizes:
        if not _NAME.fullmatch(name) or size < 0:
            raise _BadEntryError(f"it names the file {name!r}")
        files[name] = packed[start : start + size]
        start += size
    if start != len(packed):
        raise _BadEntryError("its files are not as long as it says")
    return facts, files


def read_entry(path: Path) -> bytes:
    """The bytes of an entry that only this user can have written.

    Raises:
        FileNotFoundError: There is none.
        OSError: It cannot be read.
        _BadEntryError: It is a link, or somebody else owns it or may write to it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0))
    except OSError as error:
        if path.is_symlink():
            raise _BadEntryError("it is a symbolic link") from error
        raise
    with os.fdopen(descriptor, "rb") as file:
        # Asked of the open file: what is at the path may be another one by now.
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _BadEntryError("it is not a file")
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            raise _BadEntryError("it belongs to another user")
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _BadEntryError("others may write to it")
        return file.read()


def write_entry(path: Path, content: bytes) -> None:
    """Put an entry in place in one step, for this user alone.

    Raises:
        OSError: The folder is read-only, full or no folder; what was at `path` is untouched.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=f"{SUFFIX}.tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def list_entries(folder: str | Path) -> list[CacheEntry]:
    """Entries of a cache folder, the newest first, checked in full; a missing folder has none.

    Raises:
        CacheError: The folder cannot be listed.
    """
    try:
        paths = sorted(Path(folder).glob(f"*{SUFFIX}"))
    except OSError as error:
        raise CacheError(f"cannot list the cache folder {folder}: {reason(error)}") from error
    entries = []
    for path in paths:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            entries.append(_inspect(path))
    return sorted(entries, key=lambda entry: entry.modified, reverse=True)


def _inspect(path: Path) -> CacheEntry:
    status = path.lstat()
    facts: dict[str, Any] = {}
    files: dict[str, bytes] = {}
    problem = None
    try:
        facts, files = unpack(read_entry(path))
    except FileNotFoundError:
        raise
    except (_BadEntryError, OSError) as error:
        problem = reason(error)
    return CacheEntry(path, status.st_size, status.st_mtime, facts, len(files), problem)


def clear(folder: str | Path) -> tuple[int, int]:
    """Remove all entries of a cache folder, and what interrupted writes left; nothing else.

    Returns:
        The number of entries removed and their bytes.

    Raises:
        CacheError: A file cannot be removed.
    """
    entries = removed_bytes = 0
    try:
        for path in sorted(Path(folder).glob(f".*{SUFFIX}.tmp")):
            path.unlink(missing_ok=True)
        for path in sorted(Path(folder).glob(f"*{SUFFIX}")):
            size = path.lstat().st_size
            path.unlink(missing_ok=True)
            entries, removed_bytes = entries + 1, removed_bytes + size
    except OSError as error:
        raise CacheError(f"cannot clear the cache folder {folder}: {reason(error)}") from error
    return entries, removed_bytes


def environment(device: str | torch.device) -> dict[str, Any]:
    """What compiled code depends on besides the caller's own facts.

    Raises:
        InputError: The device is a CUDA device and there is none.
    """
    import torch

    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"cannot keep code for {device}: this process has no CUDA device")
    facts: dict[str, Any] = {
        "torch": torch.__version__,
        "triton": _triton_version(),
        "python": sys.implementation.cache_tag,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "device": device.type,
    }
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
        facts["capability"] = list(torch.cuda.get_device_capability(device))
        facts["cuda"] = torch.version.cuda
    return facts


def _triton_version() -> str:
    for name in ("triton", "pytorch-triton", "triton-windows"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "none"


def _processor() -> str:
    """Model and instruction sets: code for one may end another's process."""
    lines: list[str] = []
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    chosen = sorted(
        {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    )
    digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()[:16]
    return f"{platform.machine()} {digest if chosen else platform.processor()}"


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What a cache did for this process."""

    path: Path
    loaded_files: int
    loaded_bytes: int
    new_files: int
    """Files that were made because the entry did not hold them."""
    new_binaries: tuple[str, ...]
    """Shared objects and GPU code among them: what a compiler built."""


class CompileCache:
    """The compiled code for one set of facts, read at the first compilation and packed by `save`.

    A folder that cannot be read or written costs a line in the log and the time to compile, nothing
    else. Use it as a context manager to save on leaving, or call `save` after warming up; code that
    is compiled later is added by the next `save`.

    Args:
        folder: Where entries are kept; made when the first one is written.
        facts: What the code is compiled for, as plain JSON values: shapes, dtypes, settings.
        version: The caller's version; another version's entries are never used.
        device: Device that the code runs on.

    Raises:
        InputError: `facts` holds something that JSON cannot write, or there is no such device.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        facts: Mapping[str, Any],
        version: str,
        device: str | torch.device,
    ) -> None:
        every = {"caller": dict(facts), "version": version, **environment(device)}
        try:
            text = json.dumps(every, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise InputError(f"cache facts must be plain JSON values: {reason(error)}") from error
        self.facts: dict[str, Any] = json.loads(text)
        self.path = Path(folder) / (hashlib.sha256(text.encode()).hexdigest()[:32] + SUFFIX)
        self._folder: Path | None = None
        self._loaded: dict[str, int] = {}
        self._opened = False
        self._warnings: set[str] = set()

    @property
    def is_warm(self) -> bool:
        """Whether code of an earlier process is in use."""
        return bool(self._loaded)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let everything that compiles in here use this cache, hand-written Triton kernels too.

        Compilation in other threads waits, or lands here as well if it asks nobody.
        """
        with COMPILE_LOCK:
            folder = self._open()
            if folder is None:
                yield
                return
            settings = {
                "TORCHINDUCTOR_CACHE_DIR": str(folder),
                "TRITON_CACHE_DIR": str(folder / "triton"),
            }
            before = {name: os.environ.get(name) for name in settings}
            os.environ.update(settings)
            try:
                yield
            finally:
                for name, value in before.items():
                    os.environ.pop(name, None)
                    if value is not None:
                        os.environ[name] = value

    def save(self) -> bool:
        """Pack what was compiled since, if anything; whether an entry was written."""
        with COMPILE_LOCK:
            if self._folder is None or not (files := self._new_files()):
                return False
            try:
                # Another process may have saved meanwhile: its files are worth keeping.
                present = {**self._stored(), **_contents(self._folder)}
                write_entry(self.path, pack(self.facts, present))
            except OSError as error:
                self._warn(f"compiled code cannot be kept in {self.path.parent}: {reason(error)}")
                return False
            self._loaded.update(files)
            return True

    def forget(self) -> None:
        """Stop using what was loaded: it proved unusable, and what is compiled now replaces it.

        Code of it that does run is left where it is.
        """
        with COMPILE_LOCK:
            if self._folder is not None:
                self._folder = Path(tempfile.mkdtemp(dir=self._folder.parent))
            self._loaded = {}

    def remember(self, name: str, value: Any) -> None:
        """Keep a plain JSON value beside the code that depends on it; `save` packs it.

        Args:
            name: Letters, digits and ``-``.
            value: Such as what was measured before the code was made.
        """
        with COMPILE_LOCK:
            folder = self._open()
            if folder is not None:
                try:
                    (folder / f"{name}.json").write_text(json.dumps(value))
                except OSError as error:
                    self._warn(f"{name} cannot be kept: {reason(error)}")

    def recall(self, name: str) -> Any:
        """What was kept under a name, here or by an earlier process; None if nothing was."""
        with COMPILE_LOCK:
            folder = self._open()
            try:
                return None if folder is None else json.loads((folder / f"{name}.json").read_text())
            except (OSError, ValueError):
                return None

    def report(self) -> CacheReport:
        with COMPILE_LOCK:
            new = self._new_files()
            return CacheReport(
                path=self.path,
                loaded_files=len(self._loaded),
                loaded_bytes=sum(self._loaded.values()),
                new_files=len(new),
                new_binaries=tuple(sorted(name for name in new if name.endswith(_BINARIES))),
            )

    def __enter__(self) -> CompileCache:
        return self

    def __exit__(self, *error: object) -> None:
        self.save()

    def _open(self) -> Path | None:
        """This process's private folder, filled from the entry the first time."""
        if self._opened:
            return self._folder
        self._opened = True
        try:
            self._folder = Path(tempfile.mkdtemp(dir=_private_folder()))
            files = self._stored()
            for name, content in files.items():
                target = self._folder / name
                target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                target.write_bytes(content)
            self._loaded = {name: len(content) for name, content in files.items()}
        except OSError as error:
            self._warn(f"compiled code cannot be unpacked: {reason(error)}; it is compiled again")
            self._start_anew()
        return self._folder

    def _start_anew(self) -> None:
        """Have an empty private folder, or none: half a file must not be taken for a whole one."""
        partial, self._folder, self._loaded = self._folder, None, {}
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder = Path(tempfile.mkdtemp(dir=_private_folder()))

    def _stored(self) -> dict[str, bytes]:
        """Files of the entry at `path`; none if it is missing or not to be used."""
        try:
            facts, files = unpack(read_entry(self.path))
            if facts != self.facts:
                raise _BadEntryError("it was compiled for something else")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (_BadEntryError, OSError) as error:
            self._warn(f"{self.path} is not used ({reason(error)}); the code is compiled again")
            return {}
        return files

    def _new_files(self) -> dict[str, int]:
        if self._folder is None:
            return {}
        return {
            name: path.stat().st_size
            for name, path in _packable(self._folder)
            if name not in self._loaded
        }

    def _warn(self, message: str) -> None:
        if message not in self._warnings:
            logger.warning("%s", message)
        self._warnings.add(message)


def _private_folder() -> Path:
    """A folder for this process alone, removed when it ends, or by a later one if it was killed."""
    _remove_abandoned()
    folder, owner = Path(tempfile.mkdtemp(prefix=_PREFIX)), os.getpid()
    lock = (folder / _OWNER).open("w")
    _locked(lock)

    def remove() -> None:
        if os.getpid() == owner:  # not in a forked child
            lock.close()
            shutil.rmtree(folder, ignore_errors=True)

    # Not sooner: Inductor remembers paths in it, and Triton reads kernels from it when first run.
    atexit.register(remove)
    return folder


def _remove_abandoned() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):
            # Old enough that its owner, if alive, has locked it.
            if time.time() - folder.lstat().st_mtime > 3600:
                with (folder / _OWNER).open("r+") as lock:
                    if _locked(lock):
                        shutil.rmtree(folder, ignore_errors=True)


def _locked(file: IO[str]) -> bool:
    """Whether the file is now locked by us; the lock goes with the process, however it ends."""
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _packable(folder: Path) -> Iterator[tuple[str, Path]]:
    """Files worth keeping: no locks, no half-written ones, none with odd names."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        odd = not _NAME.fullmatch(name) or name.startswith("locks/") or "tmp.pid_" in name
        if path.is_file() and not path.is_symlink() and not odd and not name.endswith(".lock"):
            yield name, path


def _contents(folder: Path) -> dict[str, bytes]:
    return {name: path.read_bytes() for name, path in _packable(folder)}
