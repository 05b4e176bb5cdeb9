"""Trains a vision transformer with CR-SAM: Flax Linen, AdamW, dropout, clipping and gradient accumulation.

python examples/train_vit.py  # scikit-learn's digits
python examples/train_vit.py --data cifar10 --patch 4 --width 384 --layers 7 --heads 6 --parts 4 --steps 78000

CIFAR comes from tensorflow-datasets and its folder TFDS_DATA_DIR. The same command continues an interrupted run.
"CR-SAM:" marks the lines that differ from training with AdamW alone.
"""

import argparse
import functools
import os
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

from crsam_jax import crsam  # CR-SAM:

# Settings. Each is also an option of the command: --steps 100.
DATA = "digits"  # or cifar10, cifar100
OUT = "runs/train_vit"
PATCH = 2  # pixels of a patch's side
WIDTH = 64
LAYERS = 2
HEADS = 4
DROPOUT = 0.1
STEPS = 500
BATCH = 128
PARTS = 2  # of the batch, whose gradients are accumulated
LEARNING_RATE = 2e-3
WARM_UP = 40  # steps
WEIGHT_DECAY = 0.05
CLIP = 1.0  # the largest norm of the gradient
RHO = 0.05  # CR-SAM: distance from the weights to the perturbed points
ALPHA = 0.1  # CR-SAM: weight of the curvature's penalty
BETA = 0.01  # CR-SAM: weight of the gradient norm's penalty
SEED = 0
EVERY = 50  # steps from one evaluation and checkpoint to the next


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in globals().items():
        if name.isupper() and isinstance(value, int | float | str):
            parser.add_argument(f"--{name.lower()}", type=type(value), default=value)
    return parser.parse_args(argv)


def load(data):
    """Images with pixels from -1 to 1 and labels, for training and for the test."""
    if data == "digits":
        images, labels = load_digits(return_X_y=True)
        images, labels = np.float32(images / 8 - 1).reshape(-1, 8, 8, 1), np.int32(labels)
        return (images[:1000], labels[:1000]), (images[1000:], labels[1000:])
    import tensorflow_datasets as tfds

    def read(split):
        source = tfds.data_source(data, split=split, data_dir=os.environ.get("TFDS_DATA_DIR"))
        parts = np.array_split(np.arange(len(source)), 100)
        rows = [row for part in parts for row in source.__getitems__(part.tolist())]
        return np.float32([row["image"] for row in rows]) / 127.5 - 1, np.int32([row["label"] for row in rows])

    return read("train"), read("test")


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def augmented(images, key, pad, flip):
    """Crops and flips each image differently."""
    key_crop, key_flip = jax.random.split(key)
    corner = jax.random.randint(key_crop, (len(images), 2), 0, 2 * pad + 1)
    flipped = jax.random.bernoulli(key_flip, 0.5 if flip else 0.0, (len(images),))

    def one(image, corner, flipped):
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1)
        crop = jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)
        return jnp.where(flipped, crop[:, ::-1], crop)

    return jax.vmap(one)(images, corner, flipped)


def batch_of_step(s, images, labels, step):
    """Depends on the step's number alone, so a resumed run sees the same batches."""
    epoch, position = divmod(step, len(images) // s.batch)
    rows = np.random.default_rng((s.seed, epoch)).permutation(len(images))[position * s.batch :][: s.batch]
    photographs = s.data != "digits"  # a digit's mirror image is not a digit
    key, rng = jax.random.split(jax.random.key(step))
    x = augmented(images[rows], key, pad=4 if photographs else 1, flip=photographs)
    return {"x": x, "y": labels[rows], "rng": rng}


class VisionTransformer(nn.Module):
    classes: int
    patch: int
    width: int
    layers: int
    heads: int
    dropout: float

    @nn.compact
    def __call__(self, x, train=False):
        drop = functools.partial(nn.Dropout(self.dropout), deterministic=not train)
        x = nn.Conv(self.width, (self.patch, self.patch), (self.patch, self.patch))(x)
        x = x.reshape(len(x), -1, self.width)
        x = drop(x + self.param("positions", nn.initializers.normal(0.5), x.shape[1:]))
        for _ in range(self.layers):
            y = nn.LayerNorm()(x)
            x = x + drop(nn.MultiHeadDotProductAttention(self.heads)(y, y))
            y = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x)))
            x = x + drop(nn.Dense(self.width)(y))
        return nn.Dense(self.classes)(nn.LayerNorm()(x).mean(axis=1))


