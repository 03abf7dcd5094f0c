"""How many steps does a model need? One model of the two moons, sampled in 2 to 1000 steps.

    python examples/steps_needed.py [--steps 3000] [--device cpu] [--seed 0] [--points 1000]

Two numbers for each way to sample. The mean distance to the moons has a trap: below that of real data, points
lie too close to the middle of the moons: a last step that starts at much noise takes that of the data along.
The energy distance to real data (Szekely and Rizzo 2013) has none: it is 0 between equal distributions alone,
and for finite samples as low as between two sets of real data, the last row. DDIM with eta = 1 is DDPM.
"""

import argparse

import numpy as np
from two_moons import draw_data, to_curve, train

import nanodiff as nd


def spread(a, b):  # (n, 2), (m, 2) -> mean distance between a point of the one and a point of the other
    return np.sqrt(((a[:, None] - b) ** 2).sum(2)).mean()


def energy_distance(a, b):
    return 2 * spread(a, b) - spread(a, a) - spread(b, b)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="training steps (default: %(default)s)")
    parser.add_argument(
        "--device", type=nd.usable_device, default="cpu", help="cpu, gpu or ref (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is random (default: %(default)s)")
    parser.add_argument("--points", type=int, default=1000, help="drawn for each row (default: %(default)s)")
    args = parser.parse_args()

    diff, rng = nd.Diffusion(prediction="v"), np.random.default_rng(args.seed + 1)
    real, more = draw_data(rng, args.points), draw_data(rng, args.points)
    model = train(nd.Context(args.device), diff, args.steps, args.seed)
    shape, seed = (args.points, 2), args.seed

    def row(name, *sets):
        distances = "".join(f"{to_curve(x)[0].mean():9.4f}" for x in sets)
        energies = "".join(f"{1000 * energy_distance(x, real):9.1f}" for x in sets)
        print(f"{name:>9} |{distances} |{energies}", flush=True)

    print(" " * 10 + "|   distance to the moons   | 1000 x energy distance")
    print("    steps |     DDIM  eta 0.5     DDPM |     DDIM  eta 0.5     DDPM")
    for n in (2, 5, 10, 20, 50, 100, 1000):
        ddim = nd.ddim_sample(model, diff, shape, steps=n, seed=seed)
        half = nd.ddim_sample(model, diff, shape, steps=n, seed=seed, eta=0.5)
        row(n, ddim, half, nd.ddpm_sample(model, diff, shape, steps=n, seed=seed))
    row("real data", more)
