"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import pytest

from turbo.errors import BadInputError, SaveError
from turbo.whole_file import require_writable_folder, write_whole

CONTENT = bytes(range(256)) * 16


def test_a_file_is_written_or_replaced(tmp_path: Path):
    for content in (b"", CONTENT):
        write_whole(tmp_path / "a", content)
        assert (tmp_path / "a").read_bytes() == content
    assert os.listdir(tmp_path) == ["a"]


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError) as caught:
        write_whole(tmp_path / "a", CONTENT)
    assert str(caught.value) == (
        f"cannot save {str(tmp_path / 'a')!r}: No space left on device; "
        "nothing was written under that name"
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no file size limits")
def test_a_write_that_ends_half_way_leaves_the_old_file(tmp_path: Path):
    import resource

    (tmp_path / "a").write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(SaveError, match="File too large"):
            write_whole(tmp_path / "a", CONTENT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_ctrl_c_while_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def interrupt(*names: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "a", CONTENT)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_sync_is_good_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "fsync", refuse)
    write_whole(tmp_path / "a", CONTENT)
    assert (tmp_path / "a").read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["missing/a", ".", "a\0b", "x" * 300])
def test_a_name_that_cannot_be_is_one_clear_line(tmp_path: Path, name: str):
    with pytest.raises(SaveError, match="cannot save"):
        write_whole(tmp_path / name, CONTENT)
    assert os.listdir(tmp_path) == []


def test_a_name_that_is_taken_can_be_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "a"
    write_whole(path, CONTENT, overwrite=False)
    with pytest.raises(FileExistsError):
        write_whole(path, b"new", overwrite=False)

    def no_links(*names: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    with pytest.raises(FileExistsError):
        write_whole(path, b"new", overwrite=False)
    write_whole(tmp_path / "b", b"new", overwrite=False)
    assert path.read_bytes() == CONTENT
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]


@pytest.mark.skipif(sys.platform == "win32", reason="links and modes are POSIX's")
def test_links_are_followed_and_the_umask_holds(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "folder" / "a")
    before = os.umask(0o027)
    try:
        write_whole(tmp_path / "link", CONTENT)
    finally:
        os.umask(before)
    assert (tmp_path / "link").is_symlink()
    assert stat.S_IMODE((tmp_path / "folder" / "a").stat().st_mode) == 0o640


def test_a_folder_is_tried_out_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    require_writable_folder(tmp_path)
    assert os.listdir(tmp_path) == []
    for name in ("missing", "x" * 300, "a\0b"):
        with pytest.raises(BadInputError, match="does not exist; make it first"):
            require_writable_folder(tmp_path / name)

    def refuse(self: Path, exist_ok: bool = True) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(SaveError, match="Read-only file system"):
        require_writable_folder(tmp_path)
