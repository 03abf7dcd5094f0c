"""The ops, three renditions side by side: *_ref.py (NumPy, the definition), *_cpu.py (Numba), *_gpu.py + .cu
(CUDA).

The contract of an op:
1. the same name and signature in every rendition;
2. arrays in, new arrays out; gradients of *parameters* come last in the arguments and are added into,
   and `update` ops work in place on the flat buffers; nobody else writes into an array it was handed;
3. activations are (B, H, W, C) and contiguous, convolution weights (kh, kw, C, O), linear weights (C, O);
4. no decision depends on a value in an array, so that a step can be recorded and replayed; on the CPU what
   is not in a kernel goes through parallel_cpu.host, for NumPy's arithmetic would not be replayed;
5. the same bits for any number of threads: parallel over outputs, reductions in fixed chunks and order;
   the order of summation in a forward depends on H, W, C and O alone, never on the batch.
"""

import functools
import importlib
import types

FAMILIES = ("linear", "conv", "norm", "attention", "resample", "pointwise", "update", "random")


@functools.cache
def load(rendition):
    """A namespace with every op of "ref", "cpu" or "gpu". Each module names its ops in `__all__`."""
    ops = types.SimpleNamespace(rendition=rendition)
    for family in FAMILIES:
        module = importlib.import_module(f"nanodiff.kernels.{family}_{rendition}")
        for name in module.__all__:
            setattr(ops, name, getattr(module, name))
    return ops
