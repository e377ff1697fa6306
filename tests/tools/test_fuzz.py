"""Broken input: what once ended in a traceback, and two thousand inputs of fuzz.py."""

import math
import struct
import subprocess
import sys
import zlib

import pytest

from kaist.files import InputError
from tools import fuzz

NINES = b"9" * 400
ANNOTATIONS = b"""{"categories": [{"id": 1, "name": "person"}],
 "images": [{"id": 0, "im_name": "set06/V000/I00000"}],
 "annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "occlusion": 0,
                  "ignore": 0}]}"""
RESULT = b'[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'


def png(header):
    """A PNG of nothing but its header chunk."""
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


REGRESSIONS = [
    ("annotation-json", b"[" * 100_000),  # RecursionError
    ("annotation-json", ANNOTATIONS.replace(b"[1, 2", b"[" + b"9" * 5000 + b", 2")),  # ValueError
    ("annotation-json", ANNOTATIONS.replace(b"[1, 2", b"[" + NINES + b", 2")),  # OverflowError
    ("annotation-json", ANNOTATIONS.replace(b"[1, 2, 3, 4]", b'"1234"')),  # taken for a box
    ("annotation-json", ANNOTATIONS.replace(b'"set06/V000/I00000"', b"{}")),
    ("annotation-json", ANNOTATIONS.replace(b'"person"', b'["person"]')),
    ("result-json", b'[{"image_id": ' + b"[" * 100_000),
    ("result-json", RESULT.replace(b"0.5", b"9" * 5000)),
    ("result-json", RESULT.replace(b"0.5", NINES)),
    ("png", png(b"")),  # ValueError
    ("png", png(struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))),  # a bomb
    ("xml", b"<!DOCTYPE a [<!ENTITY a 'x'><!ENTITY b '&a;&a;'>]><annotation>&b;</annotation>"),
    ("xml", b'<?xml version="1.0" encoding="utf-16"?><annotation/>'.decode().encode("utf-16")),
    ("image-list", "set٠٦/V٠٠٠/I٠٠٠٠٠".encode()),  # digits, but not 0 to 9
    ("frame-list", b"set06/V000/I00000\x00"),
    ("checkpoint", b"PK\x03\x04"),
    ("train-flags", b"--lr\n1e400"),
    ("train-flags", b"--input-size\n" + b"9" * 5000 + b",300"),
    ("train-flags", b"--input-size\n" + NINES + b",300"),  # OverflowError
    ("eval-flags", b"--annotations\nx.json\n--detections\n" + b"A" * 5000),  # OSError
    ("eval-flags", b"--json\n" + b"A" * 5000 + b"/x.json"),
]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    return fuzz.make_readers(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize(("name", "data"), REGRESSIONS)
def test_what_once_ended_in_a_traceback_is_refused(readers, tmp_path, name, data):
    assert fuzz.feed(readers[name], [("x", data)], tmp_path) == ({"refused": 1}, [])


def test_what_is_valid_is_taken(readers, tmp_path):
    for name, data in (("annotation-json", ANNOTATIONS), ("result-json", RESULT)):
        assert fuzz.feed(readers[name], [("x", data)], tmp_path) == ({"taken": 1}, [])
    for name, reader in readers.items():
        assert fuzz.feed(reader, [(name, reader.seeds[0])], tmp_path) == ({"taken": 1}, []), name


def test_two_thousand_inputs(readers, tmp_path):
    assert math.isclose(sum(reader.share for reader in readers.values()), 1, abs_tol=0.01)
    for name, reader in readers.items():
        n = math.ceil(2000 * reader.share)
        inputs = ((f"{name}-{i}", fuzz.make_input(name, reader, i, 1)) for i in range(n))
        counts, failures = fuzz.feed(reader, inputs, tmp_path)
        assert not failures, failures[0]
        assert counts.total() == n and counts["refused"] > 0


def test_failures_are_told(tmp_path):
    def read(path):
        raise [KeyError("x"), InputError("x", "y")][path.read_bytes().count(b"a") % 2]

    inputs = [("a", b""), ("b", b"a"), ("c", b""), ("d", b"aaa")]
    counts, failures = fuzz.feed(fuzz.Reader(read, "x", 1, None, []), inputs, tmp_path)
    assert counts == {"refused": 2, "failed": 2}
    assert [failure[:2] for failure in failures] == [("a", b""), ("c", b"")]
    assert "KeyError: 'x'" in failures[0][2]


def test_an_input_that_hangs_ends_the_run_and_is_kept(tmp_path):
    script = """
import time, pathlib, sys
from tools import fuzz
spin = fuzz.Reader(lambda path: time.sleep(60), "x", 1, lambda *_: b"slow", [])
fuzz.LIMIT, fuzz.make_readers = 1.0, lambda folder: {"x": spin}
[(name, (counts, failures))] = fuzz.feed_all({"x": 1}, 0, 1, pathlib.Path())
print(name, counts["failed"], *failures[0][:2])
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[:2] == ["died", "1"] and done.stdout.endswith("b'slow'\n"), done.stderr
    assert "Timeout" in done.stderr and "time.sleep" not in done.stdout


def test_a_refused_file_that_the_check_calls_clean_is_a_failure(tmp_path):
    def read(path):
        raise InputError("no", "never")

    with pytest.raises(AssertionError, match="the data check finds nothing, but: no"):
        fuzz.checked(read, lambda path: [])(tmp_path)
    with pytest.raises(InputError):
        fuzz.checked(read, lambda path: ["fault"])(tmp_path)


def test_an_input_depends_on_its_number_and_seed_alone(readers):
    for name, reader in readers.items():
        once = [fuzz.make_input(name, reader, number, 5) for number in range(200)]
        again = [fuzz.make_input(name, reader, number, 5) for number in reversed(range(200))]
        assert once == again[::-1]
        assert fuzz.make_input(name, reader, 0, 6) != once[0] or name.endswith("flags")


def test_a_name_that_the_system_refuses_is_told_in_one_line(tmp_path):
    flags = ["--detections", fuzz.__file__, "--annotations", "A" * 5000]
    done = subprocess.run(
        [sys.executable, fuzz.eval_script.__file__, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: AAA") and done.stderr.endswith(": File name too long\n")


def test_the_script_counts_its_inputs(tmp_path, monkeypatch, capsys):
    flags = "--inputs 400 --workers 2 --reader bbgt --reader image-list --out failures".split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", *flags])
    with pytest.raises(SystemExit) as end:
        fuzz.main()
    said = capsys.readouterr().out
    assert end.value.code == 0 and "bbgt" in said and "xml" not in said
    assert said.splitlines()[-1].startswith("40") and "0 failures" in said
    assert not list(tmp_path.iterdir())
