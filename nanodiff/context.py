"""Where a network lives: a device, its kernels, and copies to and from the host."""

from __future__ import annotations

import contextlib

import numpy as np

from nanodiff import kernels

DEVICES = {"cpu": "cpu", "gpu": "gpu", "cuda": "gpu", "ref": "ref"}


class NanodiffError(ValueError):
    """Bad input. Its one line names the value, the limit and the remedy."""


class Context:
    """A device and its rendition of the kernels.

    device  "cpu" (Numba), "gpu" or "cuda" (CuPy), "ref" (the NumPy definition)
    dtype   of weights and activations; float64 is for "ref" alone, where gradients are checked

    `k` holds every op; `saving` says whether layers keep what their backward needs; `frozen` holds prepared
    weights while `UNet.frozen()` is open, and is None otherwise.
    """

    def __init__(self, device="cpu", dtype=None):
        if device not in DEVICES:
            raise NanodiffError(f"device {device!r} is not known; use one of {', '.join(DEVICES)}")
        self.device = DEVICES[device]
        self.dtype = np.dtype(dtype or np.float32)
        if self.dtype != np.float32 and (self.device != "ref" or self.dtype != np.float64):
            raise NanodiffError(
                f"dtype {self.dtype} does not run on device {device!r}: use float32 (float64 only on 'ref')"
            )
        if self.device == "gpu":
            raise NanodiffError("device 'gpu': this version has no CUDA kernels yet; use device 'cpu'")
        self.k = kernels.load(self.device)
        self.saving = False
        self.frozen = None

    def to_device(self, array, dtype=None):
        """A contiguous copy-if-needed of a host array in `dtype` (default: the context's)."""
        return np.ascontiguousarray(array, dtype or self.dtype)

    def to_host(self, array):
        """A NumPy array with the same values."""
        return np.asarray(array)


def set_threads(n):
    """Use `n` CPU threads in every kernel from now on (1 up to what NUMBA_NUM_THREADS or the machine
    allows)."""
    from nanodiff.kernels import parallel_cpu

    limit = parallel_cpu.max_threads()
    if not isinstance(n, int) or not 1 <= n <= limit:
        raise NanodiffError(
            f"threads = {n!r}: must be an integer from 1 to {limit} (NUMBA_NUM_THREADS raises the limit)"
        )
    parallel_cpu.set_threads(n)
    with contextlib.suppress(ImportError):  # NumPy's BLAS, which only the "ref" rendition calls
        import threadpoolctl

        threadpoolctl.threadpool_limits(n, "blas")
