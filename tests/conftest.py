"""Shapes named in signatures are checked at run time, but in files that ask for
`without_shape_checks`."""
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from gate import pytest_collection_modifyitems  # noqa: F401

jaxtyping.install_import_hook("mythos_core", "beartype.beartype")

import peer  # noqa: E402

from mythos_core import MythosConfig  # noqa: E402
from mythos_core.model import moe  # noqa: E402
from mythos_core.model.config import tutorial_config  # noqa: E402

moe.SORTING = 0  # the tests' small models sort their tokens by expert, as large ones do
# timed without those checks: it has its own pytest.ini, below which this file is not read
collect_ignore = ["bench"]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def without_shape_checks():
    """For files that train or prove for most of their time, a third of which the checks would
    take. tests/model/test_shapes.py has a step of each such work with them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def full_disk():
    """Within `full_disk(BYTES)` no file grows beyond so many, as on a disk that is full."""
    resource = pytest.importorskip("resource")

    @contextmanager
    def full(most):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return full


@pytest.fixture(scope="session")
def reference():
    return peer.load()


@pytest.fixture(scope="session")
def reference_model():
    return peer.model


def tiny(attn_type: str = "gqa", **changes) -> MythosConfig:
    """A config small enough for hundreds of forward passes."""
    small = dict(vocab_size=17, dim=32, max_seq_len=64, max_loop_iters=4, kv_lora_rank=8,
                 q_lora_rank=12, qk_rope_head_dim=4, qk_nope_head_dim=6, v_head_dim=5,
                 expert_dim=16, lora_rank=2, init_std=0.1)
    return tutorial_config(attn_type, **{**small, **changes})
