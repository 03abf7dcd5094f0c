"""Run folders that survive a kill; diffusers' folder layout in and out. No pickle anywhere.

    RUN/run.json                                what the run is: settings, network, diffusion, data
    RUN/checkpoints/step-00000500.safetensors   flat arrays weights, ema, m, v, state; the last two are kept
    RUN/stats.jsonl, samples/, ...              written by train.py

The metadata of a checkpoint is {"nanodiff": BODY, "sha256": digest of BODY}. BODY is JSON: the step, a digest
of every tensor, and the layout, [shape, start] of each parameter in the flat arrays.

A file may come from anyone. So what it claims is checked first, against its own size and the limits below,
and the network it asks for is built as names and shapes alone; memory is made when they agree with what the
file holds, and is then at most a few times its size.
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
WEIGHTS_FILE, HALF_FILE = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors"
# diffusers' names to ours; of several with one meaning the last is written
CLASSES = dict.fromkeys(("DDIMScheduler", "DDPMScheduler"))
BETA_SCHEDULES = dict(linear="linear", scaled_linear="scaled_linear", squaredcos_cap_v2="cosine")
BETA_SCHEDULES |= dict(sigmoid="sigmoid_beta")
PREDICTION_TYPES = dict(epsilon="eps", sample="x0", v_prediction="v")
VARIANCE_TYPES = dict(fixed_small_log="fixed_small", fixed_small="fixed_small", fixed_large_log="fixed_large")
VARIANCE_TYPES |= dict(fixed_large="fixed_large", learned_range="learned_range")
SPACINGS = {name: name for name in ("linspace", "leading", "trailing")}
SCHEDULER = dict(  # what diffusers means by a key that a scheduler_config.json omits
    _class_name="DDPMScheduler", num_train_timesteps=1000, beta_schedule="linear", beta_start=1e-4,
    beta_end=0.02, trained_betas=None, prediction_type="epsilon", variance_type="fixed_small",
    rescale_betas_zero_snr=False, clip_sample=True, clip_sample_range=1.0, thresholding=False,
    dynamic_thresholding_ratio=0.995, sample_max_value=1.0, timestep_spacing="leading", steps_offset=0,
    set_alpha_to_one=True,
)  # fmt: skip
# Files from before diffusers 0.17 use the names on the left.
OLD_NAMES = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}

# Limits on what a file may ask for
JSON_BYTES = 4 << 20  # objects take up to 25 times that; the header of the largest network allowed here, half
JSON_DEPTH = 8  # a run.json has 4 levels; Python's own limit, 1000, would end in RecursionErrors anywhere
LEVELS = 12  # of a network: the side of an image is then divisible by 2048
LARGEST = dict(  # values of a config.json, some 10 times those of published networks
    block_out_channels=2**14, in_channels=2**12, out_channels=2**12, layers_per_block=32, norm_eps=1,
    time_embedding_dim=2**16, num_class_embeds=2**20, sample_size=2**13,
)  # fmt: skip
WEIGHTS = 2**31  # 8.6 GB in float32, and as much again for their gradients


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


def parse_json(data, finite=True):
    """The value in JSON bytes. A ValueError also for what Python's reader lets pass: a key given twice, NaN
    and infinity (if `finite`), numbers of over 40 digits, more than JSON_DEPTH levels."""

    def unique(pairs):
        if len(found := dict(pairs)) < len(pairs):
            raise ValueError("it gives a key twice")
        return found

    def number(text):
        if len(text) > 40 or finite and not math.isfinite(float(text)):
            raise ValueError(f"{text[:40]} is not a finite number of at most 40 digits")
        return int(text) if text.lstrip("-").isdigit() else float(text)

    hooks = dict(parse_float=number, parse_constant=number, parse_int=number, object_pairs_hook=unique)
    try:
        value = json.loads(data.decode(), **hooks)
        if b"\\u" in data:  # half of a surrogate pair is no text: an error of encode()
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    level = [value]
    for _ in range(JSON_DEPTH + 1):
        level = [v for x in level if type(x) in (dict, list) for v in (x.values() if type(x) is dict else x)]
    if level:
        raise ValueError(f"it is nested more than {JSON_DEPTH} levels deep")
    return value


def read_json(path, **types):
    """The object in a JSON file, with a value of that type for each key in `types`; else a NanodiffError."""
    with open(path, "rb") as file:
        data = file.read(JSON_BYTES + 1)
    try:
        value = parse_json(data) if len(data) <= JSON_BYTES else {}
        lacks = [k for k, t in types.items() if type(value) is not dict or type(value.get(k)) is not t]
        wrong = ", ".join(f"without {k!r}, {types[k].__name__}" for k in lacks)
        wrong = wrong if type(value) is dict else "not an object"
    except ValueError as error:
        wrong = f"not JSON: {error}"
    wrong = wrong if len(data) <= JSON_BYTES else f"longer than {JSON_BYTES} bytes"
    if wrong:
        raise NanodiffError(f"{path} is {wrong}; restore it, or use another folder")
    return value


def _must(ok, path, key, value, limit):
    if not ok:
        raise NanodiffError(f"{path}: {key} = {value!a:.60}: must be {limit}")


@contextlib.contextmanager
def _about(what):
    """What goes wrong with a value from a file is said of `what`, in a line of bounded length."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError) as error:
        raise NanodiffError(f"{what}: {' '.join(str(error).split())[:400]}") from error


