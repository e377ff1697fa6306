"""The memory plan: by hand, and compared with the CPU allocations of a real step."""

import re
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from engine.run import Run
from pseudo_gt import box_masks
from ssd.memory_plan import (
    RESERVED_BYTES,
    SAFETY_FACTOR,
    LiveBytes,
    MemoryPlan,
    added_bytes,
    as_fake,
    plan_memory,
)
from tools.workloads import random_objects, row_config, row_network


def test_live_bytes_by_hand():
    """An MLP: tensors saved for the backward pass stay, others are freed."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = as_fake(nn.Sequential(nn.Linear(256, 1024), nn.ReLU(inplace=True), nn.Linear(1024, 256)))
        with LiveBytes() as live:
            x = torch.empty(64, 256)
            assert live.current == 64 * 256 * 4
            hidden = model[1](model[0](x))
            assert live.current == 64 * 256 * 4 + 64 * 1024 * 4
            loss = model[2](hidden).square().sum()
            del hidden, x
            saved = live.current
            assert saved == 64 * 256 * 4 + 64 * 1024 * 4 + 64 * 256 * 4 + 512  # and the loss, in a block
            loss.backward()
            del loss
    gradients = sum(p.nbytes for p in model.parameters())
    assert live.current == gradients and live.peak > max(saved, gradients)
    assert all(p.grad.shape == p.shape for p in model.parameters())


def test_largest_batch_by_hand():
    plan = MemoryPlan(weights=100, fixed=200, per_frame=50)
    assert plan.total(2) == 400
    batches = {0: 0, 349: 0, 351: 1, 399: 1, 401: 2}
    assert {n: plan.largest_batch(RESERVED_BYTES + SAFETY_FACTOR * n) for n in batches} == batches


@pytest.mark.parametrize("row", ["29", "42"])
def test_the_plan_is_near_what_a_step_takes(row):
    """Compared with a real fp32 step on the CPU, measured by torch's profiler."""
    size = (300, 300) if row == "29" else (128, 128)
    config = row_config(row, width=0.1, input_size=size)
    torch.manual_seed(0)
    model, criterion = row_network(config)
    planned = added_bytes(model, criterion, "sgd", torch.float32, 2)
    measured = measured_bytes(model.train(), criterion, n=2)
    assert measured == pytest.approx(planned, rel=0.15)


def test_the_documented_plan_is_up_to_date():
    """The line of docs/speed.md on row 26 in bf16, as `tools.benchmark --memory-plan` prints it.

    The plan grows by what frames take, not by Adam's step, which in batches of a frame or two takes the most.
    """
    page = (Path(__file__).parents[2] / "docs/speed.md").read_text(encoding="utf-8")
    [row] = re.findall(r"^\| 26: .*, bf16 \| (\d+) MiB \| (\d+) MiB \| (\d+) MiB \|", page, re.M)
    with torch.device("meta"):
        network = row_network(row_config("26"))
    plan = plan_memory(*network, "adam", torch.bfloat16)
    weights, fixed, frame = map(int, row)
    assert plan.total(32) / 2**20 == pytest.approx(weights + fixed + 32 * frame, rel=0.03)
    planned = plan.total(64) - plan.weights
    assert planned == pytest.approx(added_bytes(*network, "adam", torch.bfloat16, 64), rel=0.02)


def measured_bytes(model, criterion, n):
    """Peak of torch's CPU allocations in a training step, with the losses computed as on a GPU."""
    if hasattr(criterion.multibox, "static"):
        criterion.multibox.sparse = criterion.multibox.static
    parameters = [*model.parameters(), *criterion.parameters()]
    optimizer = torch.optim.SGD(parameters, 1e-6, momentum=0.9)
    with torch.profiler.profile(profile_memory=True) as profile:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        images = torch.zeros(n, 4 if model.input_mode == "halfway" else 1, *model.size, dtype=torch.uint8)
        boxes, labels = random_objects(n, 15, torch.device("cpu"))
        masks = box_masks(boxes, labels, [model.grids[i] for i in model.infused_maps])
        loss = criterion(model(images), boxes, labels, masks)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def test_a_step_out_of_memory_names_the_batch_that_should_fit(tmp_path):
    config = Namespace(checkpoints=str(tmp_path), batch_size=64, save_minutes=0.0)
    run = Run(config, "26", {})
    assert run.out_of_memory().remedy.startswith("lower BATCH_SIZE, INPUT_SIZE")
    run.planned_batch = lambda: 48
    said = str(run.out_of_memory())
    assert "BATCH_SIZE = 64" in said and "(about 48 should fit)" in said
    run.planned_batch = lambda: 100  # the plan was wrong: less than what has failed
    assert "(about 63 should fit)" in str(run.out_of_memory())
