"""Run folders that survive a kill; diffusers' folder layout in and out. No pickle anywhere.

    RUN/run.json                                what the run is: settings, network, diffusion, data
    RUN/checkpoints/step-00000500.safetensors   flat arrays weights, ema, m, v, state; the last two are kept
    RUN/stats.jsonl, samples/, ...              written by train.py

The metadata of a checkpoint is {"nanodiff": BODY, "sha256": digest of BODY}. BODY is JSON: the step, a digest
of every tensor, and the layout, [shape, start] of each parameter in the flat arrays.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanodiff.context import NanodiffError

KEEP = 2
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
BETA_SCHEDULES = {"linear": "linear", "squaredcos_cap_v2": "cosine"}  # diffusers' names to ours
PREDICTION_TYPES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
# Files from before diffusers 0.17 use the names on the left.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


def write_file(path, data):
    """Replace a file by `data`, bytes or str: a crash at any moment leaves the old or the new one, whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is durable only once the folder is; Windows opens no folders
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_json(path, *keys):
    """The object in a JSON file, which must have `keys`; a NanodiffError names what is wrong with it."""
    wrong = "not an object"
    try:
        value = json.loads(Path(path).read_bytes())
        wrong = (
            ", ".join(f"without {key!r}" for key in keys if key not in value)
            if type(value) is dict
            else wrong
        )
    except ValueError as error:
        wrong = f"not JSON: {error}"
    if wrong:
        raise NanodiffError(f"{path} is {wrong}; restore it, or use another folder")
    return value


