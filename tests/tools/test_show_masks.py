"""tools.show_masks: the order of the frames, and the picture."""

import sys
from pathlib import Path
from types import SimpleNamespace

from tools import show_masks


def test_videos_take_turns():
    names = ["set00/V000/I00001", "set00/V000/I00000", "set00/V001/I00005", "set00/V000/I00002"]
    frames = show_masks.alternate_videos([SimpleNamespace(id=name) for name in names])
    assert [frame.id for frame in frames] == [names[0], names[2], names[1], names[3]]


def test_the_script_draws_a_picture(demo_root, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for mode in ("early", "lwir"):
        flags = f"--samples 2 --input-mode {mode} --out {mode}.png".split()
        monkeypatch.setattr(sys, "argv", ["show_masks.py", "--data-root", str(demo_root), *flags])
        show_masks.main()
        assert f"{mode}.png: 2 augmented samples" in capsys.readouterr().out
        assert Path(f"{mode}.png").stat().st_size > 10_000
