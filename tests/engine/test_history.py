"""Reading run folders and the table of `--runs`, whatever else is in the folder."""

import os

import pytest

from engine.config import describe_changes
from engine.curves import finished_constants
from engine.history import read_log, read_run, runs_table, saved_constants
from engine.run import same_recipe
from kaist.files import InputError


def make_run(folder, config='{"epochs": 2}', log="epoch,miss_rate\n1,0.5\n2,0.25\n"):
    folder.mkdir(parents=True)
    for name, text in (("config.json", config), ("log.csv", log), ("miss_rate.json", "{}")):
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def test_runs_are_listed_newest_first(tmp_path):
    last = make_run(tmp_path / "old") / "last.pt"
    last.touch()
    half = make_run(tmp_path / "new", '{"epochs": 3, "experiment": "26"}', "epoch,miss_rate\n1,0.5\n2,\n")
    for path in (half, *half.iterdir()):
        os.utime(path, (2e9, 2e9))
    os.symlink("nowhere", tmp_path / "old/link")
    os.utime(tmp_path / "old", (3e9, 3e9))  # as after an evaluation
    _, _, first, second = runs_table(tmp_path, describe_changes).splitlines()
    assert first.split()[:5] == ["new", "26", "2/3", "unfinished", "50.00"]
    assert "EPOCHS 3" in first  # a run older than the constant DATA
    assert second.split()[:5] == ["old", "demo", "2/2", "finished", "25.00"]
    assert "no runs yet" in runs_table(tmp_path / "none", describe_changes)


BROKEN = [
    "",
    "[]",
    "3",
    "[" * 100_000,
    '{"epochs": Infinity}',
    '{"epochs": [1]}',
    "{}",
    "\xe9",
    '{"epochs": "x"}',
]


@pytest.mark.parametrize("config", BROKEN)
def test_a_folder_that_is_not_a_run_is_ignored(tmp_path, config):
    folder = make_run(tmp_path / "broken", config)
    make_run(tmp_path / "whole", '{"epochs": 2, "experiment": ["odd"]}')
    assert read_run(folder) is None and not same_recipe(folder, {"epochs": 2})
    assert len(runs_table(tmp_path, describe_changes).splitlines()) == 3
    with pytest.raises(InputError):
        (folder / "detections.txt").touch()
        (folder / "detections.frames.txt").touch()
        finished_constants(folder)


@pytest.mark.parametrize(
    "log", ["epoch\nx\n", "epoch\n1,2\n", "epoch\n\xe9\n", "epoch\n" + "1" * 200_000, "a\n\0\n"]
)
def test_a_broken_log_is_named(tmp_path, log):
    folder = make_run(tmp_path / "broken", log=log)
    with pytest.raises(InputError, match="log.csv: "):
        read_log(folder)
    assert read_run(folder) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system")
@pytest.mark.parametrize(("name", "read"), [("config.json", saved_constants), ("log.csv", read_log)])
def test_a_pipe_does_not_block(tmp_path, name, read):
    folder = make_run(tmp_path / "run")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(InputError, match="a pipe or a device"):
        read(folder)
    read_run(folder)
    assert same_recipe(folder, {"epochs": 2}) == (name != "config.json")
