"""What lies between the large kernels of an op: zeros, sums of partial sums, rows made longer. They are
launches, not NumPy's, so that a step can be recorded (parallel_cpu.py)."""

from nanodiff.kernels.parallel_cpu import empty, parallel
from nanodiff.kernels.simd_cpu import at, zero_run

CHUNK, ROWS = 1 << 15, 256  # floats, rows of a job


@parallel
def zero_chunk(job, worker, x):  # (n,), which starts on a cache line and has the last one to itself
    for i in range(job * CHUNK, min((job + 1) * CHUNK, x.size), 16):
        zero_run(at(x, i))


def zeros(shape):
    out = empty(shape)
    rows = out.reshape(-1, shape[-1])
    add_rows(-(-len(rows) // ROWS), out.reshape(-1), 0, 0, 0, 0, 0, rows, 0)
    return out


@parallel
def add_rows(job, worker, parts, first, row, step, count, wide, out, add):
    """out[r] = the sum of `count` runs of `wide` floats of parts, `step` apart, of which the first begins at
    first + r * row, and zeros to fill the row; or, with `add`, out[r] plus that sum."""
    for r in range(job * ROWS, min((job + 1) * ROWS, len(out))):
        to = out[r]
        if not add:
            for o in range(to.size):
                to[o] = 0
        for i in range(count):
            start = first + r * row + i * step
            run = parts[start : start + wide]
            for o in range(run.size):
                to[o] += run[o]


def sum_first(parts, O):  # (S,B,O or more) -> (B,O)
    """The sums over the first axis, in order, of the first O columns."""
    S, B, wide = parts.shape
    if S == 1 and O == wide:
        return parts[0]
    out = empty((B, O))
    add_rows(-(-B // ROWS), parts.reshape(-1), 0, wide, B * wide, S, O, out, 0)
    return out


def add_columns(parts, into, first=0):  # (B, first + O or more), (O,)
    """into += the rows of parts from column `first` on, in order."""
    add_rows(1, parts.reshape(-1), first, 0, parts.shape[1], len(parts), into.size, into[None], 1)


def widened(x, wide, plus=None):  # (n, C), (C,) -> (n, wide)
    """The rows of x, plus a row, with zeros behind them."""
    (n, C), out = x.shape, empty((len(x), wide))
    add_rows(-(-n // ROWS), x.reshape(-1), 0, C, 0, 1, C, out, 0)
    if plus is not None:
        add_rows(-(-n // ROWS), plus, 0, 0, 0, 1, C, out, 1)
    return out