class Entry(NamedTuple):  # a tensor in a safetensors file; its numbers lie from byte `start` on
    dtype: str
    shape: tuple
    start: int


def read_header(path):  # -> {name: Entry}, {key: text}
    """What a safetensors file holds, checked against its size; no tensor is read.

    The library's reader takes the last of two tensors with one name, and gives neither the header before the
    tensors nor bfloat16: hence this one. Beyond what the library refuses it refuses a key given twice, empty
    tensors, other dtypes, and a header above JSON_BYTES (the format's own limit is 100 MB).
    """

    def need(ok, text):
        if not ok:
            raise NanodiffError(f"{path} is not a whole safetensors file: {text}")

    with open(path, "rb") as file:
        size, n = os.fstat(file.fileno()).st_size, int.from_bytes(file.read(8), "little")
        rest = size - 8 - n
        need(size >= 8 and rest >= 0, f"it has {size} bytes, and should have more than {8 + n}")
        need(n <= JSON_BYTES, f"its header has {n} bytes; at most {JSON_BYTES} are read")
        data = file.read(n)
    with _about(f"{path}: its header is not JSON"):
        header = parse_json(data)
    need(type(header) is dict and data[:1] == b"{", "its header is not an object")
    metadata = header.pop("__metadata__", None) or {}
    need(type(metadata) is dict and all(type(v) is str for v in metadata.values()), "its metadata is no text")
    entries, spans = {}, []
    for name, found in header.items():
        say, fields = f"{name!a:.100}", ("dtype", "shape", "data_offsets")
        need(type(found) is dict and found.keys() == set(fields), f"{say} has other fields than {fields}")
        dtype, shape, span = map(found.get, fields)
        if dtype not in list(DTYPES):
            raise NanodiffError(f"{path}: {say} is {str(dtype)!a:.20}; must be {', '.join(DTYPES)}")
        for v, least in ((shape, 1), (span, 0)):
            whole = type(v) is list and len(v) <= 8 and all(type(k) is int and k >= least for k in v)
            need(whole and (v is shape or len(v) == 2), f"{say} has no proper shape or place")
        fits = span[1] - span[0] == math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        need(fits, f"{say}, {dtype} {shape}, cannot lie at bytes {span}")
        spans.append((*span, say))
        entries[name] = Entry(dtype, tuple(shape), 8 + n + span[0])
    end = 0
    for start, stop, say in sorted(spans):
        need(start == end, f"{say} starts at byte {start}, where byte {end} is next")
        end = stop
    need(end == rest, f"its tensors take {end} bytes, and it has {rest}")
    return entries, metadata


