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
ROWS_T = {16: 16, 8: 4, 4: 4, 1: 4}[VECTOR]

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


def make_product(rows, transposed=False):
    """C[rows, 16] (+)= A[rows, depth] @ B[depth, 16], all of C in registers.

    A[r, k] is at A[r * lda + k], or at A[k * lda + r] if transposed; row k of B at B[k * ldb], row r of C at
    C[r * ldc]. Each step of the loop over k loads one row of B (NV registers) and, for every row of C,
    spreads one element of A over a register and does NV fused multiply-adds: rows * NV independent ones,
    enough to hide their latency. `add` != 0 adds to what is in C. The sum over k is in order.
    """

    @intrinsic
    def product(typingctx, A, lda, B, ldb, C, ldc, depth, add):
        n = types.intp
        signature = types.void(pointer, n, pointer, n, pointer, n, n, n)

        def codegen(context, b, _, args):
            A, lda, B, ldb, C, ldc, depth, add = args
            i64 = lambda v: ir.Constant(I64, v)  # noqa: E731
            fma = cgutils.get_or_insert_function(
                b.module, ir.FunctionType(VEC, [VEC] * 3), f"llvm.fma.v{VECTOR}f32"
            )
            c_row = [_at(b, C, b.mul(ldc, i64(r))) for r in range(rows)]
            a_row = [_at(b, A, b.mul(lda, i64(r))) for r in range(rows)]
            sums = [cgutils.alloca_once(b, VEC) for _ in range(rows * NV)]  # LLVM turns these into registers
            cells = [(r, j) for r in range(rows) for j in range(NV)]
            adding = b.icmp_signed("!=", add, i64(0))
            for s in sums:
                b.store(_constant(0), s)
            with b.if_then(adding):
                for (r, j), s in zip(cells, sums):
                    b.store(_load(b, _at(b, c_row[r], VECTOR * j)), s)

            def step(k):
                b_row = _at(b, B, b.mul(k, ldb))
                bv = [_load(b, _at(b, b_row, VECTOR * j)) for j in range(NV)]
                a_col = _at(b, A, b.mul(k, lda)) if transposed else None
                for r in range(rows):
                    av = _splat(b, b.load(_at(b, a_col, r) if transposed else _at(b, a_row[r], k)))
                    for j in range(NV):
                        s = sums[r * NV + j]
                        b.store(b.call(fma, [av, bv[j], b.load(s)]), s)

            with cgutils.for_range_slice(b, i64(0), depth, i64(1), I64) as (k, _):
                step(k)
            for (r, j), s in zip(cells, sums):
                _store(b, b.load(s), _at(b, c_row[r], VECTOR * j))
            return context.get_dummy_value()

        return signature, codegen

    return product


class _Vector:
    """An LLVM vector with + - and multiplication by constants, so that a transform is ordinary Python
    arithmetic."""

    FLAGS = ("contract", "nsz", "reassoc")

    def __init__(self, b, value):
        self.b, self.value = b, value

    def __add__(self, other):
        return _Vector(self.b, self.b.fadd(self.value, other.value, flags=self.FLAGS))

    def __sub__(self, other):
        return _Vector(self.b, self.b.fsub(self.value, other.value, flags=self.FLAGS))

    def __rmul__(self, constant):
        return _Vector(self.b, self.b.fmul(_constant(constant), self.value, flags=self.FLAGS))

    def __neg__(self):
        return _Vector(self.b, self.b.fneg(self.value))


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
