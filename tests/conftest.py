"""Tests use no network and not the user's cache of texts; they run side by side, so each has one thread."""

import multiprocessing
import os
import tempfile

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp()
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def context():
    """How tests start processes: from a server that has imported the project, which Windows lacks."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(["main", "torch._dynamo"])  # which the first update imports
    return context
