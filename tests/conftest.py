"""Without a GPU, Triton's kernels run in its interpreter, which must be chosen before the first
import of Triton; importing some transformers models is such an import, so a test module is too
late. With a GPU nothing is set and the same tests run the compiled kernels."""

from __future__ import annotations

import gc
import os
import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# How long an example takes on a busy machine says nothing of what it proves. Before any test module
# is imported: a property keeps the profile that it was made with.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


@pytest.fixture(scope="session", autouse=True)
def interruptible():
    """Ctrl-C works: a shell's background jobs inherit it switched off, and so would the tests."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What is loaded by now lives as long as the process: collections need not look at it again.

    A benchmark collects before each of its rounds, which takes a third of a second over the modules
    and tests of the whole suite.
    """
    gc.collect()
    gc.freeze()
