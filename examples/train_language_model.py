"""Trains a transformer on text with CR-SAM: a changed loss, AdamW, dropout, and parameters sharded over the devices.

python examples/train_language_model.py             # the texts of Python's help()
python examples/train_language_model.py --data a.txt --width 384 --layers 6 --heads 6 --context 256 --learning_rate 1e-3

The same command continues an interrupted run. "CR-SAM:" marks the lines that differ from training with AdamW alone.
"""

import argparse
import functools
import pydoc_data.topics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import NamedSharding, P

from crsam_jax import crsam, sharpened  # CR-SAM:

# Settings. Each is also an option of the command: --steps 100.
DATA = "help"  # or the name of a text file
OUT = "runs/train_language_model"
CONTEXT = 64  # characters that the network sees
WIDTH = 64
LAYERS = 2
HEADS = 4
DROPOUT = 0.1
DTYPE = "float32"  # of the network's computations, bfloat16 on a GPU or TPU; parameters and the loss are float32
STEPS = 400
BATCH = 32  # a multiple of the number of devices
LEARNING_RATE = 1e-2
WARM_UP = 50  # steps
WEIGHT_DECAY = 0.1
CLIP = 1.0  # the largest norm of the gradient
RHO = 0.05  # CR-SAM: distance from the weights to the perturbed points
ALPHA = 0.1  # CR-SAM: weight of the curvature's penalty
BETA = 0.01  # CR-SAM: weight of the gradient norm's penalty
SEED = 0
EVERY = 50  # steps from one evaluation and checkpoint to the next
SAMPLE = 300  # characters


