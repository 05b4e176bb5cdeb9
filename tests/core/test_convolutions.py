"""Convolutions in the fast layout: the same function, wherever they stand."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from crsam_jax import canonical_convolutions, periodic, sam

RNG = np.random.default_rng(0)


def array(*shape, dtype=jnp.float32):
    return jnp.asarray(RNG.normal(size=shape), dtype)


# Operands and settings of ``conv_general_dilated`` of many kinds.
CONVOLUTIONS = {
    "NHWC": ((2, 6, 7, 4), (3, 3, 4, 5), {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}),
    "NCHW": ((2, 4, 6, 7), (5, 4, 3, 3), {}),
    "CHWN to CNHW": ((4, 6, 7, 2), (3, 4, 3, 5), {"dimension_numbers": ("CHWN", "HIWO", "CNHW")}),
    "strides": ((2, 4, 9, 9), (5, 4, 3, 3), {"window_strides": (2, 3)}),
    "padding": ((2, 4, 6, 6), (5, 4, 3, 3), {"padding": ((0, 2), (3, -1))}),
    "dilated kernel": ((2, 4, 9, 9), (5, 4, 3, 3), {"rhs_dilation": (2, 1)}),
    "dilated images": ((2, 4, 5, 5), (5, 4, 3, 3), {"lhs_dilation": (2, 3)}),
    "groups": ((2, 6, 7, 7), (4, 3, 3, 3), {"feature_group_count": 2}),
    "depthwise": ((2, 6, 7, 7), (12, 1, 3, 3), {"feature_group_count": 6}),
    "groups of the batch": ((4, 6, 7, 7), (8, 6, 3, 3), {"batch_group_count": 2}),
    "no space": ((3, 4), (5, 4), {"padding": ()}),
    "line": ((2, 4, 11), (5, 4, 3), {}),
    "volume": ((2, 3, 5, 6, 4), (4, 3, 2, 3, 2), {}),
}


def convolution(name, dtype=jnp.float32):
    image_shape, kernel_shape, options = CONVOLUTIONS[name]
    space = len(image_shape) - 2
    options = {"window_strides": (1,) * space, "padding": "SAME", **options}
    if options["padding"] == "SAME" and "lhs_dilation" in options:
        options["padding"] = ((1, 1),) * space
    conv = functools.partial(jax.lax.conv_general_dilated, **options)
    return conv, array(*image_shape, dtype=dtype), array(*kernel_shape, dtype=dtype)


def loss_of(conv):
    def loss(images, kernel):
        out = jnp.tanh(conv(images, kernel))
        return jnp.mean(out.astype(jnp.promote_types(out.dtype, jnp.float32)) ** 2)

    return loss


def value_and_grads(name, dtype=jnp.float32):
    conv, images, kernel = convolution(name, dtype)
    return jax.value_and_grad(loss_of(conv), argnums=(0, 1)), images, kernel


def assert_close(found, expected, rtol=2e-5, atol=1e-6):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(np.asarray(a, np.float64), np.asarray(b, np.float64), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("where", ["eager", "jit", "cond", "scan", "vmap"])
def test_values_and_gradients_are_those_of_the_function_itself(name, where):
    fn, images, kernel = value_and_grads(name)
    expected = fn(images, kernel)
    wrapped = canonical_convolutions(fn)
    if where == "eager":
        found = wrapped(images, kernel)
    elif where == "jit":
        found = jax.jit(wrapped)(images, kernel)
    elif where == "cond":
        otherwise = lambda x, k: jax.tree.map(jnp.zeros_like, fn(x, k))
        found = jax.jit(lambda p, x, k: jax.lax.cond(p, wrapped, otherwise, x, k))(True, images, kernel)
    elif where == "scan":
        found = jax.jit(lambda x, k: jax.lax.scan(lambda c, _: (c, wrapped(x, k)), 0, length=2)[1])(images, kernel)
        found = jax.tree.map(lambda leaf: leaf[1], found)
    else:
        found = jax.vmap(wrapped, in_axes=(0, None))(images[None], kernel)
        found = jax.tree.map(lambda leaf: leaf[0], found)
    assert_close(found, expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float64, 1e-12), (jnp.bfloat16, 0.05), (jnp.float16, 0.01)])
def test_dtypes_are_kept(dtype, tolerance, x64):
    fn, images, kernel = value_and_grads("NCHW", dtype)
    assert_close(jax.jit(canonical_convolutions(fn))(images, kernel), fn(images, kernel), tolerance, tolerance)


def layouts(text):
    return [
        line.split("dim_numbers = ")[1].split(",  window")[0] for line in text.splitlines() if "dim_numbers" in line
    ]


def test_all_of_a_gradients_convolutions_are_canonical_on_cpu_and_left_alone_elsewhere():
    fn, images, kernel = value_and_grads("NCHW")
    lowered = lambda f, platform: jax.jit(f).trace(images, kernel).lower(lowering_platforms=(platform,)).as_text()
    canonical = layouts(lowered(canonical_convolutions(fn), "cpu"))
    assert len(canonical) == 3
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in layout for layout in canonical)
    plain = layouts(lowered(fn, "cpu"))
    assert plain != canonical
    for platform in ("cuda", "tpu"):
        assert layouts(lowered(canonical_convolutions(fn), platform)) == plain


def nested(wrap):
    """A function of every kind of inner program: jit, custom derivatives, remat, scan, cond and while."""
    conv, _, _ = convolution("NCHW")

    @jax.custom_jvp
    def bent(x):
        return jnp.tanh(x)

    bent.defjvp(lambda primals, tangents: (bent(*primals), 2 * tangents[0]))

    @jax.custom_vjp
    def doubled(x, k):
        return conv(x, k)

    doubled.defvjp(lambda x, k: (doubled(x, k), (x, k)), lambda saved, ct: (saved[0] * 2, saved[1] * jnp.sum(ct)))

    def network(x, k):
        x = jax.jit(conv)(x, k)[:, :4]
        x = jax.checkpoint(lambda x: bent(conv(x, k)))(x)[:, :4]
        x, _ = jax.lax.scan(lambda x, _: (bent(conv(x, k))[:, :4], None), x, length=2)
        x = jax.lax.cond(jnp.sum(x) > 1e9, lambda x: x, lambda x: doubled(x, k)[:, :4], x)
        return jnp.mean(x**2)

    def fn(x, k):
        loss, grads = jax.value_and_grad(network, argnums=1)(x, k)
        _, total = jax.lax.while_loop(
            lambda s: s[0] < 2, lambda s: (s[0] + 1, s[1] + jnp.sum(conv(x, k * s[1]))), (0, loss)
        )
        return loss, grads, total

    return wrap(fn)


def inner_programs(jaxpr):
    for equation in jaxpr.eqns:
        yield equation.primitive.name
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from inner_programs(inner)


def test_no_convolution_is_missed_in_nested_programs():
    _, images, kernel = convolution("NCHW")
    names = list(inner_programs(jax.make_jaxpr(nested(canonical_convolutions))(images, kernel).jaxpr))
    assert "conv_general_dilated" not in names
    assert names.count("canonical_convolution") == list(
        inner_programs(jax.make_jaxpr(nested(lambda f: f))(images, kernel).jaxpr)
    ).count("conv_general_dilated")
    assert_close(
        jax.jit(nested(canonical_convolutions))(images, kernel), jax.jit(nested(lambda f: f))(images, kernel), 1e-4
    )


def test_it_closes_over_tracers_takes_keywords_and_keeps_side_effects():
    conv, images, kernel = convolution("NCHW")
    seen = []

    @jax.jit
    def outer(scale, images):
        @canonical_convolutions
        def inner(*, kernel):
            jax.debug.callback(lambda value: seen.append(float(value)), scale)
            return {"out": conv(images, kernel * scale)}

        return inner(kernel=kernel)

    assert_close(outer(3.0, images)["out"], conv(images, 3.0 * kernel))
    jax.effects_barrier()
    assert seen == [3.0]


def test_a_wrapped_function_can_be_differentiated():
    """Forward and in reverse; the new convolutions of its derivative are plain ones."""
    conv, images, kernel = convolution("NCHW")
    loss = loss_of(conv)
    assert_close(
        jax.grad(canonical_convolutions(loss), argnums=(0, 1))(images, kernel), jax.grad(loss, (0, 1))(images, kernel)
    )
    tangents = (array(*images.shape), array(*kernel.shape))
    assert_close(
        jax.jvp(canonical_convolutions(loss), (images, kernel), tangents), jax.jvp(loss, (images, kernel), tangents)
    )


def test_sharded_batches_stay_sharded(mesh):
    conv, images, kernel = convolution("NCHW")
    images = jnp.tile(images, (8, 1, 1, 1))
    step = canonical_convolutions(jax.value_and_grad(loss_of(conv), argnums=1))
    P = jax.sharding.PartitionSpec
    sharded = jax.shard_map(
        lambda x, k: jax.lax.pmean(step(x, k), "data"), mesh=mesh, in_specs=(P("data"), P()), out_specs=P(),
        check_vma=False,
    )  # fmt: skip
    assert_close(jax.jit(sharded)(images, kernel), step(images, kernel))
    data = jax.device_put(images, jax.sharding.NamedSharding(mesh, P("data")))
    compiled = jax.jit(step).lower(data, kernel).compile()
    assert "all-gather" not in compiled.as_text()
    assert_close(compiled(data, kernel), step(images, kernel))


def test_the_branch_of_a_policy_is_canonical():
    conv, images, kernel = convolution("NCHW")
    loss_fn = lambda kernel: loss_of(conv)(images, kernel)
    tx = periodic(sam(loss_fn), 2)
    step = jax.jit(lambda k, s: tx.update(jax.grad(loss_fn)(k), s, k)).lower(kernel, tx.init(kernel)).as_text()
    branches = step[step.index("stablehlo.case") :]
    assert layouts(branches)
    assert all("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]" in layout for layout in layouts(branches))


def test_training_in_scanned_epochs_is_training_in_a_loop():
    conv, images, kernel = convolution("NCHW")
    tx = optax.chain(sam(lambda k, x: loss_of(conv)(x, k)), optax.sgd(0.5))

    def step(carry, x):
        k, state = carry
        loss, grads = jax.value_and_grad(lambda k: loss_of(conv)(x, k))(k)
        updates, state = tx.update(grads, state, k, x=x, loss=loss)
        return (optax.apply_updates(k, updates), state), loss

    batches = jnp.stack([images + i for i in range(4)])
    carry, losses = (kernel, tx.init(kernel)), []
    for x in batches:
        carry, loss = jax.jit(step)(carry, x)
        losses.append(loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scanned = jax.jit(lambda c, b: jax.lax.scan(canonical_convolutions(step), c, b))
        found, found_losses = scanned((kernel, tx.init(kernel)), batches)
    assert_close(found[0], carry[0], 1e-4)
    assert_close(found_losses, jnp.stack(losses), 1e-4)
