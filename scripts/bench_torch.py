"""Time torch over gloo: one of the processes that scripts/bench.py starts in torch's environment.

Rules of the file: a time is taken after a barrier; what a request needs is made before
it, once, and kept until a request 'forget'.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
from bench_worker import Answer, parse_arguments, serve
from torch.nn.parallel import DistributedDataParallel


def all_reduce(request: dict[str, Any]) -> Callable[[int], float]:
    """Make what times all_reduce in place of tensors of `elements` each, one after another."""
    tensors = [torch.zeros(request["elements"]) for _ in range(request["keys"])]

    def run(calls: int) -> float:
        dist.barrier()
        began_s = perf_counter()
        for _ in range(calls):
            for tensor in tensors:
                dist.all_reduce(tensor)
        return (perf_counter() - began_s) / calls

    return run


def ddp(request: dict[str, Any]) -> Callable[[int], float]:
    """Make what times DDP's share of a backward pass, and the step of SGD after it.

    The model has parameters of the `shapes` and nothing else: its backward pass only
    writes the gradients, first the last parameter's. DDP's share is a pass with DDP
    less one without, both after a barrier.
    """
    tuned = request["tuned"]
    alone, trained = model_of(request["shapes"]), model_of(request["shapes"])
    replicated = DistributedDataParallel(trained, gradient_as_bucket_view=tuned)
    sgd = torch.optim.SGD(trained.parameters(), lr=0.1, momentum=0.9, fused=True if tuned else None)

    def backward(model: Any) -> float:
        model.zero_grad()
        loss = model()
        dist.barrier()
        began_s = perf_counter()
        loss.backward()
        return perf_counter() - began_s

    def run(calls: int) -> float:
        total_s = 0.0
        for _ in range(calls):
            total_s += backward(replicated) - backward(alone)
            began_s = perf_counter()
            sgd.step()
            total_s += perf_counter() - began_s
        return total_s / calls

    return run


def model_of(shapes: list[list[int]]) -> Any:
    """Make a model of parameters only, whose output is the sum of all of them."""
    model: Any = torch.nn.Module()
    for number, shape in enumerate(shapes):
        model.register_parameter(f"p{number}", torch.nn.Parameter(torch.ones(shape)))

    def forward() -> Any:
        total = torch.zeros(())
        for parameter in model.parameters():
            total = total + parameter.sum()
        return total

    model.forward = forward
    return model


def begin() -> tuple[str, Answer]:
    """Join the other processes; give torch's version and what answers requests."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(ARGUMENTS.threads)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{ARGUMENTS.port}",
        rank=ARGUMENTS.rank,
        world_size=ARGUMENTS.ranks,
    )
    made: dict[str, Callable[[int], float]] = {}

    def answer(request: dict[str, Any]) -> float:
        if request["what"] == "forget":
            made.clear()
            return 0.0
        calls = request.pop("calls")
        name = repr(request)
        if name not in made:
            made[name] = ddp(request) if request["what"] == "ddp" else all_reduce(request)
        return made[name](calls)

    return torch.__version__, answer


if __name__ == "__main__":
    ARGUMENTS = parse_arguments("Times torch over gloo.")
    serve(begin)
    dist.destroy_process_group()
