"""Pictures for people: grids of samples, animations, loss curves. A file appears whole or not at all."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

import numpy as np

from nanodiff.context import NanodiffError
from nanodiff.data import to_uint8


def grid(images, columns=None, pad=2, scale=1):  # (N,H,W,C) -> uint8 (h,w,C)
    """One picture of N, row by row, on black; uint8, or float in [-1,1]; `scale` repeats each pixel."""
    images = _pixels(images)
    if images.ndim != 4 or not images.size:
        raise NanodiffError(f"images of shape {images.shape}: a grid takes (N,H,W,C), each of at least 1")
    N, H, W, C = images.shape
    columns = min(math.ceil(math.sqrt(N)) if columns is None else columns, N)
    if columns < 1 or pad < 0 or scale < 1:
        raise NanodiffError(f"columns = {columns}, pad = {pad}, scale = {scale}: use at least 1, 0 and 1")
    rows = math.ceil(N / columns)
    cells = np.zeros((rows * columns, H + pad, W + pad, C), np.uint8)
    cells[:N, pad:, pad:] = images
    cells = cells.reshape(rows, columns, H + pad, W + pad, C).swapaxes(1, 2)
    out = np.pad(cells.reshape(rows * (H + pad), columns * (W + pad), C), ((0, pad), (0, pad), (0, 0)))
    return out.repeat(scale, axis=0).repeat(scale, axis=1)


def save_png(path, image):
    """Writes one image (H,W), (H,W,1), (H,W,3) or (H,W,4), uint8 or float in [-1,1]."""
    file = io.BytesIO()
    _pillow(image).save(file, "PNG", optimize=True)
    _write(path, file.getvalue())


def save_gif(path, frames, ms=80):
    """Writes an endless animation of images as `save_png` takes them; the last one stays for a second."""
    import imageio.v3 as iio

    frames = [np.asarray(_pillow(frame)) for frame in frames]
    if len({frame.shape for frame in frames}) != 1:
        raise NanodiffError(
            f"frames of shapes {sorted({f.shape for f in frames})}: give one or more of one shape"
        )
    ms = [ms] * (len(frames) - 1) + [max(ms, 1000)]
    _write(path, iio.imwrite("<bytes>", frames, extension=".gif", plugin="pillow", duration=ms, loop=0))


def loss_curve(path, steps, losses):
    """Draws losses over steps, pale, and their running mean, dark; on a log scale if all are positive."""
    from PIL import Image, ImageDraw, ImageFont

    x, y = np.asarray(steps, np.float64), np.asarray(losses, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise NanodiffError(f"steps {x.shape} and losses {y.shape}: give two sequences of one length")
    x, y = x[np.isfinite(y)], y[np.isfinite(y)]
    if not len(y):
        raise NanodiffError(f"{len(losses)} losses: none is finite; give at least one that is")
    scale = np.log10 if y.min() > 0 else np.asarray
    x0, x1, y0, y1 = x.min(), x.max(), scale(y).min(), scale(y).max()
    x1, margin = max(x1, x0 + 4), max(0.05 * (y1 - y0), 0.01)
    y0, y1 = y0 - margin, y1 + margin
    left, top, right, bottom = 150, 60, 1860, 1080  # drawn at twice the size: halving smooths the lines

    def across(value):
        return left + (value - x0) / (x1 - x0) * (right - left)

    def down(value):
        return bottom - (scale(value) - y0) / (y1 - y0) * (bottom - top)

    picture = Image.new("RGB", (1920, 1200), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(30)
    for tick in _ticks(x0, x1):
        draw.line([(across(tick), bottom), (across(tick), bottom + 12)], "black", 2)
        draw.text((across(tick), bottom + 20), f"{tick:,.7g}", "black", font, anchor="ma")
    low, high = (10**y0, 10**y1) if scale is np.log10 else (y0, y1)
    decades = range(math.floor(y0), math.ceil(y1), 1 + int(y1 - y0) // 15) if scale is np.log10 else ()
    ticks = [m * 10.0**k for k in decades for m in ((1, 2, 5) if y1 - y0 < 4 else (1,))]
    ticks = [tick for tick in ticks if low <= tick <= high]
    for tick in ticks if len(ticks) > 2 else _ticks(low, high):
        draw.line([(left, down(tick)), (right, down(tick))], "#dddddd", 2)
        draw.text((left - 15, down(tick)), f"{tick:.3g}", "black", font, anchor="rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], "black", 3)
    draw.text((right, bottom + 70), "step", "black", font, anchor="rm")
    draw.text((left, top - 20), f"loss (last {y[-1]:.4g}, best {y.min():.4g})", "black", font, anchor="lb")
    window = len(y) // 40 + 1
    total = np.cumsum(np.append(0, y))
    mean = np.maximum((total[window:] - total[:-window]) / window, y.min())  # sums may cancel to below zero
    middle = x[window // 2 :][: len(mean)]
    for color, width, xs, ys in (("#a9c8ea", 2, x, y), ("#14508c", 5, middle, mean)):
        points = np.stack([across(xs), down(ys)], axis=1)
        draw.line([tuple(point) for point in points], color, width, joint="curve")
        if len(points) == 1:
            draw.circle(tuple(points[0]), 6, color)
    save_png(path, np.asarray(picture.reduce(2)))


def _ticks(low, high):
    """Round values, four to ten of them, from low to high."""
    rough = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * max(m for m in (1, 2, 5) if m * power <= rough)
    return [step * n for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _pixels(image):
    image = np.asarray(image)
    if image.dtype.kind != "f" and image.dtype != np.uint8:
        raise NanodiffError(f"an image of dtype {image.dtype}: give uint8, or floats in [-1, 1]")
    return image if image.dtype == np.uint8 else to_uint8(image)


def _pillow(image):
    from PIL import Image

    image = _pixels(image)
    if image.ndim not in (2, 3) or image.ndim == 3 and image.shape[2] not in (1, 3, 4):
        raise NanodiffError(f"an image of shape {image.shape}: give (H,W) or (H,W,C) with C of 1, 3 or 4")
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)


def _write(path, data):
    """Bytes to a file by way of a temporary one beside it, so that no reader meets half a picture."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        part.write_bytes(data)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
