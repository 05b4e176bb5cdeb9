"""Trains a ResNet with CR-SAM: flax nnx, BatchNorm, bfloat16, SGD, and as many devices as there are.

python examples/train_resnet.py                  # scikit-learn's digits
python examples/train_resnet.py --data cifar10 --width 64 --blocks 2 --steps 78000 --learning_rate 0.1

CIFAR comes from tensorflow-datasets and its folder TFDS_DATA_DIR. The same command continues an interrupted run.
"CR-SAM:" marks the lines that differ from training with SGD alone.
"""

import argparse
import functools
import itertools
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax import NamedSharding, P
from sklearn.datasets import load_digits

from crsam_jax import crsam  # CR-SAM:

# Settings. Each is also an option of the command: --steps 100.
DATA = "digits"  # or cifar10, cifar100
OUT = "runs/train_resnet"
WIDTH = 16  # channels of the first stage; the second has twice, the third four times as many
BLOCKS = 1  # residual blocks per stage
DTYPE = "bfloat16"  # of the network's computations; parameters and the loss are float32
STEPS = 300
BATCH = 128
LEARNING_RATE = 0.05
WEIGHT_DECAY = 5e-4
RHO = 0.1  # CR-SAM: distance from the weights to the perturbed points
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


def divided(*arrays):
    """The arrays on the mesh, the batch divided over its devices."""
    return jax.device_put(arrays, NamedSharding(jax.sharding.get_mesh(), P("data")))


@functools.partial(jax.jit, static_argnames=("pad", "flip"))
def augmented(images, key, pad, flip):
    """Crops and flips each image differently, on the device that holds it."""
    key_crop, key_flip = jax.random.split(key)
    corner = jax.random.randint(key_crop, (len(images), 2), 0, 2 * pad + 1)
    flipped = jax.random.bernoulli(key_flip, 0.5 if flip else 0.0, (len(images),))

    def one(image, corner, flipped):
        padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=-1)
        crop = jax.lax.dynamic_slice(padded, (corner[0], corner[1], 0), image.shape)
        return jnp.where(flipped, crop[:, ::-1], crop)

    return jax.vmap(one)(images, *jax.reshard((corner, flipped), P("data")))


def batch_of_step(s, images, labels, step):
    """Depends on the step's number alone, so a resumed run sees the same batches."""
    epoch, position = divmod(step, len(images) // s.batch)
    rows = np.random.default_rng((s.seed, epoch)).permutation(len(images))[position * s.batch :][: s.batch]
    x, y = divided(images[rows], labels[rows])
    photographs = s.data != "digits"  # a digit's mirror image is not a digit
    return augmented(x, jax.random.key(step), pad=4 if photographs else 1, flip=photographs), y


class Block(nnx.Module):
    def __init__(self, inputs, outputs, stride, dtype, rngs):
        conv = functools.partial(nnx.Conv, use_bias=False, dtype=dtype, rngs=rngs)
        norm = functools.partial(nnx.BatchNorm, outputs, dtype=dtype, rngs=rngs)
        self.conv1, self.norm1 = conv(inputs, outputs, (3, 3), stride), norm()
        self.conv2, self.norm2 = conv(outputs, outputs, (3, 3)), norm()
        self.shortcut = conv(inputs, outputs, (1, 1), stride) if inputs != outputs else lambda x: x

    def __call__(self, x):
        y = nnx.relu(self.norm1(self.conv1(x)))
        return nnx.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nnx.Module):
    def __init__(self, channels, classes, width, blocks, dtype, rngs):
        self.stem = nnx.Conv(channels, width, (3, 3), use_bias=False, dtype=dtype, rngs=rngs)
        sizes = [width] + [width * 2**stage for stage in range(3) for _ in range(blocks)]
        blocks = [Block(a, b, 1 if a == b else 2, dtype, rngs) for a, b in itertools.pairwise(sizes)]
        self.blocks = nnx.Sequential(*blocks)
        self.output = nnx.Linear(sizes[-1], classes, rngs=rngs)

    def __call__(self, x):
        x = self.blocks(self.stem(x))
        return self.output(x.mean(axis=(1, 2)).astype(jnp.float32))  # logits and loss in float32


def build(s, channels, classes):
    """The state at the start, the loss, the training step and the count of right answers."""
    network = ResNet(channels, classes, s.width, s.blocks, jnp.dtype(s.dtype), nnx.Rngs(s.seed))
    graphdef, params, stats = nnx.split(network, nnx.Param, ...)  # stats: BatchNorm's running means and variances

    def loss_fn(params, stats, x, y):
        network = nnx.merge(graphdef, params, stats, copy=True)
        loss = optax.softmax_cross_entropy_with_integer_labels(network(x), y).mean()
        return loss, nnx.state(network, nnx.Not(nnx.Param))

    tx = optax.chain(
        crsam(loss_fn, rho=s.rho, alpha=s.alpha, beta=s.beta, has_aux=True),  # CR-SAM: first in the chain
        optax.add_decayed_weights(s.weight_decay),
        optax.sgd(optax.cosine_decay_schedule(s.learning_rate, s.steps), momentum=0.9),
    )

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, x, y):
        params, stats, opt_state = state
        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, stats, x, y)
        # CR-SAM: the update takes what the loss took, so the old stats; and the loss, to save an evaluation.
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss, stats=stats, x=x, y=y)
        return (optax.apply_updates(params, updates), new_stats, opt_state), loss

    @jax.jit
    def right_answers(state, images, labels):
        network = nnx.merge(graphdef, state[0], state[1], copy=True)
        network.eval()
        return (network(images).argmax(axis=-1) == labels).sum()

    state = jax.device_put((params, stats, tx.init(params)), NamedSharding(jax.sharding.get_mesh(), P()))
    return state, loss_fn, train_step, right_answers


def train(s):
    train_set, test_set = load(s.data)
    state, _, train_step, right_answers = build(s, train_set[0].shape[-1], int(train_set[1].max()) + 1)
    log = {name: [] for name in ("step", "training loss", "test accuracy", "curvature along the gradient")}
    out = Path(s.out).absolute()
    saver = ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    start = saver.latest_step() or 0
    if start:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(state), log=ocp.args.JsonRestore())
        state, log = (found := saver.restore(start, args=args)).state, found.log
    print(f"{sum(a.size for a in jax.tree.leaves(state[0])):,} parameters, {jax.device_count()} devices, step {start}")
    extra = -len(test_set[1]) % s.batch  # fills the last batch; no answer equals the label -1
    images, labels = (np.pad(a, [(0, extra)] + [(0, 0)] * (a.ndim - 1), constant_values=-1) for a in test_set)
    tests = [divided(images[i : i + s.batch], labels[i : i + s.batch]) for i in range(0, len(images), s.batch)]
    clock = time.perf_counter()
    for step in range(start + 1, s.steps + 1):
        state, loss = train_step(state, *batch_of_step(s, *train_set, step - 1))
        if step % s.every == 0 or step == s.steps:
            curvature = optax.tree.get(state[2], "curvature")  # CR-SAM: the optimizer's state holds its diagnostics
            accuracy = int(sum(right_answers(state, *batch) for batch in tests)) / len(test_set[1])
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


def main(argv=None):
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",))):
        return train(options(argv))


if __name__ == "__main__":
    main()
