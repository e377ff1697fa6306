"""Counting steps on CPU and GPU, and skipping steps that are not finite."""

import copy

import pytest
import torch

from engine.monitor import READ_BACK_STEPS, StepMonitor
from engine.optim import GuardedStep, make_optimizer, step_if_finite
from kaist.files import InputError
from tools.workloads import plain_config, row_network

SETTINGS = {"lr": 1e-3, "bias_lr_factor": 2.0, "weight_decay": 1e-5}


class FakeRun:
    """Records the calls of the monitor."""

    in_step = False

    def __init__(self):
        self.step, self.losses, self.evidence = 0, [], []

    def add_step(self, losses, seconds):
        self.step += 1
        self.losses.append(None if losses is None else losses.tolist())

    def save_evidence(self, frame_ids, losses, rank):
        self.evidence.append((self.step + 1, frame_ids, losses.tolist(), rank))
        return "evidence.json"

    def save_is_due(self):
        return False

    def check_stop(self):
        pass


class OnGpu(torch.Tensor):
    """A tensor that claims to be on a GPU."""

    is_cuda = True


def add(monitor, n, value=1.0, kind=torch.Tensor):
    losses = torch.tensor([[value, n], [value, 10 * n]])
    monitor.add(losses.as_subclass(kind), losses.isfinite().all(), [f"frame{n}"])


def test_a_cpu_counts_at_once():
    run = FakeRun()
    with StepMonitor(run, 1) as monitor:
        for n in range(3):
            add(monitor, n)
            assert run.losses[-1] == [1.0, n] and run.step == n + 1


def test_a_gpus_losses_are_counted_in_blocks_and_none_is_lost():
    run = FakeRun()
    with StepMonitor(run, 1) as monitor:
        for n in range(READ_BACK_STEPS + 3):
            add(monitor, n, kind=OnGpu)
            assert run.step == (READ_BACK_STEPS if n + 1 >= READ_BACK_STEPS else 0)
    assert run.losses == [[1.0, n] for n in range(READ_BACK_STEPS + 3)]


def test_a_gpus_step_that_is_not_finite_is_named():
    run = FakeRun()
    with pytest.raises(InputError, match="evidence.json"), StepMonitor(run, 1) as monitor:
        for n in range(READ_BACK_STEPS):
            add(monitor, n, torch.nan if n in (1, 4) else 1.0, OnGpu)
    assert run.in_step  # later steps have changed the weights: do not save them
    [(step, frames, losses, rank)] = run.evidence
    assert (step, frames, losses[1], rank) == (2, ["frame1"], 10, 0)
    assert run.step == 1


def test_an_interrupted_step_is_not_counted():
    run = FakeRun()
    with pytest.raises(RuntimeError), StepMonitor(run, 1) as monitor:
        for _ in monitor.steps([1, 2]):
            monitor.pending.append(None)  # a step that never completed
            raise RuntimeError
    assert run.in_step and run.step == 0


def test_unreadable_batches_count_as_skipped_steps():
    run = FakeRun()
    with StepMonitor(run, 1) as monitor:
        for step, batch in monitor.steps(["a", None, "c"]):
            assert run.in_step and (step, batch) in ((0, "a"), (2, "c"))
            add(monitor, step)
    assert run.losses == [[1.0, 0], None, [1.0, 2]] and not run.in_step


def test_only_consecutive_nonfinite_steps_stop_a_run():
    run = FakeRun()
    with pytest.raises(InputError), StepMonitor(run, 2) as monitor:
        for n, value in enumerate([torch.inf, 1.0, torch.nan, torch.nan]):
            run.in_step = True
            add(monitor, n, value)
    assert run.losses == [None, [1.0, 1], None]
    assert [step for step, *_ in run.evidence] == [1, 3, 4]


def fused(optimizer):
    """The optimiser with fused kernels, as on a GPU; torch has them for CPUs too."""
    for group in [optimizer.defaults, *optimizer.param_groups]:
        group["fused"] = True
    return optimizer


@pytest.mark.parametrize("name", ["sgd", "adam"])
@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_nonfinite_step_changes_nothing(name, on_gpu):
    model = row_network(plain_config(width=0.01))[0]
    optimizer = make_optimizer(model, torch.nn.Identity(), name=name, **SETTINGS)
    if on_gpu:
        fused(optimizer)

    def step(value, finite):
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, value * (i + 1))
        step_if_finite(optimizer, torch.tensor(finite))

    before = copy.deepcopy(model.state_dict())
    step(torch.nan, False)  # also the first step
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


def test_a_loaded_state_keeps_fused_of_the_device():
    """A run of a GPU can be resumed on a CPU, and the reverse."""
    model = row_network(plain_config(width=0.01))[0]
    theirs, ours = (make_optimizer(model, torch.nn.Identity(), name="adam", **SETTINGS) for _ in range(2))
    fused(theirs)
    ours.load_state_dict(theirs.state_dict())
    assert {group["fused"] for group in ours.param_groups} == {None}
    theirs.load_state_dict(ours.state_dict())
    assert {group["fused"] for group in theirs.param_groups} == {True}


def test_batch_norm_statistics_are_restored_after_a_nonfinite_step():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    optimizer = make_optimizer(model, torch.nn.Identity(), name="sgd", **SETTINGS)
    guarded_step = GuardedStep(model, optimizer)
    states = []
    for value in (1.0, float("nan"), 2.0):
        guarded_step.save_statistics()
        loss = model(torch.randn(4, 1, 3, 3) * value).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert bool(guarded_step(loss.detach()[None])) == (value == value)
        states.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    assert not torch.equal(states[2]["1.running_mean"], states[1]["1.running_mean"])
    assert states[2]["1.num_batches_tracked"] == 2
