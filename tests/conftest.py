import os
import signal
import sys
from collections.abc import Iterator

import pytest
import torch

# Under nohup the runs that tests start would ignore a terminal that closes, as they should; but tests ask them to end.
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda *_: None)  # what a process handles, those that it starts have at its default

# The networks of the tests are tiny: a second thread costs more than it brings, on a busy machine many times more.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(autouse=True)
def _by_itself(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test draws the same numbers, leaves torch's switches as they were, and waits for what it started on a GPU:
    a fault there is its own, not the next one's."""
    torch.manual_seed(0)
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    names = [(cudnn, "allow_tf32"), (matmul, "allow_tf32"), (cudnn, "benchmark"), (cudnn, "benchmark_limit")]
    switches = [(place, name, getattr(place, name)) for place, name in names]
    yield
    for place, name, value in switches:
        setattr(place, name, value)
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            if "PYTEST_XDIST_WORKER" in os.environ:  # this process can use its GPU no more: xdist starts another
                sys.__stderr__.write(f"\n{request.node.nodeid} left a fault on the GPU: {error}\n")
                os._exit(1)
            raise
