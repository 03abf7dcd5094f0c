"""Whole steps on the GPU as CUDA graphs: a training step, and a step of a sampler.

A small network has hundreds of kernels that take microseconds each, less than a host needs to launch one. So
a step is recorded once (`Backend.record`) and then launched as a whole. What differs from step to step lies
in arrays that the recorded kernels read: the host writes it into one slot of a ring of page-locked memory
and sends that ahead of the launch. What a step says of itself comes back into another ring and is read
steps later, so that neither side waits for the other.
"""

from collections import deque

import numpy as np

from nanodiff.kernels.random_ref import FLIP, LABEL, NOISE, TIME, random_bits

RING = 8  # steps that may be on their way


class Ring:
    """Slots of page-locked memory with named fields, and an array of the device for each field.

    fields  {name: (dtype, count)}
    """

    def __init__(self, gpu, fields):
        self.gpu, self.backend = gpu, gpu.backend()
        offsets, size = [], 0
        for dtype, count in fields.values():
            offsets.append(size)
            size += -(-np.dtype(dtype).itemsize * count // 16) * 16
        formats = [(dtype, (count,)) for dtype, count in fields.values()]
        layout = np.dtype(dict(names=list(fields), formats=formats, offsets=offsets, itemsize=size))
        self.bytes = self.backend.pinned(RING * size).reshape(RING, size)
        self.slots = self.bytes.view(layout).reshape(RING)
        self.block = gpu.empty((size,), np.uint8)
        self.device = {
            name: self.block[at : at + np.dtype(dtype).itemsize * count].view(dtype)
            for (name, (dtype, count)), at in zip(fields.items(), offsets)
        }

    def send(self, slot, **values):
        """Fill a slot, and have it copied before what is launched next. It must have been sent RING sends ago
        at the latest, and have arrived."""
        for name, value in values.items():
            self.slots[slot][name][...] = value
        self.backend.send(self.block, self.bytes[slot])


class Training:
    """The training step of train.py on a data set that lies on the GPU; the same bits as `train_step`.

    images, labels  all of them, uint8 (N,H,W,C) and ints (N,) or None;  all others as in TrainSettings
    """

    def __init__(
        self, model, opt, diff, images, labels, batch, seed, flip=False, min_snr=None, label_drop=0.0
    ):
        self.model, self.opt, self.diff = model, opt, diff
        self.batch, self.seed, self.flip, self.min_snr, self.drop = batch, seed, flip, min_snr, label_drop
        ctx, k, gpu = model.ctx, model.ctx.k, model.ctx.gpu
        self.count, self.labels = len(images), labels
        fields = dict(chosen=("i4", batch), mirrored=("u1", batch), t=("f4", batch), a=("f4", batch))
        fields |= dict(s=("f4", batch), labels=("i4", batch), step=("u4", 1), lr=("f8", 1))
        fields |= dict(weight=("f4", batch))
        self.ring = Ring(gpu, fields)
        self.results = gpu.backend().pinned(RING * opt.state.nbytes).view(np.float64).reshape(RING, -1)
        self.flying = deque()  # (step, event) of steps whose result was not read yet
        at, images = self.ring.device, ctx.to_device(images, np.uint8)
        shape, classes = (batch, *images.shape[1:]), None if labels is None else at["labels"]
        weight = None if min_snr is None else at["weight"]

        def step():  # train.train_step, line by line
            x0 = k.gather_images(images, at["chosen"], at["mirrored"])
            eps = k.normal(shape, seed, at["step"], NOISE)
            xt, target = k.q_sample(x0, eps, at["a"], at["s"], diff.prediction)
            loss = model._loss_and_grad(xt, at["t"], classes, target, weight, (seed, at["step"]))
            opt.step(loss, lr=at["lr"])

        self.graph = gpu.backend().record(step)

    def step(self, step, lr, wait=False):
        """Launch step number `step`; returns [(step, loss, squared gradient norm, skipped so far), ...] of
        steps whose result was not returned before: of those RING steps back, or, with `wait`, of all."""
        from nanodiff import data
        from nanodiff.train import spread_times

        done = self.read(RING - 1)
        slot, batch = step % RING, self.batch
        chosen = data.batch_indices(self.count, batch, step, self.seed)
        t = spread_times(random_bits((1,), self.seed, step, TIME)[0], batch, self.diff.timesteps)
        a, s = self.diff.scales(t)
        more = {} if self.min_snr is None else dict(weight=self.diff.loss_weight(t, self.min_snr))
        if self.labels is not None:
            none = self.model.config.num_class_embeds - 1
            dropped = random_bits((batch,), self.seed, step, LABEL) < self.drop * 2**32
            more |= dict(labels=np.where(dropped, none, self.labels[chosen]))
        mirrored = random_bits((batch,), self.seed, step, FLIP) >> 31 if self.flip else 0
        self.ring.send(slot, chosen=chosen, mirrored=mirrored, t=t, a=a, s=s, step=step, lr=lr, **more)
        self.graph.launch()
        backend = self.ring.backend
        backend.fetch(self.results[slot], self.opt.state)
        self.flying.append((step, backend.mark()))
        return done + self.read(0 if wait else RING)

    def read(self, most=0):
        """The results of the oldest steps, until at most `most` are on their way."""
        done = []
        while len(self.flying) > most:
            step, event = self.flying.popleft()
            event.synchronize()
            loss, norm2, _, skipped = self.results[step % RING].tolist()
            done.append((step, loss, norm2, skipped))
        return done


class Sampling:
    """A step of a sampler on the GPU: the prediction, x0 held in [-limit, limit], the step back.

    shape  of x;  limit 0: x0 as it is;  labels: whether the network is told classes. The weights are those
    that params.data holds when `begin` is called.
    """

    def __init__(self, model, shape, limit, labels):
        ctx, k, gpu = model.ctx, model.ctx.k, model.ctx.gpu
        self.model, self.count = model, 0
        self.ring, self.marks = Ring(gpu, dict(t=("f4", shape[0]), c=("f4", 5))), deque()
        self.x, self.z, self.x0 = (gpu.upload(np.zeros(shape, np.float32)) for _ in range(3))
        self.labels = gpu.upload(np.zeros(shape[0], np.int32)) if labels else None
        at = self.ring.device

        def step():
            pred = model._forward(self.x, at["t"], self.labels)
            x, x0 = k.sample_step(self.x, pred, self.z, at["c"], limit)
            ctx.copy(self.x, x)
            ctx.copy(self.x0, x0)

        with model.frozen():
            ctx.prepare_weights(model.params.data)
            self.graph = gpu.backend().record(step)

    def begin(self, x, labels):
        """Start at x with `labels`, device arrays, and the weights of this moment."""
        ctx = self.model.ctx
        ctx.prepare_weights(self.model.params.data)
        ctx.copy(self.x, x)
        if labels is not None:
            ctx.copy(self.labels, labels)

    def step(self, t, c, z=None):
        """x of the next step and x0, device arrays that the next call writes over; c, z: see sample_step."""
        if len(self.marks) == RING:
            self.marks.popleft().synchronize()
        if z is not None:
            self.model.ctx.copy(self.z, z)
        self.ring.send(self.count % RING, t=t, c=c)
        self.graph.launch()
        self.marks.append(self.ring.backend.mark())
        self.count += 1
        return self.x, self.x0


def sampling(model, x, limit, labels):
    """The Sampling of a UNet on the GPU, begun at x; None for any other model. The last one is kept."""
    if getattr(getattr(model, "ctx", None), "device", None) != "gpu" or not hasattr(model, "predict"):
        return None
    x, _, labels = model._checked(x, np.zeros(len(x)), labels)
    wanted = x.shape, limit, labels is not None
    if getattr(model, "_sampling", (None,))[0] != wanted:
        model._sampling = None  # its memory is free for the next
        model._sampling = wanted, Sampling(model, x.shape, limit, labels is not None)
    found = model._sampling[1]
    found.begin(x, labels)
    return found
