"""Grids, animations and curves: right pixels in files that appear whole or not at all."""

import numpy as np
import pytest
from PIL import Image

from nanodiff import images
from nanodiff.context import NanodiffError
from nanodiff.images import grid, loss_curve, save_gif, save_png

rng = np.random.default_rng(0)


@pytest.mark.parametrize("C", [1, 3])
@pytest.mark.parametrize(
    "N, columns, pad, scale", [(1, None, 2, 1), (7, None, 1, 2), (7, 4, 0, 3), (3, 9, 2, 1)]
)
def test_grid_puts_every_image_in_its_place(N, columns, pad, scale, C):
    x = rng.integers(1, 256, (N, 4, 5, C), np.uint8)
    out = grid(x, columns, pad, scale)
    wide = min(columns or int(np.ceil(np.sqrt(N))), N)
    rows = -(-N // wide)
    assert out.shape == ((rows * (4 + pad) + pad) * scale, (wide * (5 + pad) + pad) * scale, C)
    assert out.dtype == np.uint8
    small = out[::scale, ::scale]
    for i in range(N):
        top, left = pad + i // wide * (4 + pad), pad + i % wide * (5 + pad)
        np.testing.assert_array_equal(small[top : top + 4, left : left + 5], x[i])
    assert np.count_nonzero(small) == x.size  # all else is black
    np.testing.assert_array_equal(out, small.repeat(scale, 0).repeat(scale, 1))


def test_grid_takes_floats():
    assert grid(np.float32([[[[-1.0]]], [[[0.0]]], [[[1.0]]], [[[7.0]]]]), pad=0).ravel().tolist() == [
        0,
        128,
        255,
        255,
    ]


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 4)])
def test_png_keeps_the_pixels(tmp_path, shape):
    x = rng.integers(0, 256, shape, np.uint8)
    save_png(tmp_path / "new/folder/x.png", x)
    back = np.asarray(Image.open(tmp_path / "new/folder/x.png"))
    np.testing.assert_array_equal(back.reshape(shape), x)
    assert [p.name for p in (tmp_path / "new/folder").iterdir()] == ["x.png"]


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    save_png(tmp_path / "x.png", np.zeros((4, 4), np.uint8))
    before = (tmp_path / "x.png").read_bytes()

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(images.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_png(tmp_path / "x.png", np.ones((4, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["x.png"]
    assert (tmp_path / "x.png").read_bytes() == before


@pytest.mark.parametrize("C", [1, 3])
def test_gif_loops_and_has_every_frame(tmp_path, C):
    frames = [np.full((8, 8, C), value, np.uint8) for value in (0, 100, 200)]
    save_gif(tmp_path / "x.gif", frames, ms=50)
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
        for frame, ms in zip(frames, (50, 50, 1000)):
            gif.seek(gif.tell() + 1) if frame.any() else None
            shown = np.asarray(gif.convert("RGB"))
            assert gif.info["duration"] == ms
            assert abs(shown.astype(int) - frame).max() <= 4  # a palette's rounding


def colors(path):
    picture = np.asarray(Image.open(path).convert("RGB")).astype(int)
    blue = (picture[..., 2] - picture[..., 0] > 40) & (picture[..., 0] < 120)
    return picture, blue


def test_loss_curve_falls_from_left_to_right(tmp_path):
    steps = np.arange(1, 2001)
    loss_curve(tmp_path / "x.png", steps, 0.02 + np.exp(-steps / 100) + 0.005 * rng.random(2000))
    picture, blue = colors(tmp_path / "x.png")
    assert picture.shape == (600, 960, 3)
    heights = [np.nonzero(blue[:, x])[0].mean() for x in (100, 200, 400)]
    assert heights[0] < heights[1] < heights[2] and heights[0] < 200 and heights[2] > 400


@pytest.mark.parametrize(
    "losses",
    [[0.5], [0.5, 0.5], [1.0, np.nan, np.inf, 0.1], [-1.0, 2.0, 0.0], [1e-30, 1e30], [1e30] + [1e-30] * 50],
)
def test_loss_curve_of_odd_values(tmp_path, losses):
    loss_curve(tmp_path / "x.png", range(len(losses)), losses)
    assert colors(tmp_path / "x.png")[1].any()


@pytest.mark.parametrize(
    "words, call",
    [
        ("(2, 2)", lambda path: grid(np.zeros((2, 2), np.uint8))),
        ("(0, 2, 2, 1)", lambda path: grid(np.zeros((0, 2, 2, 1), np.uint8))),
        ("int64", lambda path: grid(np.zeros((1, 2, 2, 1), np.int64))),
        ("columns = 0", lambda path: grid(np.zeros((1, 2, 2, 1)), columns=0)),
        ("scale = 0", lambda path: grid(np.zeros((1, 2, 2, 1)), scale=0)),
        ("(2, 2, 2)", lambda path: save_png(path, np.zeros((2, 2, 2)))),
        ("bool", lambda path: save_png(path, np.zeros((2, 2), bool))),
        ("frames", lambda path: save_gif(path, [])),
        ("frames", lambda path: save_gif(path, [np.zeros((2, 2)), np.zeros((2, 3))])),
        ("(2,)", lambda path: loss_curve(path, [1, 2], [1])),
        ("finite", lambda path: loss_curve(path, [1, 2], [np.nan, np.inf])),
        ("finite", lambda path: loss_curve(path, [], [])),
    ],
)
def test_bad_input_is_refused_in_one_line(tmp_path, words, call):
    with pytest.raises(NanodiffError) as caught:
        call(tmp_path / "x")
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
