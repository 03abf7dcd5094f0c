"""Before NumPy loads: its BLAS keeps to one thread; several, on a busy machine, mostly wait."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import pytest  # noqa: E402


@pytest.fixture
def little_memory():
    """Address space for 100 MB more than is in use: whoever asks for more gets a MemoryError."""
    resource = pytest.importorskip("resource")
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:
        pytest.skip("no /proc to say how much memory is in use")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 100_000_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
