"""Steps are counted late on a GPU and told as what they were; what is not finite moves nothing."""

import copy
from contextlib import nullcontext

import pytest
import torch

from engine.config import read_constants
from engine.monitor import StepLog
from engine.optim import make_optimizer, update
from kaist.files import InputError
from model import SSD300
from tools.workloads import MODEL


class FakeRun:
    """Remembers what it is told."""

    undivided = staticmethod(nullcontext)

    def __init__(self):
        self.step, self.losses, self.evidence = 0, [], []

    def add_step(self, losses, seconds):
        self.step += 1
        self.losses.append(None if losses is None else losses.tolist())

    def save_evidence(self, frame_ids, losses, rank):
        self.evidence.append((self.step + 1, frame_ids, losses.tolist(), rank))
        return "evidence.json"


class OnGpu:
    """A tensor that says it is on a GPU."""

    is_cuda = True

    def __init__(self, value):
        self.value = value

    def to(self, device, non_blocking):
        assert device == "cpu" and non_blocking
        return self.value


class FakeEvent:
    """A CUDA event: waited for only when the next step is under way."""

    launched = 0

    def record(self):
        FakeEvent.launched += 1
        self.number = FakeEvent.launched

    def synchronize(self):
        assert FakeEvent.launched > self.number or FakeEvent.over


def add(log, n, value=1.0, wrap=lambda x: x):
    losses = torch.tensor([[value, n], [value, 10 * n]])
    log.add(wrap(losses), wrap(losses.isfinite().all()), [f"frame{n}"])


def test_a_cpu_counts_at_once():
    run = FakeRun()
    with StepLog(run, 0, patience=1) as log:
        for n in range(3):
            add(log, n)
            assert run.losses[-1] == [1.0, n] and run.step == n + 1


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "launched", 0)
    monkeypatch.setattr(FakeEvent, "over", False, raising=False)


def test_a_gpu_is_one_step_ahead_and_no_step_is_lost(gpu):
    run = FakeRun()
    with StepLog(run, 0, patience=1) as log:
        for n in range(3):
            add(log, n, wrap=OnGpu)
            assert run.step == n
        FakeEvent.over = True
    assert run.losses == [[1.0, 0], [1.0, 1], [1.0, 2]]
    with pytest.raises(KeyboardInterrupt), StepLog(run, 0, patience=1) as log:
        add(log, 3, wrap=OnGpu)
        raise KeyboardInterrupt
    assert run.step == 4


def test_the_step_that_is_not_finite_is_named(gpu):
    run = FakeRun()
    with pytest.raises(InputError, match="evidence.json"), StepLog(run, 2, patience=1) as log:
        add(log, 0, wrap=OnGpu)
        add(log, 1, torch.nan, OnGpu)
        add(log, 2, torch.nan, OnGpu)
    [(step, frames, losses, rank)] = run.evidence
    assert (step, frames, losses[1], rank) == (2, ["frame1"], 10, 2)
    assert run.step == 1


def test_patience_is_for_steps_in_a_row():
    run = FakeRun()
    with pytest.raises(InputError), StepLog(run, 0, patience=2) as log:
        for n, value in enumerate([torch.inf, 1.0, torch.nan, torch.nan]):
            add(log, n, value)
    assert run.losses == [None, [1.0, 1], None]
    assert [step for step, *_ in run.evidence] == [1, 3, 4]


def fused(optimizer):
    """The optimiser as it is made on a GPU; torch has the same kernels for CPUs."""
    for group in [optimizer.defaults, *optimizer.param_groups]:
        group["fused"] = True
    return optimizer


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_step_that_is_not_finite_moves_nothing(name, on_gpu):
    import train

    config = {key: value for key, (value, _) in read_constants(train.__file__).items()}
    model = SSD300(**(MODEL | {"width": 0.01}))
    optimizer = make_optimizer(model, torch.nn.Identity(), config | {"optimizer": name})
    if on_gpu:
        fused(optimizer)

    def step(value, finite):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, value * (i + 1))
        update(optimizer, torch.tensor(finite))

    before = copy.deepcopy(model.state_dict())
    step(torch.nan, False)  # the very first, too
    step(0.1, True)
    moved = copy.deepcopy(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict()["state"])
    assert any(not torch.equal(moved[key], before[key]) for key in before)
    step(torch.nan, False)
    assert all(torch.equal(value, moved[key]) for key, value in model.state_dict().items())
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            assert value is None or torch.equal(value, state[index][key])
    step(0.2, True)
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_state_keeps_to_the_kernels_of_its_device():
    """A run of a GPU goes on on a CPU, and the other way round."""
    import train

    config = {key: value for key, (value, _) in read_constants(train.__file__).items()}
    model = SSD300(**(MODEL | {"width": 0.01}))
    theirs, ours = (make_optimizer(model, torch.nn.Identity(), config) for _ in range(2))
    fused(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert {group["fused"] for group in ours.param_groups} == {None}
    theirs.load_state_dict(ours.state_dict())
    assert {group["fused"] for group in theirs.param_groups} == {True}
