"""Are they digits? A classifier trained on real MNIST judges samples.

    python bench/judge_mnist.py RUN           # 256 by DDIM-50 and 64 by DDPM-1000 from the EMA weights
    python bench/judge_mnist.py samples.npz   # or .npy: (N,H,W,1) in [-1,1], 28x28 or zero-padded 32x32
    python bench/judge_mnist.py               # only trains and tests the classifier

A set passes where the classifier is at least 0.9 sure of 80 % of the images and all ten digits occur. Samples
are unselected: number k of a seed, k = 0, 1, 2, ... The classifier is a small PyTorch network of at least
98.5 % test accuracy, trained once (80 seconds on two cores) and cached. The last line of stdout is one
JSON object.
"""

import argparse
import gzip
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
SURE, SHARE, ACCURACY = 0.9, 0.8, 0.985


def read_idx(folder, name):
    """One file of MNIST, gzipped or plain, as a uint8 array of the shape in its header."""
    plain = Path(folder, name)
    if plain.exists():
        raw = plain.read_bytes()
    else:
        with gzip.open(f"{plain}.gz") as file:
            raw = file.read()
    shape = np.frombuffer(raw, ">i4", raw[3], 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def to_input(images):  # uint8 (N,28,28) -> float32 (N,1,28,28)
    return torch.from_numpy(images.astype(np.float32) / 255)[:, None].contiguous(
        memory_format=torch.channels_last
    )


def network():
    """Four convolutions and a linear layer, 32k weights."""

    def layer(cin, cout):
        return [nn.Conv2d(cin, cout, 3, padding=1, bias=False), nn.BatchNorm2d(cout), nn.ReLU()]

    body = [*layer(1, 16), *layer(16, 16), nn.MaxPool2d(2), *layer(16, 32), nn.MaxPool2d(2), *layer(32, 64)]
    return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64 * 9, 10)).to(
        memory_format=torch.channels_last
    )


