"""Matrix products on the GPU: which tile, which variant of the kernel in gemm_gpu.cu, and its launch.

Tensor cores multiply bfloat16; float32 goes through plain FMA. The choice is a matter of shapes and of the
machine (capability, processors) alone: nothing is timed, so a run can be repeated.
"""

from dataclasses import dataclass

import numpy as np

from nanodiff.context import NanodiffError
from nanodiff.kernels.device_gpu import BF16, bf16_of, capability, element, empty, launch, processors

FIELDS = """images N C lda ldb ldo H W OH OW GH GW kh kw stride pad parts depth
    heads a_image a_head b_image b_head o_image o_head""".split()
DIVISORS = ["area_factor", "area_shift", "width_factor", "width_shift"]
GEMM = np.dtype(
    [(n, "i4") for n in FIELDS] + [(n, "u4") for n in DIVISORS] + [("alpha", "f4")]
)  # struct Gemm


@dataclass(frozen=True)
class Tile:
    """What a block makes, BM x BN; of it a thread (SIMT), warp (MMA) or warpgroup (WGMMA) makes WM x WN.
    `resident` blocks share a multiprocessor; `rate` is its speed then, relative to MMA 128 x 128: until it
    is measured, an estimate from how often a tile reads shared memory for a product."""

    main: str
    BM: int
    BN: int
    WM: int
    WN: int
    stages: int
    resident: int
    rate: float

    @property
    def threads(self):
        each = {"SIMT": 1, "MMA": 32, "WGMMA": 128}[self.main]
        return self.BM // self.WM * (self.BN // self.WN) * each

    def shared(self):
        """Bytes of shared memory: the stages, or the finished tile on its way out. The rows of a stage are
        128 bytes of either operand."""
        panel = 32 if self.main == "SIMT" else 64
        stage = (max(self.BM, panel) + max(self.BN, panel)) * 128
        return max(self.stages * stage, self.BM * (self.BN + 8) * 4)


TILES = {
    "SIMT": (Tile("SIMT", 64, 64, 8, 4, 3, 4, 0.1), Tile("SIMT", 32, 32, 4, 4, 3, 8, 0.07)),
    "MMA": (
        Tile("MMA", 128, 128, 64, 64, 3, 2, 1.0),
        Tile("MMA", 128, 64, 64, 32, 3, 3, 0.85),
        Tile("MMA", 64, 64, 32, 32, 3, 4, 0.7),
        Tile("MMA", 128, 32, 32, 32, 3, 3, 0.55),
    ),
    "WGMMA": (
        Tile("WGMMA", 128, 256, 64, 256, 4, 1, 1.7),
        Tile("WGMMA", 256, 128, 128, 128, 4, 1, 1.65),
        Tile("WGMMA", 128, 128, 64, 128, 3, 2, 1.5),
        Tile("WGMMA", 128, 64, 64, 64, 4, 2, 1.1),
        Tile("WGMMA", 64, 64, 64, 64, 3, 4, 0.8),
    ),
}


def main_loop(dtype, N):
    """Which main loop: by dtype and N alone, so that a row has the same bits among few rows and many."""
    if dtype != BF16:
        return "SIMT"
    return "WGMMA" if capability() == 90 and N > 32 else "MMA"


