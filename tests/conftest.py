"""Set up before any test is imported: paths, no network, and one thread per worker."""

import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent)]

import support.openmp  # noqa: E402 (before torch)

os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub when it is imported
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


SLOW = "readme kill attack eval resume report sdxl files commands run convert bench".split()


def pytest_collection_modifyitems(items):
    """The slow files first, so that both workers have something to do until the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A tiny random model in diffusers' layout. Copy it before you change it."""
    from common import write_model_folder

    return write_model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield
