"""Random draws that leave the caller's stream as it was."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Inside, torch's CPU generator runs on a seed derived from its state; afterwards it is as it was before.

    What is built inside is a function of the seed, and what is built after does not depend on it.
    """
    before = torch.get_rng_state()
    derived = int(torch.randint(2**62, (1,)))
    torch.default_generator.manual_seed(derived)
    try:
        yield
    finally:
        torch.set_rng_state(before)
