"""20,000 damaged and hostile files, the same each time: all load or are refused in a line, in little memory.

Bytes are flipped, cut, moved and overwritten; JSON is changed as JSON, also in headers and with digests made
anew, so that the checks behind them are reached.
"""

import hashlib
import json
import random
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import nanodiff as nd
from nanodiff import checkpoint

TOKENS = [b"NaN", b"Infinity", b"1e999", b"-1", b"0", b"9" * 25, b'"', b"{", b"}", b"[", b"]", b"null",
          b"true", b"\x00", b"\xff\xfe", b"\\ud800", b",", b":", b'"8"']  # fmt: skip
VALUES = [0, 1, 2, 3, -1, True, False, None, "", "8", "linear", "a\nb", "\ud800", "x" * 10_000, [], [[]], {},
          0.5, [0], [1, 2], {"a": 1}, 10**6, 10**9, 10**12, 2**31, 2**63, 10**19, -(10**18), 1e308, -1e308,
          1e-320, float("nan"), float("inf"), [10**9] * 4, [0.5] * 1000, "F64", "BF16", [[[[[[[[[[1]]]]]]]]]],
          "learned_range", "UNet2DConditionModel", "AttnDownBlock2D", ["AttnDownBlock2D"] * 30]  # fmt: skip
VALUES = [json.dumps(value) for value in VALUES]


