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
    dtype   "float32"; on the GPU also "bfloat16", its default where the hardware has it (from Ampere on):
            activations and the weights that kernels read are bfloat16, while sums, statistics, the weights
            themselves, their gradients and moments stay float32. "float64" is for "ref", where gradients are
            checked.

    `k` holds every op; `dtype` is that of weights and images, `compute` the name of that of activations;
    `saving` says whether layers keep what their backward needs; `frozen` holds prepared weights while
    `UNet.frozen()` is open, and is None otherwise.
    """

    def __init__(self, device="cpu", dtype=None):
        if device not in DEVICES:
            raise NanodiffError(f"device {device!r} is not known; use one of {', '.join(DEVICES)}")
        self.device = DEVICES[device]
        self.compute = str(dtype) if dtype == "bfloat16" else str(np.dtype(dtype or np.float32))
        allowed = {"cpu": ("float32",), "ref": ("float32", "float64"), "gpu": ("float32", "bfloat16")}
        if self.compute not in allowed[self.device]:
            choice = " or ".join(allowed[self.device])
            text = f"dtype {self.compute} does not run on device {device!r}: use {choice}"
            raise NanodiffError(f"{text} (float64 is for 'ref', bfloat16 for 'gpu')")
        self.dtype = np.dtype(np.float64 if self.compute == "float64" else np.float32)
        if self.device == "gpu":
            from nanodiff.kernels import device_gpu

            self.gpu, capability = device_gpu, device_gpu.capability()
            if dtype is None and capability >= 80:
                self.compute = "bfloat16"
            if self.compute == "bfloat16" and capability < 80:
                text = f"dtype bfloat16 needs compute capability 8.0, this GPU has {capability / 10}"
                raise NanodiffError(f"{text}: use float32")
        self.k = kernels.load(self.device)
        self.saving = False
        self.frozen = None
        self.recordings = {}  # of `replay`

    def to_device(self, array, dtype=None):
        """A contiguous copy-if-needed of a host array in `dtype` (default: the context's)."""
        if self.device == "gpu":
            owned = self.gpu.backend().owns(array)
            return array if owned else self.gpu.upload(array, dtype or self.dtype)
        return np.ascontiguousarray(array, dtype or self.dtype)

    def numbers(self, t, labels):
        """Times and labels as the ops of this device want them: on the GPU its arrays, float32 and int32."""
        if self.device != "gpu":
            return t, labels
        whole = labels is None or labels.dtype.kind in "iu"
        labels = None if labels is None else self.to_device(labels, np.int32 if whole else np.float32)
        return self.to_device(t), labels

    def to_host(self, array):
        """A NumPy array with the same values."""
        if self.device == "gpu" and self.gpu.backend().owns(array):
            return self.gpu.download(array)
        return np.asarray(array)

    def narrow(self, x):
        """x, as activations are kept: float32 to bfloat16 where ctx.compute says so."""
        return self.k.cast(x, "bfloat16") if self.compute == "bfloat16" else x

    def widen(self, x):
        """The inverse of `narrow`."""
        return self.k.cast(x, "float32") if self.compute == "bfloat16" else x

    def add_shadow(self, flat):
        """Make room for what kernels read of the weights in `flat`, where that is not `flat` itself."""
        if self.compute == "bfloat16":
            self.gpu.register_shadow(flat)

    def prepare_weights(self, flat):
        """Bring the shadow up to date; inside `UNet.frozen()` once."""
        if self.compute == "bfloat16" and not (self.frozen and "weights" in self.frozen):
            self.k.prepare_weights(flat, self.compute)
            if self.frozen is not None:
                self.frozen["weights"] = True

    def replay(self, name, function, *arrays):
        """function(*arrays), which only calls ops and returns a new array; on the CPU a call with the shapes
        of the last one of this name runs without the Python between its kernels."""
        if self.device != "cpu":
            return function(*arrays)
        return kernels.parallel_cpu.replayed(self.recordings, name, function, arrays)

    def lasting(self, function, *args):
        """function(*args), for what is kept beyond a call that may be recorded."""
        return function(*args) if self.device != "cpu" else kernels.parallel_cpu.outside(function, *args)

    def copy(self, into, array):
        """into[...] = array, both of this device."""
        if self.device == "gpu":
            self.gpu.copy(into, array)
        else:
            into[...] = array

    def clone(self, array):
        """A new array of this device with the same values."""
        if self.device != "gpu":
            return array.copy()
        new = self.gpu.empty(array.shape, array.dtype)
        self.gpu.copy(new, array)
        return new


def usable_device(name):
    """`name`, for argparse's `type=`: of a device that this machine lacks, one line says what was missed."""
    import argparse

    try:
        Context(name)
    except NanodiffError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return name


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
