"""How CPU kernels are compiled, cached, run on threads, and given memory.

    @njit                     a Numba function of ours: no GIL, IEEE division, cached on disk
    @parallel                 a body(job, worker, *args), called as body(jobs, *args): jobs on all threads
    empty(shape)              an aligned array whose memory is used again once nobody refers to it
    replayed(...)             a function of arrays, without Python between its kernels when it is called again

Numba's own `prange` costs about a second of compilation for each loop, and its threads wait for one another
even when one of them never got a core. `@parallel` compiles the body once, serially, and every thread takes
the next job from a shared counter: a slow core takes fewer. Which thread runs a job never changes its result:
a job owns its outputs, and `worker` (0 .. threads-1) picks nothing but scratch memory.
"""

import atexit
import bisect
import ctypes
import hashlib
import math
import os
import pathlib
import sys
import threading
import types as pytypes

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Flags
from numba.core.cpu_options import FastMathOptions
from numba.extending import intrinsic

I8P, I64 = ir.IntType(8).as_pointer(), ir.IntType(64)
TASK_TYPE = ir.FunctionType(ir.VoidType(), [I8P, I64, I64])  # task(arguments, job, worker)


def _vector_width():
    """Floats per SIMD register of this machine, or 1 where no fused multiply-add is known."""
    wanted, features = os.environ.get("NANODIFF_VECTOR", ""), llvm.get_host_cpu_features()
    if wanted:
        if wanted not in ("1", "4", "8", "16"):
            raise ValueError(f"NANODIFF_VECTOR = {wanted!r}: must be 1, 4, 8 or 16 floats per register")
        return int(wanted)
    if features.get("avx512f"):
        return 16
    if features.get("avx2") and features.get("fma"):
        return 8
    return 4 if features.get("neon") or features.get("fp-armv8") else 1


VECTOR = _vector_width()


# NANODIFF_CONV=direct: plain float32 sums, without the matrix unit and without Winograd; slower, more precise
if os.environ.get("NANODIFF_CONV", "") not in ("", "direct"):
    raise ValueError(f"NANODIFF_CONV = {os.environ['NANODIFF_CONV']!r}: must be direct, or not set")
DIRECT = os.environ.get("NANODIFF_CONV") == "direct"


def _matrix_unit():
    """Of AMX (tiles_cpu.py): 1 where Linux lets this process use it, 2 to emulate it, 0 to do without."""
    wanted, features = os.environ.get("NANODIFF_AMX", ""), llvm.get_host_cpu_features()
    if wanted not in ("", "0", "emulate"):
        raise ValueError(f"NANODIFF_AMX = {wanted!r}: must be 0 (do without AMX) or emulate, or not set")
    if DIRECT:
        return 0
    here = VECTOR == 16 and features.get("amx-tile") and features.get("amx-bf16")
    if wanted or not here or not sys.platform.startswith("linux"):
        return 2 * (wanted == "emulate")
    # arch_prctl(ARCH_REQ_XCOMP_PERM, tile data): from now on the system keeps 8 KB more for each thread
    return int(ctypes.CDLL(None).syscall(158, 0x1023, 18) == 0)


AMX = _matrix_unit()


