"""A GPU for tests that have none: the package's .cu files, compiled by g++ under cpu_cuda.h; NumPy arrays.

    device_gpu.use(Emulator())

Stricter than a device: arrays are born full of NaN, what lies around an array must stay as it was, a kernel
gets arguments of exactly its types, and arrays of the host are refused.
"""

import bisect
import ctypes
import functools
import hashlib
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from host_backend import HostBackend

from nanodiff.kernels.device_gpu import BF16, source_text

HERE = Path(__file__).parent
GUARD = 256  # bytes before and behind what `reserve` hands out
POINTER = 1 << 16  # added to the size of a parameter that is a pointer (args_... of cpu_cuda.h)
FLAGS = "-std=c++17 -O1 -shared -fPIC -U_FORTIFY_SOURCE -fcf-protection=none -ffp-contract=off".split()
FLAGS += ["-fno-strict-aliasing", "-w"]
SANITIZE = ["-g1", "-O0", "-fsanitize=undefined", "-fno-sanitize-recover=all"]
COMPILER = shutil.which("g++")


def to_bf16(a):
    """float array -> its bfloat16 bits, rounded to nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(a), np.uint32(0x7FFF), rounded).astype(BF16)


def from_bf16(bits):
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


class Emulator(HostBackend):
    """Put in a device's place by `device_gpu.use`.

    order     in which the threads of a block take turns: 0 one after another, else drawn from this seed
    sanitize  compile with UBSan, which ends the process at the first undefined behaviour
    edit      a function of a source's text, to plant mistakes in it
    """

    def __init__(self, order=0, sanitize=False, edit=None, **options):
        super().__init__(**options)
        self.order, self.flags, self.edit = order, FLAGS + (SANITIZE if sanitize else []), edit
        self.module, self.load = functools.cache(self.module), functools.cache(self.load)
        self.reserved, self.starts = {}, []  # {pointer: bytes}; the pointers, sorted
        self.used = {}  # {pointer of a block: bytes of the block, and of the array that was made of it last}

    # ---- memory ----
    def reserve(self, size):
        start = super().reserve(size + 2 * GUARD) + GUARD
        self.reserved[start] = size
        bisect.insort(self.starts, start)
        return start

    def reaches(self, pointer):
        """Whether an address is one of this device."""
        i = bisect.bisect_right(self.starts, pointer) - 1
        return i >= 0 and pointer < self.starts[i] + self.reserved[self.starts[i]]

    def array(self, block, shape, dtype):
        pointer, size = block.pointer, block.size
        if not self.rehearsing:
            used = math.prod(shape) * dtype.itemsize
            self.do(lambda: self.born(pointer, size, used))
        return super().array(block, shape, dtype)

    def born(
        self, pointer, size, used
    ):  # also in a replayed graph, where blocks share memory one after another
        for other in [p for p in self.used if pointer <= p < pointer + size]:
            del self.used[other]
        self.used[pointer] = size, used
        ctypes.memset(pointer, 0xFF, size)  # born full of NaN

    def address(self, array):
        assert self.owns(array), "a kernel was handed an array of the host"
        assert array.flags.c_contiguous, "a kernel was handed an array that is not contiguous"
        return super().address(array)

    def check(self, pointer):
        """Nothing was written outside of the array at `pointer`, as far as one can see around it."""
        ends = []
        if pointer in self.reserved:
            size = self.reserved[pointer]
            ends += [(pointer - GUARD, pointer), (pointer + size, pointer + size + GUARD)]
        if pointer in self.used and not self.lazy:
            size, used = self.used[pointer]
            ends.append((pointer + used, pointer + size))
        for low, high in ends:
            assert ctypes.string_at(low, high - low) == b"\xff" * (high - low), "written out of bounds"

    # ---- kernels ----
    def module(self, source, defines):
        text = source_text(source)
        text = self.edit(text) if self.edit else text
        return compiled(text, (*self.flags, *(f"-D{name}={value}" for name, value in defines)))

    def load(self, source, kernel, smem, defines):
        assert smem <= 227 << 10, f"{kernel}: {smem} bytes of shared memory"
        library = self.module(source, defines)
        function, size_of, sizes = library[f"cpu_{kernel}"], library[f"args_{kernel}"], []
        while (size := size_of(len(sizes))) >= 0:
            sizes.append(size)

        def run(grid, block, args, smem):
            limits = (2**31 - 1, 65535, 65535)
            assert all(0 < n <= most for n, most in zip(grid, limits)), f"{kernel}: grid {grid}"
            assert len(sizes) == len(args), f"{kernel} takes {len(sizes)} arguments, not {len(args)}"
            for i, (size, a) in enumerate(zip(sizes, args)):
                address = a.dtype == np.uint64 and self.reaches(int(a))
                null = a.dtype == np.uint64 and a == 0
                same = address or null if size >= POINTER else size == a.dtype.itemsize and not address
                assert same, f"{kernel}: argument {i} is {a!r}, of the wrong type"
            library.cpu_order(self.order)
            held = [np.atleast_1d(a) for a in args]
            parameters = (ctypes.c_void_p * len(held))(*(a.ctypes.data for a in held))
            function((ctypes.c_uint * 6)(*grid, *block), ctypes.c_size_t(smem), parameters)
            for size, a in zip(sizes, args):
                if size >= POINTER:
                    self.check(int(a))

        return run


@functools.cache
def compiled(text, flags):
    """The shared library of a source text, from the cache folder where it was compiled before."""
    digest = hashlib.sha256()
    for part in (text, (HERE / "cpu_cuda.h").read_text(), *flags):
        digest.update(part.encode() + b"\0")
    folder = Path(tempfile.gettempdir()) / f"nanodiff-emulator-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    assert folder.stat().st_uid == os.getuid(), f"{folder} is somebody else's"
    path = folder / f"{digest.hexdigest()[:32]}.so"
    if not path.exists():
        temporary = path.with_suffix(f".{os.getpid()}")
        command = [COMPILER, "-x", "c++", "-", "-I", HERE, "-o", temporary, *flags]
        done = subprocess.run(command, input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[:4000]
        os.replace(temporary, path)
    return ctypes.CDLL(str(path))
