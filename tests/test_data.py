"""Image sets: what is read is what was written, and whatever is wrong ends in one line."""

import gzip
import hashlib
import io
import os
import struct
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from nanodiff import data
from nanodiff.context import NanodiffError
from nanodiff.data import batch_indices, flip, load_data, to_float, to_uint8

REAL = Path(__file__).parents[2] / "shared/data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="../shared/data with MNIST and CIFAR-10 is not there")
rng = np.random.default_rng(0)
quick = settings(deadline=None, derandomize=True, max_examples=40)


def refuses(*words, call, error=NanodiffError):
    """The call ends in one line that has all the words."""
    with pytest.raises(error) as caught:
        call()
    line = str(caught.value)
    assert "\n" not in line
    assert all(word in line for word in words), line


def idx(array, magic=None):
    head = magic or bytes([0, 0, 8, array.ndim])
    return head + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files(folder, N=20, part="train"):
    folder.mkdir(exist_ok=True)
    images, labels = rng.integers(0, 256, (N, 28, 28), np.uint8), rng.integers(0, 10, N, np.uint8)
    (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
    (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(labels))
    return images, labels


def cifar_bytes(N=5):
    records = rng.integers(0, 256, (N, 3073), np.uint8)
    records[:, 0] %= 10
    return records, records.tobytes()


# ---- glyphs


def test_glyphs_are_the_same_for_a_seed_and_a_longer_set_continues_a_shorter_one():
    few, many = load_data("glyphs", count=40), load_data("glyphs", count=100)
    assert few.images.shape == (40, 32, 32, 1) and few.images.dtype == np.uint8
    np.testing.assert_array_equal(few.images, many.images[:40])
    assert few.labels.dtype == np.int64 and set(many.labels) == set(range(16)) and len(few.classes) == 16
    assert (load_data("glyphs", count=40, seed=1).images != few.images).any()
    assert (load_data("glyphs", count=40, split="test").images != few.images).any()
    assert len(load_data("glyphs").images) == 4096


def test_glyphs_can_be_told_apart_and_stay_inside_the_picture():
    train, test = load_data("glyphs", count=1600), load_data("glyphs", count=320, split="test")
    x, y = (d.images.reshape(len(d.images), -1).astype(float) for d in (train, test))
    nearest = ((x**2).sum(axis=1) - 2 * y @ x.T).argmin(axis=1)  # |x - y|^2 less |y|^2
    assert (train.labels[nearest] == test.labels).mean() > 0.8  # chance is 1/16
    edge = np.concatenate([train.images[:, [0, -1]].ravel(), train.images[:, :, [0, -1]].ravel()])
    assert edge.mean() < 1 < 20 < train.images.mean()


def test_glyphs_of_other_sizes():
    assert load_data("glyphs", size=(20, 44), count=8, channels=3).images.shape == (8, 20, 44, 3)


# ---- MNIST


@real
def test_real_mnist():
    train, test = load_data(REAL / "mnist"), load_data(str(REAL / "mnist"), split="test", size=32)
    assert train.images.shape == (60000, 28, 28, 1) and test.images.shape == (10000, 32, 32, 1)
    assert np.bincount(train.labels).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert abs(train.images.mean() / 255 - 0.1307) < 1e-4  # the known mean
    assert not test.images[:, :2].any() and not test.images[:, :, 30:].any()
    np.testing.assert_array_equal(test.images[:, 2:30, 2:30], load_data(REAL / "mnist", split="test").images)


def test_idx_files(tmp_path):
    images, labels = mnist_files(tmp_path / "set")
    got = load_data(tmp_path / "set")
    np.testing.assert_array_equal(got.images[..., 0], images)
    np.testing.assert_array_equal(got.labels, labels)
    assert got.name == "set" and got.labels.dtype == np.int64
    (tmp_path / "set/train-labels-idx1-ubyte").unlink()
    assert load_data(tmp_path / "set").labels is None
    few = load_data(tmp_path / "set", count=3, size=(30, 36), channels=3).images
    np.testing.assert_array_equal(few[:, 1:29, 4:32], np.repeat(images[:3, ..., None], 3, axis=3))
    assert few.sum() == 3 * images[:3].sum()  # the border is black
    assert load_data(tmp_path / "set", size=40).images[:, 0].any()  # too far for a border: scaled
    refuses(
        "t10k-images", "test", call=lambda: load_data(tmp_path / "set", split="test"), error=FileNotFoundError
    )
    refuses("21", "20", call=lambda: load_data(tmp_path / "set", count=21))


IMAGES = idx(np.ones((4, 5, 6), np.uint8))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "raw, word",
    [
        (b"\x00\x00\x08\x01" + IMAGES[4:], "00000801"),
        (b"\x00\x00\x0d\x03" + IMAGES[4:], "00000d03"),
        (IMAGES[:10], "fetch"),
        (b"", "fetch"),
        (IMAGES[:-1], "exactly"),
        (IMAGES + b"x", "exactly"),
        (IMAGES[:4] + b"\xff" * 12 + IMAGES[16:], "possible"),
        (IMAGES[:4] + struct.pack(">3I", 1 << 20, 1, 1), "possible"),
        (idx(np.ones((0, 5, 6), np.uint8)), "possible"),
    ],
)
def test_bad_idx_images(tmp_path, raw, word, packed):
    file = tmp_path / ("train-images-idx3-ubyte" + ".gz" * packed)
    file.write_bytes(gzip.compress(raw) if packed else raw)
    refuses(file.name, word, call=lambda: load_data(tmp_path))


