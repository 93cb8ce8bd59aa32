"""The selective scan's forms beside each other: seconds and peak memory of forward and backward, a process for each.

``python benchmark/selective_scan.py`` takes the shape of which the plain loop is still bearable; Mamba4Rec's own shape is
``--batch 2048 --channels 384 --states 32 --forms scan last``. ``scan-numba`` and ``last-numba`` need numba.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from model_zoo.layers.selective_scan import ScanKernel, scan_loop, selective_scan, selective_scan_last


def loop(*given: Tensor) -> Tensor:
    """The definition under autograd."""
    return scan_loop(*given)[0]


def scan(*given: Tensor, kernel: ScanKernel = "torch") -> Tensor:
    """The form for every position."""
    return selective_scan(*given, kernel=kernel)


def last(*given: Tensor, kernel: ScanKernel = "torch") -> Tensor:
    """The form for the newest position."""
    u, delta, A, B, C, D, z, bias = given
    return selective_scan_last(u, delta, A, B, C[:, -1], D, z[:, -1], bias, kernel=kernel)


FORMS: dict[str, Callable[..., Tensor]] = {
    "loop": loop,
    "scan": scan,
    "last": last,
    "scan-numba": partial(scan, kernel="numba"),
    "last-numba": partial(last, kernel="numba"),
    "kernel": partial(scan, kernel="cuda"),
}


def arguments(batch: int, length: int, channels: int, states: int, device: str) -> list[Tensor]:
    """Random inputs at Mamba's start values: Delta log-uniform in 0.001..0.1, A = -1..-N."""
    torch.manual_seed(0)
    step = torch.empty(channels).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    by_position = [(batch, length, channels)] * 2 + [(batch, length, states)] * 2 + [(batch, length, channels)]
    u, delta, B, C, z = (torch.randn(shape, device=device) for shape in by_position)
    delta.mul_(0.5)
    A = -torch.arange(1.0, states + 1).repeat(channels, 1)
    given = [u, delta, A, B, C, torch.ones(channels), z, step + torch.log(-torch.expm1(-step))]
    return [t.to(device).requires_grad_() for t in given]


def peak_bytes(device: str) -> int:
    """Most memory that the process has held so far."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(form: str, shape: tuple[int, int, int, int], device: str, repeats: int, threads: int) -> dict[str, float]:
    """Best seconds of forward and backward, bytes kept between them, and bytes above the inputs at the peak."""
    torch.set_num_threads(threads)
    given = arguments(*shape, device)
    before = peak_bytes(device)
    own = {t.untyped_storage().data_ptr() for t in given}
    seconds = []
    for _ in range(repeats):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = FORMS[form](*given)
        if device != "cpu":
            torch.cuda.synchronize()
        middle = time.perf_counter()
        torch.autograd.grad(output.sum(), given, allow_unused=True)
        if device != "cpu":
            torch.cuda.synchronize()
        seconds.append((middle - start, time.perf_counter() - middle))
        del output
    forward, backward = (min(column) for column in zip(*seconds, strict=True))
    return {
        "forward_seconds": forward,
        "backward_seconds": backward,
        "kept_bytes": sum(kept.values()),
        "peak_bytes": peak_bytes(device) - before,
    }


def main() -> None:
    """Print one line per form, and a json record."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--batch", type=int, default=128)
    options.add_argument("--length", type=int, default=200)
    options.add_argument("--channels", type=int, default=256)
    options.add_argument("--states", type=int, default=16)
    options.add_argument("--forms", nargs="+", choices=list(FORMS), default=["loop", "scan", "last"])
    options.add_argument("--device", default="cpu")
    options.add_argument("--repeats", type=int, default=3)
    options.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = options.parse_args()
    shape = (chosen.batch, chosen.length, chosen.channels, chosen.states)
    print(f"[B, L, channels, states] = {list(shape)}: {4e-9 * math.prod(shape):.2f} GB if it were held")
    for form in chosen.forms:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (form, shape, chosen.device, chosen.repeats, chosen.threads))
        print(
            f"{form}: forward {row['forward_seconds']:.3f} s, backward {row['backward_seconds']:.3f} s, "
            f"kept {row['kept_bytes'] / 1e9:.3f} GB, peak above the inputs {row['peak_bytes'] / 1e9:.3f} GB"
        )
        print(json.dumps({"form": form, "shape": shape, "device": chosen.device, "threads": chosen.threads, **row}))


if __name__ == "__main__":
    main()
