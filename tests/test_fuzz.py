"""Broken input: regressions, and two thousand inputs of fuzz.py."""

import math
import struct
import subprocess
import sys
import time
import zlib

import pytest

from kaist.files import InputError
from tests import fuzz

NINES = b"9" * 400
ANNOTATIONS = b"""{"categories": [{"id": 1, "name": "person"}],
 "images": [{"id": 0, "im_name": "set06/V000/I00000"}],
 "annotations": [{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "occlusion": 0,
                  "ignore": 0}]}"""
RESULT = b'[{"image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]'


def png(header):
    """A PNG with a header chunk only."""
    chunk = b"IHDR" + header
    return (
        b"\x89PNG\r\n\x1a\n" + struct.pack(">I", len(header)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    )


REGRESSIONS = [
    ("annotation-json", b"[" * 100_000),  # RecursionError
    ("annotation-json", ANNOTATIONS.replace(b"[1, 2", b"[" + b"9" * 5000 + b", 2")),  # ValueError
    ("annotation-json", ANNOTATIONS.replace(b"[1, 2", b"[" + NINES + b", 2")),  # OverflowError
    ("annotation-json", ANNOTATIONS.replace(b"[1, 2, 3, 4]", b'"1234"')),  # accepted as a box
    ("annotation-json", ANNOTATIONS.replace(b'"set06/V000/I00000"', b"{}")),
    ("annotation-json", ANNOTATIONS.replace(b'"person"', b'["person"]')),
    ("result-json", b'[{"image_id": ' + b"[" * 100_000),
    ("result-json", RESULT.replace(b"0.5", b"9" * 5000)),
    ("result-json", RESULT.replace(b"0.5", NINES)),
    ("png", png(b"")),  # ValueError
    ("png", png(struct.pack(">IIBBBBB", 2**31 - 1, 2**31 - 1, 8, 2, 0, 0, 0))),  # decompression bomb
    ("xml", b"<!DOCTYPE a [<!ENTITY a 'x'><!ENTITY b '&a;&a;'>]><annotation>&b;</annotation>"),
    ("xml", b'<?xml version="1.0" encoding="utf-16"?><annotation/>'.decode().encode("utf-16")),
    ("image-list", "set٠٦/V٠٠٠/I٠٠٠٠٠".encode()),  # digits other than 0 to 9
    ("frame-list", b"set06/V000/I00000\x00"),
    ("checkpoint", b"PK\x03\x04"),
    ("train-flags", b"--lr\n1e400"),
    ("train-flags", b"--input-size\n" + b"9" * 5000 + b",300"),
    ("train-flags", b"--input-size\n" + NINES + b",300"),  # OverflowError
    ("eval-flags", b"--annotations\nx.json\n--detections\n" + b"A" * 5000),  # OSError
    ("eval-flags", b"--json\n" + b"A" * 5000 + b"/x.json"),
]


@pytest.fixture(scope="module")
def readers():
    return fuzz.make_readers()


@pytest.mark.parametrize(("name", "data"), REGRESSIONS)
def test_inputs_that_once_raised_other_errors_are_refused(readers, tmp_path, name, data):
    assert fuzz.feed(readers[name], data, tmp_path) == "refused"


def test_valid_input_is_accepted(readers, tmp_path):
    for name, data in (("annotation-json", ANNOTATIONS), ("result-json", RESULT)):
        assert fuzz.feed(readers[name], data, tmp_path) == "accepted"
    for name, reader in readers.items():
        assert fuzz.feed(reader, reader.seeds[0], tmp_path) == "accepted", name


def test_two_thousand_inputs(readers, tmp_path):
    total = sum(reader.weight for reader in readers.values())
    for name, reader in readers.items():
        results = set()
        for number in range(math.ceil(2000 * reader.weight / total)):
            results.add(fuzz.feed(reader, fuzz.make_input(name, reader, number, 1), tmp_path))
        assert "refused" in results and results <= {"refused", "accepted"}, results


@pytest.mark.timing
def test_an_error_and_a_hang_are_failures(tmp_path, monkeypatch):
    def fail(path):
        raise KeyError("x")

    monkeypatch.setattr(fuzz, "TIMEOUT", 0.1)
    readers = [fuzz.Reader(read, "x", 1, []) for read in (fail, lambda path: time.sleep(60))]
    failed, hung = (fuzz.feed(reader, b"a", tmp_path) for reader in readers)
    assert "KeyError: 'x'" in failed and "TimeoutError: not read after 0.1 s" in hung


def test_a_refused_file_without_a_fault_is_a_failure(tmp_path):
    def read(path):
        raise InputError("no", "never")

    with pytest.raises(AssertionError, match="the data check finds nothing, but: no"):
        fuzz.checked(read, lambda path: [])(tmp_path)
    with pytest.raises(InputError):
        fuzz.checked(read, lambda path: ["fault"])(tmp_path)


def test_an_input_depends_only_on_its_number_and_seed(readers):
    for name, reader in readers.items():
        once = [fuzz.make_input(name, reader, number, 5) for number in range(50)]
        again = [fuzz.make_input(name, reader, number, 5) for number in reversed(range(50))]
        assert once == again[::-1]
        assert fuzz.make_input(name, reader, 0, 6) != once[0] or name.endswith("flags")


def test_an_overlong_file_name_is_reported_in_one_line(tmp_path):
    flags = ["--detections", fuzz.__file__, "--annotations", "A" * 5000]
    done = subprocess.run(
        [sys.executable, fuzz.eval_script.__file__, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: AAA") and done.stderr.endswith(": File name too long\n")


def test_the_script_counts_its_inputs(tmp_path, monkeypatch, capsys):
    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["fuzz.py", "--inputs", "100", *flags])
        with pytest.raises(SystemExit) as end:
            fuzz.main()
        return end.value.code, capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    code, output = run("--reader", "bbgt", "--reader", "image-list")
    assert code == 0 and "bbgt" in output and "xml" not in output and output.endswith("\n0 failures\n")
    assert not list(tmp_path.iterdir())
    broken = fuzz.Reader(lambda path: path.read_bytes() / 1, "x", 1, [b"seed"])
    monkeypatch.setattr(fuzz, "make_readers", lambda: {"broken": broken})
    code, output = run("--out", "failures")
    assert code == 1 and output.endswith("100 failures, saved in failures\n")
    assert "TypeError" in (tmp_path / "failures/broken-7.trace").read_text()
    assert (tmp_path / "failures/broken-7").read_bytes() == fuzz.make_input("broken", broken, 7, 0)
