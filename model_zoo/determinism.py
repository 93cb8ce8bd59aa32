"""Runs that repeat bit for bit: on the CPU they do, on CUDA they do with kernels chosen for it (``--deterministic``).

On the CPU nothing is to be switched: with one seed, one number of compute threads and one build of torch, weights and
metrics repeat, however many batches a loader thread makes ahead. On CUDA several kernels add with atomic operations,
whose order, and with it the last bits of a sum, differs from run to run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from model_zoo.errors import ConfigError

#: cuBLAS's workspace settings under which its results repeat (the second is smaller, and slower)
WORKSPACES = (":4096:8", ":16:8")
WORKSPACE_VARIABLE = "CUBLAS_WORKSPACE_CONFIG"

_REFUSED = re.compile(r"(?P<operation>\S+) does not have a deterministic implementation")


def use_deterministic_kernels(device: torch.device) -> str:
    """Have torch choose kernels whose results repeat, and refuse operations that have none (`deterministic_errors`).

    To be called before the first computation on ``device``: cuBLAS reads its setting once. On the CPU it changes nothing.

    Returns:
        What that means, in a sentence for the log.

    Raises:
        ConfigError: ``CUBLAS_WORKSPACE_CONFIG`` is set to a value under which results do not repeat.
    """
    if device.type != "cuda":
        return (
            f"deterministic: on the CPU results repeat bit for bit as it is, with {torch.get_num_threads()} compute "
            "thread(s) and this torch; nothing was switched and it costs nothing"
        )
    workspace = os.environ.setdefault(WORKSPACE_VARIABLE, WORKSPACES[0])
    if workspace not in WORKSPACES:
        raise ConfigError(
            f"--deterministic: {WORKSPACE_VARIABLE} is {workspace!r}, under which cuBLAS's results do not repeat; "
            f"unset it, or set {' or '.join(WORKSPACES)}"
        )
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    return (
        f"deterministic: {device} uses kernels that repeat bit for bit on the same GPU, torch and CUDA; it costs speed "
        "(additions into indexed rows are sorted instead of atomic, new memory is filled first) and memory for cuBLAS's "
        "workspace"
    )


@contextmanager
def deterministic_errors() -> Iterator[None]:
    """Inside, torch's refusal of an operation becomes the user's to answer.

    Raises:
        ConfigError: an operation has no kernel whose results repeat.
    """
    try:
        yield
    except RuntimeError as error:
        refused = _REFUSED.search(str(error))
        if refused is None:
            raise
        raise ConfigError(
            f"--deterministic: torch {torch.__version__} has no deterministic kernel for {refused['operation']}; leave "
            "--deterministic out, or run on the CPU (--gpu -1), where results repeat"
        ) from error