def read_tensor(path, entry):
    """One tensor, straight from the file; bfloat16, the upper half of float32, comes as that."""
    count = math.prod(entry.shape)
    array = np.fromfile(path, DTYPES[entry.dtype], count, offset=entry.start)
    if array.size != count:
        raise NanodiffError(f"{path} became shorter while it was read: try again")
    if entry.dtype == "BF16":
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.reshape(entry.shape)


def read_run(folder):
    """RUN/run.json as a dictionary."""
    path = Path(folder) / "run.json"
    run = read_json(path, settings=dict, data=dict, shape=list, model=dict, diffusion=dict)
    sides = len(run["shape"]) == 3 and all(type(n) is int and 0 < n <= 2**13 for n in run["shape"])
    _must(sides, path, "shape", run["shape"], f"H, W, C, each from 1 to {2**13}")
    return run


def match_run(folder, run, free, defaults=()):
    """What run.json shall hold: `run`, if the folder is new or its run differs in `free` settings alone.

    defaults: values of settings that a run from before they existed does not name, a dictionary.
    Changes nothing on disk. A NanodiffError names the first difference and both values.
    """
    path = Path(folder) / "run.json"
    if not path.exists():
        if path.parent.exists() and [p for p in path.parent.iterdir() if not p.name.startswith(".")]:
            raise NanodiffError(f"{folder} holds other files and no run.json: choose an empty or new --out")
        return run
    old, new = read_run(folder), json.loads(json.dumps(run))
    settings = {**dict(defaults), **old["settings"]}
    pairs = [(name, settings.get(name), value) for name, value in new["settings"].items()]
    pairs += [(f"data {name}", old["data"].get(name), value) for name, value in new["data"].items()]
    for name, there, here in pairs:
        if name not in free and there != here:
            text = f"was trained with {name} = {there!r:.200}, not {here!r}"
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
        for line in (Path(folder) / "stats.jsonl").read_bytes().splitlines():
            with contextlib.suppress(ValueError):
                record = parse_json(line, finite=False)
                if type(record) is dict and type(record.get("step")) is int and record["step"] <= step:
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
    if len(body) > JSON_BYTES // 2:  # its quotes are escaped in the header
        raise NanodiffError(f"step {step}: {len(body)} bytes beside the weights: use a smaller --log-every")
    write_file(path, safetensors.numpy.save(tensors, metadata))
    for old in sorted(files.glob("step-*.safetensors"))[:-KEEP]:
        with contextlib.suppress(OSError):  # the next save tries again
            old.unlink()
    return path


def read_checkpoint(path):
    """A checkpoint with every digest checked; a NanodiffError says what is wrong with the file."""
    entries, metadata = read_header(path)
    body = metadata.get("nanodiff", "").encode()
    if hashlib.sha256(body).hexdigest() != metadata.get("sha256"):
        raise NanodiffError(f"{path}: its header is damaged (the sha-256 differs)")
    with _about(f"{path}: its header is damaged"):
        meta = parse_json(body, finite=False)  # the loss of a step may be NaN
    for key, kind in dict(step=int, sha256=dict, layout=dict).items():
        if type(meta) is not dict or type(meta.get(key)) is not kind:
            raise NanodiffError(f"{path}: its header has no {key}: it was not written by nanodiff")
    tensors = {}
    for name in sorted(entries.keys() | meta["sha256"].keys()):
        if name in entries:
            tensors[name] = read_tensor(path, entries[name])
        if name not in tensors or _digest(tensors[name]) != meta["sha256"].get(name):
            raise NanodiffError(f"{path}: tensor {name!a:.100} is damaged (its sha-256 differs)")
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
            text = f"[shape, start] of {name!a:.100} is {there.get(name)!a:.60}, in this network"
            text = f"{text} {here.get(name)}"
            raise NanodiffError(f"{checkpoint.path}: {text}; load it with the version in its run.json")
    tensors, ctx = checkpoint.tensors, model.ctx
    weights = "ema" if ema and "ema" in tensors else "weights"
    if model.params.data is None and weights in tensors and model.params.count <= tensors[weights].size:
        _allocate(model)
    targets = {weights: model.params.data}
    if opt is not None:
        targets |= dict(m=opt.m, v=opt.v, state=opt.state) | ({} if opt.ema is None else dict(ema=opt.ema))
    for name, target in targets.items():
        there = tensors[name].shape if name in tensors else "missing"
        here = model.params.count if target is None else target.shape
        if there != here:
            raise NanodiffError(f"{checkpoint.path}: {name} is {there}, in this network {here}")
    for name, target in targets.items():
        ctx.copy(target, ctx.to_device(tensors[name], target.dtype))