def _cache_folder():
    """A folder that changes with any source of the kernels: Numba itself looks only at the file of the
    function."""
    sources = sorted(pathlib.Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(f"{VECTOR} {AMX} {numba.__version__}".encode())
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


def njit(function=None, *, flags=(), inline=False):
    """numba.njit as every kernel wants it. `flags`: named LLVM liberties, such as {"contract", "reassoc"};
    inline: put into the body of each caller."""
    if function is None:
        return lambda f: njit(f, flags=flags, inline=inline)
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(CACHE or before)  # read when the dispatcher is made, by nobody else
    try:
        return numba.njit(
            function,
            nogil=True,
            error_model="numpy",
            fastmath=set(flags),
            cache=CACHE is not None,
            forceinline=inline,
        )
    finally:
        numba.config.CACHE_DIR = before


# ---- threads ----
# The pool is a few numbers in memory that every thread looks at, each on a cache line of its own:
#   TICKET  threads << 54 | number of jobs << 36 | taken from the front << 18 | taken from the back: who adds
#           1 to one of the two, atomically, owns that job
#   TASK    address of the compiled task(arguments, job, worker)
#   ARGS    address of its arguments
#   DONE    jobs that are finished
#   BUSY    1 while a caller uses the pool
#   STOP    1 when the program ends
#   RUN     address of the function that publishes a task and waits for it (_runner)
# Every other thread takes jobs from the back. In most ops two threads so have the same half of the images
# each, and find in their own cache what they wrote in the op before; yet neither waits for the other. The
# calling thread takes jobs like any other and waits only for jobs that somebody has begun. A worker that the
# operating system leaves waiting (another program has its core) therefore delays nobody.
TICKET, TASK, ARGS, DONE, BUSY, STOP, RUN = range(0, 56, 8)
FIELD, MASK = 18, (1 << 18) - 1
SPINS = 20000  # looks, of some 20 ns each, before a thread without work sleeps: Python takes less
NAP, LONG = 50, 1000  # microseconds: of the first 200 sleeps, and of all further ones


def _i64(value):
    return ir.Constant(I64, value)


class _Pool:
    """Emits reads and writes of the pool's numbers into a function that is being built."""

    def __init__(self, b, base):
        self.b, self.base = b, base

    def at(self, field):
        return self.b.gep(self.base, [_i64(field)])

    def load(self, field):
        return self.b.load_atomic(self.at(field), "acquire", 8)

    def store(self, field, value):
        self.b.store_atomic(value, self.at(field), "release", 8)

    def field(self, ticket, n):
        """Of a ticket: jobs taken from the back (0) and from the front (1), all jobs (2), threads (3)."""
        return self.b.and_(self.b.lshr(ticket, _i64(n * FIELD)), _i64(MASK))

    def left(self, ticket):
        """An i1: whether there is a job that nobody has taken."""
        taken = self.b.add(self.field(ticket, 0), self.field(ticket, 1))
        return self.b.icmp_unsigned("<", taken, self.field(ticket, 2))

    def take(self, ticket, worker):
        """Try to move the ticket on: an i1, whether it worked."""
        odd = self.b.trunc(worker, ir.IntType(1))
        moved = self.b.add(ticket, self.b.select(odd, _i64(1), _i64(1 << FIELD)))
        return self.b.extract_value(self.b.cmpxchg(self.at(TICKET), ticket, moved, "acq_rel", "acquire"), 1)

    def call(self, ticket, worker):
        """Run the job of a ticket that was taken, and count it."""
        b = self.b
        last = b.sub(self.field(ticket, 2), _i64(1))
        back = b.sub(last, self.field(ticket, 0))
        job = b.select(b.trunc(worker, ir.IntType(1)), back, self.field(ticket, 1))
        task = b.inttoptr(self.load(TASK), TASK_TYPE.as_pointer())
        b.call(task, [b.inttoptr(self.load(ARGS), I8P), job, worker])
        b.atomic_rmw("add", self.at(DONE), _i64(1), "acq_rel")

    def wait(self, spins):
        """A moment of waiting: a pause of the processor, or once `spins` are used up, of the thread."""
        b = self.b
        with b.if_else(b.icmp_signed("<", spins, _i64(SPINS))) as (spin, sleep):
            with spin:  # lets the other hyper-thread of the core run
                if llvm.get_process_triple().startswith(("x86_64", "i686")):
                    ftype = ir.FunctionType(ir.VoidType(), [])
                    b.call(cgutils.get_or_insert_function(b.module, ftype, "llvm.x86.sse2.pause"), [])
            with sleep:
                i32 = ir.IntType(32)
                name, unit = ("Sleep", 1000) if os.name == "nt" else ("usleep", 1)
                function = cgutils.get_or_insert_function(b.module, ir.FunctionType(i32, [i32]), name)
                naps = (ir.Constant(i32, -(-nap // unit)) for nap in (NAP, LONG))
                b.call(function, [b.select(b.icmp_signed("<", spins, _i64(SPINS + 200)), *naps)])


@intrinsic
def _serve(typingctx, pool, worker):
    """What worker number `worker` (1, 2, ...) does until STOP."""

    def codegen(context, b, _, args):
        p = _Pool(b, b.inttoptr(args[0], I64.as_pointer()))
        spins = cgutils.alloca_once_value(b, _i64(0))
        look, mine, work, idle, done = (
            b.append_basic_block(n) for n in ("look", "mine", "work", "idle", "done")
        )
        b.branch(look)
        b.position_at_end(look)
        ticket = p.load(TICKET)
        wanted = b.and_(p.left(ticket), b.icmp_unsigned("<", args[1], p.field(ticket, 3)))
        b.cbranch(wanted, mine, idle)
        b.position_at_end(mine)
        b.cbranch(p.take(ticket, args[1]), work, look)
        b.position_at_end(work)
        p.call(ticket, args[1])
        b.store(_i64(0), spins)
        b.branch(look)
        b.position_at_end(idle)
        p.wait(b.load(spins))
        b.store(b.add(b.load(spins), _i64(1)), spins)
        b.cbranch(b.icmp_signed("!=", p.load(STOP), _i64(0)), done, look)
        b.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), codegen


def _call_run(b, base, *values):
    """Emit run(pool, task, arguments, words of them, jobs, threads, log)."""
    ftype = ir.FunctionType(ir.VoidType(), [I64] * 7)
    address = _Pool(b, b.inttoptr(base, I64.as_pointer())).load(RUN)
    b.call(b.inttoptr(address, ftype.as_pointer()), [base, *values])


@intrinsic
def _runner(typingctx):
    """The address of run(pool, task, arguments, words, jobs, threads, log), compiled once for all launchers:
    task(arguments, job, worker) for every job, on the pool, or here if it is in use or one thread is asked
    for. Where `log` is not 0 it is the address of a log (Recording), to which a record is added."""

    def codegen(context, b, _, args):
        address = b.module.get_unique_name("run")
        run = ir.Function(b.module, ir.FunctionType(ir.VoidType(), [I64] * 7), address)
        run.linkage, caller, b = "internal", b, ir.IRBuilder(run.append_basic_block("entry"))
        base, task, data, words, jobs, threads, log = run.args
        p, memory = (_Pool(b, b.inttoptr(at, I64.as_pointer())) for at in (base, log))
        with b.if_then(b.icmp_signed("!=", log, _i64(0))):
            used = b.load(memory.base)
            record = b.gep(memory.base, [used])
            for i, value in enumerate((task, jobs, threads, words)):
                b.store(value, b.gep(record, [_i64(i)]))
            source = b.inttoptr(data, I64.as_pointer())
            with cgutils.for_range(b, words) as loop:
                to = b.gep(record, [b.add(loop.index, _i64(4))])
                b.store(b.load(b.gep(source, [loop.index])), to)
            b.store(b.add(used, b.add(words, _i64(4))), memory.base)
        alone = cgutils.alloca_once_value(b, b.icmp_signed("<=", threads, _i64(1)))
        with b.if_then(b.not_(b.load(alone))):
            free = b.extract_value(b.cmpxchg(p.at(BUSY), _i64(0), _i64(1), "acq_rel", "acquire"), 1)
            b.store(b.not_(free), alone)
        with b.if_else(b.load(alone)) as (here, together):
            with here, cgutils.for_range(b, jobs) as loop:
                function = b.inttoptr(task, TASK_TYPE.as_pointer())
                b.call(function, [b.inttoptr(data, I8P), loop.index, _i64(0)])
            with together:
                p.store(TASK, task)
                p.store(ARGS, data)
                p.store(DONE, _i64(0))
                p.store(TICKET, b.or_(b.shl(threads, _i64(3 * FIELD)), b.shl(jobs, _i64(2 * FIELD))))
                look, mine, work, rest, end = (
                    b.append_basic_block(n) for n in ("look", "mine", "work", "rest", "end")
                )
                b.branch(look)
                b.position_at_end(look)
                ticket = p.load(TICKET)
                b.cbranch(p.left(ticket), mine, rest)
                b.position_at_end(mine)
                b.cbranch(p.take(ticket, _i64(0)), work, look)
                b.position_at_end(work)
                p.call(ticket, _i64(0))
                b.branch(look)
                b.position_at_end(rest)
                spins = cgutils.alloca_once(b, I64)
                b.store(_i64(0), spins)
                again, ready = b.append_basic_block("again"), b.append_basic_block("ready")
                b.branch(again)
                b.position_at_end(again)
                p.wait(b.load(spins))
                b.store(b.add(b.load(spins), _i64(1)), spins)
                b.cbranch(b.icmp_signed("<", p.load(DONE), jobs), again, ready)
                b.position_at_end(ready)
                p.store(BUSY, _i64(0))
                b.branch(end)
                b.position_at_end(end)
        b.ret_void()
        return caller.ptrtoint(run, I64)

    return types.intp(), codegen


@intrinsic
def _run(typingctx, pool, task, data, words, jobs, threads):
    def codegen(context, b, _, values):
        _call_run(b, *values, _i64(0))
        return context.get_dummy_value()

    return types.void(*[types.intp] * 6), codegen


@intrinsic
def _fork(typingctx, body, pool, log, jobs, threads, args):
    """Run body(job, worker, *args) for every job."""
    body_signature = types.void(types.intp, types.intp, *args.types)

    def codegen(context, b, _, values):
        _, base, log, jobs, threads, args_value = values
        # compiled into the launcher, with its flags, and never on its own: half the work of a second njit
        # function
        flags = Flags()
        flags.nrt = True
        flags.error_model = "numpy"  # Python's check of every division would keep loops scalar
        flags.noalias = True  # an op writes into no array it was handed, so outputs overlap nothing
        flags.fastmath = FastMathOptions(body.dispatcher.targetoptions["fastmath"])
        compiled = context.compile_subroutine(b, body.dispatcher.py_func, body_signature, flags=flags)
        shared = cgutils.alloca_once_value(b, args_value)
        task = ir.Function(b.module, TASK_TYPE, b.module.get_unique_name("task"))
        task.linkage = "internal"
        tb = ir.IRBuilder(task.append_basic_block("entry"))
        unpacked = cgutils.unpack_tuple(tb, tb.load(tb.bitcast(task.args[0], args_value.type.as_pointer())))
        for i, kind in enumerate(args.types):
            if isinstance(kind, types.Array):
                # Numba counts references at every slice: threads would fight for the count's cache line, at
                # hundreds of nanoseconds a time. The caller keeps the arrays alive, so the body need not
                # count.
                array = context.make_array(kind)(context, tb, unpacked[i])
                array.meminfo = cgutils.get_null_value(array.meminfo.type)
                unpacked[i] = array._getvalue()
        context.call_internal_no_propagate(tb, compiled.fndesc, body_signature, [*task.args[1:], *unpacked])
        tb.ret_void()
        words = _i64(context.get_abi_sizeof(args_value.type) // 8)
        _call_run(b, base, *(b.ptrtoint(at, I64) for at in (task, shared)), words, jobs, threads, log)
        return context.get_dummy_value()

    return types.void(body, *[types.intp] * 4, args), codegen


def _launch(pool, log, jobs, threads, *args):
    _fork(body, pool, log, jobs, threads, args)  # noqa: F821  (`body` is in the globals of each copy below)


def parallel(function=None, *, flags=()):
    """Make body(job, worker, *args) callable as body(jobs, *args). Arguments: arrays, ints and floats."""
    if function is None:
        return lambda f: parallel(f, flags=flags)
    # a copy of _launch for each body, under the body's name: Numba names its cache files after the function
    code = _launch.__code__.replace(
        co_name=function.__name__, co_qualname=f"launch_{function.__qualname__}",
        co_filename=function.__code__.co_filename, co_firstlineno=function.__code__.co_firstlineno,
    )  # fmt: skip
    body = numba.njit(function, fastmath=set(flags))
    names = {"_fork": _fork, "body": body, "__name__": function.__module__}
    launch = pytypes.FunctionType(code, names)
    launch.__module__ = function.__module__
    launch = njit(launch, flags=flags)

    def call(jobs, *args):
        log = _here.recording.note(args) if _here.recording else 0
        launch(_POOL, log, jobs, min(jobs, _threads) if jobs <= MASK else 1, *args)

    call.__name__, call.__doc__ = function.__name__, function.__doc__
    return call


@njit
def serve(pool, worker):
    _serve(pool, worker)


@njit
def runner():
    return _runner()


@njit
def replay(pool, log):
    at = 1
    while at < log[0]:
        task, jobs, threads, words = log[at], log[at + 1], log[at + 2], log[at + 3]
        _run(pool, task, log.ctypes.data + 8 * (at + 4), words, jobs, threads)
        at += 4 + words


_threads = 1
_numbers = np.zeros(64, np.int64)
_POOL = _numbers.ctypes.data
_numbers[RUN] = runner()
_workers = []


def max_threads():
    return numba.config.NUMBA_NUM_THREADS


def threads():
    return _threads


def set_threads(n):
    """Use n threads from now on: the calling one and n - 1 workers."""
    global _threads
    while len(_workers) < n - 1:
        worker = threading.Thread(target=serve, args=(_POOL, len(_workers) + 1), daemon=True)
        worker.start()
        _workers.append(worker)
    _threads = n


@atexit.register
def _stop():
    """Before the interpreter frees the code that the workers run."""
    _numbers[STOP] = 1
    for worker in _workers:
        worker.join()


set_threads(max_threads())


# ---- memory ----
# bytes, of which the system gives pages when they are first touched: large enough that little is lost at the
# ends, and for huge pages, which NumPy asks the system for; they save a page walk every 4 KB
SLAB = 1 << 28


class _Heap:
    """Memory that nobody refers to: ranges in the order of their addresses. The first that is large enough is
    cut; what comes back grows together with its neighbours. Fresh pages cost a fault each.

    An array may die anywhere, even in the middle of `take`, when Python collects its garbage: `give` does no
    more than append to a list.
    """

    def __init__(self):
        self.free, self.back, self.lock = [], [], threading.Lock()  # of (start, bytes, their slab)

    def give(self, start, size, slab):
        self.back.append((start, size, slab))

    def take(self, size):
        """The start of `size` bytes, and the slab that they are in; None where there are none."""
        with self.lock:
            self._sort_in()
            for i, (start, length, slab) in enumerate(self.free):
                if length >= size:
                    self.free[i : i + 1] = [(start + size, length - size, slab)] if length > size else []
                    return start, slab
        return None

    def empty(self):
        """All ranges, which are no longer here."""
        with self.lock:
            self._sort_in()
            ranges, self.free = self.free, []
        return ranges

    def _sort_in(self):
        while self.back:
            start, size, slab = self.back.pop()
            i = bisect.bisect(self.free, start, key=lambda one: one[0])
            for k in (i, i - 1):  # the range behind, then the one before
                if 0 <= k < len(self.free) and self.free[k][2] is slab:
                    first, length, _ = self.free[k]
                    if first == start + size or first + length == start:
                        start, size = min(first, start), size + length
                        del self.free[k]
                        i = min(i, k)
            self.free.insert(i, (start, size, slab))


_shelf, _arena = _Heap(), _Heap()  # the second one is for recordings


def _slab(size):
    """Fresh memory with room for `size` bytes: where it starts, its bytes, what owns it."""
    memory = np.empty(max(SLAB, size) + 64, np.uint8)
    return memory.ctypes.data + -memory.ctypes.data % 64, memory.size - 64, memory


class _Block:
    """Bytes that go back to their heap when the last array over them dies."""

    __slots__ = ("__array_interface__", "range", "home")

    def __init__(self, size):
        self.home = _arena if _here.recording else _shelf
        if not Recording.alive:  # its memory is everybody's again
            _shelf.back.extend(_arena.empty())
        # whole cache lines, so that no vector load straddles two, and one between blocks: never two in step,
        # whose lines would share the sets of the cache
        room = -(-size // 64) * 64 + 64
        # (small ones are nobody's gain, and missed by who takes them at every step)
        while not (found := self.home.take(room) or (size >= 4096 and _shelf.take(room))):
            self.home.give(*_slab(room))  # again: another thread may have cut it
        start, slab = found
        self.range = start, room, slab
        self.__array_interface__ = {"data": (start, False), "shape": (size,), "typestr": "|u1", "version": 3}

    def __del__(self):
        self.home.give(*self.range)


def empty(shape, dtype=np.float32):
    """An uninitialised, contiguous array that starts on a cache line."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    return np.asarray(_Block(size)).view(dtype).reshape(shape)


_room, _views = {}, {}


def scratch(words):
    """(threads, `words` or more) floats for the jobs of an op: the same ones for every op, so that they stay
    in the caches of their core, in rows no shorter than before, so that a worker's stay its own. Only one
    thread of a program may therefore call ops."""
    have = _room.get("scratch")
    if have is None or have.shape[0] < _threads or have.shape[1] < words:
        longest = max(words, have.shape[1] if have is not None else 0)
        _room["scratch"] = have = empty((_threads, -(-longest // 16) * 16 + 16))
    return have


def shared(name, shape, dtype=np.float32):
    """An array for what is made and used within one op, in memory that all ops share under that name."""
    view = _views.get((name, shape, dtype))
    if view is None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        room = _room.get(name)
        if room is None or room.size < size:
            for key in [key for key in _views if key[0] == name]:
                del _views[key]
            _room[name] = room = empty((size,), np.uint8)
        _views[name, shape, dtype] = view = room[:size].view(dtype).reshape(shape)
    return view


# ---- recordings ----
LOG, LONGEST = 1 << 17, 1 << 12  # words of a log, and more than any record has


class _Thread(threading.local):
    recording = None  # that this thread makes


_here = _Thread()


class Recording:
    """What function(*arrays) runs. `replay` runs it for other arrays of the same shapes, without Python
    between the kernels, and writes the array `result`, which function returned, anew.

    A log holds for each launch, in order, its task and a copy of its arguments: shapes, numbers, addresses of
    arrays. So the function must do all arithmetic in kernels or by `host`, and decide nothing by values; a
    replay reads and writes the same memory. What `empty` gives meanwhile is from a shelf for recordings only,
    where it goes again when its arrays die. All recordings share it, since nothing in it outlives a replay:
    whoever needs the result copies it. All other arrays that a launch is handed are kept alive.
    """

    alive = 0

    def __init__(self, function, arrays):
        Recording.alive += 1
        self.inputs = [None if a is None else np.array(a, order="C") for a in arrays]
        self.steps, self.kept, self.log = [], {}, np.empty(LOG, np.int64)
        self.log[0] = 1  # where the next record begins
        _here.recording = self
        try:
            self.result = function(*self.inputs)
        finally:
            _here.recording = None
        self.next_log()
        self.log = None

    def next_log(self):
        """What is in the log becomes a step of its own."""
        if self.log[0] > 1:
            self.steps.append((replay, (_POOL, self.log[: self.log[0]].copy())))
            self.log[0] = 1

    def note(self, args):
        """Keep the arrays of a launch; returns the address of the log."""
        for array in args:
            if isinstance(array, np.ndarray):
                while isinstance(array.base, np.ndarray):
                    array = array.base
                owner = array if array.base is None else array.base
                if getattr(owner, "home", None) is not _arena:
                    self.kept[id(owner)] = owner
        if self.log[0] > LOG - LONGEST:
            self.next_log()
        return self.log.ctypes.data

    def replay(self, arrays):
        for mine, array in zip(self.inputs, arrays):
            if array is not None:
                mine[...] = array
        for function, args in self.steps:
            function(*args)

    def __del__(self):
        self.steps = self.kept = self.result = None
        type(self).alive -= 1


def host(function, *args):
    """function(*args), arrays or the rows of one, which a replay fills anew: the little that NumPy does."""
    made = function(*args)

    def again():
        for old, new in zip(made, function(*args)):
            old[...] = new

    if _here.recording:
        _here.recording.next_log()
        _here.recording.steps.append((again, ()))
    return made


def outside(function, *args):
    """function(*args), as if nothing were recorded: for what is made once, and lasts."""
    before, _here.recording = _here.recording, None
    try:
        return function(*args)
    finally:
        _here.recording = before


def replayed(recordings, name, function, arrays):
    """function(*arrays), a new array: replayed if recordings[name] is of the same shapes, else recorded. Some
    of `arrays` may be None."""
    key = _threads, *(None if a is None else (a.shape, a.dtype) for a in arrays)
    known, record = recordings.pop(name, (None, None))
    if key == known:
        record.replay(arrays)
    else:
        record = None  # its memory is free for the next
        record = Recording(function, arrays)
    recordings[name] = key, record
    out = outside(empty, record.result.shape, record.result.dtype)
    out[...] = record.result
    return out
