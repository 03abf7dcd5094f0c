"""AMX, the matrix unit of Intel's processors since 2023, made to multiply float32.

The unit has eight tiles of 16 rows x 64 bytes. Its one useful instruction multiplies two tiles of bfloat16,
[16, 32] by [32, 16], and adds to a tile of float32, [16, 16]: 16 times the rate of the vector units. A
bfloat16 is the upper half of a float32: 8 bits of significand for 24. So every value is split into two of
them,
    x = hi + lo,   hi = x rounded to bfloat16,   lo = (x - hi) rounded to bfloat16,
which keeps 17 bits, and a product of float32 matrices becomes three of bfloat16,
    x w = hi hi + hi lo + lo hi   (+ lo lo, of the size of what was rounded off, dropped).
Its relative error is about 4e-6 RMS, next to that of Winograd's F(4x4) in float32; sums are in float32
throughout.

Memory holds "words" of 32 bits, two bfloat16 each: the values of two neighbours along the sum. A tile of A
has 16 words in a row (32 values along the sum); a tile of B has a row for each of the same 16 words. Which 32
values, in which order, does not matter as long as both agree. Where there is no such unit,
NANODIFF_AMX=emulate runs the same code with tiles in ordinary memory: for tests, slowly.
"""

import functools
import itertools

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.compiler import Flags
from numba.extending import intrinsic

from nanodiff.kernels.parallel_cpu import AMX
from nanodiff.kernels.simd_cpu import F32, I32, I64, _prefetch, _Vector, addresses, pointer, split_words

I8, I8P, VOID = ir.IntType(8), ir.IntType(8).as_pointer(), ir.VoidType()
WORDS, FLOATS = ir.VectorType(I32, 16), ir.VectorType(F32, 16)
TILE = 256  # words of a tile


class _Unit:
    """Emits the instructions of the matrix unit."""

    def __init__(self, b):
        self.b = b

    def call(self, name, *args):
        ftype = ir.FunctionType(VOID, [a.type for a in args])
        self.b.call(cgutils.get_or_insert_function(self.b.module, ftype, f"llvm.x86.{name}"), args)

    def begin(self):
        setup = np.zeros(64, np.uint8)  # palette 1; bytes in a row and rows of all eight tiles
        setup[0], setup[16:32:2], setup[48:56] = 1, 64, 16
        data = ir.Constant(ir.ArrayType(I8, 64), bytearray(setup.tobytes()))
        self.call("ldtilecfg", self.b.bitcast(cgutils.global_constant(self.b, "tiles", data), I8P))

    def end(self):
        self.call("tilerelease")

    def load(self, tile, p, row):  # row: words from one row of the tile to the next
        bytes_ = self.b.shl(row, ir.Constant(I64, 2))
        self.call("tileloadd64", ir.Constant(I8, tile), self.b.bitcast(p, I8P), bytes_)

    def store(self, tile, p, row):
        bytes_ = self.b.shl(row, ir.Constant(I64, 2))
        self.call("tilestored64", ir.Constant(I8, tile), self.b.bitcast(p, I8P), bytes_)

    def product(self, c, x, y):
        self.call("tdpbf16ps", *(ir.Constant(I8, tile) for tile in (c, x, y)))