def _allocate(model):
    """Memory for a network that is names and shapes so far; its weights are read, so none are drawn."""
    for name in model.params:
        model.params[name].init = "zero"
    model.params.allocate(model.ctx, 0)


@dataclass
class Run:
    """What load_run returns. shape: (H, W, C). A folder in diffusers' layout has no settings and no step, but
    in `sampling` its scheduler's settings, as keywords for the samplers."""

    folder: Path
    model: object
    diffusion: object
    shape: tuple
    settings: dict = field(default_factory=dict)
    step: int | None = None
    sampling: dict = field(default_factory=dict)


def load_run(folder, device="cpu", ema=True):
    """Run of a run folder (with the EMA weights, or the raw ones) or of a folder in diffusers' layout."""
    from nanodiff.diffusion import Diffusion
    from nanodiff.unet import UNet

    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder: give a run folder or one in diffusers' layout")
    if (folder / "run.json").exists():
        run = read_run(folder)
        checkpoint = load_checkpoint(folder)
        if checkpoint is None:
            raise NanodiffError(f"{folder} has no checkpoint yet: train it first")
        model = UNet(_config(run["model"], folder / "run.json"), device=device, init=None)
        restore(checkpoint, model, ema=ema)
        with _about(folder / "run.json"):
            shape, diffusion = tuple(run["shape"]), Diffusion.from_dict(run["diffusion"])
        return Run(folder, model, diffusion, shape, run["settings"], checkpoint.step)
    if not any((folder / name).exists() for name in ("config.json", "unet/config.json")):
        raise NanodiffError(f"{folder} has no run.json and no config.json: give the folder of a run or model")
    model = from_pretrained(folder, device)
    size = model.config.sample_size or 32
    H, W = (size, size) if isinstance(size, int) else size
    scheduler, sampling = folder / "scheduler" / "scheduler_config.json", {}
    if scheduler.exists():
        diffusion, sampling = _diffusion(read_json(scheduler), scheduler)
    else:
        warnings.warn(f"{folder} has no scheduler/: taken as 1000 steps, linear, eps (DDPM's)", stacklevel=2)
        diffusion = Diffusion(1000, "linear", "eps")
    C, out = model.config.in_channels, model.config.out_channels
    fits = diffusion.variance != "learned_range" or out == 2 * C
    _must(fits, folder, "out_channels", out, f"{2 * C}, two for each of in, with variance_type learned_range")
    return Run(folder, model, diffusion, (H, W, C), sampling=sampling)


def _ends(T):  # as Diffusion has them where it is given none
    return 1e-4 * (1000 / T), 0.02 * (1000 / T)


