"""How CPU kernels are compiled, cached, run on threads, and given memory.

    @njit                     a Numba function of ours: no GIL, IEEE division, cached on disk
    @parallel                 a body(job, worker, *args), called as body(jobs, *args): the jobs run on all threads
    empty(shape)              an aligned array whose memory is used again once nobody refers to it

Numba's own `prange` costs about a second of compilation for each loop. `@parallel` hands the same thread pool
one small compiled function instead (0.2 s), in which every thread takes the next job from a shared counter:
a slow core takes fewer. Which thread runs a job never changes its result: a job owns its outputs, and `worker`
(0 .. threads-1) picks nothing but scratch memory.
"""

import hashlib
import math
import os
import pathlib
import types as pytypes

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.ufunc import parallel as pool

I8P, I64 = ir.IntType(8).as_pointer(), ir.IntType(64)


def _vector_width():
    """Floats per SIMD register of this machine, or 1 where no fused multiply-add is known."""
    wanted, features = os.environ.get("NANODIFF_VECTOR", ""), llvm.get_host_cpu_features()
    if wanted:
        return int(wanted)
    if features.get("avx512f"):
        return 16
    if features.get("avx2") and features.get("fma"):
        return 8
    return 4 if features.get("neon") or features.get("fp-armv8") else 1


VECTOR = _vector_width()


def _cache_folder():
    """A folder that changes with any source of the kernels: Numba itself looks only at the file of the function."""
    sources = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(f"{VECTOR} {numba.__version__}".encode())
    for path in sources:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    home = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    folder = pathlib.Path(home).expanduser() / f"nanodiff-{digest.hexdigest()[:16]}"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder if os.access(folder, os.W_OK) else None
    except OSError:
        return None


CACHE = _cache_folder()


def njit(function=None, *, flags=()):
    """numba.njit as every kernel wants it. `flags`: named LLVM liberties, such as {"contract", "reassoc"}."""
    if function is None:
        return lambda f: njit(f, flags=flags)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE or before)  # read when the dispatcher is made, by nobody else
    try:
        return numba.njit(
            function, nogil=True, error_model="numpy", fastmath=set(flags), cache=CACHE is not None
        )
    finally:
        numba.config.CACHE_DIR = before


@intrinsic
def _fork(typingctx, body, jobs, threads, args):
    """Run body(job, worker, *args) for every job, on Numba's thread pool."""
    signature = types.void(body, types.intp, types.intp, args)
    body_signature = types.void(types.intp, types.intp, *args.types)

    def codegen(context, b, _, values):
        _, jobs, threads, args_value = values
        # compiled into the launcher, with its flags, and never on its own: half the work of a second njit function
        compiled = context.compile_subroutine(b, body.dispatcher.py_func, body_signature)
        # shared = {next job, number of jobs, the arguments}; every thread gets its address
        shared_type = ir.LiteralStructType([I64, I64, args_value.type])
        shared = cgutils.alloca_once(b, shared_type)
        for i, value in enumerate((ir.Constant(I64, 0), jobs, args_value)):
            b.store(value, cgutils.gep_inbounds(b, shared, 0, i))

        # the pool calls task(address of address + worker, ...): with one "array" of stride 1 that starts at `shared`
        ftype = ir.FunctionType(
            ir.VoidType(), [I8P.as_pointer(), I64.as_pointer(), I64.as_pointer(), I8P]
        )
        task = ir.Function(b.module, ftype, b.module.get_unique_name("task"))
        task.linkage = "internal"
        tb = ir.IRBuilder(task.append_basic_block("entry"))
        data = tb.bitcast(task.args[3], shared_type.as_pointer())
        worker = tb.sub(tb.ptrtoint(tb.load(task.args[0]), I64), tb.ptrtoint(task.args[3], I64))
        counter = cgutils.gep_inbounds(tb, data, 0, 0)
        total = tb.load(cgutils.gep_inbounds(tb, data, 0, 1))
        args_here = tb.load(cgutils.gep_inbounds(tb, data, 0, 2))
        take, work, done = (task.append_basic_block(n) for n in ("take", "work", "done"))
        tb.branch(take)
        tb.position_at_end(take)
        job = tb.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")
        tb.cbranch(tb.icmp_signed("<", job, total), work, done)
        tb.position_at_end(work)
        unpacked = [tb.extract_value(args_here, i) for i in range(len(args.types))]
        context.call_internal_no_propagate(tb, compiled.fndesc, body_signature, [job, worker, *unpacked])
        tb.branch(take)
        tb.position_at_end(done)
        tb.ret_void()

        base = b.bitcast(shared, I8P)
        address, count, stride = (cgutils.alloca_once(b, t) for t in (I8P, I64, I64))
        b.store(base, address)
        b.store(threads, count)
        b.store(ir.Constant(I64, 1), stride)
        with b.if_else(b.icmp_signed("<=", threads, ir.Constant(I64, 1))) as (alone, together):
            with alone:
                b.call(task, [address, count, stride, base])
            with together:
                rest = [I8P.as_pointer(), I64.as_pointer(), I64.as_pointer(), I8P, I64, I64, I64]
                entry = cgutils.get_or_insert_function(
                    b.module, ir.FunctionType(ir.VoidType(), [I8P, *rest]), "numba_parallel_for"
                )
                one = ir.Constant(I64, 1)
                none = ir.Constant(I64, 0)
                b.call(entry, [b.bitcast(task, I8P), address, count, stride, base, none, one, threads])
        return context.get_dummy_value()

    return signature, codegen


