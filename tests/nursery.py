"""Training processes of their own: torch is imported once, and they are killed at a chosen moment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

PROJECT = Path(__file__).parent.parent

# Runs train.py's main() in as many processes as a line asks for, says their ids and, when all have ended,
# how. Imports are most of the time that such a start takes; what train.py reaches late is here from the
# start as well. Curves would be most of the rest: their files are written, and nothing is drawn.
SCRIPT = """
import json, os, signal, socket, sys, traceback, matplotlib.backends.backend_agg, torch._dynamo, train
from matplotlib.figure import Figure
from engine.distributed import run_distributed
from kaist.files import run_script
from torch.utils.data import _utils, dataloader

# How often a loader and its workers look whether the other is alive: 5 seconds are long in a test.
_utils.worker.MP_STATUS_CHECK_INTERVAL = 0.2
dataloader._MultiProcessingDataLoaderIter._try_get_data.__defaults__ = (0.2,)

def save_nothing(figure, path, **how):
    open(path, "wb").close()

Figure.savefig = save_nothing

def kill_at(moment, name, count, half=""):
    seen, saved = [], []

    def look(event, arguments):
        path = arguments[event == "os.rename"] if event in ("open", "os.rename") else None
        if not isinstance(path, (str, os.PathLike)):
            return
        path, renamed = os.fspath(path), event == "os.rename"
        if renamed and path.endswith("last.pt"):
            saved.append(path)
        if {"open": not renamed, "rename": renamed, "later": saved and not renamed}[moment] and name in path:
            seen.append(path)
            if len(seen) == int(count):
                if half:
                    os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)

def train_in_a_process(said, flags, kill, folder):
    code = 1
    try:
        os.setpgid(0, 0)
        os.chdir(folder)
        output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = ["train.py", *flags]
        if kill:
            kill_at(*kill.split())
        run_script(lambda: run_distributed(train.main))
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)

for line in sys.stdin:
    if not line.strip():
        break
    said, kills, flags, folder = json.loads(line)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    if len(kills) > 1:
        os.environ |= {"WORLD_SIZE": str(len(kills)), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:
        os.environ.pop("WORLD_SIZE", None)
    children = []
    for rank, kill in enumerate(kills):
        os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(rank)
        children.append(os.fork())
        if not children[-1]:
            train_in_a_process(f"{said}{rank or ''}", flags, kill, folder)
    print(*children, flush=True)
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children), flush=True)
"""


class Nursery:
    """Starts training processes, one run after the other; what the last one said is in `said`.

    Of several ranks the others' words are in files beside it, with their rank at the name's end.
    """

    def __init__(self, folder):
        self.said = folder / "said"
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            cwd=folder,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROJECT), "TQDM_MININTERVAL": "0"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, *flags, kill=""):
        """The new process's id; `kill` tells at the so-and-so-many-th time that it opens, or renames, a file
        of such a name when it is killed."""
        [child] = self.start_ranks([kill], *flags)
        return child

    def start_ranks(self, kills, *flags, folder=""):
        """The ids of as many processes of one run as there are `kills`, "" for none, in a folder or in this
        object's own."""
        for path in self.said.parent.glob("said*"):
            path.unlink()
        line = json.dumps([str(self.said), kills, list(map(str, flags)), str(folder or self.said.parent)])
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()
        return self.numbers()

    def close(self):
        """End the process. Closing its input is not enough: a forked process may hold that open as well."""
        self.process.stdin.write("\n")
        self.process.stdin.close()
        self.process.wait()

    def numbers(self):
        return [int(word) for word in self.process.stdout.readline().split()]

    def end(self):
        """The exit code of the process, once it has ended; minus the signal that killed it."""
        [code] = self.numbers()
        return code

    def run(self, *flags, ranks=1, folder=""):
        """What a run's first process said, once all have ended well."""
        self.start_ranks([""] * ranks, *flags, folder=folder)
        assert self.numbers() == [0] * ranks, self.said.read_text()
        return self.said.read_text()

    def says(self, words):
        return self.said.exists() and words in self.said.read_text()


def wait_for(happens, seconds=600):
    """Look until something has happened; that it never does is for the machine's own limit to say."""
    end = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.0005)
