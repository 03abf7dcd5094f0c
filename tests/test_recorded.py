"""A step that is recorded and replayed: the same bits as one that Python runs, and memory of its own."""

import gc
import sys
import threading

import numpy as np
import pytest

import nanodiff as nd
from nanodiff.kernels import parallel_cpu, pointwise_cpu
from nanodiff.unet import UNetConfig

DOWN, ATTN_DOWN, UP, ATTN_UP = "DownBlock2D", "AttnDownBlock2D", "UpBlock2D", "AttnUpBlock2D"
CONFIG = dict(
    in_channels=3, out_channels=3, block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8,
    down_block_types=(DOWN, ATTN_DOWN), up_block_types=(ATTN_UP, UP),
)  # fmt: skip
FIELDS = {  # together every kind of layer, and every op that a UNet runs
    "default": {},
    "wide": dict(block_out_channels=(32, 64), attention_head_dim=None, add_attention=False),
    "modulated": dict(
        act_fn="gelu", resnet_time_scale_shift="scale_shift", mid_block_scale_factor=2.0,
        center_input_sample=True, downsample_type="resnet", upsample_type="resnet",
        down_block_types=(ATTN_DOWN,) * 2, up_block_types=(ATTN_UP,) * 2, num_class_embeds=5,
    ),
    "activated": dict(act_fn="mish", class_embed_type="timestep", downsample_padding=0, in_channels=1),
    "silu modulated": dict(resnet_time_scale_shift="scale_shift", class_embed_type="identity"),
    "no middle": dict(mid_block_type=None, act_fn="relu", out_channels=6, flip_sin_to_cos=False),
}  # fmt: skip


def network(**fields):
    return nd.UNet(UNetConfig(**CONFIG | fields), init="torch")


def batch(model, B=2, H=16, W=16, seed=0, weighted=False):
    """x, t, target, labels and weight for `loss_and_grad`, of the kinds that the network wants."""
    rng, cfg = np.random.default_rng(seed), model.config
    x = rng.standard_normal((B, H, W, cfg.in_channels), dtype=np.float32)
    target = rng.standard_normal((B, H, W, cfg.out_channels), dtype=np.float32)
    labels = None
    if cfg.class_embed_type == "identity":
        labels = rng.standard_normal((B, 4 * cfg.block_out_channels[0]), dtype=np.float32)
    elif cfg.class_embed_type or cfg.num_class_embeds:
        labels = rng.integers(0, 5, B)
    weight = rng.uniform(0, 1, B).astype(np.float32) if weighted else None
    return dict(x=x, t=rng.integers(0, 1000, B), target=target, labels=labels, weight=weight)


def by_hand(model, x, t, target, labels, weight):
    model.params.grad[...] = 7  # to be cleared
    loss, dout = model.ctx.k.mse_loss(model.forward(x, t, labels), target, weight)
    model.params.zero_grad()
    model.backward(dout)
    return loss, model.params.grad.copy()


def at_once(model, x, t, target, labels, weight):
    handed = [a for a in (x, t, target, labels, weight) if a is not None]
    copies = [a.copy() for a in handed]
    loss = model.loss_and_grad(x, t, target, labels, weight=weight)
    assert all(same_bits(a, b) for a, b in zip(handed, copies))
    return loss, model.params.grad.copy()


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def assert_same(one, other):
    assert np.isfinite(one[0]).all() and np.abs(one[1]).max() > 0
    assert all(map(same_bits, one, other))