def _launch(jobs, threads, *args):
    _fork(body, jobs, threads, args)  # noqa: F821  (`body` is put into the globals of each copy below)


def parallel(function=None, *, flags=()):
    """Make body(job, worker, *args) callable as body(jobs, *args). Arguments: arrays, ints and floats."""
    if function is None:
        return lambda f: parallel(f, flags=flags)
    # a copy of _launch for each body, under the body's name: Numba names its cache files after the function
    code = _launch.__code__.replace(
        co_name=function.__name__, co_qualname=f"launch_{function.__qualname__}",
        co_filename=function.__code__.co_filename, co_firstlineno=function.__code__.co_firstlineno,
    )  # fmt: skip
    launch = pytypes.FunctionType(
        code, {"_fork": _fork, "body": numba.njit(function), "__name__": function.__module__}
    )
    launch.__module__ = function.__module__
    launch = njit(launch, flags=flags)

    def call(jobs, *args):
        launch(jobs, min(jobs, _threads), *args)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


# ---- threads ----
_threads = numba.config.NUMBA_NUM_THREADS
pool._launch_threads()


def max_threads():
    return numba.config.NUMBA_NUM_THREADS


def threads():
    return _threads


def set_threads(n):
    global _threads
    _threads = n


# ---- memory ----
_shelf = {}  # bytes -> blocks nobody refers to


class _Block:
    """Memory that goes back on its shelf when the last array over it dies. Fresh pages cost a fault each."""

    __slots__ = ("__array_interface__", "memory")

    def __init__(self, size):
        shelf = _shelf.get(size)
        if shelf:
            self.memory, self.__array_interface__ = shelf.pop()
        else:
            self.memory = np.empty(size + 64, np.uint8)
            start = (self.memory.ctypes.data + 63) & ~63  # a cache line, so that no vector load straddles two
            self.__array_interface__ = {"data": (start, False), "shape": (size,), "typestr": "|u1", "version": 3}

    def __del__(self, shelf=_shelf):
        shelf.setdefault(self.__array_interface__["shape"][0], []).append((self.memory, self.__array_interface__))


def empty(shape, dtype=np.float32):
    """An uninitialised, contiguous array that starts on a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.asarray(_Block(size)).view(dtype).reshape(shape)


def zeros(shape, dtype=np.float32):
    out = empty(shape, dtype)
    out.fill(0)
    return out