def probabilities(model, images):  # uint8 (N,28,28) -> float64 (N,10)
    with torch.inference_mode():
        parts = [
            F.softmax(model(to_input(part)).double(), 1)
            for part in np.array_split(images, -(-len(images) // 500))
        ]
    return torch.cat(parts).numpy()


def train(folder, epochs=4, batch=128):
    """A classifier trained on the 60,000 training images under a one-cycle learning rate."""
    images, labels = read_idx(folder, "train-images-idx3-ubyte"), read_idx(folder, "train-labels-idx1-ubyte")
    torch.manual_seed(0)
    model = network()
    steps = epochs * (len(images) // batch)
    opt = torch.optim.AdamW(model.parameters(), weight_decay=0.01, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(opt, 0.01, total_steps=steps)
    rng = np.random.default_rng(0)
    for _ in range(epochs):
        order = rng.permutation(len(images))[: len(images) // batch * batch].reshape(-1, batch)
        for pick in order:
            dy, dx = rng.integers(-2, 3, 2)  # digits have a wide border: a shift of 2 loses nothing
            x = to_input(np.roll(images[pick], (dy, dx), (1, 2)))
            loss = F.cross_entropy(model(x), torch.from_numpy(labels[pick].astype(np.int64)))
            opt.zero_grad()
            loss.backward()
            opt.step()
            rate.step()
    return model.eval()


def classifier(folder, cache):
    """The trained classifier, from `cache` if it is there, and its accuracy on the 10,000 test images."""
    cache = Path(cache)
    begin = time.perf_counter()
    if cache.exists():
        model = network()
        model.load_state_dict(torch.load(cache, weights_only=True))
        model.eval()
    else:
        model = train(folder)
        cache.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), cache)
    images, labels = read_idx(folder, "t10k-images-idx3-ubyte"), read_idx(folder, "t10k-labels-idx1-ubyte")
    p = probabilities(model, images)
    accuracy, seconds = float((p.argmax(1) == labels).mean()), time.perf_counter() - begin
    sure = float((p.max(1) >= SURE).mean())
    print(
        f"classifier: {accuracy:.2%} of the test images right, sure of {sure:.1%}, {seconds:.0f} s ({cache})"
    )
    if accuracy < ACCURACY:
        sys.exit(
            f"the classifier reaches {accuracy:.2%}, below {ACCURACY:.1%}: delete {cache} to train another"
        )
    return model, accuracy


def quantise(samples):
    """float (N,H,W,1) in [-1,1] -> uint8 (N,28,28); 32x32 loses its border of 2"""
    samples = np.asarray(samples)
    if samples.ndim != 4 or samples.shape[1:] not in ((28, 28, 1), (32, 32, 1)):
        sys.exit(f"samples of shape {samples.shape}: only (N,28,28,1) and (N,32,32,1) can be judged")
    if samples.dtype.kind != "f" or not np.isfinite(samples).all():
        sys.exit(f"samples of dtype {samples.dtype}: must be finite floats in [-1, 1]")
    border = (samples.shape[1] - 28) // 2
    samples = samples[:, border : border + 28, border : border + 28, 0]
    return np.clip(np.rint((samples + 1) * 127.5), 0, 255).astype(np.uint8)


def judge(name, samples, model):
    """Print and return what the classifier thinks of one set of samples."""
    p = probabilities(model, quantise(samples))
    counts = np.bincount(p.argmax(1), minlength=10)
    sure, mean = float((p.max(1) >= SURE).mean()), float(p.max(1).mean())
    passed = bool(sure >= SHARE and counts.all())
    print(f"{name}: {len(p)} samples, sure (>= {SURE}) of {sure:.1%}, mean confidence {mean:.3f}, ", end="")
    print(f"digits 0-9 {' '.join(map(str, counts))}: {'PASS' if passed else 'FAIL'}")
    return dict(
        count=len(p), sure=round(sure, 4), confidence=round(mean, 4), digits=counts.tolist(), passed=passed
    )


def generate(folder, args):
    """{name: samples} of a run folder, from the EMA weights, in batches of 64"""
    sys.path.insert(0, str(ROOT))
    import nanodiff as nd
    from nanodiff.checkpoint import load_run

    run = load_run(folder)

    def sample(sampler, count, **options):
        parts, begin = [], time.perf_counter()
        for first in range(0, count, 64):
            shape, classes = (min(64, count - first), *run.shape), run.model.config.num_class_embeds
            labels = (
                np.arange(first, first + shape[0]) % classes if classes else None
            )  # as nanodiff sample does
            options |= dict(seed=args.seed, first=first, labels=labels)
            parts.append(sampler(run.model, run.diffusion, shape, **options))
            print(f"{first + shape[0]} of {count}, {time.perf_counter() - begin:.0f} s", file=sys.stderr)
        return np.concatenate(parts)

    sets = {}
    if args.ddim:
        sets["DDIM-50"] = sample(nd.ddim_sample, args.ddim, steps=50)
    if args.ddpm:
        sets[f"DDPM-{run.diffusion.timesteps}"] = sample(nd.ddpm_sample, args.ddpm)
    return sets


def load_samples(path):
    """{name: samples} of a .npy or .npz file"""
    arrays = np.load(path, allow_pickle=False)
    return dict(arrays) if path.suffix == ".npz" else {path.stem: arrays}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", nargs="?", type=Path, help="run folder, .npy or .npz")
    parser.add_argument(
        "--data", default=ROOT.parent / "shared/data/mnist", help="folder of the four MNIST files"
    )
    default = Path(tempfile.gettempdir(), "nanodiff-judge-mnist.pt")
    parser.add_argument("--cache", default=default, help="the classifier's weights (default %(default)s)")
    parser.add_argument(
        "--ddim", type=int, default=256, metavar="N", help="samples by DDIM, 50 steps (default 256)"
    )
    parser.add_argument(
        "--ddpm", type=int, default=64, metavar="N", help="samples by DDPM, all steps (default 64)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="also write the samples to this .npz")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.source and not args.source.exists():
        sys.exit(f"{args.source}: no such run folder or file of samples")

    model, accuracy = classifier(args.data, args.cache)
    result = {"accuracy": round(accuracy, 4), "sets": {}}
    if args.source:
        sets = generate(args.source, args) if args.source.is_dir() else load_samples(args.source)
        if args.save:
            np.savez(args.save, **sets)
        result["sets"] = {name: judge(name, samples, model) for name, samples in sets.items()}
        result["passed"] = all(one["passed"] for one in result["sets"].values())
    print(json.dumps(result))


if __name__ == "__main__":
    main()
