"""Fine-tunes by LoRA with CR-SAM: a flax nnx network learns the digits 0 to 4, then its adapters learn 5 to 9.

python examples/fine_tune.py
python examples/fine_tune.py --rank 8 --examples 200 --perturbed all

The data are scikit-learn's digits. The same command continues an interrupted run.
"CR-SAM:" marks the lines that differ from fine-tuning with AdamW alone.
"""

import argparse
import time
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from sklearn.datasets import load_digits

from crsam_jax import crsam  # CR-SAM:

# Settings. Each is also an option of the command: --steps 100.
OUT = "runs/fine_tune"
WIDTH = 256
RANK = 4  # of the adapters
EXAMPLES = 100  # of the digits 5 to 9 for training; the others are the test
PRETRAINING_STEPS = 200
PRETRAINING_RATE = 1e-3
STEPS = 200
BATCH = 50
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
RHO = 0.05  # CR-SAM: distance from the weights to the perturbed points
ALPHA = 0.1  # CR-SAM: weight of the curvature's penalty
BETA = 0.01  # CR-SAM: weight of the gradient norm's penalty
PERTURBED = "adapters"  # CR-SAM: or all that is trained, so the new output layer too
SEED = 0
EVERY = 20  # steps from one evaluation and checkpoint to the next


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in globals().items():
        if name.isupper() and isinstance(value, int | float | str):
            parser.add_argument(f"--{name.lower()}", type=type(value), default=value)
    return parser.parse_args(argv)


def load(s):
    """Images and labels from 0 to 4, for training and for the test: of the digits 0 to 4, and of 5 to 9."""
    images, labels = load_digits(return_X_y=True)
    images, labels = np.float32(images / 8 - 1), np.int32(labels)
    low, high = labels < 5, labels >= 5
    halves = (images[low], labels[low], 700), (images[high], labels[high] - 5, s.examples)
    return [((x[:first], y[:first]), (x[first:], y[first:])) for x, y, first in halves]


def batch_of_step(s, images, labels, step):
    """Depends on the step's number alone, so a resumed run sees the same batches."""
    epoch, position = divmod(step, len(images) // s.batch)
    rows = np.random.default_rng((s.seed, epoch)).permutation(len(images))[position * s.batch :][: s.batch]
    return {"x": images[rows], "y": labels[rows]}


class Network(nnx.Module):
    def __init__(self, width, rank, rngs):
        # x W + x A B, with an adapter A B of this rank. B starts at zero: until it is trained, the layer is x W.
        self.hidden1 = nnx.LoRALinear(64, width, lora_rank=rank, rngs=rngs)
        self.hidden2 = nnx.LoRALinear(width, width, lora_rank=rank, rngs=rngs)
        self.output = nnx.Linear(width, 5, rngs=rngs)

    def __call__(self, x):
        return self.output(nnx.relu(self.hidden2(nnx.relu(self.hidden1(x)))))


def is_adapter(path, variable):
    return isinstance(variable, nnx.LoRAParam)


def is_weight(path, variable):
    return isinstance(variable, nnx.Param) and not is_adapter(path, variable)


def is_adapter_or_output(path, variable):
    return is_adapter(path, variable) or "output" in path


def mask_of(params):
    """CR-SAM: a tree of bools like the params, True for those that are perturbed."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    return jax.tree.map(lambda variable: is_adapter((), variable), params, is_leaf=is_variable)


def build(s, network, trained, adapt):
    """What is trained and what is frozen, the optimizer, the loss, the training step and the accuracy."""
    # Adapters are params of the loss and frozen weights its argument, which costs no gradient and no optimizer state.
    graphdef, params, frozen = nnx.split(network, trained, ...)

    def loss_fn(params, frozen, x, y):
        logits = nnx.merge(graphdef, params, frozen)(x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

    adamw = optax.adamw(s.learning_rate if adapt else s.pretraining_rate, weight_decay=s.weight_decay)
    mask = mask_of(params) if adapt and s.perturbed == "adapters" else None
    tx = optax.chain(crsam(loss_fn, rho=s.rho, alpha=s.alpha, beta=s.beta, mask=mask), adamw)  # CR-SAM: first

    @jax.jit
    def train_step(params, opt_state, frozen, batch):
        loss, grads = jax.value_and_grad(loss_fn)(params, frozen, **batch)
        # CR-SAM: the update takes what the loss took; and the loss, to save an evaluation.
        updates, opt_state = tx.update(grads, opt_state, params, loss=loss, frozen=frozen, **batch)
        return optax.apply_updates(params, updates), opt_state, loss

    @jax.jit
    def accuracy(params, frozen, x, y):
        return (nnx.merge(graphdef, params, frozen)(x).argmax(axis=-1) == y).mean()

    return (params, tx.init(params)), frozen, loss_fn, train_step, accuracy


def train(s, name, network, trained, data, steps):
    """Trains the variables that ``trained`` selects, changes the network, and returns what happened on the way."""
    train_set, test_set = data
    (params, opt_state), frozen, _, train_step, accuracy = build(s, network, trained, adapt=name == "adaptation")
    log = {name: [] for name in ("step", "training loss", "test accuracy", "curvature along the gradient")}
    keep = ocp.CheckpointManagerOptions(max_to_keep=2)
    saver = ocp.CheckpointManager(Path(s.out).absolute() / name, options=keep)
    start = saver.latest_step() or 0
    if start:
        state = ocp.args.StandardRestore({"params": params, "opt_state": opt_state})
        found = saver.restore(start, args=ocp.args.Composite(state=state, log=ocp.args.JsonRestore()))
        params, opt_state, log = found.state["params"], found.state["opt_state"], found.log
    counts = [sum(a.size for a in jax.tree.leaves(tree)) for tree in (params, frozen)]
    print(f"{name}: {counts[0]:,} parameters are trained, {counts[1]:,} are not; {len(train_set[1])} images", end="")
    print(f", step {start}, test accuracy {accuracy(params, frozen, *test_set):.3f}")
    clock = time.perf_counter()
    for step in range(start + 1, steps + 1):
        params, opt_state, loss = train_step(params, opt_state, frozen, batch_of_step(s, *train_set, step - 1))
        if step % s.every == 0 or step == steps:
            right = accuracy(params, frozen, *test_set)
            curvature = optax.tree.get(opt_state, "curvature")  # CR-SAM: the state holds its diagnostics
            for key, value in zip(log, (step, loss, right, curvature), strict=True):
                log[key].append(round(float(value), 5))
            print(f"step {step}, {time.perf_counter() - clock:.0f} s: loss {loss:.3f}, test accuracy {right:.3f}")
            state = ocp.args.StandardSave({"params": params, "opt_state": opt_state})
            saver.save(step, args=ocp.args.Composite(state=state, log=ocp.args.JsonSave(log)))
    saver.close()
    nnx.update(network, params)
    return log


def main(argv=None):
    s = options(argv)
    low, high = load(s)
    network = Network(s.width, s.rank, nnx.Rngs(s.seed))
    train(s, "pretraining", network, is_weight, low, s.pretraining_steps)
    network.output = nnx.Linear(s.width, 5, rngs=nnx.Rngs(s.seed + 1))  # new classes
    log = train(s, "adaptation", network, is_adapter_or_output, high, s.steps)
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for ax, name in zip(axes, list(log)[1:], strict=True):
        ax.plot(log["step"], log[name], ".-")
        ax.set(title=name, xlabel="step of the adaptation")
    figure.savefig(Path(s.out) / "training.png", dpi=120)
    print(f"picture: {Path(s.out).absolute() / 'training.png'}")
    return network


if __name__ == "__main__":
    main()
