"""A training step recorded as a CUDA graph, which the host starts at once instead of kernel by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from engine.distributed import world_size
from kaist.files import InputError

Step = Callable[..., tuple[Tensor, ...]]
WARM_UP_STEPS = 3  # before the captured one: kernels are chosen, the optimiser creates its state


def capture_steps(
    step: Step, optimizer: torch.optim.Optimizer, choice: str, device: torch.device
) -> Step | CapturedStep:
    """The step as COMPILE has it: recorded unless that is "off", in one process on CUDA, or as it is."""
    captures = choice != "off" and device.type == "cuda" and world_size() == 1
    return CapturedStep(step, optimizer) if captures else step


class CapturedStep:
    """Runs a step as it is until it can be recorded, then records it, and replays it from then on.

    To start a kernel takes the host some microseconds, and a step has more than a thousand of them. A
    replay runs the same kernels on the same memory: inputs and learning rates are copied there. Inputs of
    other shapes than the recorded ones, such as an epoch's last batch, are worked on as without.

    Args:
        step: a function of tensors on a GPU that gives tensors. No value may change which kernels it
            starts, nor may the host wait for one.
        optimizer: the one that it steps.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        self.stream = torch.cuda.Stream()
        self.seen: Counter[tuple] = Counter()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        self.seen[shapes] += 1
        # Before the optimiser has a state, the host looks whether its first step is finite.
        if self.graph is None and self.seen[shapes] > WARM_UP_STEPS and self.optimizer.state:
            self.capture(inputs)
            self.shapes = shapes
        if self.graph is not None and shapes == self.shapes:
            return self.replay(inputs)
        # In the precision of replays, so that a run that goes on takes the same steps.
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32).item()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # on which it will be recorded
            outputs = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Record the step, which does not run meanwhile. InputError: CUDA cannot."""
        groups = self.optimizer.param_groups
        self.inputs = [tensor.clone() for tensor in inputs]
        self.rates = [torch.full((), group["lr"], device=inputs[0].device) for group in groups]
        recorded = [{"lr": rate, "capturable": True} for rate in self.rates]
        self.optimizer.param_groups = [a | b for a, b in zip(groups, recorded, strict=True)]
        graph = torch.cuda.CUDAGraph()
        try:  # other threads pin memory meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        except RuntimeError as error:
            for cause in (error, error.__context__):  # the recording's end may fail after the step's memory
                if isinstance(cause, torch.OutOfMemoryError):
                    raise cause from None
            said = str(error).partition("\n")[0]
            problem = f"a step cannot be recorded as a CUDA graph ({said})"
            raise InputError(problem, 'set COMPILE = "off" (--compile off)') from None
        finally:
            self.optimizer.param_groups = groups
        self.graph = graph

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run what was recorded on other inputs."""
        for own, tensor in zip(self.inputs, inputs, strict=True):
            own.copy_(tensor, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return tuple(tensor.clone() for tensor in self.outputs)
