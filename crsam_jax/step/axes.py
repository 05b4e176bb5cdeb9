"""Values along the axes of a mesh: which differ from device to device, and how they become one."""

from typing import Any

import jax
import jax.numpy as jnp


def varying(tree: Any, axis_name: str | None) -> Any:
    """A tree marked as differing along the axis, so that gradients with respect to it are not summed over it.

    Inside ``shard_map(check_vma=True)`` the gradient with respect to a replicated value is the sum over the
    axis already; without the check, and under ``pmap`` and ``vmap``, it is local and there is nothing to mark.
    """
    if axis_name is None or axis_name not in jax.sharding.get_abstract_mesh().manual_axes:  # vmap's is not manual
        return tree

    def cast(leaf: Any) -> jax.Array:
        return leaf if axis_name in _varying_axes(leaf) else jax.lax.pcast(leaf, axis_name, to="varying")

    return jax.tree.map(cast, tree)


def synced(tree: Any, axis_name: str) -> Any:
    """The mean over the axis for floating leaves, "any" for flags; integers are the same everywhere and stay."""

    def sync(leaf: jax.Array) -> jax.Array:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            return jax.lax.pmean(leaf, axis_name)
        return jax.lax.pmax(leaf.astype(jnp.int32), axis_name).astype(leaf.dtype)

    return jax.tree.map(lambda leaf: sync(jnp.asarray(leaf)), tree)


def gathered(tree: Any, axis_name: str) -> Any:
    """The values at all places of the axis, stacked along a new first axis."""

    def gather(leaf: jax.Array) -> jax.Array:
        if axis_name not in _varying_axes(leaf):
            return jax.lax.all_gather(leaf, axis_name)
        # Under ``shard_map(check_vma=True)`` a gathered value counts as different along the axis, and a sum does not.
        places = jnp.arange(jax.lax.axis_size(axis_name)).reshape(-1, *[1] * leaf.ndim)
        return jax.lax.psum(jnp.where(places == jax.lax.axis_index(axis_name), leaf, 0), axis_name)

    return jax.tree.map(gather, tree)


def is_mapped(axis_name: str) -> bool:
    """Whether the program is inside of ``shard_map``, ``pmap`` or ``vmap`` over the axis."""
    try:
        jax.lax.axis_index(axis_name)
    except NameError:
        return False
    return True


def _varying_axes(leaf: Any) -> Any:
    """The axes along which a value differs; none where ``shard_map`` does not check that."""
    kind: Any = jax.typeof(leaf)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying  # jax 0.10 renamed it