class _Emulated(_Unit):
    """The same with tiles in memory."""

    def __init__(self, b):
        self.b = b
        self.tiles = [cgutils.alloca_once(b, I32, TILE) for _ in range(8)]

    def begin(self):
        pass

    end = begin

    def row(self, p, offset, kind=WORDS):
        return self.b.bitcast(self.b.gep(p, [offset]), kind.as_pointer())

    def load(self, tile, p, row):
        b, p = self.b, self.b.bitcast(p, I32.as_pointer())
        with cgutils.for_range(b, ir.Constant(I64, 16)) as loop:
            words = b.load(self.row(p, b.mul(loop.index, row)), align=4)
            b.store(words, self.row(self.tiles[tile], b.shl(loop.index, ir.Constant(I64, 4))), align=4)

    def store(self, tile, p, row):
        b, p = self.b, self.b.bitcast(p, I32.as_pointer())
        with cgutils.for_range(b, ir.Constant(I64, 16)) as loop:
            words = b.load(self.row(self.tiles[tile], b.shl(loop.index, ir.Constant(I64, 4))), align=4)
            b.store(words, self.row(p, b.mul(loop.index, row)), align=4)

    def product(self, c, x, y):
        """c[m, :] += low(x[m, k]) low(y[k, :]) + high(x[m, k]) high(y[k, :]), for each word k."""
        b, four, upper = self.b, ir.Constant(I64, 4), ir.Constant(WORDS, [0xFFFF0000] * 16)
        with cgutils.for_range(b, ir.Constant(I64, 16)) as m:
            out = self.row(self.tiles[c], b.shl(m.index, four), FLOATS)
            with cgutils.for_range(b, ir.Constant(I64, 16)) as k:
                word = b.load(b.gep(self.tiles[x], [b.add(b.shl(m.index, four), k.index)]))
                a = _splat(b, word)
                w = b.load(self.row(self.tiles[y], b.shl(k.index, four)), align=4)
                total = b.load(out, align=4)
                for half in (lambda v: b.shl(v, _words(16)), lambda v: b.and_(v, upper)):
                    total = b.fadd(total, b.fmul(b.bitcast(half(a), FLOATS), b.bitcast(half(w), FLOATS)))
                b.store(total, out, align=4)


def _unit(b):
    return (_Emulated if AMX == 2 else _Unit)(b)


def _words(value):
    return ir.Constant(WORDS, [value] * 16)


def _splat(b, word):
    undef = ir.Constant(WORDS, ir.Undefined)
    return b.shuffle_vector(b.insert_element(undef, word, ir.Constant(I32, 0)), undef, _words(0))


def _load(b, p, kind=FLOATS):
    return b.load(b.bitcast(p, kind.as_pointer()), align=4)


def _store(b, v, p):
    b.store(v, b.bitcast(p, v.type.as_pointer()), align=4)


@intrinsic
def begin(typingctx):
    """Set up this thread's tiles: before the first product of a job."""

    def codegen(context, b, signature, args):
        _unit(b).begin()
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def end(typingctx):
    """Give the tiles back, at the end of a job: the system then need not save them."""

    def codegen(context, b, signature, args):
        _unit(b).end()
        return context.get_dummy_value()

    return types.void(), codegen


