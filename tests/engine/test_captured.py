"""Recorded steps, without a GPU: which steps are recorded, replayed or run as they are.

That a replay computes the same is compared on a GPU by `tools.benchmark --report`.
"""

from contextlib import nullcontext
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from engine.captured import WARM_UP_STEPS, CapturedStep, capture_steps
from kaist.files import InputError

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def recorded(monkeypatch):
    """A step whose \"GPU\" notes what happens: its calls, recordings and replays, by frames of the batch."""
    happened = []
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.5, momentum=0.9)
    optimizer.state[weight] = {"momentum_buffer": torch.zeros(1)}

    def step(images):
        lr = optimizer.param_groups[0]["lr"]
        happened.append(("step", len(images), float(lr), isinstance(lr, torch.Tensor)))
        return (images * 2,)

    graph = SimpleNamespace(replay=lambda: happened.append(("replay", float(captured.rates[0]))))
    stream = SimpleNamespace(wait_stream=lambda other: None)
    names = {"Stream": lambda: stream, "current_stream": lambda: stream, "CUDAGraph": lambda: graph}
    names |= {"stream": nullcontext, "graph": lambda *_, **__: nullcontext()}
    for name, fake in names.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    captured = CapturedStep(step, optimizer)
    return captured, optimizer, happened


def test_a_shape_is_recorded_once_and_others_run_as_they_are(recorded):
    captured, optimizer, happened = recorded
    full, last = torch.ones(4, 1), torch.ones(3, 1)
    groups = [dict(group) for group in optimizer.param_groups]
    for images in (last, *[full] * WARM_UP_STEPS):
        assert torch.equal(captured(images)[0], images * 2)
    assert happened == [("step", 3, 0.5, False)] + [("step", 4, 0.5, False)] * WARM_UP_STEPS
    happened.clear()
    optimizer.param_groups[0]["lr"] = 0.25
    captured(full)  # recorded with the rate in the device's memory, and replayed
    assert happened == [("step", 4, 0.25, True), ("replay", 0.25)]
    happened.clear()
    optimizer.param_groups[0]["lr"] = 0.125
    captured(full)
    captured(last)
    assert happened == [("replay", 0.125), ("step", 3, 0.125, False)]
    assert optimizer.param_groups == [groups[0] | {"lr": 0.125}]  # a saved state is of numbers


def test_nothing_is_recorded_before_the_optimiser_has_a_state(recorded):
    """The first steps may not be finite: what decides on that waits for the GPU."""
    captured, optimizer, happened = recorded
    [(weight, state)] = optimizer.state.items()
    optimizer.state.clear()
    for _ in range(WARM_UP_STEPS + 2):
        captured(torch.ones(4, 1))
    assert {kind for kind, *_ in happened} == {"step"}
    optimizer.state[weight] = state
    captured(torch.ones(4, 1))
    assert happened[-1] == ("replay", 0.5)


def test_rates_are_those_of_replays_from_the_first_step_on(recorded):
    captured, optimizer, happened = recorded
    optimizer.param_groups[0]["lr"] = 0.1  # no float32
    captured(torch.ones(4, 1))
    assert happened[-1][2] == float(np.float32(0.1))


def test_inputs_are_copied_to_where_they_were_recorded(recorded):
    captured, _, _ = recorded
    for _ in range(WARM_UP_STEPS + 1):
        out = captured(torch.ones(2, 1))
    assert torch.equal(out[0], torch.full((2, 1), 2.0))
    captured(torch.full((2, 1), 7.0))
    assert torch.equal(captured.inputs[0], torch.full((2, 1), 7.0))


def test_a_step_that_cannot_be_recorded_is_told_with_the_remedy(recorded, monkeypatch):
    captured, optimizer, _ = recorded
    groups = [dict(group) for group in optimizer.param_groups]
    for error, told, words in (
        (RuntimeError("CUDA error: operation not permitted\nmore"), InputError, "permitted.*--compile off"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),  # the run says of what
    ):
        monkeypatch.setattr(torch.cuda, "graph", Mock(side_effect=error))
        captured.seen.clear()
        for _ in range(WARM_UP_STEPS):
            captured(torch.ones(2, 1))
        with pytest.raises(told, match=words) as end:
            captured(torch.ones(2, 1))
        assert "\n" not in str(end.value)
        assert optimizer.param_groups == groups


def test_what_is_recorded_where(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Stream", object)
    step, optimizer = (lambda images: images), SimpleNamespace(param_groups=[])
    for choice, device, recorded in (
        ("off", CUDA, False),
        ("auto", CUDA, True),
        ("graphs", CUDA, True),
        ("on", CUDA, True),
        ("auto", CPU, False),
        ("graphs", CPU, False),
    ):
        taken = capture_steps(step, optimizer, choice, device)
        assert isinstance(taken, CapturedStep) == recorded, (choice, device)