def _resident(tile):
    """Blocks of a tile that share a multiprocessor: as registers allow, and its shared memory."""
    kilobytes = {75: 64, 80: 164, 90: 228, 100: 228}.get(capability(), 100)
    return max(1, min(tile.resident, (kilobytes << 10) // (tile.shared() + 1024)))


def choose_tile(main, M, N, batches):
    """The tile that is done first if blocks run in waves: n on each of the P multiprocessors at a time.

    A full wave takes n BM BN / rate. The last one puts r <= n blocks on a multiprocessor. They would take
    r / n of that if they kept it busy, and as long as n if each waited for its own loads; the truth is taken
    to be the geometric mean, sqrt(r n) BM BN / rate.
    """

    def time(tile):
        blocks, n = -(-M // tile.BM) * -(-N // tile.BN) * batches, _resident(tile)
        waves, rest = divmod(blocks, processors() * n)
        r = -(-rest // processors())
        return (waves * n + (r * n) ** 0.5) * tile.BM * tile.BN / tile.rate

    return min(TILES[main], key=time)


def choose_split(main, M, N, K):
    """Tile and depth of a weight gradient: its few big tiles are cut along K, as often as fills the machine.

    A part is at least 512 deep, so that what it writes is little beside what it reads.
    """
    tile = min(TILES[main], key=lambda t: -(-M // t.BM) * t.BM * -(-N // t.BN) * t.BN / t.rate)
    tiles = -(-M // tile.BM) * -(-N // tile.BN)
    parts = max(1, min(processors() * _resident(tile) // tiles, K // 512))
    return tile, -(-K // (parts * 64)) * 64


def _divisor(d):
    """factor and shift of struct Divisor."""
    shift = (d - 1).bit_length()
    return -(-(1 << (31 + shift)) // d), shift


def operand(weight, dtype):
    """A float32 weight as it meets activations of `dtype`."""
    return bf16_of(weight) if dtype == BF16 else weight


def multiply(layout, a, b, out, bias=None, emb=None, residual=None, rows=None, epilogue="PLAIN",
             tile=None, batches=1, parts=1, alpha=1.0, **sizes):  # fmt: skip
    """out = a b as `struct Gemm` in gemm_gpu.cu says; sizes: its fields, 1 where left out (strides: 0)."""
    for array in (a, b, out):
        if array.size >= 2**31:
            raise NanodiffError(
                f"an array of {array.size} elements: GPU kernels take fewer than 2^31; use a smaller batch"
            )
    if max(sizes.get("kh", 1), sizes.get("kw", 1)) > 15:
        raise NanodiffError(f"a kernel of {sizes['kh']} x {sizes['kw']}: GPU convolutions take up to 15 x 15")
    zero = dict.fromkeys(FIELDS[FIELDS.index("heads") + 1 :], 0)
    g = dict.fromkeys(FIELDS, 1) | zero | dict(pad=0) | sizes | dict(parts=parts)
    s = g["stride"] if layout == "NT" else 1
    g["GH"], g["GW"] = -(-g["OH"] // s), -(-g["OW"] // s)
    pixels = g["images"] * g["GH"] * g["GW"]
    M = g["kh"] * g["kw"] * g["C"] if layout == "TN" else pixels
    tile = tile or choose_tile(main_loop(a.dtype, g["N"]), M, g["N"], batches * parts)
    g["depth"] = sizes.get("depth", pixels)

    def step(array, *lengths):  # elements that one 16-byte access moves, or 1 where rows do not start on 16
        n = 16 // array.dtype.itemsize
        return 1 if any(length % n for length in lengths) else n

    across = g["C"] if layout == "NT" else g["N"]
    steps = dict(
        A_STEP=step(a, g["C"], g["lda"], g["a_image"], g["a_head"]),
        B_STEP=step(b, across, g["ldb"], g["b_image"], g["b_head"]),
        O_STEP=step(out, g["N"], g["ldo"], g["o_image"], g["o_head"]),
    )
    defines = dict(
        [element(a)], OUT=element(out)[1], LAYOUT=layout, EPILOGUE=epilogue, MAIN=tile.main, BM=tile.BM,
        BN=tile.BN, WM=tile.WM, WN=tile.WN, STAGES=tile.stages, BLOCKS=tile.resident, **steps,
    )  # fmt: skip
    divisors = _divisor(g["GH"] * g["GW"]) + _divisor(g["GW"])
    values = np.array([(*(g[name] for name in FIELDS), *divisors, alpha)], GEMM)
    grid = (-(-M // tile.BM) * -(-g["N"] // tile.BN), 1, batches * parts)
    launch("gemm_gpu.cu", "gemm", grid, (tile.threads,), (a, b, out, bias, emb, residual, rows, values),
           tile.shared(), tuple(defines.items()))  # fmt: skip


def add_gradients(layer, x, dout, dweight, dbias, group):
    """dweight += the weight gradient of a layer given as sizes of `multiply`; dbias += column sums of dout.

    Returns the sums (float32) over `group` rows of dout at a time. Parts of sums are added in their order.
    """
    O, rows = layer["N"], dout.size // layer["N"]
    M = layer["kh"] * layer["kw"] * layer["C"]
    tile, depth = choose_split(main_loop(x.dtype, O), M, O, rows)
    parts = -(-rows // depth)
    partial = empty((parts, M, O), np.float32)
    multiply("TN", x, dout, partial, tile=tile, parts=parts, depth=depth, **layer)

    V = 16 // dout.dtype.itemsize if O % 8 == 0 else 1
    wide = min(32, 1 << (-(-O // V) - 1).bit_length())  # threads side by side: a power of two
    groups = -(-rows // group)
    sums = empty((groups, O), np.float32)
    launch("conv_gpu.cu", "column_sums", (groups, -(-O // (V * wide))), (256,),
           (dout, sums, rows, group, O, wide), defines=(element(dout), ("STEP", V)))  # fmt: skip
    blocks = -(-M * O // 32)
    launch("conv_gpu.cu", "add_parts", (blocks - (-O // 32),), (256,),
           (partial, dweight, parts, M * O, blocks, sums, dbias, groups, O),
           defines=(element(sums), ("STEP", 1)))  # fmt: skip
    return sums