def _product(b, args, ahead, beside=(), then=lambda: None):
    """ahead: see tile_product; beside: each of up to 12 emits what follows a product of a step; then: what
    follows the last."""
    A, steps, a_row, a_lo, a_half, B, b_step, b_row, b_lo, b_half = args[:10]
    I0, I1, i_row, i_half, C0, C1, c_row, c_half, depth = args[10:19]
    unit = _unit(b)
    at = lambda p, *offsets: p if not offsets else at(b.gep(p, [offsets[0]]), *offsets[1:])  # noqa: E731
    for i, p in enumerate((I0, at(I0, i_half), I1, at(I1, i_half))):
        unit.load(i, p, i_row)

    # tiles 4, 5: the halves of A; 6, 7: those of B. Each load stands right before its first use: the unit
    # multiplies while the next operand comes.
    with cgutils.for_range(b, depth) as loop:
        a, w = at(A, b.load(at(steps, loop.index))), at(B, b.mul(loop.index, b_step))

        more, lines = iter(beside), itertools.count()

        def product(*sums):
            for i in sums:
                unit.product(i, 4 + i // 2, 6 + i % 2)
                next(more, lambda: None)()
                if ahead:
                    line = ir.Constant(I64, 16 * next(lines))
                    _prefetch(b, at(ahead[0], b.add(b.mul(loop.index, ahead[1]), line)))

        unit.load(4, a, a_row)  # hi
        unit.load(6, at(w, b_lo), b_row)
        product(0)
        unit.load(7, at(w, b_lo, b_half), b_row)
        product(1)
        unit.load(5, at(a, a_half), a_row)
        product(2)
        unit.load(6, w, b_row)  # hi
        product(3, 0)
        unit.load(7, at(w, b_half), b_row)
        product(2, 1)
        unit.load(4, at(a, a_lo), a_row)
        product(3, 0)
        unit.load(5, at(a, a_lo, a_half), a_row)
        product(1, 2, 3)
        then()
    for i, p in enumerate((C0, at(C0, c_half), C1, at(C1, c_half))):
        unit.store(i, p, c_row)


_n = types.intp
_PRODUCT = (
    pointer, addresses, _n, _n, _n, pointer, _n, _n, _n, _n,
    pointer, pointer, _n, _n, pointer, pointer, _n, _n, _n,
)  # fmt: skip


@intrinsic
def tile_product(
    typingctx, A, steps, a_row, a_lo, a_half, B, b_step, b_row, b_lo, b_half,
    I0, I1, i_row, i_half, C0, C1, c_row, c_half, depth, *ahead,
):  # fmt: skip
    """C = I + A[32, 32 * depth] @ B[32 * depth, 32] in float32, by three products of bfloat16.

    Step k of the sum reads A at A + steps[k] and B at B + k * b_step. Each has two halves (of 16 rows of A,
    of 16 columns of B) a_half or b_half apart, each half a tile of hi and, lo words further on, one of lo,
    whose rows lie row words apart. C is four tiles: 16 rows by 16 columns at C0, 16 columns more c_half
    further on, and the same of the lower 16 rows at C1; likewise I, where i_row = 0 repeats one row. Four
    tiles hold sums and four operands, so that a step is 12 products (16 cycles each) and 8 loads (8 each).

    `ahead`, if given, is an address and floats: step k asks for 12 cache lines from address + k * floats on,
    one behind each product, since many at once would keep the loads of operands waiting.
    """

    def codegen(context, b, _, args):
        _product(b, args, cgutils.unpack_tuple(b, args[-1]))
        return context.get_dummy_value()

    return types.void(*_PRODUCT, types.StarArgTuple(ahead)), codegen


def _split(b, x, y, hi, lo):
    """The words of 16 floats each (split_words), at hi and at lo."""
    for v, p in zip(split_words(_Vector(b, x), _Vector(b, y)), (hi, lo)):
        _store(b, v.value, p)


@intrinsic
def split_pair(typingctx, x, y, hi, lo):
    """The words of the 16 floats at x and at y (_split)."""

    def codegen(context, b, signature, args):
        x, y, hi, lo = args
        _split(b, _load(b, x), _load(b, y), hi, lo)
        return context.get_dummy_value()

    return types.void(pointer, pointer, pointer, pointer), codegen


class _InOrder(_Vector):
    """Sums as they are written: where a transform is compiled twice, beside products and alone, it must give
    the same bits."""

    FLAGS = ("contract",)


def make_split(rule, n, parts=(slice(None),)):
    """A 1-D transform on the way into words:
    split(part, table, count, offset, move, target, next, stride, lo).

    The first half of the words are the 16 floats `offset` after the addresses table[j], j < n, the second
    those after table[n + j]. Of the results only those in parts[part] are made: number f of them goes to
    target + f * stride, its lo `lo` words on. `count` times: each time the floats are `move` further on, the
    results `next`."""

    @intrinsic
    def split(typingctx, part, table, count, offset, move, target, next, stride, lo):
        def codegen(context, b, signature, args):
            part, table, count, offset, move, target, next, stride, lo = args
            at = lambda p, i: b.gep(p, [i])  # noqa: E731
            starts = [
                at(b.inttoptr(b.load(at(table, ir.Constant(I64, i))), F32.as_pointer()), offset)
                for i in range(2 * n)
            ]
            for number, results in enumerate(parts):
                with (
                    b.if_then(b.icmp_signed("==", part, ir.Constant(I64, number))),
                    cgutils.for_range(b, count) as loop,
                ):
                    shift, to = b.mul(loop.index, move), at(target, b.mul(loop.index, next))
                    values = [_InOrder(b, _load(b, at(p, shift))) for p in starts]
                    pairs = zip(rule(*values[:n])[results], rule(*values[n:])[results])
                    for f, (x, y) in enumerate(pairs):
                        hi = at(to, b.mul(stride, ir.Constant(I64, f)))
                        _split(b, x.value, y.value, hi, at(hi, lo))
            return context.get_dummy_value()

        i = types.intp
        return types.void(i, addresses, i, i, i, pointer, i, i, i), codegen

    return split


def make_merge(rule, n):
    """A 1-D transform on the way out of tiles of sums: merge(source, stride, half, to, step, more, bias).

    Value f of the rule is a run of 16 floats at source + f * stride, and a second one `half` further on.
    Result j, plus `bias`, plus what is at more + j * step, goes to to + j * step: 32 floats."""

    @intrinsic
    def merge(typingctx, source, stride, half, to, step, more, more_step, bias):
        def codegen(context, b, signature, args):
            source, stride, half, to, step, more, more_step, bias = args

            def at(p, i, j, d):
                return b.gep(p, [b.add(b.mul(i, ir.Constant(I64, j)), ir.Constant(I64, d))])

            for h in range(2):
                here = at(source, half, h, 0)
                plus = _InOrder(b, _load(b, b.gep(bias, [ir.Constant(I64, 16 * h)])))
                values = (_load(b, at(here, stride, f, 0)) for f in range(n))
                for j, y in enumerate(rule(*(_InOrder(b, v) for v in values))):
                    y = y + plus + _InOrder(b, _load(b, at(more, more_step, j, 16 * h)))
                    _store(b, y.value, at(to, step, j, 16 * h))
            return context.get_dummy_value()

        i = types.intp
        return types.void(pointer, i, i, pointer, i, pointer, i, pointer), codegen

    return merge


# What product_beside finds in its table. To split: where the addresses of six inputs are, floats to skip
# there; where the words go, floats from one line of them to the next and from hi to lo. To merge: where a
# row's entry is, the first sums, floats from one line of them to the next, and bytes to skip at the addresses
# in the entry.
INPUTS, SKIP, WORDS_TO, WORDS_LINE, LO, ENTRY, SUMS, SUMS_LINE, PANEL = range(9)
# A row's entry: bytes from the first sums to its own, the address of its results and floats from one to the
# next, what to add to them, likewise, and what to add to all.
OWN, RESULTS, STEP_R, MORE, STEP_M, BIAS, ENTRY_SIZE = 0, 1, 2, 3, 4, 5, 8


def _beside(b, table, split, merge):
    """Twelve pieces of work: six inputs each of two runs to six words (split), six runs of sums, twice, to
    four results each (merge)."""
    i64 = functools.partial(ir.Constant, I64)
    number = lambda p, i: b.load(b.gep(p, [i64(i)]))  # noqa: E731
    run = lambda address, skip: b.gep(b.inttoptr(address, F32.as_pointer()), [skip])  # noqa: E731
    steps = lambda step, i, more=0: b.add(b.mul(step, i64(i)), i64(more))  # noqa: E731
    lines, results = [], []

    def gather(more):
        inputs = b.inttoptr(number(table, INPUTS), I64.as_pointer())
        skip = b.add(number(table, SKIP), i64(more))
        lines.append(split(*(_InOrder(b, _load(b, run(number(inputs, i), skip))) for i in range(6))))

    def word(f):
        hi = run(number(table, WORDS_TO), steps(number(table, WORDS_LINE), f))
        _split(b, lines[0][f].value, lines[1][f].value, hi, b.gep(hi, [number(table, LO)]))

    def entry(i):
        return number(b.inttoptr(number(table, ENTRY), I64.as_pointer()), i)

    def gather_sums(half):
        first, line = b.add(number(table, SUMS), entry(OWN)), number(table, SUMS_LINE)
        values = (_load(b, run(first, steps(line, f, 256 * half))) for f in range(6))
        results.append(merge(*(_InOrder(b, v) for v in values)))

    def write(half):
        skip, step, more_step = number(table, PANEL), entry(STEP_R), entry(STEP_M)
        to, more, bias = (b.add(entry(i), skip) for i in (RESULTS, MORE, BIAS))
        bias = _InOrder(b, _load(b, run(bias, i64(16 * half))))
        for j, y in enumerate(results[half]):
            y = y + bias + _InOrder(b, _load(b, run(more, steps(more_step, j, 16 * half))))
            _store(b, y.value, run(to, steps(step, j, 16 * half)))

    pieces = [(gather, 0), (gather, 16), *((word, f) for f in range(6))]
    pieces += [(gather_sums, 0), (write, 0), (gather_sums, 1), (write, 1)]
    return [functools.partial(*piece) for piece in pieces]


def make_beside(split, merge):
    """(product_beside, split, merge): a product beside which the processor does other work; each work alone.

    product_beside(on, table, *arguments of tile_product): the table says where the work of a step is, one
    `split` and one `merge`, 1-D transforms like those of make_split and make_merge; after each step
    on(table), a Numba function, moves on to the next. The unit takes 16 cycles for each product, and the
    processor runs ahead of it by some 500 instructions. That is why the work comes in twelve pieces, one
    behind each product: all of it behind the last one would fill that window while the unit waits (86 for
    68 ns a step)."""

    def call(context, b, function, table):
        flags, sig = Flags(), types.void(addresses)
        flags.error_model, flags.nrt, flags.forceinline = "numpy", True, True
        compiled = context.compile_subroutine(b, function.dispatcher.py_func, sig, flags=flags)
        context.call_internal_no_propagate(b, compiled.fndesc, sig, [table])

    @intrinsic
    def product_beside(
        typingctx, on, table, A, steps, a_row, a_lo, a_half, B, b_step, b_row, b_lo, b_half,
        I0, I1, i_row, i_half, C0, C1, c_row, c_half, depth, *ahead,
    ):  # fmt: skip
        def codegen(context, b, _, args):
            then = functools.partial(call, context, b, on, args[1])
            ahead = cgutils.unpack_tuple(b, args[-1])
            _product(b, args[2:], ahead, _beside(b, args[1], split, merge), then)
            return context.get_dummy_value()

        return types.void(on, addresses, *_PRODUCT, types.StarArgTuple(ahead)), codegen

    def alone(pieces):
        @intrinsic
        def work(typingctx, table):
            def codegen(context, b, _, args):
                for piece in _beside(b, args[0], split, merge)[pieces]:
                    piece()
                return context.get_dummy_value()

            return types.void(addresses), codegen

        return work

    return product_beside, alone(slice(8)), alone(slice(8, 12))


@intrinsic
def transpose16(typingctx, source, row, target):
    """target[j, i] = source[i, j] for 16 x 16 words; rows of the source lie `row` words apart."""

    def codegen(context, b, signature, args):
        source, row, target = args
        rows = [_load(b, b.gep(source, [b.mul(row, ir.Constant(I64, i))]), WORDS) for i in range(16)]
        # exchange the off-diagonal blocks of size 8, 4, 2, 1
        for size in (8, 4, 2, 1):
            first = [c if not c & size else 16 + c - size for c in range(16)]
            second = [c + size if not c & size else 16 + c for c in range(16)]
            for i in (r for r in range(16) if not r & size):
                pair = rows[i], rows[i + size]
                for j, lanes in ((i, first), (i + size, second)):
                    mask = ir.Constant(ir.VectorType(I32, 16), lanes)
                    rows[j] = b.shuffle_vector(*pair, mask)
        for i, r in enumerate(rows):
            _store(b, r, b.gep(target, [ir.Constant(I64, 16 * i)]))
        return context.get_dummy_value()

    return types.void(pointer, types.intp, pointer), codegen


@intrinsic
def tile_plus(typingctx, x, y, target, row):
    """target = x + y for 16 x 16 floats: x is a tile, rows of y and of the target lie `row` floats apart."""

    def codegen(context, b, signature, args):
        x, y, target, row = args
        for i in range(16):
            here = b.mul(row, ir.Constant(I64, i))
            total = b.fadd(_load(b, b.gep(x, [ir.Constant(I64, 16 * i)])), _load(b, b.gep(y, [here])))
            _store(b, total, b.gep(target, [here]))
        return context.get_dummy_value()

    return types.void(pointer, pointer, pointer, types.intp), codegen


@intrinsic
def add_runs(typingctx, x, y, z, target):
    """target = x + y + z, 16 floats each."""

    def codegen(context, b, signature, args):
        x, y, z, target = args
        _store(b, b.fadd(b.fadd(_load(b, x), _load(b, y)), _load(b, z)), target)
        return context.get_dummy_value()

    return types.void(pointer, pointer, pointer, pointer), codegen
