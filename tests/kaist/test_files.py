"""Files are written whole or not at all, and whatever cannot be read or written is named."""

import errno
import os
import stat
from pathlib import Path

import pytest

from kaist.files import InputError, write_atomically


def system_error(number, path):
    return OSError(number, os.strerror(number), str(path))


def test_two_writers_of_one_name_end_with_one_whole_file(tmp_path):
    """As two containers that share a folder: even the process ids may be the same."""
    path = tmp_path / "cache.u8"

    def write(temporary):
        with temporary.open("wb") as file:
            file.write(b"a" * 1000)
            write_atomically(path, lambda other: other.write_bytes(b"b" * 2000))
            assert path.read_bytes() == b"b" * 2000
            file.write(b"a" * 1000)

    write_atomically(path, write)
    assert path.read_bytes() == b"a" * 2000
    assert os.listdir(tmp_path) == ["cache.u8"]


def test_a_temporary_file_is_nobody_elses(tmp_path, monkeypatch):
    """Not even one that lies there under the name that was drawn."""
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    other = tmp_path / f".a.txt.{'0' * 16}.tmp"
    other.symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("kept")
    with pytest.raises(InputError, match="a.txt: cannot write it"):
        write_atomically(tmp_path / "a.txt", lambda temporary: temporary.write_text("b"))
    assert (tmp_path / "precious").read_text() == "kept" and not (tmp_path / "a.txt").exists()


def test_a_written_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_atomically(tmp_path / "a.txt", lambda temporary: temporary.write_text("a"))
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "a.txt")}
    assert len(modes) == 1


def test_a_read_only_disk_is_told_by_the_files_own_name(tmp_path, monkeypatch):
    path = tmp_path / "detections.txt"

    def refuse(temporary, **_):
        raise system_error(errno.EROFS, temporary)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError) as error:
        write_atomically(path, refuse)
    assert str(error.value).startswith(f"{path}: cannot write it (Read-only file system); ")
    assert ".tmp" not in str(error.value)


def test_a_full_disk_is_told_with_the_need(tmp_path):
    path = tmp_path / "frames.u8"
    path.write_text("old")

    def write(temporary):
        temporary.write_bytes(bytes(9_000_000))
        raise system_error(errno.ENOSPC, temporary)

    for size, need in ((18_350_000, "18.4 MB"), (0, "9.0 MB")):
        with pytest.raises(
            InputError, match=f"frames.u8: the disk is full: it needs {need} or more, "
        ) as error:
            write_atomically(path, write, size)
        assert ".tmp" not in str(error.value)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["frames.u8"]
