"""Compiled code on disk: never half written, never trusted when damaged or foreign, never fatal."""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from turbo.compile import CacheError, CompileCache, InputError, cache, clear, list_entries

from tests.conftest import REPOSITORY

FACTS = {"shape": [1, 16, 84, 108], "dtype": "bfloat16", "lora": None}
FILES = {"ab/kernel.so": b"\x7fELF" + bytes(40), "fxgraph/x/y": b"graph", "triton/K/k.cubin": b""}


def make(folder: Path, **changes: Any) -> CompileCache:
    settings: dict[str, Any] = {"facts": FACTS, "version": "1", "device": "cpu", **changes}
    return CompileCache(folder, **settings)


def compile_something(kept: CompileCache, files: dict[str, bytes]) -> dict[str, bytes]:
    """Write files where Inductor would; the files that were there before."""
    with kept.active():
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        found = {
            path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
    return found


def stored(folder: Path) -> Path:
    """The path of an entry that holds FILES."""
    kept = make(folder)
    compile_something(kept, FILES)
    assert kept.save()
    path: Path = kept.path
    return path


# Keeping.


def test_what_one_process_compiled_the_next_one_finds(tmp_path: Path):
    path = stored(tmp_path)
    kept = make(tmp_path)
    assert compile_something(kept, {}) == FILES
    report = kept.report()
    assert report.path == path
    assert report.loaded_files == 3
    assert report.loaded_bytes == sum(map(len, FILES.values()))
    assert report.new_files == 0
    assert report.new_binaries == ()
    assert not kept.save()


def test_nothing_is_read_or_written_before_something_compiles(tmp_path: Path):
    kept = make(tmp_path / "missing")
    assert not kept.save()
    assert not kept.is_warm
    assert not (tmp_path / "missing").exists()


def test_what_is_compiled_later_is_added(tmp_path: Path):
    stored(tmp_path)
    with make(tmp_path) as kept:
        compile_something(kept, {"zz/late.so": b"late"})
        assert kept.report().new_binaries == ("zz/late.so",)
    assert compile_something(make(tmp_path), {}) == {**FILES, "zz/late.so": b"late"}


def test_saving_keeps_what_another_process_saved_meanwhile(tmp_path: Path):
    one, two = make(tmp_path), make(tmp_path)
    compile_something(one, {"one": b"1", "both": b"b"})
    compile_something(two, {"two": b"2", "both": b"b"})
    assert one.save()
    assert two.save()
    expected = {"one": b"1", "two": b"2", "both": b"b"}
    assert compile_something(make(tmp_path), {}) == expected


def test_locks_links_and_half_written_files_are_left_out(tmp_path: Path):
    kept = make(tmp_path)
    temporary = {"locks/a.lock": b"", "ab/.7.8.tmp": b"half", "triton/tmp.pid_3_f/k.cubin": b"half"}
    compile_something(kept, {**FILES, **temporary})
    with kept.active():
        Path(os.environ["TORCHINDUCTOR_CACHE_DIR"], "link").symlink_to("/etc/passwd")
    assert kept.save()
    assert compile_something(make(tmp_path), {}) == FILES


def test_the_process_s_settings_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    with make(tmp_path).active():
        assert os.environ["TRITON_CACHE_DIR"].startswith(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] != "/mine"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert "TRITON_CACHE_DIR" not in os.environ


def test_forgotten_files_are_gone_and_compiled_again(tmp_path: Path):
    stored(tmp_path)
    kept = make(tmp_path)
    compile_something(kept, {})
    warm = [kept.is_warm]
    kept.forget()
    warm.append(kept.is_warm)
    assert warm == [True, False]
    assert compile_something(kept, {"ab/kernel.so": b"good"}) == {}
    assert kept.save()
    assert compile_something(make(tmp_path), {})["ab/kernel.so"] == b"good"


def test_a_killed_process_s_files_are_removed_by_a_later_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = "from turbo.compile import cache; cache._private_folder(); import os; os._exit(1)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    (abandoned,) = tmp_path.iterdir()
    in_use = cache._private_folder()
    assert abandoned.exists()  # it may be another process's that has just begun
    for folder in (abandoned, in_use):
        os.utime(folder, (1, 1))
    newest = cache._private_folder()
    assert {*tmp_path.iterdir()} == {in_use, newest}


# Keys.


@pytest.mark.parametrize(
    "change",
    [{"facts": {**FACTS, "dtype": "float32"}}, {"facts": {}}, {"version": "2"}],
)
def test_other_facts_have_an_entry_of_their_own(tmp_path: Path, change: dict[str, Any]):
    stored(tmp_path)
    other = make(tmp_path, **change)
    assert other.path != make(tmp_path).path
    assert compile_something(other, {}) == {}


@pytest.mark.parametrize("part", ["torch", "triton", "processor", "threads", "device"])
def test_another_environment_has_an_entry_of_its_own(
    tmp_path: Path, part: str, monkeypatch: pytest.MonkeyPatch
):
    before = make(tmp_path).path
    here = cache.environment("cpu")
    assert part in here
    monkeypatch.setattr(cache, "environment", lambda device: {**here, part: "other"})
    assert make(tmp_path).path != before


def test_the_order_of_facts_does_not_matter(tmp_path: Path):
    assert make(tmp_path, facts=dict(reversed(FACTS.items()))).path == make(tmp_path).path


@pytest.mark.parametrize("value", [object(), {1, 2}, float("nan"), b"bytes"])
def test_facts_must_be_plain_values(tmp_path: Path, value: object):
    with pytest.raises(InputError, match="cache facts must be plain JSON values"):
        make(tmp_path, facts={"value": value})


# Damage.


def refused(path: Path, caplog: pytest.LogCaptureFixture, why: str) -> None:
    """The entry is not used, says why in one line, and is replaced by the next save."""
    folder = path.parent
    (entry,) = list_entries(folder)
    assert entry.problem is not None
    assert why in entry.problem
    kept = make(folder)
    with caplog.at_level(logging.WARNING):
        assert compile_something(kept, {"new": b"new"}) == {}
        assert kept.save()
    (record,) = caplog.records
    assert why in record.message
    assert "\n" not in record.message
    assert compile_something(make(folder), {}) == {"new": b"new"}


DAMAGES = {
    "empty": (lambda content: b"", "another format"),
    "foreign": (lambda content: b"PK\x03\x04 a zip file\n" + content, "another format"),
    "older format": (lambda content: content.replace(b"code 1", b"code 0", 1), "another format"),
    "truncated": (lambda content: content[:-1], "checksum does not fit"),
    "longer": (lambda content: content + b"x", "checksum does not fit"),
    "one bit": (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "checksum does not fit"),
    "no checksum": (lambda content: b"compiled-code 1 \n{}", "checksum does not fit"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_compiled_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
):
    path = stored(tmp_path)
    change, why = DAMAGES[damage]
    path.write_bytes(change(path.read_bytes()))
    refused(path, caplog, why)


def sealed(body: bytes) -> bytes:
    """A body of somebody else's making under a checksum that fits."""
    from hashlib import sha256

    return b"compiled-code 1 " + sha256(body).hexdigest().encode() + b"\n" + body


FORGERIES = {
    "no header": (b"", "header"),
    "no JSON": (b"not json\n", "header"),
    "a list": (b"[1]\n", "header"),
    "no files": (b'{"facts": {}}\n', "header"),
    "odd sizes": (b'{"facts": {}, "files": [["a", "b"]]}\n', "header"),
    "upwards": (b'{"facts": {}, "files": [["../a", 1]]}\nx', "names the file '../a'"),
    "inner upwards": (b'{"facts": {}, "files": [["a/../../b", 1]]}\nx', "names the file"),
    "absolute": (b'{"facts": {}, "files": [["/etc/x", 1]]}\nx', "names the file '/etc/x'"),
    "negative": (b'{"facts": {}, "files": [["a", -1]]}\nx', "names the file 'a'"),
    "too short": (b'{"facts": {}, "files": [["a", 9]]}\nx', "not as long"),
    "too long": (b'{"facts": {}, "files": [["a", 1]]}\nxx', "not as long"),
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_an_impossible_entry_is_compiled_again(
    tmp_path: Path, forgery: str, caplog: pytest.LogCaptureFixture
):
    body, why = FORGERIES[forgery]
    path = stored(tmp_path)
    path.write_bytes(sealed(body))
    refused(path, caplog, why)


def test_an_entry_under_another_s_name_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = stored(tmp_path)
    other = make(tmp_path, version="2")
    path.rename(other.path)
    assert compile_something(other, {}) == {}
    assert "it was compiled for something else" in caplog.text


@given(position=st.integers(0, 10_000), byte=st.integers(1, 255), cut=st.booleans())
def test_no_damage_goes_unnoticed(position: int, byte: int, cut: bool):
    content = cache.pack(FACTS, FILES)
    assert cache.unpack(content) == (FACTS, FILES)
    position %= len(content)
    changed = bytes([content[position] ^ byte])
    damaged = content[:position] + (b"" if cut else changed + content[position + 1 :])
    with pytest.raises(cache._BadEntryError):
        cache.unpack(damaged)


# Trust.


def test_an_entry_that_others_may_write_to_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    path = stored(tmp_path)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o620)
    refused(path, caplog, "others may write to it")


def test_an_entry_of_another_user_is_not_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    path = stored(tmp_path)
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    assert compile_something(make(tmp_path), {}) == {}
    assert f"{path} is not used (it belongs to another user)" in caplog.text


def test_a_link_is_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    path = stored(tmp_path)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    refused(path, caplog, "it is a symbolic link")


def test_a_folder_in_an_entry_s_place_is_not_fatal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    kept = make(tmp_path)
    kept.path.mkdir()
    assert compile_something(kept, FILES) == {}
    assert not kept.save()
    assert list(tmp_path.iterdir()) == [kept.path]


# A disk that does not take it.


def test_a_folder_that_cannot_be_made_costs_one_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    (tmp_path / "file").write_text("not a folder")
    kept = make(tmp_path / "file" / "cache")
    for turn in range(2):
        compile_something(kept, {f"file{turn}": b"x"})
        assert not kept.save()
    assert len(caplog.records) == 1


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC, errno.EACCES])
def test_a_read_only_or_full_folder_costs_one_line(
    tmp_path: Path,
    number: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
):
    path = stored(tmp_path)
    before = path.read_bytes()

    def refuse(*paths: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", refuse)
    kept = make(tmp_path)
    for turn in range(2):
        assert set(compile_something(kept, {f"file{turn}": b"x"})) >= set(FILES)
        assert not kept.save()
    (record,) = caplog.records
    assert record.message.startswith(f"compiled code cannot be kept in {tmp_path}: ")
    assert os.strerror(number) in record.message
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_no_room_to_unpack_means_compiling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    stored(tmp_path)

    def refuse(*arguments: object, **settings: object) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/mine")
    kept = make(tmp_path)
    with kept.active():
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/mine"
    assert "cannot be unpacked: [Errno 28] No space left" in caplog.text
    assert not kept.is_warm


def test_half_an_unpacked_entry_is_not_packed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    stored(tmp_path)
    before = next(tmp_path.glob(f"*{cache.SUFFIX}")).read_bytes()
    write, seen = Path.write_bytes, []

    def half(path: Path, content: bytes) -> int:
        seen.append(path)
        write(path, content[: len(content) // 2])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    kept = make(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", half)
        with kept.active():
            pass
    assert "cannot be unpacked: [Errno 28] No space left" in caplog.text
    assert not kept.is_warm
    assert not seen[0].exists()
    assert not kept.save()
    assert next(tmp_path.glob(f"*{cache.SUFFIX}")).read_bytes() == before


def test_a_value_is_kept_beside_the_code(tmp_path: Path):
    kept = make(tmp_path)
    assert kept.recall("attention-1x64") is None
    kept.remember("attention-1x64", "sdpa")
    assert kept.recall("attention-1x64") == "sdpa"
    assert kept.save()
    assert make(tmp_path).recall("attention-1x64") == "sdpa"


# Two processes at once.

WRITER = """
import sys
import tempfile
from pathlib import Path
from turbo.compile import cache
path, name = Path(sys.argv[1]), sys.argv[2]
for turn in range(40):
    cache.write_entry(path, cache.pack({"turn": turn}, {name: name.encode() * 20_000}))
    facts, files = cache.unpack(cache.read_entry(path))
    assert [len(content) for content in files.values()] == [20_000], files.keys()
assert "torch" not in sys.modules
"""


def test_two_processes_may_write_at_once(tmp_path: Path):
    path = tmp_path / f"entry{cache.SUFFIX}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), name],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("a", "b")
    ]
    for writer in writers:
        _, errors = writer.communicate(timeout=60)
        assert writer.returncode == 0, errors
    assert list(tmp_path.iterdir()) == [path]


# For the command line.


def test_entries_are_listed_with_what_they_hold(tmp_path: Path):
    path = stored(tmp_path)
    damaged = tmp_path / f"damaged{cache.SUFFIX}"
    damaged.write_bytes(b"nonsense")
    os.utime(damaged, (1, 1))
    (tmp_path / "notes.txt").write_text("not ours")
    good, bad = list_entries(tmp_path)
    assert (good.path, good.files, good.problem) == (path, 3, None)
    assert good.bytes == path.stat().st_size
    assert good.facts["caller"] == FACTS
    assert good.facts["version"] == "1"
    assert (bad.path, bad.files, bad.modified) == (damaged, 0, 1.0)
    assert bad.problem == "it is of another format"


def test_clearing_removes_entries_and_nothing_else(tmp_path: Path):
    path = stored(tmp_path)
    size = path.stat().st_size
    (tmp_path / f".abc{cache.SUFFIX}.tmp").write_bytes(b"left by an interrupted write")
    (tmp_path / "notes.txt").write_text("not ours")
    assert clear(tmp_path) == (1, size)
    assert [left.name for left in tmp_path.iterdir()] == ["notes.txt"]
    assert clear(tmp_path) == (0, 0)


def test_a_missing_folder_is_an_empty_one(tmp_path: Path):
    assert list_entries(tmp_path / "missing") == []
    assert clear(tmp_path / "missing") == (0, 0)


def test_an_entry_that_cannot_be_removed_is_an_error(tmp_path: Path):
    (tmp_path / f"folder{cache.SUFFIX}").mkdir()
    with pytest.raises(CacheError, match="cannot clear the cache folder"):
        clear(tmp_path)