def _diffusion(config, path):  # -> Diffusion, keywords for the samplers
    """What the config of diffusers' DDPMScheduler or DDIMScheduler says; a warning names what is lost."""
    from nanodiff.diffusion import SCHEDULES, Diffusion

    c = SCHEDULER | config

    def pick(key, table):
        _must(type(c[key]) is str and c[key] in table, path, key, c[key], f"one of {', '.join(table)}")
        return table[c[key]]

    for key, value in SCHEDULER.items():
        if type(value) in (bool, int, float):
            kinds = (int, float) if type(value) is float else (type(value),)
            _must(type(c[key]) in kinds, path, key, c[key], f"of the type of {value!r}")
    pick("_class_name", CLASSES)
    schedule, prediction = pick("beta_schedule", BETA_SCHEDULES), pick("prediction_type", PREDICTION_TYPES)
    T, listed = c["num_train_timesteps"], c["trained_betas"]
    ends = (c["beta_start"], c["beta_end"])
    ends = None if schedule == "cosine" or T > 0 and ends == _ends(T) else ends
    if listed is not None:  # as _scheduler_config writes the schedule that diffusers has no name for
        ok = type(listed) is list and len(listed) == T > 0 and all(type(b) in (int, float) for b in listed)
        ok = ok and np.allclose(np.array(listed, float), SCHEDULES["sigmoid"](T), rtol=1e-5, atol=0)
        _must(ok, path, "trained_betas", listed, "null: this list is no schedule of nanodiff")
        schedule, ends = "sigmoid", None
    with _about(path):
        variance = pick("variance_type", VARIANCE_TYPES)
        diffusion = Diffusion(T, schedule, prediction, ends, c["rescale_betas_zero_snr"], variance)

    limit, ratio, most = c["clip_sample_range"], c["dynamic_thresholding_ratio"], c["sample_max_value"]
    _must(limit > 0, path, "clip_sample_range", limit, "above 0")
    _must(0 < ratio <= 1, path, "dynamic_thresholding_ratio", ratio, "above 0 and at most 1")
    sampling = dict(clip=c["clip_sample"] and (limit == 1 or float(limit)), dynamic=None)
    if c["thresholding"]:  # to at most sample_max_value: at 1, its default, that is clipping
        sampling = dict(clip=True, dynamic=float(ratio) if most > 1 else None)
    sampling["spacing"] = spacing = pick("timestep_spacing", SPACINGS)
    used = ["set_alpha_to_one"] + ["steps_offset"] * (spacing == "leading")
    used += ["sample_max_value"] * (sampling["dynamic"] is not None)
    lost = [f"{key} = {c[key]}" for key in used if c[key] != SCHEDULER[key]]
    if lost:
        warnings.warn(f"{path}: {', '.join(lost)}: nanodiff has no such setting, left out", stacklevel=3)
    return diffusion, sampling


def _scheduler_config(diffusion):
    """The config of a DDPMScheduler with the same alpha_bar, and the spacing of nanodiff's samplers."""
    from nanodiff.diffusion import SCHEDULES

    T, tables = diffusion.timesteps, (BETA_SCHEDULES, PREDICTION_TYPES, VARIANCE_TYPES)
    schedules, predictions, variances = ({ours: name for name, ours in d.items()} for d in tables)
    low, high = diffusion.betas or _ends(T)
    betas = None if diffusion.schedule in schedules else SCHEDULES[diffusion.schedule](T).tolist()
    return dict(
        _class_name="DDPMScheduler", num_train_timesteps=T, beta_start=low, beta_end=high,
        beta_schedule=schedules.get(diffusion.schedule, "linear"), trained_betas=betas,
        prediction_type=predictions[diffusion.prediction], variance_type=variances[diffusion.variance],
        rescale_betas_zero_snr=diffusion.zero_snr, clip_sample=True, timestep_spacing="trailing",
    )  # fmt: skip


def _torch_axes(name, ndim):
    """Our axes in PyTorch's order: convolution (kh,kw,C,O) to (O,C,kh,kw), linear (C,O) to (O,C)."""
    table = name == "class_embedding.weight"  # (classes, D) in both
    return (0, 1) if table else {4: (3, 2, 0, 1), 2: (1, 0)}.get(ndim, (0,))


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
        weights[name] = np.ascontiguousarray(array.transpose(_torch_axes(name, array.ndim)))
    write_file(target / WEIGHTS_FILE, safetensors.numpy.save(weights, {"format": "pt"}))
    configs = {target / "config.json": dict(_class_name="UNet2DModel", **model.config.to_dict())}
    if diffusion:
        (folder / "scheduler").mkdir(exist_ok=True)
        configs[folder / "scheduler" / "scheduler_config.json"] = _scheduler_config(diffusion)
        parts = dict(scheduler=["diffusers", "DDPMScheduler"], unet=["diffusers", "UNet2DModel"])
        configs[folder / "model_index.json"] = dict(_class_name="DDPMPipeline", **parts)
    for path, config in configs.items():
        write_file(path, json.dumps(dict(config, _diffusers_version="0.30.0"), indent=2) + "\n")


