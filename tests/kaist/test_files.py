"""Files are written completely or not at all, and errors name the file."""

import errno
import itertools
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kaist.annotations import open_annotations, read_image_list
from kaist.files import InputError, OneLineParser, read_text, write_atomically
from kaist.results import read_detections


def system_error(number, path):
    return OSError(number, os.strerror(number), str(path))


def test_two_writers_of_one_path_leave_one_complete_file(tmp_path):
    """For example, two containers that share a folder; their process ids may be equal."""
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


def test_a_temporary_file_never_replaces_another_file(tmp_path, monkeypatch):
    """Not even one with the random name of the temporary file."""
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


def test_a_read_only_disk_is_reported_with_the_final_file_name(tmp_path, monkeypatch):
    path = tmp_path / "detections.txt"

    def refuse(temporary, **_):
        raise system_error(errno.EROFS, temporary)

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(InputError) as error:
        write_atomically(path, refuse)
    assert str(error.value).startswith(f"{path}: cannot write it (Read-only file system); ")
    assert ".tmp" not in str(error.value)


def test_a_full_disk_is_reported_with_the_required_space(tmp_path):
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


def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    pipe = tmp_path / "I00019.txt"
    os.mkfifo(pipe)
    for path, kind in (
        (pipe, "a pipe or a device"),
        (Path("/dev/zero"), "a pipe or a device"),
        (tmp_path, "a folder"),
    ):
        with pytest.raises(InputError, match=f"{path}: it is {kind}, not a file"):
            read_text(path)
    for read in (read_image_list, lambda path: read_detections(path, []), open_annotations):
        with pytest.raises(InputError, match="I00019.txt: "):
            read(pipe)
    folder = tmp_path / "annotations/set06/V001"
    folder.mkdir(parents=True)
    os.rename(pipe, folder / pipe.name)
    with pytest.raises(InputError, match="I00019.txt: it is a pipe"):
        open_annotations(tmp_path).read("set06/V001/I00019")


# ------------------------------------------------------------------------------ scripts

PROJECT = Path(__file__).parents[2]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
PRINTING = (["print('x\\n' * 100_000)"], ["print('x')"], ["print('x')", "sys.exit()"])


@pytest.fixture
def run(tmp_path):
    """A function that runs lines of code as the main() of a script."""

    def run(code, stdout=subprocess.PIPE, **environment):
        body = "\n".join(f"    {line}" for line in code)
        imports = "import sys\nfrom pathlib import Path\nfrom kaist.files import *\n"
        script = tmp_path / "script.py"
        script.write_text(f"{imports}def main():\n{body}\nrun_script(main)\n", encoding="utf-8")
        own = {"PYTHONPATH": str(PROJECT), "PYTHONUNBUFFERED": ""}
        return subprocess.run(
            [sys.executable, script],
            env={**os.environ, **own, **environment},
            stdout=stdout,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )

    return run


@pytest.mark.parametrize("code", [["print('é 日 \\udce9')"], ["print('é 日 \\udce9')", "sys.exit()"]])
def test_characters_that_a_terminal_lacks_are_escaped(run, code):
    done = run(code, **ASCII)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9 \\u65e5 \\udce9\n", "")
    assert run(code, PYTHONIOENCODING="utf-8").stdout == "é 日 \\udce9\n"
    done = run(["raise InputError('日 cannot be read', 'rename it', file='\\udce9.txt')"], **ASCII)
    assert (done.returncode, done.stderr) == (2, "error: \\udce9.txt: \\u65e5 cannot be read; rename it\n")


def test_text_is_written_as_utf_8_in_every_locale(run, tmp_path):
    path = tmp_path / "a.csv"
    done = run([f"write_text(Path({str(path)!r}), 'caf\\udce9,日\\n')"], **ASCII)
    assert done.returncode == 0, done.stderr
    assert path.read_bytes() == "caf\\udce9,日\n".encode()


@pytest.mark.timing
def test_a_closed_pipe_ends_a_script_silently(run):
    reader, writer = os.pipe()
    os.close(reader)
    for code, unbuffered in itertools.product(PRINTING, ("", "1")):
        done = run(code, writer, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (141, ""), code
    done = run(["print('x', flush=False)", "raise InputError('it is wrong', 'mend it')"], writer)
    assert (done.returncode, done.stderr) == (2, "error: it is wrong; mend it\n")
    os.close(writer)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_a_full_output_is_reported_in_one_line(run):
    for code, unbuffered in itertools.product(PRINTING, ("", "1")):
        with Path("/dev/full").open("w") as full:
            done = run(code, full, PYTHONUNBUFFERED=unbuffered)
        assert (done.returncode, done.stderr) == (2, "error: standard output: No space left on device\n")


def test_an_os_error_without_a_file_keeps_its_traceback(run):
    done = run(["raise OSError('a bug')"])
    assert done.returncode == 1 and "OSError: a bug" in done.stderr
    done = run(["open('/nowhere/at all')"])
    assert (done.returncode, done.stderr) == (2, "error: /nowhere/at all: No such file or directory\n")


@pytest.mark.parametrize("folder, expected", [("tests", "python -m tests.soak"), ("mine", "soak.py")])
def test_help_names_the_command_that_starts_a_script(folder, expected, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"/somewhere/{folder}/soak.py"])
    assert OneLineParser().prog == expected
