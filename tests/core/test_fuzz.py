"""Random numbers over all magnitudes: no output that is not finite from a finite gradient, unless it is counted."""

import zlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import crsam_jax
from crsam_jax import sam
from tests.core.problems import MEMBERS

ASCENTS = {
    "adaptive": partial(crsam_jax.ascents.adaptive_ascent, eta=0.0),
    "smoothed": crsam_jax.ascents.smoothed_ascent,
    "dropped": crsam_jax.ascents.dropped_ascent,
    "momentum": crsam_jax.ascents.momentum_ascent,
    "friendly": crsam_jax.ascents.friendly_ascent,
    "dynamic_sparse": partial(crsam_jax.ascents.dynamic_sparse_ascent, update_every=1, total_steps=4),
}
POLICIES = {
    "periodic": partial(crsam_jax.periodic, k=2),
    "look": partial(crsam_jax.look, k=2),
    "late": partial(crsam_jax.late, start=1),
    "adaptive_policy": crsam_jax.adaptive_policy,
}
OPTIMIZERS = {
    **MEMBERS,
    "crsam_gradients": partial(crsam_jax.crsam, differences="gradients"),
    "crsam_probes": partial(crsam_jax.crsam, probes=crsam_jax.random_probes(2)),
    "crsam_masked": lambda loss_fn, rho: crsam_jax.crsam(loss_fn, rho, mask=_some),
    "sam_with_aux": lambda loss_fn, rho: sam(lambda w, **kwargs: (loss_fn(w, **kwargs), 0), rho, has_aux=True),
    "sam_ascent_only": partial(sam, ascent_only=True),
    "decoupled_wsam": lambda loss_fn, rho: crsam_jax.decoupled_wsam(loss_fn, optax.sgd(0.1), 0.1, rho),
    "msam": lambda loss_fn, rho: crsam_jax.msam(optax.sgd(0.1), rho),
    "s2sam": lambda loss_fn, rho: crsam_jax.s2sam(optax.sgd(0.1), rho),
    **{name: lambda loss_fn, rho, make=make: sam(loss_fn, rho, ascent=make()) for name, make in ASCENTS.items()},
    **{name: lambda loss_fn, rho, wrap=wrap: wrap(sam(loss_fn, rho)) for name, wrap in POLICIES.items()},
}
TREES = {
    "scalar": (),
    "vector": (5,),
    "nested": {"a": {"kernel": (3, 2), "bias": (2,)}, "b": [(), (0, 3)], "c": {}},
}
DTYPES = ["float16", "bfloat16", "float32", "float64"]
CASES = 200  # of each optimizer and dtype
STEPS = 3
LOSSES = [
    lambda w: jnp.sum(w**2) / 2,
    lambda w: -jnp.sum(w**4),
    jnp.sum,
    lambda w: jnp.sum(jnp.exp(w)),
    lambda w: jnp.sum(jnp.log(jnp.abs(w))),
    lambda w: jnp.sum(jnp.sqrt(jnp.abs(w))),
    lambda w: jnp.zeros((), w.dtype),
]


def _some(params):
    leaves, structure = jax.tree.flatten(params)
    return jax.tree.unflatten(structure, [index % 2 == 0 for index in range(len(leaves))])


def shapes(name):
    return jax.tree.leaves(TREES[name], is_leaf=lambda node: isinstance(node, tuple))


def tree_of(name, leaves):
    structure = jax.tree.structure(TREES[name], is_leaf=lambda node: isinstance(node, tuple))
    return jax.tree.unflatten(structure, leaves)


def loss_fn(params, kind, scale):
    """One of the losses, summed up in the dtype of the leaves."""
    branches = [lambda leaf, one=one: one(leaf) for one in LOSSES]
    terms = [jax.lax.switch(kind, branches, leaf) for leaf in jax.tree.leaves(params)]
    return scale.astype(terms[0].dtype) * sum(terms)