def build(s, images, classes):
    """The state at the start, the loss and the training step."""
    network = VisionTransformer(classes, s.patch, s.width, s.layers, s.heads, s.dropout)

    def loss_fn(params, x, y, rng):
        """The mean over the whole batch, one part in memory at a time. CR-SAM: so all parts share one perturbation."""

        @jax.checkpoint
        def add_part(total, part):
            x, y, rng = part
            logits = network.apply({"params": params}, x, train=True, rngs={"dropout": rng})
            return total + optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), None

        x, y = (a.reshape(s.parts, -1, *a.shape[1:]) for a in (x, y))
        total, _ = jax.lax.scan(add_part, jnp.float32(0), (x, y, jax.random.split(rng, s.parts)))
        return total / s.parts

    warm_up = min(s.warm_up, s.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, s.learning_rate, warm_up, s.steps)
    tx = optax.chain(
        crsam(loss_fn, rho=s.rho, alpha=s.alpha, beta=s.beta),  # CR-SAM: first in the chain, so before clipping
        optax.clip_by_global_norm(s.clip),
        optax.adamw(schedule, weight_decay=s.weight_decay),
    )

    @jax.jit
    def train_step(state, batch):
        loss, grads = jax.value_and_grad(loss_fn)(state.params, **batch)
        # CR-SAM: the update takes what the loss took, so the same dropout; and the loss, to save an evaluation.
        updates, opt_state = tx.update(grads, state.opt_state, state.params, loss=loss, **batch)
        params = optax.apply_updates(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state), loss

    params = network.init(jax.random.key(s.seed), images[:1])["params"]
    return TrainState.create(apply_fn=network.apply, params=params, tx=tx), loss_fn, train_step


@jax.jit
def right_answers(state, images, labels):
    return (state.apply_fn({"params": state.params}, images).argmax(axis=-1) == labels).sum()


def main(argv=None):
    s = options(argv)
    train_set, test_set = load(s.data)
    state, _, train_step = build(s, train_set[0], int(train_set[1].max()) + 1)
    log = {name: [] for name in ("step", "training loss", "test accuracy", "curvature along the gradient")}
    out = Path(s.out).absolute()
    saver = ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    if saver.latest_step():
        args = ocp.args.Composite(state=ocp.args.StandardRestore(state), log=ocp.args.JsonRestore())
        state, log = (found := saver.restore(saver.latest_step(), args=args)).state, found.log
    print(f"{sum(a.size for a in jax.tree.leaves(state.params)):,} parameters, step {int(state.step)}")
    tests = list(zip(*(np.array_split(a, 10) for a in test_set), strict=True))
    clock = time.perf_counter()
    for step in range(int(state.step) + 1, s.steps + 1):
        state, loss = train_step(state, batch_of_step(s, *train_set, step - 1))
        if step % s.every == 0 or step == s.steps:
            accuracy = int(sum(right_answers(state, *part) for part in tests)) / len(test_set[1])
            curvature = optax.tree.get(state.opt_state, "curvature")  # CR-SAM: the state holds the diagnostics
            for name, value in zip(log, (step, loss, accuracy, curvature), strict=True):
                log[name].append(round(float(value), 5))
            print(f"step {step}, {time.perf_counter() - clock:.0f} s: loss {loss:.3f}, test accuracy {accuracy:.3f}")
            saver.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)))
    saver.close()
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for ax, name in zip(axes, list(log)[1:], strict=True):
        ax.plot(log["step"], log[name], ".-")
        ax.set(title=name, xlabel="step")
    figure.savefig(out / "training.png", dpi=120)
    print(f"picture: {out / 'training.png'}")
    return state


if __name__ == "__main__":
    main()