def changed_bytes(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        place, length = chance.randrange(len(data) + 1), chance.choice((1, 2, 8, 100))
        other = chance.randrange(len(data) + 1)
        match chance.randrange(7):
            case 0 if place < len(data):
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                del data[place:]
            case 2:
                data[place : place + length] = data[other : other + length]
            case 3:
                data[place:place] = data[other : other + length]
            case 4:
                del data[place : place + length]
            case 5:
                data[place : place + chance.randrange(4)] = chance.choice(TOKENS)
            case 6:
                data[:8] = chance.choice((0, 1, len(data), 2**32, 2**63, 2**64 - 1)).to_bytes(8, "little")
    return bytes(data)


def places(value):
    """(container, key) of everything inside."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield value, key
        yield from places(inner)


def changed_json(text, chance):
    value = json.loads(text)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        found = list(places(value))
        if not found:
            break
        container, key = chance.choice(found)
        match chance.randrange(6):
            case 0 | 1 | 2:
                container[key] = json.loads(chance.choice(VALUES))
            case 3:
                del container[key]
            case 4:
                other, place = chance.choice(found)
                container[key] = json.loads(json.dumps(other[place])) if other is not container else None
            case 5 if isinstance(container, dict):
                container[chance.choice(["", "query", "__metadata__", "more", "\n"])] = container.pop(key)
    return value


def framed(text, data):
    return struct.pack("<Q", len(text)) + text + data


def sealed(tensors, meta):
    """The bytes of a checkpoint whose digests are right."""
    if isinstance(meta, dict) and isinstance(meta.get("sha256"), dict):
        meta["sha256"] |= {n: checkpoint._digest(a) for n, a in tensors.items() if n in meta["sha256"]}
    body = json.dumps(meta)
    metadata = {"nanodiff": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    return safetensors.numpy.save(tensors, metadata)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pipeline folder and a run folder, in memory where there is such a place; 2889 weights."""
    root = tmp_path_factory.mktemp("fuzz")
    config = nd.UNetConfig(
        sample_size=4, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2,
        down_block_types=("AttnDownBlock2D",), up_block_types=("UpBlock2D",),
    )  # fmt: skip
    model, diffusion = nd.UNet(config, device="ref"), nd.Diffusion(20, "scaled_linear", "v", (1e-3, 0.02))
    checkpoint.save_pretrained(model, root / "pipe", diffusion)
    run = dict(version="0", settings=dict(steps=1, data="glyphs"), data=dict(name="glyphs"), shape=[4, 4, 1],
               model=config.to_dict(), diffusion=diffusion.to_dict(), finished=None)  # fmt: skip
    (root / "run").mkdir()
    (root / "run" / "run.json").write_text(json.dumps(run))
    opt = nd.Adam(model.params, ema=0.9)
    checkpoint.save_checkpoint(root / "run", 1, model, opt, window=[0.5, float("nan")], seconds=1.0)
    (root / "run" / "stats.jsonl").write_text('{"step": 1, "loss": 0.5, "lr": 1e-3}\n' * 3)
    return root


KINDS = {  # file, how many mutants
    "pipe/unet/config.json": 3500,
    "pipe/scheduler/scheduler_config.json": 4500,
    f"pipe/unet/{checkpoint.WEIGHTS_FILE}": 4000,
    "run/run.json": 3500,
    "run/checkpoints/step-00000001.safetensors": 3500,
    "run/stats.jsonl": 1000,
}


def mutants(path, good, chance):
    """Endlessly: bytes, and what the file means changed."""
    if path.suffix == ".json":
        while True:
            yield changed_bytes(good, chance)
            yield json.dumps(changed_json(good, chance)).encode()
            yield json.dumps(changed_json(good, chance)).encode()
    while path.suffix == ".jsonl":
        yield changed_bytes(good, chance)
    end = 8 + int.from_bytes(good[:8], "little")
    header, data = good[8:end], good[end:]
    body = json.loads(header)["__metadata__"].get("nanodiff")
    while True:
        yield changed_bytes(good, chance)
        yield framed(changed_bytes(header, chance), data)
        yield framed(json.dumps(changed_json(header, chance)).encode(), data)
        if body:
            tensors = safetensors.numpy.load(good)
            for name in chance.sample(sorted(tensors), chance.randrange(3)):
                array = tensors.pop(name)
                odd = [array[:1], array.astype("f2"), array.reshape(-1, 2), None]
                if (other := chance.choice(odd)) is not None:
                    tensors[name] = other
            yield sealed(tensors, changed_json(body, chance))


@pytest.mark.parametrize("name", KINDS)
def test_a_mutant_loads_or_is_refused(name, folders, little_memory):
    path = folders / name
    good, chance, loaded, said = path.read_bytes(), random.Random(name), 0, set()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", UserWarning)
        for i, data in zip(range(KINDS[name]), mutants(path, good, chance)):
            path.write_bytes(data)
            try:
                load(path, folders)
                loaded += 1
            except (nd.NanodiffError, FileNotFoundError) as error:
                text = str(error)
                assert len(text.splitlines()) == 1 and len(text) < 1000, f"mutant {i}: {text}"
                said.add(text)
            except Exception as error:
                raise AssertionError(f"mutant {i} of {name}, {data[:2000]!r}") from error
    path.write_bytes(good)
    load(path, folders)
    assert loaded > KINDS[name] / 100, (
        "nearly all are refused: what lies behind the first check is not tested"
    )
    assert len(said) > 20 or name.endswith(".jsonl"), "the mutants are all refused for the same reasons"


def load(path, folders):
    """Whatever reads the file, as far as the file decides."""
    if path.suffix == ".jsonl":
        return checkpoint.read_stats(path.parent, 2)
    if path.parent.name == "scheduler":
        return checkpoint._diffusion(checkpoint.read_json(path), path)
    if path.name == checkpoint.WEIGHTS_FILE:
        checkpoint.read_header(path)
        safetensors.deserialize(path.read_bytes())  # what is accepted here the library accepts
    if path.name == "run.json":
        settings = json.loads(json.dumps(dict(settings=dict(steps=1), data=dict(name="glyphs"))))
        checkpoint.match_run(path.parent, settings, frozenset())
    run = checkpoint.load_run(folders / path.relative_to(folders).parts[0], "ref")
    assert np.isfinite(run.model.params.data).all()
    if path.suffix == ".json":  # what was accepted also runs
        x = np.zeros((1, 4, 4, run.model.config.in_channels), np.float32)
        with np.errstate(all="ignore"):
            run.model.predict(x, np.array([3]))
    return Path(path)