def read_tensors(path):  # -> {name: array}, {key: text}
    """Tensors and metadata of a safetensors file; bfloat16 comes as float32."""
    import safetensors

    data = Path(path).read_bytes()
    try:
        entries = safetensors.deserialize(data)
        metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__") or {}
    except (safetensors.SafetensorError, ValueError) as error:
        raise NanodiffError(f"{path} is not a whole safetensors file: {error}") from None
    tensors = {}
    for name, entry in entries:
        if entry["dtype"] not in DTYPES:
            raise NanodiffError(f"{path}: {name} is {entry['dtype']}; must be {', '.join(DTYPES)}")
        array = np.frombuffer(entry["data"], DTYPES[entry["dtype"]])
        if entry["dtype"] == "BF16":
            array = (array.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.reshape(entry["shape"])
    return tensors, metadata


def read_run(folder):
    """RUN/run.json as a dictionary."""
    return read_json(Path(folder) / "run.json", "settings", "data", "shape", "model", "diffusion")


def match_run(folder, run, free):
    """What run.json shall hold: `run`, if the folder is new or its run differs in `free` settings alone.

    Changes nothing on disk. A NanodiffError names the first difference and both values.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        if path.parent.exists() and [p for p in path.parent.iterdir() if not p.name.startswith(".")]:
            raise NanodiffError(f"{folder} holds other files and no run.json: choose an empty or new --out")
        return run
    old, new = read_run(folder), json.loads(json.dumps(run))
    pairs = [(name, old["settings"].get(name), value) for name, value in new["settings"].items()]
    pairs += [(f"data {name}", old["data"].get(name), value) for name, value in new["data"].items()]
    for name, there, here in pairs:
        if name not in free and there != here:
            text = f"was trained with {name} = {there!r}, not {here!r}"
            raise NanodiffError(f"{folder} {text}: give the old value or choose another --out")
    return {**run, "finished": old.get("finished")}


@contextlib.contextmanager
def claim(folder):
    """Make a run folder, hold it for one training, and sweep up the temporary files that a killed one left.

    The system drops the lock when the process ends, however it ends.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            text = f"{folder} is being trained by another process: wait, or choose another --out"
            raise NanodiffError(text) from None
        except (ImportError, OSError):  # Windows; a file system without locks
            pass
        for path in folder.rglob(".*.[0-9]*.tmp"):  # as write_file names them
            path.unlink(missing_ok=True)
        yield


def read_stats(folder, step=math.inf):
    """The records of RUN/stats.jsonl up to `step`; a line cut off by a crash is left out."""
    records = []
    with contextlib.suppress(FileNotFoundError):
        for line in (Path(folder) / "stats.jsonl").read_text().splitlines():
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if isinstance(record, dict) and record.get("step", math.inf) <= step:
                    records.append(record)
    return records


class Checkpoint(NamedTuple):
    path: Path
    step: int
    tensors: dict
    meta: dict


def _digest(array):
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(array)
    return digest.hexdigest()


def _layout(params):
    return {name: [list(params[name].shape), params[name].start] for name in params}


def save_checkpoint(folder, step, model, opt, **extra):
    """Write RUN/checkpoints/step-<step>.safetensors, then delete all but the newest two. Returns its path.

    extra   what else the training loop needs to go on, as JSON
    What holds a NaN or an infinity is never written: NanodiffError, and the files stay as they are.
    """
    import safetensors.numpy

    arrays = {"weights": model.params.data, "m": opt.m, "v": opt.v, "state": opt.state}
    if opt.ema is not None:
        arrays["ema"] = opt.ema
    tensors = {name: np.ascontiguousarray(model.ctx.to_host(array)) for name, array in arrays.items()}
    for name, array in tensors.items():
        if name != "state" and not np.isfinite(array).all():
            text = f"step {step}: NaN or infinity in {name}, so no checkpoint was written"
            raise NanodiffError(f"{text}; go on from the last one, or from the start with a smaller --lr")
    digests = {name: _digest(array) for name, array in tensors.items()}
    body = json.dumps(dict(extra, step=step, sha256=digests, layout=_layout(model.params)))
    metadata = {"nanodiff": body, "sha256": hashlib.sha256(body.encode()).hexdigest()}
    files = Path(folder) / "checkpoints"
    files.mkdir(exist_ok=True)
    path = files / f"step-{step:08d}.safetensors"
    write_file(path, safetensors.numpy.save(tensors, metadata))
    for old in sorted(files.glob("step-*.safetensors"))[:-KEEP]:
        with contextlib.suppress(OSError):  # the next save tries again
            old.unlink()
    return path


def read_checkpoint(path):
    """A checkpoint with every digest checked; a NanodiffError says what is wrong with the file."""
    tensors, metadata = read_tensors(path)
    body = metadata.get("nanodiff", "")
    if hashlib.sha256(body.encode()).hexdigest() != metadata.get("sha256"):
        raise NanodiffError(f"{path}: its header is damaged (the sha-256 differs)")
    meta = json.loads(body)
    for name in sorted(tensors.keys() | meta["sha256"].keys()):
        if name not in tensors or _digest(tensors[name]) != meta["sha256"].get(name):
            raise NanodiffError(f"{path}: tensor {name!r} is damaged (its sha-256 differs)")
    return Checkpoint(Path(path), meta["step"], tensors, meta)


def load_checkpoint(folder, aside=False):
    """The latest readable checkpoint of a run folder; None where none was written yet.

    A damaged file is passed over with a warning that says what is wrong; if all are, that is a NanodiffError.
    aside: rename damaged files to *.damaged, for a training that will write these steps again.
    """
    wrong = {}
    for path in sorted((Path(folder) / "checkpoints").glob("step-*.safetensors"), reverse=True):
        try:
            checkpoint = read_checkpoint(path)
        except (NanodiffError, OSError) as error:
            wrong[path] = str(error)
            continue
        for bad, text in wrong.items():
            warnings.warn(f"{text}; using {path.name} instead", stacklevel=2)
            if aside:
                bad.rename(bad.with_suffix(".damaged"))
        return checkpoint
    if wrong:
        raise NanodiffError(f"no readable checkpoint: {'; '.join(wrong.values())}; choose another --out")
    return None


def restore(checkpoint, model, opt=None, ema=False):
    """Put a checkpoint into a model (its EMA weights if `ema` and it has them) and into its optimiser."""
    here, there = _layout(model.params), checkpoint.meta["layout"]
    for name in [*here, *there]:
        if here.get(name) != there.get(name):
            text = f"[shape, start] of {name} is {there.get(name)}, in this network {here.get(name)}"
            raise NanodiffError(f"{checkpoint.path}: {text}; load it with the version in its run.json")
    tensors, ctx = checkpoint.tensors, model.ctx
    weights = tensors["ema"] if ema and "ema" in tensors else tensors["weights"]
    model.params.data[...] = ctx.to_device(weights)
    if opt is not None:
        for name in ("m", "v", "state", "ema")[: 3 if opt.ema is None else 4]:
            getattr(opt, name)[...] = ctx.to_device(tensors[name], tensors[name].dtype)


@dataclass
class Run:
    """What load_run returns. shape: (H, W, C); a folder in diffusers' layout has no settings and no step."""

    folder: Path
    model: object
    diffusion: object
    shape: tuple
    settings: dict = field(default_factory=dict)
    step: int | None = None


def load_run(folder, device="cpu", ema=True):
    """Run of a run folder (with the EMA weights, or the raw ones) or of a folder in diffusers' layout."""
    from nanodiff.diffusion import Diffusion
    from nanodiff.unet import UNet, UNetConfig

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a run folder or one in diffusers' layout")
    if (folder / "run.json").exists():
        run = read_run(folder)
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            raise NanodiffError(f"{folder} has no checkpoint yet: train it first")
        model = UNet(UNetConfig.from_dict(run["model"]), device=device)
        restore(checkpoint, model, ema=ema)
        shape, diffusion = tuple(run["shape"]), Diffusion.from_dict(run["diffusion"])
        return Run(folder, model, diffusion, shape, run["settings"], checkpoint.step)
    if not any((folder / name).exists() for name in ("config.json", "unet/config.json")):
        raise NanodiffError(
            f"{folder} holds no run.json and no config.json: give the folder of a run or model"
        )
    model = from_pretrained(folder, device)
    size = model.config.sample_size or 32
    H, W = (size, size) if isinstance(size, int) else size
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        diffusion = _diffusion(read_json(scheduler), scheduler)
    else:
        warnings.warn(f"{folder} has no scheduler/: taken as 1000 steps, linear, eps (DDPM's)", stacklevel=2)
        diffusion = Diffusion(1000, "linear", "eps")
    return Run(folder, model, diffusion, (H, W, model.config.in_channels))


def _diffusion(config, path):
    """Diffusion from the config of a diffusers scheduler."""
    from nanodiff.diffusion import Diffusion

    found = dict(beta_schedule="linear", prediction_type="epsilon", beta_start=1e-4, beta_end=0.02) | config
    args = []
    for key, table in (("beta_schedule", BETA_SCHEDULES), ("prediction_type", PREDICTION_TYPES)):
        if found[key] not in table:
            raise NanodiffError(f"{path}: {key} = {found[key]!r}: must be one of {', '.join(table)}")
        args.append(table[found[key]])
    diffusion = Diffusion(found.get("num_train_timesteps", 1000), *args)
    betas = [found["beta_start"], found["beta_end"]]
    if diffusion.schedule == "linear" and not np.allclose(betas, diffusion.beta[[0, -1]], atol=0):
        raise NanodiffError(f"{path}: beta_start, beta_end = {betas}: must be {diffusion.beta[[0, -1]]}")
    return diffusion


def _transposed(name, array, axes):
    """Ours to PyTorch's layout or back: convolution (kh,kw,C,O) - (O,C,kh,kw), linear (C,O) - (O,C)."""
    if array.ndim == 2 and name != "class_embedding.weight":  # a table (classes, D) is the same in both
        return np.ascontiguousarray(array.T)
    return np.ascontiguousarray(array.transpose(axes) if array.ndim == 4 else array)


def save_pretrained(model, folder, diffusion=None):
    """Write a model in diffusers' layout: config.json and diffusion_pytorch_model.safetensors, float32.

    With a Diffusion the folder becomes a whole DDPMPipeline: model_index.json, unet/ and scheduler/.
    """
    import safetensors.numpy

    folder = Path(folder)
    target = folder / "unet" if diffusion else folder
    target.mkdir(parents=True, exist_ok=True)
    weights = {}
    for name in model.params:
        array = model.ctx.to_host(model.params[name].data).astype(np.float32, copy=False)
        weights[name] = _transposed(name, array, (3, 2, 0, 1))
    write_file(target / WEIGHTS_FILE, safetensors.numpy.save(weights, {"format": "pt"}))
    configs = {target / "config.json": dict(_class_name="UNet2DModel", **model.config.to_dict())}
    if diffusion:
        (folder / "scheduler").mkdir(exist_ok=True)
        theirs = {ours: name for table in (BETA_SCHEDULES, PREDICTION_TYPES) for name, ours in table.items()}
        configs[folder / "scheduler" / "scheduler_config.json"] = dict(
            _class_name="DDPMScheduler", num_train_timesteps=diffusion.timesteps,
            beta_schedule=theirs[diffusion.schedule], prediction_type=theirs[diffusion.prediction],
            beta_start=float(diffusion.beta[0]), beta_end=float(diffusion.beta[-1]), clip_sample=True,
        )  # fmt: skip
        parts = dict(scheduler=["diffusers", "DDPMScheduler"], unet=["diffusers", "UNet2DModel"])
        configs[folder / "model_index.json"] = dict(_class_name="DDPMPipeline", **parts)
    for path, config in configs.items():
        write_file(path, json.dumps(dict(config, _diffusers_version="0.30.0"), indent=2) + "\n")


def from_pretrained(folder, device="cpu"):
    """UNet from a folder in diffusers' layout, a pipeline's or a bare model's; every tensor must fit."""
    from nanodiff.unet import UNet, UNetConfig

    folder = Path(folder)
    folder = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    path = folder / WEIGHTS_FILE
    for file in (folder / "config.json", path):
        if not file.exists():
            raise FileNotFoundError(f"{file} is not there: save the model with save_pretrained (safetensors)")
    model = UNet(UNetConfig.from_dict(read_json(folder / "config.json")), device=device)
    tensors = {}
    for name, array in read_tensors(path)[0].items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        tensors[name] = _transposed(name, array, (2, 3, 1, 0))
    here, there = ({n: tuple(d[n].shape) for n in d} for d in (model.params, tensors))
    wrong = [
        f"{name} is {there.get(name, 'missing')} and should be {here.get(name, 'absent')}"
        for name in {**here, **there}
        if here.get(name) != there.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise NanodiffError(f"{path} does not fit its config.json: {'; '.join(wrong[:3])}{more}")
    for name, array in tensors.items():
        model.params[name].data[...] = model.ctx.to_device(array)
    return model
