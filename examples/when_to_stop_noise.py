"""When to stop adding noise? One model of the two moons, whose sampler goes quiet at different times.

    python examples/when_to_stop_noise.py [--steps 3000] [--device cpu] [--seed 0] [--points 1000]

DDIM with eta = 1 (DDPM) draws noise at every step. Stopped at time t in two ways: `noise_stop` leaves the
noise out and the room for it in, so that from then on x holds less noise than the network is told;
`eta_stop` closes the room too. Energy distances to real data as in steps_needed.py, in thousandths (real
against real: the last row), and the spread of the points as a share of that of real ones: below 1, they
crowd together.
"""

import argparse

import numpy as np
from steps_needed import energy_distance
from two_moons import draw_data, train

import nanodiff as nd

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


def numbers(x):
    return f"{1000 * energy_distance(x, real):9.1f}{x.std() / real.std():8.2f}"


print("          |   noise_stop    |    eta_stop")
print("stop at t |  distance spread |  distance spread")
for stop in (-1, 100, 300, 500, 700, 900, 1000):
    x, y = (
        nd.ddim_sample(model, diff, (args.points, 2), 1000, 1.0, args.seed, **{name: stop})
        for name in ("noise_stop", "eta_stop")
    )
    print(f"{'never' if stop < 0 else stop:>9} |{numbers(x)} |{numbers(y)}", flush=True)
print(f"real data |{numbers(more)} |")