def random_leaf(rng, shape, dtype):
    """Random elements, zeros among them: of one magnitude in a case, a usual one, any, or near the dtype's limits."""
    info, size = jnp.finfo(dtype), (CASES, *[1] * len(shape))
    lowest, highest = np.log2(float(info.smallest_subnormal)), info.maxexp
    ranges = [(-3, 3), (lowest, highest), (highest - 3, highest), (lowest, lowest + 15)]
    exponents = np.choose(
        rng.choice(len(ranges), size, p=[0.4, 0.3, 0.2, 0.1]), [rng.uniform(*r, size) for r in ranges]
    )
    mantissas = rng.uniform(-1, 1, (CASES, *shape)) * (rng.uniform(size=(CASES, *shape)) < 0.9)
    return np.clip(mantissas * np.exp2(exponents), float(info.min), float(info.max)).astype(dtype)


def batches(tree, dtype, seed):
    """Parameters, gradients for each step, losses, and radii, of all cases."""
    rng = np.random.default_rng(seed)
    leaves = lambda: [random_leaf(rng, shape, jnp.dtype(dtype)) for shape in shapes(tree)]
    rho = np.exp2(rng.uniform(-40, 40, CASES)) * (rng.uniform(size=CASES) < 0.95)
    rho = np.where(rng.uniform(size=CASES) < 0.6, 0.1, rho)
    return {
        "params": tree_of(tree, leaves()),
        "given": jax.tree.map(lambda *steps: np.stack(steps, 1), *(tree_of(tree, leaves()) for _ in range(STEPS))),
        "is_given": rng.uniform(size=CASES) < 0.3,
        "rho": jnp.asarray(rho, jnp.result_type(float)),
        "kind": rng.integers(0, len(LOSSES), CASES),
        "scale": jnp.asarray(np.exp2(rng.choice([0, 0, 0, -100, -10, 10, 100], CASES)), jnp.result_type(float)),
    }


def all_finite(tree):
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def guarded_steps(state):
    return optax.tree.get(state, "guarded_steps")


def trace(make, params, given, is_given, rho, kind, scale):
    """Of each step: whether its gradient is finite, whether its output is, and whether it was counted."""
    tx, loss_kwargs = make(loss_fn, rho=rho), {"kind": kind, "scale": scale}
    true = jax.grad(loss_fn)(params, **loss_kwargs)

    def step(state, given):
        grads = jax.tree.map(lambda a, b: jnp.where(is_given, a, b), given, true)
        gradient, new_state = tx.update(grads, state, params, **loss_kwargs)
        seen = all_finite(grads), all_finite(gradient), guarded_steps(new_state) > guarded_steps(state)
        return new_state, jnp.stack(seen)

    return jax.lax.scan(step, tx.init(params), given)[1]


@pytest.mark.slow
def test_no_output_that_is_not_finite_comes_from_a_finite_gradient_without_being_counted(capsys):
    cases, counted, faults = 0, 0, []
    for number, (name, make) in enumerate(OPTIMIZERS.items()):
        for dtype in DTYPES:
            tree = list(TREES)[(number + DTYPES.index(dtype)) % len(TREES)]
            with jax.enable_x64(dtype == "float64"):
                inputs = batches(tree, dtype, seed=zlib.crc32(f"{name} {dtype}".encode()))
                found = jax.jit(jax.vmap(partial(trace, make)))(*inputs.values())
            is_finite, is_output_finite, is_counted = np.moveaxis(np.array(found), -1, 0)
            cases += int(np.sum(is_finite))
            counted += int(np.sum(is_finite & is_counted))
            faults += [
                (name, dtype, tree, *where) for where in np.argwhere(is_finite & ~is_output_finite & ~is_counted)
            ]
    with capsys.disabled():
        print(f"\n{cases} steps with finite gradients, {counted} of them guarded, {len(faults)} faults")

    assert not faults
    assert cases >= 20_000
    assert cases / 10 < counted < cases * 0.6  # both happen a lot
