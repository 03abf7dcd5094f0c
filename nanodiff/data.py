"""Image sets as arrays: drawn glyphs, MNIST, CIFAR-10, folders of images and .npz files; and batches of them.

Files are read as if a stranger had made them: sizes in headers are compared with the file before memory is
taken for them, archives are read as streams, nothing is unpickled. SHA-256 sums apply to downloads alone.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import math
import os
import tarfile
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanodiff.context import NanodiffError
from nanodiff.kernels.random_ref import DATA, FLIP, ORDER, random_bits

GLYPHS = "0123456789AEHKRX"  # capitals that resemble no digit
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
COMMON = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # recognised whatever the file is called
UNSAFE = {"EPS", "FPX", "MIC", "WMF", "PDF", "MPEG"}  # Pillow runs programs for these, or only writes them
MAX_PIXELS = 1 << 26  # in one file, before it is decoded: a tiny file can claim to be huge
MAX_SIDE = 4096
INFLATE = 1032  # deflate cannot expand by more

CIFAR10_FILE = "cifar-10-binary.tar.gz"
MIRRORS = {  # tried in this order
    "mnist": (
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
    ),
    "cifar10": ("https://www.cs.toronto.edu/~kriz/",),
}
SHA256 = {
    "train-images-idx3-ubyte.gz": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte.gz": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte.gz": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte.gz": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
    CIFAR10_FILE: "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
}


@dataclass
class Dataset:
    """images uint8 (N,H,W,C); labels int64 (N,) or None; classes: their names, where the source has some."""

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    classes: tuple[str, ...] = ()


def load_data(name, size=None, channels=None, count=None, split="train", seed=0):
    """The images of `name` as a Dataset. Raises NanodiffError or FileNotFoundError.

    name      "glyphs": characters in varied places, sizes and slants; `count` (4096) of them, from `seed`
              "mnist", "cifar10": downloaded once, into $NANODIFF_CACHE or the user's cache folder
              a folder of MNIST's idx files (.gz or plain), of CIFAR-10's binary batches, or of images, whose
              sub-folders are classes if no image lies beside them; what is transparent is laid on white, gray
              becomes RGB where others are; up to 1 % of unreadable files are skipped with a warning
              an .npz with `images` (or one array of 3 or 4 dimensions), (N,H,W) or (N,H,W,C), and perhaps
              `labels`: uint8; or floats in [-1,1], which are taken for [0,1] if none of them is negative
    size      H = W, or (H, W); None keeps what the files have (glyphs: 32). MNIST gets a black border of up
              to 8 pixels in all; what differs more is scaled to cover the size, and its middle is kept
    channels  1 or 3; None keeps what the files have
    count     the first `count` images (of a folder: spread evenly over it)
    split     "train" or "test", where the source has both: glyphs, mnist, cifar10
    """
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    valid = size is None or len(pair) == 2 and all(_is_int(n, 1, MAX_SIDE) for n in pair)
    _require(valid, f"size = {size!r}: use an integer or (H, W), each from 1 to {MAX_SIDE}")
    _require(isinstance(name, (str, os.PathLike)), f"data {name!r}: use a name or a path")
    _require(channels in (None, 1, 3), f"channels = {channels!r}: use 1 (gray), 3 (RGB) or None (as is)")
    _require(count is None or _is_int(count, 1), f"count = {count!r}: use an integer from 1 up, or None")
    _require(split in ("train", "test"), f"split = {split!r}: use 'train' or 'test'")
    size, border = None if size is None else tuple(pair), 0
    if name == "glyphs":
        data = _draw_glyphs(count or 4096, *(size or (32, 32)), seed, split)
    else:
        path = _download(name, split) if name in MIRRORS else Path(name).expanduser()
        if not str(name) or not path.exists():
            raise FileNotFoundError(f"data {str(name)!r}: no such file; use a path, glyphs, mnist or cifar10")
        path = path.resolve()
        if any(path.glob("*-idx?-ubyte*")):
            data, border = _load_mnist(path, split), 8
        elif any(path.glob("*_batch*.bin")) or (path / CIFAR10_FILE).exists():
            data = _load_cifar(path, split)
        else:
            _require(split == "train", f"split = 'test': {path} has no splits; pass a path to test images")
            _require(path.is_dir() or path.suffix == ".npz", f"{path}: use a folder or an .npz file")
            data = _load_folder(path, size, channels, count) if path.is_dir() else _load_npz(path)
    have = len(data.images)
    _require((count or 1) <= have, f"count = {count}: {name} has {have} images; ask for no more than that")
    data.images = _resize(_with_channels(data.images[:count], channels), size, border)
    data.labels = None if data.labels is None else data.labels[:count]
    return data


def to_float(images):
    """uint8 to float32 in [-1, 1]: x / 127.5 - 1."""
    _require(images.dtype == np.uint8, f"images of dtype {images.dtype}: to_float takes uint8")
    return images / np.float32(127.5) - np.float32(1)


def to_uint8(images):
    """Float in [-1, 1] to uint8, rounded; what lies outside is clipped, NaN becomes 0."""
    pixels = np.clip((np.asarray(images) + 1) * 127.5, 0, 255)
    return np.rint(np.nan_to_num(pixels)).astype(np.uint8)


def flip(images, seed, step):  # (B,H,W,C) -> (B,H,W,C)
    """A copy with each image mirrored or not, left to right, as (seed, step, place in the batch) decide."""
    mirrored = random_bits((len(images),), seed, step, FLIP) >> 31 == 1
    return np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def batch_indices(N, batch, step, seed):
    """Batch number `step` (from 0) of an endless stream of permutations of range(N): int64 (batch,).

    Epoch e is the order of the words random_bits((N,), seed, e, ORDER). No call depends on an earlier one, so
    a resumed run draws what the uninterrupted one would have. A batch may reach over the end of an epoch.
    """
    for value, low, what in ((N, 1, "N"), (batch, 1, "batch"), (step, 0, "step"), (seed, 0, "seed")):
        _require(_is_int(value, low), f"{what} = {value!r}: use an integer from {low} up")
    place = int(step) * int(batch) + np.arange(batch)
    epoch, place = np.divmod(place, N)
    return np.concatenate(
        [_order(N, int(seed), e)[place[epoch == e]] for e in range(epoch[0], epoch[-1] + 1)]
    )


@functools.lru_cache(maxsize=2)  # an epoch and, at its end, the next
def _order(N, seed, epoch):
    return np.argsort(random_bits((N,), seed, epoch, ORDER), kind="stable")


# ---- checks, sizes, channels


def _require(holds, otherwise):
    if not holds:
        raise NanodiffError(otherwise)


def _is_int(value, low, high=math.inf):
    return isinstance(value, (int, np.integer)) and low <= value <= high


def _with_channels(images, channels):
    have = images.shape[3]
    if channels in (None, have):
        return images
    _require(have in (1, 3), f"channels = {channels}: the images have {have}, and only 1 and 3 are converted")
    if channels == 3:
        return np.repeat(images, 3, axis=3)
    luma = images @ np.array([[299], [587], [114]], np.uint32)  # ITU-R BT.601, in thousandths
    return ((luma + 500) // 1000).astype(np.uint8)


def _resize(images, size, border):
    N, H, W, C = images.shape
    if size in (None, (H, W)):
        return images
    dh, dw = size[0] - H, size[1] - W
    if 0 <= dh <= border and 0 <= dw <= border:
        return np.pad(images, ((0, 0), (dh // 2, dh - dh // 2), (dw // 2, dw - dw // 2), (0, 0)))
    _require(C in (1, 3), f"size = {size}: images of {C} channels are not scaled, only those of 1 or 3")
    from PIL import Image

    out = np.empty((N, *size, C), np.uint8)
    for i, image in enumerate(images):
        out[i] = _fit(Image.fromarray(image if C == 3 else image[:, :, 0]), size)
    return out


def _fit(image, size):
    """A Pillow image scaled to cover size (H, W), cut to its middle: uint8 (H,W,C)."""
    if size not in (None, (image.height, image.width)):
        from PIL import Image, ImageOps

        image = ImageOps.fit(image, size[::-1], Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(image.height, image.width, -1)


# ---- glyphs


def _draw_glyphs(count, H, W, seed, split):
    """Stamps of every character, thin and bold, put down by one affine map per image."""
    from PIL import Image, ImageDraw, ImageFont

    side = 2 * min(H, W)  # drawn at twice the size: halving smooths the edges
    font = ImageFont.load_default(0.8 * side)
    stamps = []
    for character in GLYPHS:
        for stroke in (0, side / 40):
            stamps.append(stamp := Image.new("L", (side, side)))
            draw = ImageDraw.Draw(stamp)
            left, top, right, bottom = draw.textbbox((0, 0), character, font, stroke_width=stroke)
            corner = (side - left - right) / 2, (side - top - bottom) / 2
            draw.text(corner, character, 255, font, stroke_width=stroke)
    bits = random_bits((count, 8), seed, int(split == "test"), DATA)
    low = np.array([-0.26, -0.2, 0.7, 0.9, -0.12, -0.12])
    high = np.array([0.26, 0.2, 1.15, 1.2, 0.12, 0.12])
    angle, shear, scale, narrow, dx, dy = (low + (high - low) * (bits[:, :6] / 2.0**32)).T
    # Pillow wants the way back, from the picture's (x, y) to the stamp's: turn, then shear, then scale
    cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
    a, b, d, e = narrow * (cos + shear * sin), narrow * (sin - shear * cos), -sin, cos
    x, y = W * (1 + dx), H * (1 + dy)
    maps = np.stack([a, b, side / 2 - a * x - b * y, d, e, side / 2 - d * x - e * y], axis=1).tolist()
    labels = np.arange(count) % len(GLYPHS)
    chosen = 2 * labels + (bits[:, 6] >> 31)
    AFFINE, BILINEAR = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    out = np.empty((count, H, W, 1), np.uint8)
    for i in range(count):
        drawn = stamps[chosen[i]].transform((2 * W, 2 * H), AFFINE, maps[i], BILINEAR)
        out[i, :, :, 0] = drawn.reduce(2)
    return Dataset(out, labels, "glyphs", tuple(GLYPHS))


# ---- MNIST and CIFAR-10


def _download(name, split):
    """The folder with the files of `name`, fetched and checked if they are not there yet."""
    import pooch

    part = "train" if split == "train" else "t10k"
    files = {
        "mnist": (f"{part}-images-idx3-ubyte.gz", f"{part}-labels-idx1-ubyte.gz"),
        "cifar10": (CIFAR10_FILE,),
    }
    folder = Path(os.environ.get("NANODIFF_CACHE") or pooch.os_cache("nanodiff")) / name
    for file in files[name]:
        reasons = []
        for url in MIRRORS[name]:
            try:  # pooch downloads under another name, and renames only what has the right sum
                get = pooch.HTTPDownloader(chunk_size=1 << 20)
                pooch.retrieve(url + file, f"sha256:{SHA256[file]}", file, folder, downloader=get)
                break
            except OSError as error:  # as all that requests raises
                reasons.append(f"{url}: {_line(error)}")
            except ValueError:
                reasons.append(f"{url}: the SHA-256 is not {SHA256[file]}")
        else:
            why = "; ".join(reasons)
            raise NanodiffError(f"cannot download {file} ({why}): try again, or pass a folder that has it")
    return folder


def _load_mnist(folder, split):
    def find(kind):
        stem = f"{'train' if split == 'train' else 't10k'}-{kind}-ubyte"
        return next((p for p in (folder / stem, folder / f"{stem}.gz") if p.is_file()), folder / stem)

    path, labels_path = find("images-idx3"), find("labels-idx1")
    if not path.exists():
        raise FileNotFoundError(f"{path}(.gz) is not there, and split {split!r} needs it: add it")
    images, labels, classes = _read_idx(path, 3)[..., None], None, ()
    if labels_path.exists():
        labels = _checked_labels(_read_idx(labels_path, 1), len(images), labels_path)
        classes = tuple(str(i) for i in range(labels.max() + 1))
    return Dataset(images, labels, folder.name, classes)


def _read_idx(path, rank):
    """An idx file of bytes (yann.lecun.com/exdb/mnist): magic 0x0000080<rank>, big-endian sizes, bytes."""
    packed = path.suffix == ".gz"
    with _reading(path), (gzip.open if packed else open)(path, "rb") as file:
        head = file.read(4 + 4 * rank)
        valid = len(head) == 4 + 4 * rank and head[:4] == bytes([0, 0, 8, rank])
        _require(valid, f"{path} starts with {head[:4].hex()}, not 0000080{rank}: fetch it again")
        shape = tuple(np.frombuffer(head, ">u4", offset=4).tolist())
        n, most = math.prod(shape), path.stat().st_size * (INFLATE if packed else 1)
        _require(1 <= n <= most, f"{path} claims {n} bytes of data; 1 to {most} are possible: fetch it again")
        out = np.empty(n, np.uint8)
        whole = file.readinto(out) == n and not file.read(1)
        _require(whole, f"{path} does not hold exactly the {shape} bytes that it claims: fetch it again")
    return out.reshape(shape)


def _load_cifar(folder, split):
    """Records of a label byte, then 32x32 bytes of red, green and blue (cs.toronto.edu/~kriz/cifar.html)."""
    with _reading(folder):
        batches = {path.name: path.read_bytes() for path in folder.glob("*_batch*.bin")}
    if not batches:  # the archive; no member is written to the path it names
        with _reading(folder / CIFAR10_FILE) as path, tarfile.open(path, "r|gz") as archive:
            members = (m for m in archive if m.isfile() and m.name.endswith(".bin"))
            batches = {Path(m.name).name: archive.extractfile(m).read() for m in members}
    prefix, size = "data_batch_" if split == "train" else "test_batch", 1 + 3 * 32 * 32
    chosen = sorted(name for name in batches if name.startswith(prefix))
    if not chosen:
        raise FileNotFoundError(f"{folder} has no {prefix}*.bin, and split {split!r} needs it: add it")
    for name in chosen:
        n = len(batches[name])
        _require(n and n % size == 0, f"{folder / name}: {n} bytes are not records of {size}: fetch it again")
    records = np.concatenate([np.frombuffer(batches[name], np.uint8).reshape(-1, size) for name in chosen])
    labels = records[:, 0].astype(np.int64)
    _require(labels.max() < 10, f"{folder}: label {labels.max()} exceeds 9: fetch CIFAR-10's binary version")
    images = np.ascontiguousarray(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return Dataset(images, labels, folder.name, CIFAR10)


def _checked_labels(labels, N, path):
    valid = labels.dtype.kind in "iu" and labels.shape == (N,)
    _require(valid, f"{path}: labels are {labels.dtype} {labels.shape}: use integers of shape ({N},)")
    low, high = labels.min(), labels.max()
    _require(0 <= low <= high < 1 << 31, f"{path}: labels reach from {low} to {high}: count classes from 0")
    return labels.astype(np.int64)


# ---- folders of images


def _readable():
    """{suffix: format} of all that Pillow reads by itself."""
    from PIL import Image

    Image.init()
    known = Image.registered_extensions()
    return {suffix: name for suffix, name in known.items() if name in Image.OPEN and name not in UNSAFE}


def _load_folder(root, size, channels, count):
    suffixes = _readable()
    paths = [
        path
        for path in sorted(root.rglob("*"))  # which enters no linked folder
        if path.suffix.lower() in suffixes
        and path.is_file()
        and not any(part[0] == "." for part in path.relative_to(root).parts)
        and (not path.is_symlink() or path.resolve().is_relative_to(root))
    ]
    if not paths:
        raise FileNotFoundError(f"{root} has no images ({' '.join(sorted(suffixes))}): check the path")
    names = [path.relative_to(root).parts[0] for path in paths]
    classes = () if any(path.parent == root for path in paths) else tuple(sorted(set(names)))
    n = min(count or len(paths), len(paths))
    chosen = [i * len(paths) // n for i in range(n)]

    def decode(i):
        try:
            return _decode(paths[i], size, channels)
        except Exception as error:  # decoders raise nearly anything when a file is damaged
            return f"{paths[i].relative_to(root)} ({_line(error)})"

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode, chosen))
    if bad := [image for image in images if isinstance(image, str)]:
        report = f"{root}: {len(bad)} of {n} images cannot be read: {', '.join(bad[:5])}"
        _require(100 * len(bad) <= n, f"{report}; at most 1 % may be so: mend or remove them")
        warnings.warn(f"{report}; they are skipped", stacklevel=3)
        chosen, images = zip(*((i, image) for i, image in zip(chosen, images) if not isinstance(image, str)))
    H, W, _ = images[0].shape
    for i, image in zip(chosen, images):
        h, w, _ = image.shape
        _require((h, w) == (H, W), f"{paths[i]} is {h}x{w}, the first image {H}x{W}: give a size for all")
    out = np.empty((len(images), H, W, max(image.shape[2] for image in images)), np.uint8)
    for i, image in enumerate(images):
        out[i] = image  # gray spreads over RGB
    labels = np.searchsorted(classes, [names[i] for i in chosen]) if classes else None
    return Dataset(out, labels, root.name, classes)


def _decode(path, size, channels):  # -> uint8 (H,W,C), C = 1 or 3
    from PIL import Image, ImageOps

    with Image.open(path, formats=[*COMMON, _readable()[path.suffix.lower()]]) as image:
        W, H = image.size
        _require(W * H <= MAX_PIXELS, f"{W}x{H} pixels, more than {MAX_PIXELS}")
        if size:
            image.draft(None, (2 * max(size), 2 * max(size)))  # a JPEG decoder halves big photos cheaply
        image = ImageOps.exif_transpose(image)
    gray = image.mode in ("1", "L", "LA") or image.mode[0] == "I"
    _require(image.mode != "F", "floating-point pixels, whose range is unknown")
    if image.mode[0] == "I":  # 16 bits, which Pillow's own conversion would clip
        pixels = np.asarray(image).astype(np.int64)
        low, high = pixels.min(), pixels.max()
        _require(0 <= low <= high <= 65535, f"values from {low} to {high}, not 0 to 65535")
        image = Image.fromarray(((pixels * 255 + 32767) // 65535).astype(np.uint8))
    elif image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return _fit(image.convert("L" if channels == 1 or (gray and not channels) else "RGB"), size)


# ---- .npz


def _load_npz(path):
    with _reading(path), zipfile.ZipFile(path) as archive:
        infos = {i.filename[:-4]: i for i in archive.infolist() if i.filename.endswith(".npy")}
        shapes = {key: _npy_shape(archive, info, path) for key, info in infos.items()}
        keys = [k for k, shape in shapes.items() if len(shape) in (3, 4)]
        keys = ["images"] if "images" in shapes else keys
        _require(len(keys) == 1, f"{path} holds {shapes}: name the array of images, (N,H,W,C), 'images'")
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = (arrays[key] if key in arrays else None for key in (keys[0], "labels"))
    shape = images.shape
    valid = 0 not in shape and (
        len(shape) == 3 and shape[-1] > 4 or len(shape) == 4 and shape[-1] in (1, 3, 4)
    )
    _require(valid, f"{path}: images {shape}; use (N,H,W), or (N,H,W,C) with C = 1, 3 or 4: transpose others")
    if images.dtype.kind == "f":
        low, high = images.min(), images.max()  # NaN fails the comparison, too
        _require(-1 <= low <= high <= 1, f"{path}: floats from {low} to {high}: scale them to [-1, 1]")
        images = to_uint8(images if low < 0 else 2 * images - 1)
    _require(images.dtype == np.uint8, f"{path}: images of {images.dtype}: store uint8, or floats in [-1, 1]")
    if labels is not None:
        labels = _checked_labels(labels, len(images), path)
    images = np.ascontiguousarray(images if len(shape) == 4 else images[..., None])
    return Dataset(images, labels, path.stem)


def _npy_shape(archive, info, path):
    """The shape in an .npy header, once it is known that the file can hold that much."""
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        header = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
        shape, _, dtype = header(file)
        n = info.file_size - file.tell()
    known = info.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    possible = info.file_size <= INFLATE * min(info.compress_size, path.stat().st_size)
    valid = known and possible and n == math.prod(shape) * dtype.itemsize
    _require(valid, f"{path}: {info.filename} claims {shape} {dtype}, which it cannot hold: write it again")
    return shape


@contextlib.contextmanager
def _reading(path):
    """Whatever a damaged file makes its decoder raise becomes one line."""
    try:
        yield path
    except NanodiffError:
        raise
    except Exception as error:
        raise NanodiffError(f"{path} cannot be read ({_line(error)}): mend it or fetch it again") from error


def _line(error):
    return " ".join(str(error).split())[:200] or type(error).__name__
