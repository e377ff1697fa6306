"""The GPU report, made on the CPU: quick parts run, and one that fails does not stop the others.

The parts run in this process; `test_benchmark` tests those that run in their own.
"""

import json
import pickle
import time

import pytest
import torch

from tools import gpu_report, timing
from tools.gpu_report import relative_error, unequal_boxes
from tools.timing import TINY_SETTING, Setting, build, call
from tools.workloads import row_config

CPU = torch.device("cpu")


# The others start train.py or take steps of 512x640 pixels, which takes minutes on a CPU.
QUICK = ("captured", "losses", "detections", "training", "network", "evaluation")


class InProcess:
    """A function that is made and called in this process, in place of `Subprocess`."""

    def __init__(self, make, *arguments):
        self.arguments = pickle.dumps((make, *arguments))  # as for another process

    def __call__(self, seconds):
        return call(self.arguments)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        build.cache_clear()


def small_config(row, **changes):
    """A row's configuration, with a small input for row 42."""
    return row_config(row, **changes | ({"input_size": (128, 128)} if row == "42" else {}))


@pytest.fixture(scope="module")
def report(demo_root, tmp_path_factory):
    """The folder of a tiny report of quick parts. One of its rows does not exist."""
    out = tmp_path_factory.mktemp("report") / "out"
    tiny = TINY_SETTING | {"loss_rows": "29 42 none", "test_frames": 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_report, "PARTS", {name: gpu_report.PARTS[name] for name in QUICK})
        patch.setattr(gpu_report, "Subprocess", InProcess)
        patch.setattr(gpu_report, "row_config", small_config)
        patch.setattr(timing, "MIN_TURNS", 1)
        setting = Setting(CPU, torch.float32, out.parent, **tiny)
        (setting.folder / "demo").symlink_to(demo_root)
        gpu_report.write_report(out, setting, "a CPU")
    return out


def test_a_failing_part_does_not_stop_the_others(report):
    parts = json.loads((report / "report.json").read_text())["parts"]
    assert tuple(parts) == QUICK
    errors = {name: part["error"] for name, part in parts.items() if part["error"]}
    assert list(errors) == ["losses"] and "'none'" in errors["losses"]
    # The lines before the error are kept: two for each existing row.
    assert len(parts["losses"]["lines"]) == 4 and all(part["lines"] for part in parts.values())
    assert all(line["met"] for line in parts["losses"]["lines"])


def test_boxes_that_differ_between_devices_are_reported(demo_root, tmp_path, monkeypatch):
    setting, calls = Setting(CPU, torch.float32, tmp_path, **TINY_SETTING), []

    def move_every_other(*arguments, **limits):
        calls.append(1)
        found = gpu_report_detect(*arguments, **limits)
        return [(boxes + 0.01 * (len(calls) % 2), scores) for boxes, scores in found]

    gpu_report_detect = gpu_report.detect
    assert next(gpu_report.check_detections(setting)).met
    monkeypatch.setattr(gpu_report, "detect", move_every_other)
    assert next(gpu_report.check_detections(setting)).met is False


def test_the_page_has_all_parts(report):
    page = (report / "report.md").read_text()
    assert page.startswith("# a CPU") and page.count("**Failed:**") == 1
    for what in ("row 42: gradient", "end to end", "bare convolutions", "3,000"):
        assert what in page


@pytest.mark.timing
def test_parts_without_time_are_left_out(tmp_path):
    setting = Setting(CPU, torch.float32, tmp_path, **TINY_SETTING)
    for _, part in gpu_report.run_parts(setting, ["losses", "image"], time.time()):
        assert part["error"].startswith("left out") and not part["lines"]


def test_differences_by_hand():
    assert relative_error(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 0.0])) == pytest.approx(4 / 3)
    box, far = torch.tensor([[0.1, 0.1, 0.2, 0.2]]), torch.tensor([[0.1, 0.1, 0.2, 0.3]])
    score = torch.ones(1)
    assert unequal_boxes([(box, score)], [(box + 1e-7, score)]) == 0
    assert unequal_boxes([(box, score)], [(far, score)]) == 1
    assert unequal_boxes([(box, score)], [(torch.cat([box, far]), torch.ones(2))]) == 1
