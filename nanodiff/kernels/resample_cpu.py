"""Nearest up-sampling and the joining and parting of channels on the CPU: copies, a row of pixels per job."""

from nanodiff.kernels.parallel_cpu import empty, parallel
from nanodiff.kernels.simd_cpu import at, prefetch

__all__ = ["upsample_forward", "upsample_backward", "concat", "split"]

SOON = 4  # pixels ahead of the one that is copied, whose cache lines are asked for


@parallel
def spread(job, worker, x, out):  # x (B*H, W, C), out (B*H, 2, W, 2, C)
    _, W, C = x.shape
    for i in range(2):
        for w in range(W):
            prefetch(at(x, (job * W + w + SOON) * C), C)
            prefetch(at(out, ((job * 2 + i) * W + w + SOON) * 2 * C), 2 * C)
            for j in range(2):
                to, row = out[job, i, w, j], x[job, w]
                for c in range(C):
                    to[c] = row[c]


@parallel
def gather(job, worker, dout, dx):
    _, W, C = dx.shape
    for w in range(W):
        to, a, b = dx[job, w], dout[job, 0, w], dout[job, 1, w]
        for c in range(C):
            to[c] = (a[0, c] + a[1, c]) + (b[0, c] + b[1, c])


@parallel
def join(job, worker, a, b, out):  # (rows, pixels, C), (rows, pixels, D) -> (rows, pixels, C + D)
    C = a.shape[2]
    for i in range(a.shape[1]):
        for v in (a, b, out):
            prefetch(at(v, (job * v.shape[1] + i + SOON) * v.shape[2]), v.shape[2])
        to, left, right = out[job, i], a[job, i], b[job, i]
        for c in range(C):
            to[c] = left[c]
        for d in range(right.size):
            to[C + d] = right[d]


@parallel
def part(job, worker, x, a, b):
    C = a.shape[2]
    for i in range(a.shape[1]):
        for v in (a, b, x):
            prefetch(at(v, (job * v.shape[1] + i + SOON) * v.shape[2]), v.shape[2])
        row, left, right = x[job, i], a[job, i], b[job, i]
        for c in range(C):
            left[c] = row[c]
        for d in range(right.size):
            right[d] = row[C + d]


def upsample_forward(x):
    B, H, W, C = x.shape
    out = empty((B, 2 * H, 2 * W, C))
    spread(B * H, x.reshape(B * H, W, C), out.reshape(B * H, 2, W, 2, C))
    return out


def upsample_backward(dout):
    B, H, W, C = dout.shape
    dx = empty((B, H // 2, W // 2, C))
    gather(B * H // 2, dout.reshape(B * H // 2, 2, W // 2, 2, C), dx.reshape(-1, W // 2, C))
    return dx


def _rows(x):
    return x.reshape(-1, *x.shape[2:])


def concat(a, b):
    out = empty((*a.shape[:3], a.shape[3] + b.shape[3]))
    join(a.shape[0] * a.shape[1], _rows(a), _rows(b), _rows(out))
    return out


def split(x, C):
    a, b = empty((*x.shape[:3], C)), empty((*x.shape[:3], x.shape[3] - C))
    part(x.shape[0] * x.shape[1], _rows(x), _rows(a), _rows(b))
    return a, b