def options(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in globals().items():
        if name.isupper() and isinstance(value, int | float | str):
            parser.add_argument(f"--{name.lower()}", type=type(value), default=value)
    return parser.parse_args(argv)


def load(data):
    """The sorted characters, and the text as their numbers: nine tenths for training, one for validation."""
    text = "\n".join(pydoc_data.topics.topics.values()) if data == "help" else Path(data).read_text(encoding="utf-8")
    characters, numbers = np.unique(list(text), return_inverse=True)
    return characters, *np.split(np.int32(numbers), [len(numbers) * 9 // 10])


def divided(rows):
    """The array on the mesh, the batch divided over its devices."""
    return jax.device_put(rows, NamedSharding(jax.sharding.get_mesh(), P("data")))


def batch_of_step(s, text, step):
    """Depends on the step's number alone, so a resumed run sees the same batches."""
    starts = np.random.default_rng((s.seed, step)).integers(0, len(text) - s.context, s.batch)
    return divided(np.stack([text[start : start + s.context + 1] for start in starts]))


def initial_params(s, characters):
    """No biases and scales: every parameter is a matrix, or a stack of one matrix per layer."""
    wide = 4 * s.width
    shapes = {"qkv": (s.width, 3 * s.width), "out": (s.width, s.width), "up": (s.width, wide), "down": (wide, s.width)}
    shapes = {name: (s.layers, *shape) for name, shape in shapes.items()}
    shapes |= {"characters": (characters, s.width), "positions": (s.context, s.width)}
    keys = jax.random.split(jax.random.key(s.seed), len(shapes))
    return {name: 0.05 * jax.random.normal(key, shapes[name]) for name, key in zip(shapes, keys, strict=True)}


def norm(x):
    return (x * jax.lax.rsqrt(jnp.mean(x.astype(jnp.float32) ** 2, axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def logits_of(params, tokens, s, key=None):
    """[batch, time] -> [batch, time, characters]; with a key there is dropout."""
    batch = jax.typeof(tokens).sharding.spec
    whole = lambda leaf: jax.reshard(leaf.astype(s.dtype), P())  # gathers the parts of a parameter from all devices

    def drop(x, key):
        if key is None:
            return x
        kept = jax.reshard(jax.random.bernoulli(key, 1 - s.dropout, x.shape), batch)
        return jnp.where(kept, x / (1 - s.dropout), 0)

    @jax.checkpoint  # the backward pass gathers them again, so one layer at a time is whole
    def layer(x, inputs):
        qkv, out, up, down = map(whole, inputs[:4])
        key1, key2 = (None, None) if key is None else jax.random.split(inputs[4])
        q, k, v = jnp.moveaxis((norm(x) @ qkv).reshape(*x.shape[:2], 3, s.heads, -1), 2, 0)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(x.shape)
        x = x + drop(y @ out, key1)
        return x + drop(jax.nn.gelu(norm(x) @ up) @ down, key2), None

    x = whole(params["characters"]).at[tokens].get(out_sharding=batch) + whole(params["positions"])[: tokens.shape[1]]
    layers = [params[name] for name in ("qkv", "out", "up", "down")]
    x, _ = jax.lax.scan(layer, x, (*layers, None if key is None else jax.random.split(key, s.layers)))
    return (norm(x) @ whole(params["characters"]).T).astype(jnp.float32)  # the loss in float32


def build(s, characters):
    """The state at the start, the loss, the training step and the sampler."""

    def loss_fn(params, tokens, key=None):
        logits = logits_of(params, tokens[:, :-1], s, key)
        return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

    sharp_loss_fn = sharpened(loss_fn, crsam, rho=s.rho, alpha=s.alpha, beta=s.beta)  # CR-SAM: the only change
    warm_up = min(s.warm_up, s.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, s.learning_rate, warm_up, s.steps)
    adamw = optax.adamw(schedule, b2=0.99, weight_decay=s.weight_decay)
    tx = optax.chain(optax.clip_by_global_norm(s.clip), adamw)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state, tokens, key):
        params, opt_state = state
        loss, grads = jax.value_and_grad(sharp_loss_fn)(params, tokens, key)  # CR-SAM: not loss_fn
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def sample(params, prompt, key):
        """Continues the prompt, [context], by characters drawn from the network."""

        def draw(seen, key):
            new = jax.random.categorical(key, logits_of(params, seen[None], s)[0, -1])
            return jnp.append(seen[1:], new), new

        return jax.lax.scan(draw, prompt, jax.random.split(key, s.sample))[1]

    @jax.jit
    def initial_state():
        """FSDP: every parameter is divided along its last axis, and the optimizer's state like the parameters."""
        params = initial_params(s, characters)
        params = {name: jax.reshard(a, P(*[None] * (a.ndim - 1), "data")) for name, a in params.items()}
        return params, tx.init(params)

    return initial_state(), loss_fn, train_step, sample


def train(s):
    characters, train_text, validation_text = load(s.data)
    state, loss_fn, train_step, sample = build(s, len(characters))
    log = {name: [] for name in ("step", "training loss", "validation loss")}
    out = Path(s.out).absolute()
    saver = ocp.CheckpointManager(out / "checkpoints", options=ocp.CheckpointManagerOptions(max_to_keep=2))
    start = saver.latest_step() or 0
    if start:
        args = ocp.args.Composite(state=ocp.args.StandardRestore(state), log=ocp.args.JsonRestore())
        state, log = (found := saver.restore(start, args=args)).state, found.log
    print(f"{sum(a.size for a in jax.tree.leaves(state[0])):,} parameters, {jax.device_count()} devices, step {start}")
    tests = [batch_of_step(s, validation_text, i) for i in range(20)]
    validation_loss = jax.jit(loss_fn)
    clock = time.perf_counter()
    for step in range(start + 1, s.steps + 1):
        state, loss = train_step(state, batch_of_step(s, train_text, step - 1), jax.random.key(step))
        if step % s.every == 0 or step == s.steps:
            mean = sum(float(validation_loss(state[0], batch)) for batch in tests) / len(tests)
            for name, value in zip(log, (step, loss, mean), strict=True):
                log[name].append(round(float(value), 5))
            print(f"step {step}, {time.perf_counter() - clock:.0f} s: loss {loss:.3f}, validation loss {mean:.3f}")
            saver.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), log=ocp.args.JsonSave(log)))
    saver.close()
    drawn = sample(state[0], jnp.asarray(validation_text[: s.context]), jax.random.key(s.seed))
    print("--- sample\n" + "".join(characters[np.asarray(drawn)]) + "\n---")
    figure, ax = plt.subplots(figsize=(6, 3.5), layout="constrained")
    for name in list(log)[1:]:
        ax.plot(log["step"], log[name], ".-", label=name)
    ax.set(xlabel="step", ylabel="nats per character")
    ax.legend()
    figure.savefig(out / "training.png", dpi=120)
    print(f"picture: {out / 'training.png'}")
    return state


def main(argv=None):
    with jax.set_mesh(jax.make_mesh((jax.device_count(),), ("data",))):
        return train(options(argv))


if __name__ == "__main__":
    main()
