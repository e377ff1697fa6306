"""Capture a training step as a CUDA graph, so that the host launches it at once, not kernel by kernel."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor

from engine.distributed import world_size
from kaist.files import InputError

Step = Callable[..., tuple[Tensor, ...]]
OUT_OF_MEMORY = "unable to find an engine|CUDA error: out of memory|ALLOC_FAILED|can't allocate memory"
WARM_UP_STEPS = 3  # steps before the capture: kernels are chosen, the optimiser creates its state


def capture_steps(
    step: Step, optimizer: torch.optim.Optimizer, choice: str, device: torch.device
) -> Step | CapturedStep:
    """Wrap a step in `CapturedStep`, if `choice` (COMPILE) is not "off", in a single process on CUDA."""
    captures = choice != "off" and device.type == "cuda" and world_size() == 1
    return CapturedStep(step, optimizer) if captures else step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether device memory ran out; cuDNN, cuBLAS and the CPU's allocator say so in a RuntimeError only."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and re.search(OUT_OF_MEMORY, str(error)) is not None
    )


class CapturedStep:
    """A step that runs eagerly at first, is then captured, and replayed from then on.

    Launching a kernel takes the host some microseconds, and a step has more than a thousand of them. A
    replay runs the same kernels on the same memory, to which inputs and learning rates are copied. Inputs
    of other shapes than the captured ones, such as an epoch's last batch, run eagerly.

    Args:
        step: a function from GPU tensors to a tuple of tensors. Which kernels it launches may not depend on
            values, and it may not synchronise with the host.
        optimizer: the optimiser that it steps.
    """

    def __init__(self, step: Step, optimizer: torch.optim.Optimizer) -> None:
        self.step, self.optimizer = step, optimizer
        self.stream = torch.cuda.Stream()
        self.seen: Counter[tuple] = Counter()
        self.graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        shapes = tuple(tensor.shape for tensor in inputs)
        self.seen[shapes] += 1
        # Not before the optimiser has a state: until then the host reads a value (`step_if_finite`).
        if self.graph is None and self.seen[shapes] > WARM_UP_STEPS and self.optimizer.state:
            self.capture(inputs)
            self.shapes = shapes
        if self.graph is not None and shapes == self.shapes:
            return self.replay(inputs)
        # Round to float32 as in replays, so that a resumed run takes the same steps.
        for group in self.optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], dtype=torch.float32).item()
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):  # the stream of the capture
            outputs = self.step(*inputs)
        torch.cuda.current_stream().wait_stream(self.stream)
        return outputs

    def capture(self, inputs: tuple[Tensor, ...]) -> None:
        """Capture the step without running it.

        Raises:
            InputError: CUDA cannot capture it.
        """
        groups = self.optimizer.param_groups
        self.inputs = [tensor.clone() for tensor in inputs]
        self.rates = [torch.full((), group["lr"], device=inputs[0].device) for group in groups]
        capturable = [{"lr": rate, "capturable": True} for rate in self.rates]
        self.optimizer.param_groups = [a | b for a, b in zip(groups, capturable, strict=True)]
        self.optimizer.zero_grad()  # else the last step's gradients stay in memory beside the graph's own
        graph = torch.cuda.CUDAGraph()
        try:  # thread_local, because the loader's thread pins memory at the same time
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.outputs = self.step(*self.inputs)
        except RuntimeError as error:
            # If a step runs out of memory, ending the capture fails too and hides the first error.
            for cause in (error, error.__context__):
                if cause and is_out_of_memory(cause):
                    raise cause from None
            message = str(error).partition("\n")[0]
            problem = f"a step cannot be recorded as a CUDA graph ({message})"
            raise InputError(problem, 'set COMPILE = "off" (--compile off)') from None
        finally:
            self.optimizer.param_groups = groups
        self.graph = graph

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the captured step on new inputs."""
        for captured, tensor in zip(self.inputs, inputs, strict=True):
            captured.copy_(tensor, non_blocking=True)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            rate.fill_(group["lr"])
        self.graph.replay()
        return tuple(tensor.clone() for tensor in self.outputs)