@pytest.fixture
def replays(monkeypatch):
    """Counts them."""
    count, before = [], parallel_cpu.Recording.replay
    monkeypatch.setattr(
        parallel_cpu.Recording, "replay", lambda self, arrays: count.append(before(self, arrays))
    )
    return count


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_replay_is_the_step_by_hand(fields, replays):
    """On other images, with other weights, for one thread and for two."""
    model = network(**fields)
    try:
        for threads in {1, parallel_cpu.max_threads()}:
            nd.set_threads(threads)
            for step in range(3):
                data = batch(model, seed=step, weighted=bool(fields))
                want = by_hand(model, **data)
                assert_same(at_once(model, **data), want)
                assert_same(at_once(model, **data), want)
                model.params.data -= 0.1 * want[1]
            assert len(replays) == 5
            replays.clear()
    finally:
        nd.set_threads(parallel_cpu.max_threads())


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_frozen_prediction_is_the_plain_one(fields, replays):
    model = network(**fields)
    for _ in range(2):
        some, weights = [batch(model, seed=seed) for seed in range(3)], model.params.data.copy()
        want = [model.predict(d["x"], d["t"], d["labels"]) for d in some]
        assert not replays
        with model.frozen():
            got = [model.predict(d["x"], d["t"], d["labels"]) for d in some]
            model.params["conv_in.weight"].data[...] = 0  # its prepared form is not made again
            got.append(model.predict(some[0]["x"], some[0]["t"], some[0]["labels"]))
            other = batch(model, 1, 8, 24)
            model.predict(other["x"], other["t"], other["labels"])  # as a callback of a sampler may
            got.append(model.predict(some[0]["x"], some[0]["t"], some[0]["labels"]))
        model.params.data[...] = weights
        # also: no replay changes an earlier answer
        assert all(map(same_bits, got, [*want, want[0], want[0]]))
        assert len(replays) == 3 and "predict" not in model.ctx.recordings
        model.params.data *= 1.01
        replays.clear()


def test_batches_of_many_sizes(replays):
    model = network()
    for seed, (B, H) in enumerate([(2, 16), (3, 16), (2, 16), (2, 16), (2, 24), (2, 24), (1, 8)]):
        for weighted in (False, True):
            data = batch(model, B, H, seed=seed, weighted=weighted)
            assert_same(at_once(model, **data), by_hand(model, **data))
    assert not replays  # for one recording is kept, of the last call


def test_networks_take_turns(replays):
    """They share the memory that recordings use."""
    models = [network(), network(**FIELDS["modulated"]), network()]
    for step in range(3):
        for model in models:
            data = batch(model, seed=step)
            with models[0].frozen():
                before = models[0].predict(**{k: batch(models[0], seed=9)[k] for k in ("x", "t")})
                if model is not models[0]:
                    at_once(model, **data)
                after = models[0].predict(**{k: batch(models[0], seed=9)[k] for k in ("x", "t")})
            assert same_bits(before, after)
            assert_same(at_once(model, **data), by_hand(model, **data))
            model.params.data *= 1.01
    assert len(replays) > 9


def test_a_forward_may_wait_for_its_backward_while_others_are_replayed():
    model, other = network(), network(layers_per_block=2)
    data, more = batch(model), batch(other, seed=1)
    want = by_hand(model, **data)
    for _ in range(2):
        out = model.forward(data["x"], data["t"])
        loss, dout = model.ctx.k.mse_loss(out, data["target"])
        with model.frozen():
            for _ in range(2):
                assert same_bits(model.predict(data["x"], data["t"]), out)
        at_once(other, **more)
        model.params.zero_grad()
        model.backward(dout)
        assert_same((loss, model.params.grad), want)


def test_a_step_within_frozen_and_one_with_dropout_are_not_recorded(replays):
    model = network(dropout=0.3)
    data = batch(model)
    with pytest.raises(nd.NanodiffError, match="key"):
        model.loss_and_grad(**data)
    losses = [model.loss_and_grad(**data, key=key) for key in ((1, 2), (1, 2), (1, 3))]
    assert same_bits(losses[0], losses[1]) and losses[1] != losses[2]
    model = network()
    want = by_hand(model, **data)
    with model.frozen():
        for _ in range(2):
            assert_same(at_once(model, **data), want)
    assert not replays
    assert_same(at_once(model, **data), want)


def test_an_error_while_recording_leaves_all_usable(monkeypatch, replays):
    model = network()
    data = batch(model)
    gc.collect()  # models of other tests
    want, alive = by_hand(model, **data), parallel_cpu.Recording.alive
    with monkeypatch.context() as patch:
        patch.setattr(model.ctx.k, "concat", lambda a, b: 1 / 0)
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                model.loss_and_grad(**data)
            with pytest.raises(ZeroDivisionError), model.frozen():
                model.predict(data["x"], data["t"])
    assert parallel_cpu._here.recording is None and parallel_cpu.Recording.alive == alive
    for _ in range(2):
        assert_same(by_hand(model, **data), want)
        assert_same(at_once(model, **data), want)
    assert len(replays) == 1


