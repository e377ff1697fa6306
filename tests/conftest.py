"""What several test files share: a small demo set, and where the real KAIST files may lie."""

import importlib.util
import itertools
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from kaist.demo import draw_set
from tests.nursery import Nursery

PROJECT = Path(__file__).parent.parent


@pytest.fixture(scope="session", autouse=True)
def tools_everywhere() -> None:
    """`python -m tools.x` finds the project from any folder that a test starts it in."""
    os.environ["PYTHONPATH"] = str(PROJECT)


@pytest.fixture(scope="session", autouse=True)
def signals() -> None:
    """Ctrl-C and hang-ups are heard, also where the tests run in the background or under nohup."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def demo_root(tmp_path_factory) -> Path:
    """A demo set of 12 training and 6 test frames."""
    root = tmp_path_factory.mktemp("kaist") / "demo"
    draw_set(root, train_frames=12, test_frames=6, progress=False)
    return root


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are composed, and their files hold a new text each time: drawing is half of a short run."""
    import matplotlib.figure

    number = itertools.count()
    save = lambda figure, path, **_: Path(path).write_text(f"figure {next(number)}")  # noqa: E731
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", save)


@pytest.fixture(scope="session")
def nursery(tmp_path_factory) -> Iterator[Nursery]:
    """Training processes, one run after the other."""
    nursery = Nursery(tmp_path_factory.mktemp("nursery"))
    with nursery.process:
        yield nursery
        nursery.close()


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of real KAIST files; tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("KAIST_REFERENCE", PROJECT.parent / "shared" / "kaist"))
    if not path.is_dir():
        pytest.skip(f"no real KAIST files at {path}: set KAIST_REFERENCE to their folder")
    return path


@pytest.fixture(scope="session")
def published(reference) -> Path:
    """The folder of published networks' outputs, beside that of real KAIST files."""
    path = reference.parent / "published"
    if not path.is_dir():
        pytest.skip(f"no outputs of published networks at {path}")
    return path


@pytest.fixture(scope="session")
def by_rule(published):
    """The module that makes the weights and inputs of those outputs."""
    spec = importlib.util.spec_from_file_location("by_rule", published / "by_rule.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
