"""The GPU as the runtime sees it: memory, kernels by name, and whole steps that are recorded and replayed.

Every `_gpu` module asks here for arrays and launches. Behind it is a Backend: CuPy, made when first needed,
or what a test puts in its place with `use`: the same sources compiled for the CPU, or a recorder that
computes nothing. All work goes to one stream, in order, so memory that a dead array leaves may be used by
the next launch at once.
"""

import contextlib
import functools
import math
import re
import weakref
from pathlib import Path

import numpy as np

from nanodiff.context import NanodiffError

BF16 = np.dtype(np.uint16)  # a bfloat16 is stored as its 16 bits, in NumPy and in CuPy
ALIGN = 256  # bytes, where arrays start: enough for any vector load
NOWHERE = 1 << 60  # addresses from here on are nobody's: arrays of a rehearsal
HERE = Path(__file__).parent


class Block:
    """A piece of device memory. Arrays over it hold it; when the last one dies, `dead(block)` is called."""

    def __init__(self, pointer, size, dead):
        self.pointer, self.size, self.dead = pointer, size, dead

    def __del__(self):
        self.dead(self)


class Backend:
    """Pool, plan and counters over what a device offers. A subclass has:

    reserve(size) -> pointer            new device memory, or a MemoryError; release(pointers): the inverse
    array(block, shape, dtype)          an array over a block, which it keeps alive; owns(array): whether it
                                        is such an array, and not one of the host; address(array) -> pointer
    load(source, kernel, smem, defines) -> a kernel, compiled once
    run(source, kernel, grid, block, args, smem, defines)    args: NumPy scalars and structures, in order;
                                        pointers are uint64; grid and block have three numbers
    copy(into, array), fill(array, host), download(array)    the last two wait for the device
    pinned(size) -> uint8 NumPy array   host memory that send(array, host) and fetch(host, array) copy from
                                        and to without waiting; mark() -> an event with .synchronize()
    start_capture(), stop_capture() -> graph, replay(graph)
    capability, processors              90 for sm_90; the number of multiprocessors

    counts: how often memory was reserved, a kernel launched, the device waited for by the host.
    """

    def __init__(self):
        self.free, self.counts = {}, dict(reserved=0, launches=0, host_reads=0)
        self.trace = None  # while a step is recorded: the births and deaths of its arrays
        self.rehearsing = self.capturing = False
        self.shadows = []  # (weak reference to a flat array, its bfloat16 copy)

    # ---- memory ----
    def empty(self, shape, dtype):
        """An uninitialised array, from the pool; in a step that is being recorded, where its plan says."""
        shape, dtype = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape), np.dtype(dtype)
        size = max(1, -(-math.prod(shape) * dtype.itemsize // ALIGN)) * ALIGN
        if self.trace is not None:
            number = self.trace.born(size)
            block = Block(self.trace.place(number), size, functools.partial(self.trace.died, number))
        else:
            block = self._pooled_block(size)
        return self.array(block, shape, dtype)

    def _pooled_block(self, size):
        stack = self.free.setdefault(size, [])
        if not stack:
            self.counts["reserved"] += 1
            try:
                stack.append(self.reserve(size))
            except MemoryError:  # what the pool holds of other sizes may be enough
                self.trim()
                stack.append(self.reserve(size))
        return Block(stack.pop(), size, lambda block: self.free[block.size].append(block.pointer))

    def trim(self):
        """Give back what the pool holds and no array uses."""
        for pointers in self.free.values():
            self.release(pointers)
            pointers.clear()

    def upload(self, host, dtype=None):
        host = np.ascontiguousarray(host, dtype)
        if self.trace is not None:
            raise RuntimeError("an upload inside a recorded step: it would not happen again")
        array = self.empty(host.shape, host.dtype)
        self.fill(array, host)
        return array

    # ---- kernels ----
    def launch(self, source, kernel, grid, block, args, smem=0, defines=()):
        grid, block = ((*n, 1, 1)[:3] for n in (grid, block))
        self.counts["launches"] += 1
        if self.rehearsing:
            return self.load(source, kernel, smem, defines)
        self.run(source, kernel, grid, block, tuple(map(self.argument, args)), smem, defines)

    def argument(self, value):
        """What a kernel gets of an argument: a NumPy scalar or structure."""
        if value is None:
            return np.uint64(0)
        if isinstance(value, np.generic):  # before float: np.float64 is one
            return value
        if isinstance(value, int):
            return np.int32(value)
        if isinstance(value, float):
            return np.float32(value)
        return value if value.dtype.names else np.uint64(self.address(value))

    # ---- a step, recorded ----
    def record(self, step):
        """A Graph of what step() does, a function without arguments; nothing of it runs yet.

        step is called twice. The first time is a rehearsal: kernels are compiled, nothing is launched, and
        the births and deaths of its arrays are noted; from these follows where each may lie (`plan`), and
        one arena is reserved. The second time the launches are captured.
        """
        self.rehearsing = True
        try:
            with self._tracing(lambda number: NOWHERE + number * ALIGN) as events:
                step()
        finally:
            self.rehearsing = False
        offsets, size = plan(events)
        arena = self._pooled_block(size)
        self.capturing = True
        try:
            with self._tracing(lambda number: arena.pointer + offsets[number]) as again:
                self.start_capture()
                try:
                    step()
                finally:
                    graph = self.stop_capture()
        finally:
            self.capturing = False
        if again != events:
            raise RuntimeError("a recorded step must use memory in the same order each time it is called")
        return Graph(self, graph, arena, step, events, offsets)

    @contextlib.contextmanager
    def _tracing(self, place):
        self.trace, events = Trace(place), []
        try:
            yield events
        finally:
            events += self.trace.events
            self.trace = None


class Trace:
    """The arrays of one pass over a step, numbered as they are born. events: (number, size); size 0: died."""

    def __init__(self, place):
        self.place, self.events, self.count = place, [], 0

    def born(self, size):
        number, self.count = self.count, self.count + 1
        self.events.append((number, size))
        return number

    def died(self, number, block):
        self.events.append((number, 0))


def plan(events):
    """(offset of each array, bytes in all) such that no two arrays that live at the same time overlap.

    The largest comes first, each at the lowest place that is free for as long as it lives: about what memory
    at the fullest moment asks for (Pisarchyk & Lee 2020, arXiv:2001.03288, "greedy by size").
    """
    sizes = {number: size for number, size in events if size}
    count, end = len(sizes), len(events)
    born, died, offset = np.zeros(count, int), np.full(count, end), np.zeros(count, int)
    for time, (number, size) in enumerate(events):
        (born if size else died)[number] = time
    size = np.array([sizes[number] for number in range(count)], int)
    placed = np.zeros(count, bool)
    for number in np.argsort(-size, kind="stable"):
        others = np.flatnonzero(placed & (born < died[number]) & (died > born[number]))
        place = 0
        for other in others[np.argsort(offset[others], kind="stable")]:
            if offset[other] - place >= size[number]:
                break
            place = max(place, offset[other] + size[other])
        offset[number], placed[number] = place, True
    return offset.tolist(), int((offset + size).max(initial=ALIGN))


class Graph:
    """A recorded step: launch() runs it once more, on what the arrays that it reads now hold.

    bytes: of its arena. It keeps alive what `step` refers to: the kernels know only addresses.
    """

    def __init__(self, backend, graph, arena, step, events, offsets):
        self.backend, self.graph, self.arena, self.step = backend, graph, arena, step
        self.bytes, self.events, self.offsets = arena.size, events, offsets

    def launch(self):
        self.backend.replay(self.graph)


class OutOfMemory(NanodiffError, MemoryError):
    """The GPU's memory does not suffice."""


class CuPy(Backend):
    """The NVIDIA GPU that CUDA counts as number 0 (CUDA_VISIBLE_DEVICES chooses)."""

    def __init__(self):
        super().__init__()
        remedy = "or use device 'cpu'"
        try:
            import cupy
            import cupyx
        except ImportError as error:
            text = f"device 'gpu' needs CuPy, which cannot be imported ({error})"
            raise NanodiffError(f"{text}: pip install 'nanodiff[cuda13]' or [cuda12], {remedy}") from None
        self.cupy, self.cupyx, self.cuda = cupy, cupyx, cupy.cuda
        runtime = cupy.cuda.runtime
        try:
            found = runtime.getDeviceCount()
        except runtime.CUDARuntimeError as error:
            found, why = 0, str(error)
        else:
            why = "CUDA counts 0 devices"
        if not found:
            text = f"device 'gpu': no NVIDIA driver with a GPU was found by CuPy {cupy.__version__} ({why})"
            raise NanodiffError(f"{text}: check nvidia-smi and CUDA_VISIBLE_DEVICES, {remedy}")
        try:
            nvrtc = cupy.cuda.nvrtc.getVersion()
        except Exception as error:  # what CuPy raises differs from version to version
            text = f"device 'gpu': no NVRTC, the compiler of the kernels, was found ({error})"
            raise NanodiffError(f"{text}: pip install nvidia-cuda-nvrtc, {remedy}") from None
        self.device = cupy.cuda.Device(0)
        self.device.use()
        self.capability = int(self.device.compute_capability)
        if self.capability == 90 and nvrtc < (12, 9):  # it takes one -arch only, and CuPy adds sm_90, without
            self.capability = 80  # wgmma: the kernels for sm_80 then
        self.processors = self.device.attributes["MultiProcessorCount"]
        self.name = runtime.getDeviceProperties(0)["name"].decode()
        if self.capability < 75:
            text = f"device 'gpu': {self.name} has compute capability {self.capability / 10}"
            raise NanodiffError(f"{text}: 7.5 or later (Turing) is needed, {remedy}")
        self.stream = cupy.cuda.Stream(non_blocking=True)
        self.stream.use()
        self.kept, self.shared = {}, {}  # {pointer: what owns it}, {kernel: the most shared memory}

    def reserve(self, size):
        try:
            memory = self.cuda.Memory(size)
        except (self.cuda.runtime.CUDARuntimeError, MemoryError):
            free, total = self.device.mem_info
            text = f"GPU memory: {size:,} bytes more do not fit, {free:,} of {total:,} are free"
            raise OutOfMemory(f"{text}; use a smaller batch or network") from None
        self.kept[memory.ptr] = memory
        return memory.ptr

    def release(self, pointers):
        self.stream.synchronize()
        for pointer in pointers:
            del self.kept[pointer]

    def array(self, block, shape, dtype):
        memory = self.cuda.UnownedMemory(block.pointer, block.size, block, self.device.id)
        return self.cupy.ndarray(shape, dtype, self.cuda.MemoryPointer(memory, 0))

    def address(self, array):
        return array.data.ptr

    def owns(self, array):
        return isinstance(array, self.cupy.ndarray)

    @functools.cache  # noqa: B019 (one backend lives as long as the program)
    def module(self, source, defines):
        options = ["-std=c++17"] + ["-arch=sm_90a"] * (self.capability == 90)  # a: with wgmma. CuPy adds sm_N
        options += (f"-D{name}={value}" for name, value in defines)
        return self.cupy.RawModule(code=source_text(source), options=tuple(options))

    @functools.cache  # noqa: B019
    def load(self, source, kernel, smem, defines):
        function = self.module(source, defines).get_function(kernel)
        function.kernel  # noqa: B018 (compiles it)
        if smem > 48 << 10:  # more than that is for those who ask; the limit is one for all who launch it
            at = source, kernel, defines
            self.shared[at] = max(smem, self.shared.get(at, 0))
            function.max_dynamic_shared_size_bytes = self.shared[at]
            function.preferred_shared_memory_carveout = 100  # percent: two blocks of 97 KB shall fit
        return function

    def run(self, source, kernel, grid, block, args, smem, defines):
        self.stream.use()  # a kernel goes to the calling thread's stream, which may have become another
        self.load(source, kernel, smem, defines)(grid, block, args, shared_mem=smem)

    def copy(self, into, array):
        kind = self.cuda.runtime.memcpyDeviceToDevice
        self._move(into.data.ptr, array.data.ptr, array.nbytes, kind)

    def fill(self, array, host):
        self.send(array, host)
        self.stream.synchronize()

    def download(self, array):
        self.counts["host_reads"] += 1
        host = np.empty(array.shape, array.dtype)
        self.fetch(host, array)
        self.stream.synchronize()
        return host

    def pinned(self, size):
        return self.cupyx.empty_pinned(size, np.uint8)

    def send(self, array, host):
        self._move(array.data.ptr, host.ctypes.data, host.nbytes, self.cuda.runtime.memcpyHostToDevice)

    def fetch(self, host, array):
        self._move(host.ctypes.data, array.data.ptr, host.nbytes, self.cuda.runtime.memcpyDeviceToHost)

    def _move(self, into, source, size, kind):
        self.cuda.runtime.memcpyAsync(into, source, size, kind, self.stream.ptr)

    def mark(self):
        event = self.cuda.Event(disable_timing=True)
        event.record(self.stream)
        return event

    def start_capture(self):
        self.stream.begin_capture()

    def stop_capture(self):
        return self.stream.end_capture()

    def replay(self, graph):
        graph.launch(self.stream)


@functools.cache
def source_text(name):
    """The text of a .cu or .cuh file of this folder with its #include "..." put in, each file once."""
    done = set()

    def expand(name):
        def put_in(match):
            line = match.string.count("\n", 0, match.start()) + 2
            return ("" if match[1] in done else expand(match[1])) + f'\n#line {line} "{name}"'

        done.add(name)
        text = (HERE / name).read_text(encoding="utf-8").replace("#pragma once\n", "\n")
        return f'#line 1 "{name}"\n' + re.sub(r'(?m)^#include "(\w+\.cuh)".*$', put_in, text)

    return expand(name)


# ---- what the `_gpu` modules call ----
_backend = None


def use(backend):
    """Put a Backend in CuPy's place, for a test; None: CuPy again, when it is first needed."""
    global _backend
    _backend = backend


def backend():
    """The Backend in use. NanodiffError: there is no usable GPU; it says what was looked for."""
    global _backend
    if _backend is None:
        _backend = CuPy()
    return _backend


def empty(shape, dtype):
    """An uninitialised array: float32, BF16, float64, uint8, int32, uint32 or int64."""
    return backend().empty(shape, dtype)


def upload(host, dtype=None):
    """A device array with the values of a host one. Never inside a step."""
    return backend().upload(host, dtype)


def download(array):
    """A NumPy array with the values of a device one: the host waits. Never inside a step."""
    if backend().trace is not None:
        raise RuntimeError("the host reads from the device inside a recorded step")
    return backend().download(array)


def copy(into, array):
    """into[...] = array, both of the device, contiguous, of one shape and dtype."""
    if into.shape != array.shape or into.dtype != array.dtype:
        raise ValueError(f"{array.dtype} {array.shape} does not go into {into.dtype} {into.shape}")
    if not backend().rehearsing:
        backend().copy(into, array)


def launch(source, kernel, grid, block, args, smem=0, defines=()):
    """Run an extern "C" kernel of a .cu file of this folder.

    grid, block  tuples of one to three ints;  smem  bytes of dynamic shared memory
    args         device arrays (their pointer), None (a null pointer), NumPy scalars; a Python int goes as
                 int32, a float as float32; a NumPy structured array of one element goes by value, a struct
    defines      ((name, value), ...): -Dname=value; a source is compiled once for each set of them
    """
    backend().launch(source, kernel, grid, block, args, smem, tuple(defines))


def on_device(array):
    """Whether `array` is one of the device."""
    return backend().owns(array)


def element(x):
    """The define that makes T, the element of activations, that of x: float or bf16."""
    return "ELEMENT", "bf16" if x.dtype == BF16 else "float"


def capability():
    """Compute capability: 90 for sm_90."""
    return backend().capability


def processors():
    """Number of multiprocessors."""
    return backend().processors


# ---- the bfloat16 copy of the weights ----
def register_shadow(flat):
    """Give a flat float32 array of weights a bfloat16 copy, which prepare_weights fills; returns the copy."""
    b = backend()
    b.shadows = [(ref, shadow) for ref, shadow in b.shadows if ref() is not None and ref() is not flat]
    b.shadows.append((weakref.ref(flat), b.empty(flat.shape, BF16)))
    return b.shadows[-1][1]


def shadow_of(flat):
    """The registered copy of all of `flat`, or None."""
    return next((shadow for ref, shadow in backend().shadows if ref() is flat), None)


def bf16_of(weight):
    """The bfloat16 copy of a weight: a view of a registered copy, or made now of a weight from elsewhere."""
    b = backend()
    for ref, shadow in b.shadows:
        flat = ref()
        if flat is not None and 0 <= (start := b.address(weight) - b.address(flat)) < 4 * flat.size:
            return shadow[start // 4 : start // 4 + weight.size].reshape(weight.shape)
    from nanodiff.kernels.pointwise_gpu import cast

    return cast(weight, "bfloat16")