def test_bad_gzip_and_labels(tmp_path):
    file, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte"
    whole = gzip.compress(IMAGES)
    for raw in (
        IMAGES,
        whole[:-12],
        whole[:20] + bytes([whole[20] ^ 255]) + whole[21:],
        whole[:-8] + bytes(8),
    ):
        file.write_bytes(raw)
        refuses(file.name, call=lambda: load_data(tmp_path))
    file.write_bytes(whole)
    labels.write_bytes(idx(np.zeros(3, np.uint8)))
    refuses("(3,)", "(4,)", call=lambda: load_data(tmp_path))


# ---- CIFAR-10


@real
def test_real_cifar10():
    got = load_data(REAL / "cifar-10-batches-bin")
    assert got.images.shape == (10000, 32, 32, 3) and got.classes[got.labels[0]] in data.CIFAR10
    mean = got.images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(mean, [0.4914, 0.4822, 0.4465], atol=0.005)  # of all 50,000; these are a fifth
    test = load_data(REAL / "cifar-10-batches-bin", split="test", count=500, size=(16, 24))
    assert test.images.shape == (500, 16, 24, 3) and np.ptp(test.images) > 200


def test_cifar_batches(tmp_path):
    (a, a_bytes), (b, b_bytes), (c, c_bytes) = cifar_bytes(), cifar_bytes(), cifar_bytes(2)
    (tmp_path / "data_batch_4.bin").write_bytes(b_bytes)
    (tmp_path / "data_batch_2.bin").write_bytes(a_bytes)
    got = load_data(tmp_path)
    np.testing.assert_array_equal(got.labels, [*a[:, 0], *b[:, 0]])
    assert got.images[6, 3, 7].tolist() == [b[1, 1 + p * 1024 + 3 * 32 + 7] for p in range(3)]
    refuses("test_batch", call=lambda: load_data(tmp_path, split="test"), error=FileNotFoundError)
    (tmp_path / "test_batch.bin").write_bytes(c_bytes)
    np.testing.assert_array_equal(load_data(tmp_path, split="test").labels, c[:, 0])
    gray = load_data(tmp_path, channels=1).images
    exact = got.images @ np.array([0.299, 0.587, 0.114])
    assert gray.shape == (10, 32, 32, 1) and abs(gray[..., 0] - exact).max() <= 0.5 + 1e-9
    for raw, word in ((a_bytes[:-1], "3073"), (b"", "3073"), (b"\x0a" + a_bytes[1:], "label 10")):
        (tmp_path / "data_batch_2.bin").write_bytes(raw)
        refuses(word, call=lambda: load_data(tmp_path))


