"""One thread per test process, a cache for what the tests build, and the slowest files first."""

import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the suite spawns processes of its own, and sums keep one order
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--fresh", action="store_true", help="build the CUDA emulation and run the kernel mutants again, no cache"
    )


def pytest_configure(config):
    """Under pytest-xdist the workers inherit the folder that the controller makes here."""
    if config.getoption("fresh") and not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="fresh_cache_")
        os.environ["TL_TRAINING_TEST_CACHE"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """`-m "not slow"` leaves out very_slow and gpu too. Files with slow tests start first."""
    for item in items:
        if item.get_closest_marker("very_slow") or item.get_closest_marker("gpu"):
            item.add_marker("slow")
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow_files)
