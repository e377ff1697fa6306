"""Captured steps, without a GPU: which steps are captured, replayed or run eagerly.

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
    """A step on a fake GPU that logs eager calls, captures and replays, by number of frames."""
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


def test_one_shape_is_captured_and_others_run_eagerly(recorded):
    captured, optimizer, happened = recorded
    full, last = torch.ones(4, 1), torch.ones(3, 1)
    groups = [dict(group) for group in optimizer.param_groups]
    for images in (last, *[full] * WARM_UP_STEPS):
        assert torch.equal(captured(images)[0], images * 2)
    assert happened == [("step", 3, 0.5, False)] + [("step", 4, 0.5, False)] * WARM_UP_STEPS
    happened.clear()
    [weight] = optimizer.param_groups[0]["params"]
    weight.grad = torch.ones(1)
    optimizer.param_groups[0]["lr"] = 0.25
    captured(full)  # captured with the learning rate in device memory, and replayed
    assert happened == [("step", 4, 0.25, True), ("replay", 0.25)]
    assert weight.grad is None  # it would take memory beside the graph's own gradients
    happened.clear()
    optimizer.param_groups[0]["lr"] = 0.125
    captured(full)
    captured(last)
    assert happened == [("replay", 0.125), ("step", 3, 0.125, False)]
    assert optimizer.param_groups == [groups[0] | {"lr": 0.125}]  # numbers, no tensors, in a saved state


def test_nothing_is_captured_before_the_optimiser_has_a_state(recorded):
    """Without a state, the host reads whether a step is finite, which cannot be captured."""
    captured, optimizer, happened = recorded
    [(weight, state)] = optimizer.state.items()
    optimizer.state.clear()
    for _ in range(WARM_UP_STEPS + 2):
        captured(torch.ones(4, 1))
    assert {kind for kind, *_ in happened} == {"step"}
    optimizer.state[weight] = state
    captured(torch.ones(4, 1))
    assert happened[-1] == ("replay", 0.5)


def test_eager_steps_round_learning_rates_like_replays(recorded):
    captured, optimizer, happened = recorded
    optimizer.param_groups[0]["lr"] = 0.1  # not representable in float32
    captured(torch.ones(4, 1))
    assert happened[-1][2] == float(np.float32(0.1))


def test_inputs_are_copied_to_the_captured_memory(recorded):
    captured, _, _ = recorded
    for _ in range(WARM_UP_STEPS + 1):
        out = captured(torch.ones(2, 1))
    assert torch.equal(out[0], torch.full((2, 1), 2.0))
    captured(torch.full((2, 1), 7.0))
    assert torch.equal(captured.inputs[0], torch.full((2, 1), 7.0))


def test_a_step_that_cannot_be_captured_raises_with_a_remedy(recorded, monkeypatch):
    captured, optimizer, _ = recorded
    groups = [dict(group) for group in optimizer.param_groups]
    for error, told, words in (
        (RuntimeError("CUDA error: operation not permitted\nmore"), InputError, "permitted.*--compile off"),
        (torch.OutOfMemoryError("no memory"), torch.OutOfMemoryError, "no memory"),  # the run adds the remedy
        (RuntimeError("GET was unable to find an engine to execute"), RuntimeError, "unable to find"),
    ):
        monkeypatch.setattr(torch.cuda, "graph", Mock(side_effect=error))
        captured.seen.clear()
        for _ in range(WARM_UP_STEPS):
            captured(torch.ones(2, 1))
        with pytest.raises(told, match=words) as end:
            captured(torch.ones(2, 1))
        assert "\n" not in str(end.value)
        assert optimizer.param_groups == groups


def test_which_choices_and_devices_capture(monkeypatch):
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