def _config(found, path):
    """UNetConfig of a config.json, or of that part of a run.json; values above LARGEST are refused."""
    from nanodiff.unet import UNetConfig

    kind = found.get("_class_name", "UNet2DModel")
    _must(kind == "UNet2DModel", path, "_class_name", kind, "UNet2DModel")
    for name, most in LARGEST.items():
        values = found.get(name) if type(found.get(name)) is list else [found.get(name)]
        _must(len(values) <= LEVELS, path, name, values, f"a list of at most {LEVELS}")
        for value in values:
            _must(type(value) not in (int, float) or value <= most, path, name, value, f"at most {most}")
    for name in ("flip_sin_to_cos", "add_attention"):
        _must(type(found.get(name, True)) is bool, path, name, found.get(name), "true or false")
    with _about(path):
        return UNetConfig.from_dict(found)


def from_pretrained(folder, device="cpu"):
    """UNet from a folder in diffusers' layout, a pipeline's or a bare model's; every tensor must fit.

    The weights may be float32, float16, bfloat16 or float64, under today's names or those of before 0.17.
    """
    from nanodiff.unet import UNet

    folder = Path(folder)
    folder = folder / "unet" if (folder / "unet" / "config.json").exists() else folder
    config = folder / "config.json"
    paths = [folder / name for name in (WEIGHTS_FILE, HALF_FILE)]
    path = paths[not paths[0].is_file() and paths[1].is_file()]
    if not path.is_file() and (folder / "diffusion_pytorch_model.bin").exists():
        text = f"{folder} has its weights in a .bin, a pickle, which can run code when read: convert it where"
        text = f"{text} diffusers is, by UNet2DModel.from_pretrained(folder).save_pretrained(folder)"
        raise NanodiffError(text)
    for file in (config, path):
        if not file.is_file():
            raise FileNotFoundError(f"{file} is not there: save the model with save_pretrained (safetensors)")
    entries, _ = read_header(path)
    model = UNet(_config(read_json(config), config), device=device, init=None)
    params, here, there = model.params, {}, {}
    for name in params:
        here[name] = tuple(params[name].shape[i] for i in _torch_axes(name, len(params[name].shape)))
    wrong = [f"{params.count} weights are more than {WEIGHTS}"] if params.count > WEIGHTS else []
    for name, entry in entries.items():
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        if ".attentions." in name and entry.shape == (*here.get(name, ()), 1, 1):
            entry = entry._replace(shape=here[name])  # a projection that was a 1x1 convolution
        if name in there:
            wrong.append(f"{name!a:.100} is there under two names")
        there[name] = entry
    for name in {**here, **there}:
        shape = there[name].shape if name in there else "missing"
        if shape != here.get(name, "absent"):
            wrong.append(f"{name!a:.100} is {shape} and should be {here.get(name, 'absent')}")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise NanodiffError(f"{path} does not fit its config.json: {'; '.join(wrong[:3])}{more}")
    _allocate(model)
    for name, entry in there.items():
        with np.errstate(over="ignore"):
            array = read_tensor(path, entry).astype(np.float32, copy=False)
        if not np.isfinite(array).all():
            raise NanodiffError(f"{path}: {name} holds NaN or infinity: save the model again")
        axes = np.argsort(_torch_axes(name, array.ndim))
        model.ctx.copy(params[name].data, model.ctx.to_device(array.transpose(axes)))
    return model
