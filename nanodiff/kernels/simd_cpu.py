"""The SIMD building blocks: a matrix micro-kernel and 2-D tile transforms, emitted as LLVM IR from Numba.

Numba compiles loops well, but it cannot be told to keep a tile of a matrix product in registers. So the few
inner loops that decide the speed are written one level lower, as LLVM instructions, and called from ordinary
Numba functions. `VECTOR` is the number of floats in a register: 16 (AVX-512), 8 (AVX2), 4 (NEON), 1 (none).
Whatever the machine, a panel of weights is PANEL = 16 floats wide, so that every layout is the same
everywhere.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from nanodiff.kernels.parallel_cpu import VECTOR

PANEL = 16
NV = PANEL // VECTOR  # registers across a panel
# Rows of the register tile: ROWS * NV accumulators, NV registers for a row of B and one for an element of A
# must fit in 32 registers (AVX-512, NEON) or 16 (AVX2: 6*2 + 2 + 1 = 15).
ROWS = {16: 12, 8: 6, 4: 6, 1: 4}[VECTOR]
# The same for the transposed product of weight gradients, whose rows are channels: a divisor of 16.
ROWS_T = {16: 8, 8: 4, 4: 4, 1: 4}[VECTOR]
WIDE = {16: 2, 8: 1, 4: 1, 1: 1}[VECTOR]  # panels multiplied at a time, where there are as many
UNROLL = 4  # steps along the sum before the addresses move on

# Registers across the channels of a pixel that make_rows works on at a time.
AHEAD = {16: 4, 8: 2, 4: 4, 1: 1}[VECTOR]
# Rows ahead of the one at work, whose cache lines it asks for: the processor's own guesses end with a page.
SOON = 16

F32, I32, I64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
VEC = ir.VectorType(F32, VECTOR)
pointer = types.CPointer(types.float32)
addresses = types.CPointer(types.int64)


def _splat(b, scalar):
    undef = ir.Constant(VEC, ir.Undefined)
    lanes = ir.Constant(ir.VectorType(I32, VECTOR), [0] * VECTOR)
    return b.shuffle_vector(b.insert_element(undef, scalar, ir.Constant(I32, 0)), undef, lanes)


def _constant(x):
    return ir.Constant(VEC, [ir.Constant(F32, float(x))] * VECTOR)


def _load(b, p):
    return b.load(b.bitcast(p, VEC.as_pointer()), align=4)


def _store(b, v, p):
    b.store(v, b.bitcast(p, VEC.as_pointer()), align=4)


def _at(b, p, *offsets):
    for offset in offsets:
        p = b.gep(p, [offset if isinstance(offset, ir.Value) else ir.Constant(I64, offset)])
    return p


def _prefetch(b, p):
    """Ask for the cache line at an address, which may be past the end of its array."""
    i8p = ir.IntType(8).as_pointer()
    ftype = ir.FunctionType(ir.VoidType(), [i8p, I32, I32, I32])
    function = cgutils.get_or_insert_function(b.module, ftype, "llvm.prefetch.p0i8")
    read, nearest, data = (ir.Constant(I32, n) for n in (0, 3, 1))
    b.call(function, [b.bitcast(p, i8p), read, nearest, data])


def make_product(rows, transposed=False, panels=1):
    """C[rows, 16] (+)= A[rows, depth] @ B[depth, 16], all of C in registers.

    A[r, k] is at A[r * lda + k], or at A[k * lda + r] if transposed; row k of B at B[k * ldb], row r of C at
    C[r * ldc]. Each step of the loop over k loads one row of B (NV registers) and, for every row of C,
    spreads one element of A over a register and does NV fused multiply-adds: rows * NV independent ones,
    enough to hide their latency. Additions of addresses would take the place of some of these: they come once
    for UNROLL steps. `add` != 0 adds to what is in C. The sum over k is in order.

    With `panels` = 2 an element that was spread is used twice: product(..., next_b, next_c) does the same for
    the panel of B that lies next_b floats further on, into C + next_c.
    """

    @intrinsic
    def product(typingctx, A, lda, B, ldb, C, ldc, depth, add, *apart):
        n = types.intp
        signature = types.void(pointer, n, pointer, n, pointer, n, n, n, types.StarArgTuple([n] * len(apart)))

        def codegen(context, b, _, args):
            A, lda, B, ldb, C, ldc, depth, add = args[:8]
            i64 = lambda v: ir.Constant(I64, v)  # noqa: E731
            fma = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(VEC, [VEC] * 3), f"llvm.fma.v{VECTOR}f32"
            )
            next_b, next_c = cgutils.unpack_tuple(b, args[8]) if panels > 1 else (i64(0), i64(0))
            b_panel = [_at(b, B, b.mul(next_b, i64(p))) for p in range(panels)]
            c_panel = [_at(b, C, b.mul(next_c, i64(p))) for p in range(panels)]
            cells = [(r, p, j) for r in range(rows) for p in range(panels) for j in range(NV)]
            sums = [cgutils.alloca_once(b, VEC) for _ in cells]  # LLVM turns these into registers
            place = [_at(b, c_panel[p], b.mul(ldc, i64(r)), VECTOR * j) for r, p, j in cells]
            adding = b.icmp_signed("!=", add, i64(0))
            for s in sums:
                b.store(_constant(0), s)
            with b.if_then(adding):
                for c, s in zip(place, sums):
                    b.store(_load(b, c), s)
            # pointers that move on with k, one for `reach` rows: the others are one or two lda away, or, if
            # transposed, some numbers, and both an instruction adds to its address for nothing
            (row, step), reach = ((i64(1), lda), rows) if transposed else ((lda, i64(1)), 3)
            starts = [_at(b, A, b.mul(row, i64(r))) for r in range(0, rows, reach)] + b_panel
            moves = [step] * (len(starts) - panels) + [ldb] * panels
            moving = [cgutils.alloca_once(b, p.type) for p in starts]
            for slot, p in zip(moving, starts):
                b.store(p, slot)
            for count, unrolled in ((b.sdiv(depth, i64(UNROLL)), UNROLL), (b.srem(depth, i64(UNROLL)), 1)):
                with cgutils.for_range(b, count):
                    now = [b.load(slot) for slot in moving]
                    for k in range(unrolled):
                        b_row = [_at(b, p, b.mul(ldb, i64(k))) for p in now[-panels:]]
                        bv = [_load(b, _at(b, p, VECTOR * j)) for p in b_row for j in range(NV)]
                        for r in range(rows):
                            element = _at(b, now[r // reach], b.mul(row, i64(r % reach)), b.mul(step, i64(k)))
                            av = _splat(b, b.load(element))
                            for s, v in zip(sums[r * len(bv) :], bv):
                                b.store(b.call(fma, [av, v, b.load(s)]), s)
                    for slot, p, move in zip(moving, now, moves):
                        b.store(_at(b, p, b.mul(move, i64(unrolled))), slot)
            for c, s in zip(place, sums):
                _store(b, b.load(s), c)
            return context.get_dummy_value()

        return signature, codegen

    return product


class _Vector:
    """An LLVM vector with + - * / and exp, so that a rule for one element is ordinary Python arithmetic."""

    FLAGS = ("contract", "nsz", "reassoc")

    def __init__(self, b, value):
        self.b, self.value = b, value

    def like(self, x, element=F32):
        """The number x in every lane of a vector like this one (or a scalar)."""
        lanes = getattr(self.value.type, "count", 0)
        x = ir.Constant(element, np.float32(x) if element == F32 else x)
        return ir.Constant(ir.VectorType(element, lanes), [x] * lanes) if lanes else x

    def of(self, x):
        return x.value if isinstance(x, _Vector) else self.like(x)

    def __add__(self, other):
        return type(self)(self.b, self.b.fadd(self.value, self.of(other), flags=self.FLAGS))

    def __sub__(self, other):
        return type(self)(self.b, self.b.fsub(self.value, self.of(other), flags=self.FLAGS))

    def __mul__(self, other):
        return type(self)(self.b, self.b.fmul(self.value, self.of(other), flags=self.FLAGS))

    __radd__, __rmul__ = __add__, __mul__

    def __rsub__(self, other):
        return type(self)(self.b, self.b.fsub(self.of(other), self.value, flags=self.FLAGS))

    def __rtruediv__(self, other):
        return _Vector(self.b, self.b.fdiv(self.of(other), self.value))

    def __neg__(self):
        return _Vector(self.b, self.b.fneg(self.value))

    def plus_in_order(self, other):
        """A sum that keeps its place in a chain of sums."""
        return _Vector(self.b, self.b.fadd(self.value, other.value, flags=("contract",)))

    def exp(self):
        """exp(x) = 2^n 2^f, n the integer nearest to z = x / ln 2, f = z - n. The sum of z and 1.5 2^23 + 127
        has no bits for a fraction, and its last ones are n + 127, the exponent bits of 2^n. 2^f is the
        polynomial of degree 5 with the smallest error, 1.6e-7; that of f adds 1.3e-8 |x|. x is held within
        +-87, where float32 ends."""
        b, kind = self.b, self.value.type
        high = b.select(b.fcmp_unordered("<", self.value, self.of(87)), self.value, self.of(87))
        x = b.select(b.fcmp_unordered(">", high, self.of(-87)), high, self.of(-87))
        name = "llvm.fmuladd." + (f"v{kind.count}f32" if kind != F32 else "f32")
        fma = cgutils.get_or_insert_function(b.module, ir.FunctionType(kind, [kind] * 3), name)
        scale, big = self.of(1.44269504), self.of(1.5 * 2**23 + 127)
        rounded = b.call(fma, [x, scale, big])
        f = _Vector(b, b.call(fma, [x, scale, b.fsub(big, rounded)]))
        p = f * 0.00132647087 + 0.00967151113
        for c in (0.0555073395, 0.240222424, 0.693147004, 1):
            p = p * f + c
        power = b.shl(b.bitcast(rounded, self.like(0, I32).type), self.like(23, I32))
        return p * _Vector(b, b.bitcast(power, kind))


def sigmoid(y):
    """1 / (1 + exp(-y)), with an estimate of the reciprocal made precise where the machine has one."""
    d = 1 + (-y).exp()
    return _Vector(y.b, y.b.fdiv(y.of(1), d.value, flags=("arcp",)))


def choose(x, a, b):
    """a where x > 0, else b (where x is not a number, too)."""
    return _Vector(x.b, x.b.select(x.b.fcmp_ordered(">", x.value, x.of(0)), x.of(a), x.of(b)))


def split_words(x, y):
    """Words of two bfloat16 each (tiles_cpu.py) for elements x and y: hi, of those nearest to x and y, and
    lo, of those nearest to what is left."""
    b, word, left, words = x.b, x.like(0, I32).type, [x.value, y.value], []
    for _ in range(2):
        rounded = []
        # to nearest, by adding half of the last kept bit; infinity and NaN survive
        for i, v in enumerate(left):
            up = b.add(b.bitcast(v, word), x.like(0x8000, I32))
            rounded.append(b.and_(up, x.like(0xFFFF0000, I32)))
            left[i] = b.fsub(v, b.bitcast(rounded[i], v.type))
        words.append(_Vector(b, b.or_(b.lshr(rounded[0], x.like(16, I32)), rounded[1])))
    return words


def make_rows(rule, inputs, constants, sums, output=1, combine=_Vector.plus_in_order, soon=SOON):
    """A rule for the elements of matrices (rows, C), channel by channel: every channel has its own constants
    and sums over the rows, which stay in registers while the rows pass.

    rule(*elements of `inputs` matrices, *`constants`) -> `output` elements, then a term for each sum. Called
    with a table of the addresses of inputs and outputs, the first row and the end of them, the floats from
    row to row, the channels, the constants [constants, ld] and the sums [sums, ld]. Rows `soon` further on
    are asked for (0: none, where all is in the caches).
    """

    @intrinsic
    def over_rows(typingctx, table, start, stop, row, channels, constant, sum, ld):
        n = types.intp
        signature = types.void(addresses, n, n, n, n, pointer, pointer, n)

        def codegen(context, b, _, args):
            table, start, stop, row, channels, constant, sum, ld = args
            i64 = lambda v: ir.Constant(I64, v)  # noqa: E731
            starts = [b.inttoptr(b.load(_at(b, table, i)), F32.as_pointer()) for i in range(inputs + output)]
            done = i64(0)
            # as many channels at a time as registers allow; then one vector at a time; then one channel
            for vectors, lanes in dict.fromkeys(((AHEAD, VECTOR), (1, VECTOR), (1, 1))):
                kind, step = ir.VectorType(F32, lanes) if lanes > 1 else F32, vectors * lanes

                def load(p, kind=kind):
                    return _Vector(b, b.load(b.bitcast(p, kind.as_pointer()), align=4))

                def store(v, p):
                    b.store(v.value, b.bitcast(p, v.value.type.as_pointer()), align=4)

                end = b.add(done, b.mul(b.sdiv(b.sub(channels, done), i64(step)), i64(step)))
                with cgutils.for_range_slice(b, done, end, i64(step), I64) as (first, _):
                    at = [b.add(first, i64(lanes * u)) for u in range(vectors)]
                    known = [
                        [load(_at(b, constant, b.mul(ld, i64(k)), c)) for k in range(constants)] for c in at
                    ]
                    totals = [[cgutils.alloca_once(b, kind) for _ in range(sums)] for _ in at]
                    for c, ts in zip(at, totals):
                        for k, total in enumerate(ts):
                            b.store(load(_at(b, sum, b.mul(ld, i64(k)), c)).value, total)
                    with cgutils.for_range_slice(b, start, stop, i64(1), I64) as (r, _):
                        here = b.mul(r, row)
                        later = b.mul(b.add(r, i64(soon)), row)
                        for p in starts if lanes > 1 and soon else ():
                            for c in at:
                                _prefetch(b, _at(b, p, later, c))
                        for c, ks, ts in zip(at, known, totals):
                            made = rule(*(load(_at(b, p, here, c)) for p in starts[:inputs]), *ks)
                            for p, out in zip(starts[inputs:], made):
                                store(out, _at(b, p, here, c))
                            for total, term in zip(ts, made[output:], strict=True):
                                b.store(combine(_Vector(b, b.load(total)), term).value, total)
                    for c, ts in zip(at, totals):
                        for k, total in enumerate(ts):
                            store(_Vector(b, b.load(total)), _at(b, sum, b.mul(ld, i64(k)), c))
                done = end
            return context.get_dummy_value()

        return signature, codegen

    return over_rows


def make_transform(rule, n, back=False, bias=False, add=False, residual=False):
    """Y = F X F^T for n x n values X, the 1-D transform F given as a Python function of n values that returns
    m.

    Pixels (or taps) of a tile lie anywhere: value i, j is a run of `channels` floats (a multiple of 16) at
    the address table[i, j], so borders and layouts are all in that table. Frequencies lie `stride` floats
    apart. The transform goes from pixels to frequencies, or `back`. `bias`: a run added to every output.
    `add`: the outputs are added to what is there. `residual`: the table goes on with the addresses of m * m
    runs to be added.
    """
    m = len(rule(*np.zeros(n)))

    @intrinsic
    def transform(typingctx, table, frequency, stride, channels, bias_run):
        signature = types.void(addresses, pointer, types.intp, types.intp, pointer)

        def codegen(context, b, _, args):
            table, frequency, stride, channels, bias_run = args

            def pixel(i):
                return b.inttoptr(b.load(_at(b, table, i)), F32.as_pointer())

            def frequency_at(i):
                return _at(b, frequency, b.mul(stride, ir.Constant(I64, i)))

            source, target = (frequency_at, pixel) if back else (pixel, frequency_at)
            step = ir.Constant(I64, VECTOR)
            with cgutils.for_range_slice(b, ir.Constant(I64, 0), channels, step, I64) as (c, _):
                columns = []
                for j in range(n):
                    values = (_load(b, _at(b, source(i * n + j), c)) for i in range(n))
                    columns.append(rule(*[_Vector(b, v) for v in values]))
                for i in range(m):
                    for j, y in enumerate(rule(*[columns[j][i] for j in range(n)])):
                        p = _at(b, target(i * m + j), c)
                        y = y + _Vector(b, _load(b, _at(b, bias_run, c))) if bias else y
                        y = y + _Vector(b, _load(b, p)) if add else y
                        y = y + _Vector(b, _load(b, _at(b, pixel((m + i) * m + j), c))) if residual else y
                        _store(b, y.value, p)
            return context.get_dummy_value()

        return signature, codegen

    return transform


def _data_pointer(element):
    @intrinsic
    def data_pointer(typingctx, array, offset):
        def codegen(context, b, signature, args):
            return b.gep(context.make_array(signature.args[0])(context, b, args[0]).data, [args[1]])

        return types.CPointer(element)(array, types.intp), codegen

    return data_pointer


at = _data_pointer(types.float32)  # at(a, i): the address of a.flat[i] of a contiguous float32 array
table_at = _data_pointer(types.int64)  # the same of an int64 array of addresses


@intrinsic
def shift(typingctx, address, offset):
    """The address `offset` floats further on."""

    def codegen(context, b, signature, args):
        return b.gep(args[0], [args[1]])

    return pointer(pointer, types.intp), codegen


def _pointer_from(kind, element):
    @intrinsic
    def pointer_from(typingctx, address):
        def codegen(context, b, signature, args):
            return b.inttoptr(args[0], element.as_pointer())

        return kind(types.int64), codegen

    return pointer_from


run_at, numbers_at = _pointer_from(pointer, F32), _pointer_from(addresses, I64)  # of an address, a number


@intrinsic
def prefetch(typingctx, address, floats):
    """Ask for the cache lines of a run that is needed soon."""

    def codegen(context, b, signature, args):
        with cgutils.for_range_slice(b, ir.Constant(I64, 0), args[1], ir.Constant(I64, 16), I64) as (i, _):
            _prefetch(b, _at(b, args[0], i))
        return context.get_dummy_value()

    return types.void(pointer, types.intp), codegen


@intrinsic
def zero_run(typingctx, address):
    """Zero the 16 floats at an address on a cache line, past the caches: they will not be read soon."""

    def codegen(context, b, signature, args):
        for j in range(NV):
            store = b.store(
                _constant(0), b.bitcast(_at(b, args[0], VECTOR * j), VEC.as_pointer()), align=4 * VECTOR
            )
            store.set_metadata("nontemporal", b.module.add_metadata([ir.Constant(I32, 1)]))
        return context.get_dummy_value()

    return types.void(pointer), codegen


def larger(x, y):
    return _Vector(x.b, x.b.select(x.b.fcmp_ordered(">", x.value, y.value), x.value, y.value))