# ---- downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves `files` {path: bytes} on this machine and lists what it was asked for."""
    files, asked = {}, []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = files.get(self.path)
            self.send_response(404 if body is None else 200)
            self.send_header("Content-Length", str(len(body or b"")))
            self.end_headers()
            self.wfile.write(body or b"")

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("NANODIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "MIRRORS", {"mnist": (f"{base}/a/", f"{base}/b/"), "cifar10": (f"{base}/c/",)})
    yield files, asked
    httpd.shutdown()
    httpd.server_close()


def test_download_mnist_from_the_second_mirror_once(server, tmp_path, monkeypatch):
    files, asked = server
    images, labels = mnist_files(tmp_path / "source")
    for kind, raw in (("images-idx3", idx(images)), ("labels-idx1", idx(labels))):
        name = f"train-{kind}-ubyte.gz"
        files[f"/b/{name}"] = gzip.compress(raw)
        monkeypatch.setitem(data.SHA256, name, hashlib.sha256(files[f"/b/{name}"]).hexdigest())
    for _ in range(2):
        got = load_data("mnist")
        np.testing.assert_array_equal(got.images[..., 0], images)
        np.testing.assert_array_equal(got.labels, labels)
        assert got.name == "mnist"
        assert [path[:3] for path in asked] == ["/a/", "/b/", "/a/", "/b/"]
    cached = tmp_path / "cache/mnist/train-labels-idx1-ubyte.gz"
    cached.write_bytes(b"damaged")
    load_data("mnist")
    assert cached.read_bytes() == files["/b/" + cached.name]


def test_download_cifar10_reads_members_wherever_they_claim_to_go(server, tmp_path, monkeypatch):
    files, _ = server
    records, raw = cifar_bytes()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in (
            ("../../data_batch_1.bin", raw),
            ("cifar-10-batches-bin/readme.html", b"hello"),
        ):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("data_batch_2.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    files["/c/cifar-10-binary.tar.gz"] = buffer.getvalue()
    monkeypatch.setitem(data.SHA256, data.CIFAR10_FILE, hashlib.sha256(buffer.getvalue()).hexdigest())
    got = load_data("cifar10")
    np.testing.assert_array_equal(got.labels, records[:, 0])
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [data.CIFAR10_FILE]
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / data.CIFAR10_FILE).write_bytes(buffer.getvalue()[:-2000])
    refuses(data.CIFAR10_FILE, call=lambda: load_data(tmp_path / "cut"))


def test_wrong_checksum_and_missing_file_leave_nothing(server, tmp_path):
    files, _ = server
    files["/b/t10k-images-idx3-ubyte.gz"] = b"not what was asked for"
    sum_ = data.SHA256["t10k-images-idx3-ubyte.gz"]
    refuses("404", "SHA-256", sum_, "folder", call=lambda: load_data("mnist", split="test"))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


# ---- folders of images


def picture(H=8, W=8, C=3):
    pixels = np.random.default_rng(0).integers(
        0, 256, (H, W, C), np.uint8
    )  # always the same: hypothesis needs it
    return Image.fromarray(pixels.squeeze())


def test_folder_with_classes(tmp_path):
    for name in ("cat/a.png", "cat/deep/b.bmp", "dog/c.tiff", "dog/d.PPM"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture().save(tmp_path / name)
    (tmp_path / "dog/notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    picture(3, 3).save(tmp_path / ".hidden/x.png")
    got = load_data(tmp_path)
    assert got.images.shape == (4, 8, 8, 3)
    assert got.classes == ("cat", "dog") and got.labels.tolist() == [0, 0, 1, 1]
    np.testing.assert_array_equal(got.images[2], np.asarray(Image.open(tmp_path / "dog/c.tiff")))
    assert load_data(tmp_path, count=2).labels.tolist() == [0, 1]  # spread over the folder
    assert load_data(tmp_path, channels=1).images.shape == (4, 8, 8, 1)
    refuses("5", "4 images", call=lambda: load_data(tmp_path, count=5))
    picture().save(tmp_path / "beside.png")
    assert load_data(tmp_path).labels is None


def test_folder_scales_to_cover_and_keeps_the_middle(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40] = 200  # the middle third
    Image.fromarray(wide).save(tmp_path / "a.png")
    assert abs(load_data(tmp_path, size=10).images.astype(int) - 200).max() < 20  # bicubic at the cut
    assert load_data(tmp_path, size=(12, 36)).images.shape == (1, 12, 36, 3)
    picture(30, 20).save(tmp_path / "b.png")
    refuses("30x20", "20x60", "size", call=lambda: load_data(tmp_path))
    assert load_data(tmp_path, size=5).images.shape == (2, 5, 5, 3)


def one(tmp_path, image, name="x.png", **options):
    folder = tmp_path / f"one{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    image.save(folder / name, **options)
    return load_data(folder).images[0]


def test_folder_pixel_formats(tmp_path):
    gray = picture(C=1)
    assert one(tmp_path, gray).shape == (8, 8, 1)
    assert one(tmp_path, gray.convert("1")).shape == (8, 8, 1)
    sixteen = np.array([[0, 128, 257, 32768, 65520, 65535]], np.uint16)
    for name in ("x.png", "x.tif", "x.pgm"):
        assert one(tmp_path, Image.fromarray(sixteen), name).ravel().tolist() == [0, 0, 1, 128, 255, 255]
    see_through = np.full((2, 2, 4), [10, 20, 30, 0], np.uint8)
    see_through[0, 0, 3] = 255
    got = one(tmp_path, Image.fromarray(see_through))
    assert got[0, 0].tolist() == [10, 20, 30] and got[1, 1].tolist() == [255, 255, 255]
    assert one(tmp_path, Image.fromarray(see_through[..., 2:])).tolist() == [[[30], [255]], [[255], [255]]]
    assert one(tmp_path, picture().convert("P")).shape == (8, 8, 3)
    assert one(tmp_path, picture().convert("CMYK"), "x.jpg").shape == (8, 8, 3)
    turned, exif = picture(4, 6), Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    np.testing.assert_array_equal(one(tmp_path, turned, exif=exif), np.rot90(np.asarray(turned), -1))
    both = tmp_path / "both"
    both.mkdir()
    gray.save(both / "a.png")
    picture().save(both / "b.png")
    got = load_data(both).images
    np.testing.assert_array_equal(got[0], np.repeat(np.asarray(gray)[..., None], 3, axis=2))


def test_folder_with_unreadable_files(tmp_path):
    for i in range(100):
        picture(2, 2).save(tmp_path / f"{i:03}.png")
    (tmp_path / "050.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.warns(UserWarning, match=r"1 of 100 images cannot be read: 050.png"):
        got = load_data(tmp_path)
    assert got.images.shape == (99, 2, 2, 3)
    np.testing.assert_array_equal(got.images[50], np.asarray(Image.open(tmp_path / "051.png")))
    cut = (tmp_path / "051.png").read_bytes()[:50]
    (tmp_path / "051.png").write_bytes(cut)
    refuses("2 of 100", "1 %", "050.png", "051.png", call=lambda: load_data(tmp_path))


def test_folder_refuses_bombs_scripts_and_floats(tmp_path):
    file = tmp_path / "a.png"
    picture().save(file)
    raw = bytearray(file.read_bytes())
    raw[16:24] = struct.pack(">2I", 9000, 9000)
    raw[29:33] = struct.pack(">I", zipfile.crc32(raw[12:29]))
    file.write_bytes(raw)
    refuses("9000x9000", call=lambda: load_data(tmp_path))
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    refuses("a.png", call=lambda: load_data(tmp_path))
    file.unlink()
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tiff")
    refuses("floating", call=lambda: load_data(tmp_path))


def test_folder_ignores_links_that_lead_out(tmp_path):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir()
    outside.mkdir()
    picture().save(inside / "a.png")
    picture().save(outside / "b.png")
    (inside / "same.png").symlink_to(inside / "a.png")
    (inside / "b.png").symlink_to(outside / "b.png")
    (inside / "folder").symlink_to(outside)
    (inside / "gone.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(inside / "pipe.png")
    assert len(load_data(inside).images) == 2


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # what Pillow says of damaged TIFF files
@quick
@given(st.data())
def test_damaged_images_end_in_one_line(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("damaged")
    suffix = drawn.draw(st.sampled_from(["png", "jpg", "webp", "bmp", "gif", "tiff", "ppm"]))
    picture().save(folder / f"x.{suffix}")
    raw = bytearray((folder / f"x.{suffix}").read_bytes())
    for place in drawn.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=6)):
        raw[place] = drawn.draw(st.integers(0, 255))
    (folder / f"x.{suffix}").write_bytes(raw[: drawn.draw(st.integers(0, len(raw)))])
    try:
        assert load_data(folder, size=4).images.shape[:3] == (1, 4, 4)
    except NanodiffError as error:
        assert "\n" not in str(error)


# ---- .npz


def test_npz(tmp_path):
    images, labels = rng.integers(0, 256, (6, 5, 7, 3), np.uint8), np.arange(6, dtype=np.int16)
    file = tmp_path / "set.npz"
    np.savez_compressed(file, images=images, labels=labels, other=np.zeros((2, 2, 9)))
    got = load_data(file)
    np.testing.assert_array_equal(got.images, images)
    assert got.labels.tolist() == list(range(6)) and got.labels.dtype == np.int64 and got.name == "set"
    assert load_data(file, size=4, count=2).images.shape == (2, 4, 4, 3)
    np.savez(file, anything=images[..., 0])
    np.testing.assert_array_equal(load_data(file).images, images[..., :1])
    for dtype, scaled in ((np.float32, to_float(images)), (np.float64, images / 255)):
        np.savez(file, images=scaled.astype(dtype))
        np.testing.assert_array_equal(load_data(file).images, images)
    np.savez(file, images=np.asfortranarray(images))
    assert load_data(file).images.flags.c_contiguous
    np.savez(file, images=images[..., :2])
    refuses("C = 1, 3 or 4", "(6, 5, 7, 2)", call=lambda: load_data(file))


PLAIN = np.zeros((6, 8, 8, 3), np.uint8)


@pytest.mark.parametrize(
    "word, arrays",
    [
        ("holds", {"a": PLAIN, "b": PLAIN}),
        ("holds", {"a": PLAIN[0, 0]}),
        ("holds", {}),
        ("transpose", {"images": PLAIN.transpose(0, 3, 1, 2)}),
        ("(N,H,W,C)", {"images": PLAIN[0]}),
        ("(N,H,W,C)", {"images": PLAIN[0, 0]}),
        ("(0, 8, 8, 3)", {"images": PLAIN[:0]}),
        ("int64", {"images": PLAIN.astype(np.int64)}),
        ("255.0", {"images": PLAIN + np.float32(255)}),
        ("nan", {"images": PLAIN + np.float32(np.nan)}),
        ("(5,)", {"images": PLAIN, "labels": np.arange(5)}),
        ("float64", {"images": PLAIN, "labels": np.arange(6.0)}),
        ("-1", {"images": PLAIN, "labels": np.arange(-1, 5)}),
        ("claims", {"images": np.array([None])}),
    ],
)
def test_bad_npz(tmp_path, word, arrays):
    np.savez(tmp_path / "x.npz", **arrays)
    refuses("x.npz", word, call=lambda: load_data(tmp_path / "x.npz"))


def test_npz_that_lies_or_is_damaged(tmp_path):
    file = tmp_path / "x.npz"

    def member(shape, body):
        head = io.BytesIO()
        np.lib.format.write_array_header_1_0(head, {"descr": "|u1", "fortran_order": False, "shape": shape})
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("images.npy", head.getvalue() + body)

    for shape in ((1 << 20, 1 << 20, 64), (6, 8, 9), (-6, -8, 8)):
        member(shape, bytes(6 * 8 * 8))
        refuses("x.npz", call=lambda: load_data(file))
    member((6, 8, 8), bytes(6 * 8 * 8))
    whole = file.read_bytes()
    assert load_data(file).images.shape == (6, 8, 8, 1)
    for raw in (b"", b"PK", whole[:-30], whole[:300] + b"\x01" + whole[301:]):
        file.write_bytes(raw)
        refuses("x.npz", call=lambda: load_data(file))


# ---- calls that are wrong


@pytest.mark.parametrize(
    "words, options",
    [
        (["size = 0", "4096"], {"size": 0}),
        (["size = (8, 8, 3)"], {"size": (8, 8, 3)}),
        (["size = 5000"], {"size": 5000}),
        (["size = '32'"], {"size": "32"}),
        (["size = 8.5"], {"size": 8.5}),
        (["channels = 2", "RGB"], {"channels": 2}),
        (["count = 0", "from 1"], {"count": 0}),
        (["count = 1.5"], {"count": 1.5}),
        (["split = 'valid'", "train"], {"split": "valid"}),
    ],
)
def test_wrong_options(words, options):
    refuses(*words, call=lambda: load_data("glyphs", **options))


def test_wrong_paths(tmp_path):
    for name in ("no-such-set", "", tmp_path / "missing"):
        refuses("mnist", repr(str(name)), call=lambda: load_data(name), error=FileNotFoundError)  # noqa: B023
    refuses(".png", call=lambda: load_data(tmp_path), error=FileNotFoundError)
    refuses("None", call=lambda: load_data(None))
    (tmp_path / "x.txt").write_text("hello")
    refuses("x.txt", ".npz", call=lambda: load_data(tmp_path / "x.txt"))
    picture().save(tmp_path / "a.png")
    refuses("no splits", call=lambda: load_data(tmp_path, split="test"))


# ---- pixels and batches


def test_floats_and_back():
    images = np.arange(256, dtype=np.uint8)
    x = to_float(images)
    assert x.dtype == np.float32 and x[0] == -1 and x[255] == 1
    np.testing.assert_array_equal(to_uint8(x), images)
    np.testing.assert_array_equal(to_uint8(x.astype(np.float64)), images)
    assert to_uint8(np.float32([-9, 9, np.nan, np.inf, -np.inf])).tolist() == [0, 255, 0, 255, 0]
    refuses("float32", call=lambda: to_float(x))


def test_flip_mirrors_half_of_the_images():
    x = rng.normal(size=(400, 2, 3, 1))
    out = flip(x, seed=1, step=5)
    same, mirrored = (out == x).all(axis=(1, 2, 3)), (out == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all() and 150 < mirrored.sum() < 250  # five standard deviations
    np.testing.assert_array_equal(flip(x, 1, 5), out)
    assert (flip(x, 1, 6) != out).any() and (flip(x, 2, 5) != out).any()


@quick
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 2**64 - 1), st.integers(2, 12))
def test_every_epoch_has_every_index_once(N, batch, seed, steps):
    batches = [batch_indices(N, batch, step, seed) for step in range(steps)]
    assert all(b.shape == (batch,) and b.dtype == np.int64 for b in batches)
    stream = np.concatenate(batches)
    for start in range(0, len(stream) - N + 1, N):
        assert sorted(stream[start : start + N]) == list(range(N))
    rest = stream[len(stream) // N * N :]
    assert len(set(rest)) == len(rest) and all(0 <= i < N for i in rest)
    data._order.cache_clear()  # a resumed run begins anywhere, with nothing remembered
    np.testing.assert_array_equal(batch_indices(N, batch, steps - 1, seed), batches[-1])
    single = [batch_indices(N, 1, place, seed)[0] for place in range(min(len(stream), 50))]
    np.testing.assert_array_equal(single, stream[:50])  # the stream does not depend on the batch size


def test_epochs_and_seeds_differ():
    orders = {tuple(batch_indices(100, 100, step, seed)) for step in range(5) for seed in range(5)}
    assert len(orders) == 25
    a = batch_indices(1000, 1000, 0, 0)
    a[:] = 0  # the caller's own
    assert len(set(batch_indices(1000, 1000, 0, 0))) == 1000


@pytest.mark.parametrize("call", [(0, 1, 0, 0), (5, 0, 0, 0), (5, 1, -1, 0), (5, 1, 0, -1), (5.0, 1, 0, 0)])
def test_wrong_batches(call):
    refuses("use an integer", call=lambda: batch_indices(*call))