def test_the_pool_in_use_while_recording_and_replaying():
    """Another thread has it all the time: launches run on the calling thread, in the record too."""
    model = network()
    data = batch(model)
    want = by_hand(model, **data)
    stop, turns, x = threading.Event(), [], np.ones(1 << 22, np.float32)

    def use():
        while not stop.is_set():
            turns.append(pointwise_cpu.add(x, x)[0])

    thread = threading.Thread(target=use)
    thread.start()
    try:
        found = [at_once(model, **data) for _ in range(4)]
    finally:
        stop.set()
        thread.join()
    assert turns and set(turns) == {2}
    for one in [*found, at_once(model, **data)]:
        assert_same(one, want)


def test_memory_is_taken_once_and_comes_back(monkeypatch):
    gc.collect()
    assert parallel_cpu.Recording.alive == 0
    model, taken, before = network(), [], parallel_cpu._slab
    data = batch(model, 4)
    monkeypatch.setattr(parallel_cpu, "SLAB", 1 << 16)
    monkeypatch.setattr(parallel_cpu._shelf, "free", [])
    monkeypatch.setattr(parallel_cpu._arena, "free", [])
    monkeypatch.setattr(parallel_cpu, "_slab", lambda size: taken.append(size) or before(size))
    at_once(model, **data)
    total = sum(taken)
    taken.clear()
    for _ in range(3):
        at_once(model, **data)
    assert taken == []
    with model.frozen():  # in the memory of the recorded step; its weights last longer and are not there
        for _ in range(3):
            model.predict(data["x"], data["t"])
    assert sum(taken) < 3 * model.params.data.nbytes
    taken.clear()
    model.ctx.recordings.clear()
    assert parallel_cpu.Recording.alive == 0
    by_hand(model, **data)
    assert parallel_cpu._arena.empty() == []
    assert sum(taken) < total / 2  # in other order than before, from slabs that are small here


def test_ranges_grow_together_again():
    """Whatever the order in which blocks come back, one range is left; and no two of them overlap."""
    rng, heap, slab = np.random.default_rng(0), parallel_cpu._Heap(), object()
    heap.give(1000, 6400, slab)
    assert heap.take(6464) is None
    for _ in range(20):
        sizes = rng.integers(1, 12, 20) * 64
        taken = [(n, *found) for n in sizes if (found := heap.take(n))]
        spans = sorted((start, start + n) for n, start, _ in taken)
        assert all(a[1] <= b[0] for a, b in zip(spans, spans[1:])) and spans[-1][1] <= 7400
        for k in rng.permutation(len(taken)):
            n, start, owner = taken[k]
            heap.give(start, n, owner)
        assert heap.take(6464) is None and heap.free == [(1000, 6400, slab)]


def test_arrays_may_die_while_others_are_made():
    """In cycles, which Python collects anywhere; and two threads take memory at once."""
    wrong = []

    def use(number):
        kept = []
        for k in range(3000):
            x = parallel_cpu.empty((17 + k % 50,))
            x[:] = number
            cycle = [x]
            cycle.append(cycle)  # dies when garbage is collected
            if k % 7 == 0:
                kept.append(x)
        wrong.extend(x for x in kept if (x != number).any())

    threads, before = [threading.Thread(target=use, args=(n,)) for n in (1, 2, 3)], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # without the lock of a heap two threads then get the same memory
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong


def test_logs_may_be_short(monkeypatch, replays):
    """A recording goes on in the next log when one is full."""
    monkeypatch.setattr(parallel_cpu, "LOG", parallel_cpu.LONGEST + 1000)
    model = network()
    for seed in range(2):
        data = batch(model, seed=seed)
        assert_same(at_once(model, **data), by_hand(model, **data))
    assert len(replays) == 1 and len(model.ctx.recordings["step"][1].steps) > 30


@pytest.mark.parametrize("wrong", ["target", "weight"])
def test_wrong_shapes_are_refused(wrong):
    model = network()
    data = batch(model, weighted=True)
    with pytest.raises(nd.NanodiffError, match=wrong):
        model.loss_and_grad(**data | {wrong: data[wrong][:1]})
    with pytest.raises(nd.NanodiffError, match="target"):
        model.loss_and_grad(**data | {"target": None})
