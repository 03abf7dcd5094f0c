"""Backends of device_gpu.py over NumPy arrays: what the emulator is built on, and a recorder.

Like a CUDA stream they may run late: with lazy=True nothing runs before the host waits. So memory that is
used again too early, or a ring slot overwritten before it was copied, shows.
"""

import ctypes
import mmap
import types

import numpy as np

from nanodiff.kernels.device_gpu import Backend

NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


class HostBackend(Backend):
    """Device memory is host memory, filled with 0xff bytes when reserved (NaN in every float dtype).

    A subclass has load(source, kernel, smem, defines) -> a function (grid, block, args, smem).
    """

    def __init__(self, capability=90, processors=132, lazy=False, poison=True):
        super().__init__()
        self.capability, self.processors, self.lazy, self.poison = capability, processors, lazy, poison
        self.queue, self.captured, self.kept = [], None, []

    # ---- the stream ----
    def do(self, work):
        if self.capturing:
            self.captured.append(work)
        elif self.lazy:
            self.queue.append(work)
        else:
            work()

    def wait(self):
        assert not self.capturing, "the host waits for the device inside a recorded step"
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    # ---- memory ----
    def reserve(self, size):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE  # pages come when they are touched
        memory = mmap.mmap(-1, size + 256, flags=flags)
        self.kept.append(memory)
        start = -(-ctypes.addressof(ctypes.c_char.from_buffer(memory)) // 256) * 256
        if self.poison:
            ctypes.memset(start, 0xFF, size)
        return start

    def release(self, pointers):
        self.wait()

    def array(self, block, shape, dtype):
        holder = types.SimpleNamespace(block=block)
        holder.__array_interface__ = dict(
            shape=shape, typestr=dtype.str, data=(block.pointer, False), version=3
        )
        return np.asarray(holder)

    def address(self, array):
        return array.__array_interface__["data"][0]

    def owns(self, array):
        while isinstance(array, np.ndarray):
            array = array.base
        return hasattr(array, "block")

    def fill(self, array, host):
        self.wait()
        array[...] = host

    def download(self, array):
        self.counts["host_reads"] += 1
        self.wait()
        return array.copy()

    def _move(self, into, source, size):  # addresses, as a driver has: the arrays may be dead when it runs
        self.do(lambda: ctypes.memmove(into, source, size))

    def copy(self, into, array):
        self._move(self.address(into), self.address(array), array.nbytes)

    def pinned(self, size):
        return np.full(size, 0xFF, np.uint8)

    def send(self, array, host):
        assert array.nbytes == host.nbytes and not self.capturing
        self._move(self.address(array), host.ctypes.data, host.nbytes)

    def fetch(self, host, array):
        assert array.nbytes == host.nbytes and not self.capturing
        self._move(host.ctypes.data, self.address(array), host.nbytes)

    def mark(self):
        return types.SimpleNamespace(synchronize=self.wait)

    # ---- kernels ----
    def run(self, source, kernel, grid, block, args, smem, defines):
        function = self.load(source, kernel, smem, defines)
        self.do(lambda: function(grid, block, args, smem))

    def start_capture(self):
        self.captured = []

    def stop_capture(self):
        graph, self.captured = self.captured, None
        return graph

    def replay(self, graph):
        for work in graph:
            self.do(work)


class Recorder(HostBackend):
    """Computes nothing: `calls` has (source, kernel, grid, block, args, smem, defines) of every launch."""

    def __init__(self, capability=90, processors=132):
        super().__init__(capability, processors, poison=False)
        self.calls = []

    def load(self, source, kernel, smem, defines):
        return None

    def run(self, *call):
        self.calls.append(call)
