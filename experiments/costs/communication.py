"""What the methods send between the devices that share a batch, read from the compiled training step.

Global SAM sums two gradients over the devices per step, CR-SAM three. The original m-SAM perturbs each device's part of
the batch by that part's own gradient, and sums the results alone. Two layouts: parameters and optimizer state on every
device, or divided among the devices (FSDP), so that each evaluation gathers the weights and scatters the gradients. The
mesh axis is explicit, as ``jax.make_mesh`` makes it.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import optax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import crsam_jax
from experiments.costs import steps
from experiments.costs.steps import LossFn, make_step, make_train_step
from experiments.costs.targets import by_name, count, find
from experiments.settings.configs import Benchmark
from experiments.system import tables
from experiments.system.progress import track

Row = dict[str, Any]
"""Of the CSV file, by column."""

Layout = Literal["replicated", "fsdp"]
LAYOUTS: tuple[Layout, ...] = get_args(Layout)

AXIS = "data"
_LOCAL = crsam_jax.Execution(axis_name=AXIS, sync_perturbation=False)
_REPLICATED = PartitionSpec()

Initial = Callable[[], tuple[Any, Any]]
"""Makes params and model state."""


class Program(NamedTuple):
    """A training step, ``(params, model_state, opt_state, batch) -> the next ones and the loss``.

    Attributes:
      name: of the method.
      points: at how many points it evaluates the gradient.
      init: from params to the optimizer's state.
      step: the training step.
    """

    name: str
    points: int
    init: Callable[[Any], Any]
    step: Callable[..., Any]


def communication(config: Benchmark) -> list[Row]:
    """Compiles all programs in both layouts: a row of each, written as soon as it is there."""
    target = find(config.target or "", config.devices)
    mesh = Mesh(target.mesh.devices, (AXIS,), axis_types=(AxisType.Explicit,))
    initial = lambda: steps.initial(config)
    params = jax.tree.leaves(jax.eval_shape(initial)[0])
    loss_fn, base = steps.make_loss(config), optax.sgd(0.1, momentum=0.9)
    compared = [(layout, program) for layout in LAYOUTS for program in programs(loss_fn, base, mesh, layout)]
    rows: list[Row] = []
    for layout, program in track(compared, "compiling", "programs"):
        start = time.perf_counter()
        compiled = target.compile(lowered(program, initial, lambda: steps.batch(config), mesh, layout))
        seconds = time.perf_counter() - start
        counts = count(compiled.as_text())
        sgd = next((row for row in rows if row["layout"] == layout), {"sent_bytes": counts.sent_bytes})
        rows.append(
            {
                "target": target.name,
                "devices": config.devices,
                "model": config.model,
                "batch_size": config.batch_size,  # images in a step, on all devices together
                "dtype": config.dtype,
                "leaves": len(params),  # arrays of parameters
                "parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in params),
                "layout": layout,
                "program": program.name,
                "points": program.points,
                "collectives": by_name(counts.collectives),
                "collective_bytes": by_name(counts.collective_bytes),  # of whole arrays
                "sent_bytes": counts.sent_bytes,  # by each device
                "over_sgd": counts.sent_bytes / sgd["sent_bytes"],  # in the same layout
                "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,  # of each device
                "compile_seconds": seconds,  # with tracing and lowering
            }
        )
        steps.write(config, rows)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        [
            row["layout"],
            row["program"],
            str(row["points"]),
            _with_sizes(row["collectives"], row["collective_bytes"]) or "–",
            f"{row['sent_bytes'] / 1e6:.2f}",
            f"{row['over_sgd']:.2f}",
        ]
        for row in rows
    ]
    first = rows[0]
    title = f"{first['model']}, {first['leaves']} leaves of {first['parameter_bytes'] / 1e6:.2f} MB, "
    title += f"batch {first['batch_size']}, {first['dtype']}, {first['target']}, {first['devices']} devices"
    titles = ("layout", "program", "evaluations", "collectives (MB)", "a device sends MB", "÷ SGD")
    return f"{title}\n\n{tables.markdown(titles, lines)}"


def _with_sizes(numbers: str, sizes: str) -> str:
    """Such as ``1 all-gather (1.88)``, in megabytes."""
    megabytes = [f"({int(size.split()[0]) / 1e6:.2f})" for size in filter(None, sizes.split(", "))]
    return ", ".join(map(" ".join, zip(numbers.split(", "), megabytes, strict=False)))


def programs(loss_fn: LossFn, base: optax.GradientTransformation, mesh: Mesh, layout: Layout) -> list[Program]:
    """The methods to compare, SGD first."""
    whole = _gathering(loss_fn)

    def of_batch(name: str, points: int, tx: optax.GradientTransformation) -> Program:
        return Program(name, points, tx.init, make_train_step(whole, optax.with_extra_args_support(tx)))

    def by_stage(name: str, points: int, method: Any) -> Program:
        tx = method(loss_fn, has_aux=True, execution=_LOCAL)
        step = _in_parts(_by_stage(loss_fn, tx), base, mesh, "replicated")
        return Program(name, points, lambda params: (tx.init(params), base.init(params)), step)

    def by_loss(name: str, points: int, method: Any) -> Program:
        step = _in_parts(_by_loss(loss_fn, method, mesh, layout), base, mesh, layout)
        return Program(name, points, lambda params: (optax.EmptyState(), base.init(params)), step)

    return [
        of_batch("SGD", 1, base),
        of_batch("msam", 1, crsam_jax.msam(base)),
        by_stage("m-SAM", 2, crsam_jax.sam),
        by_loss("m-SAM, sharpened", 2, crsam_jax.sam),
        by_stage("m-CR-SAM", 3, crsam_jax.crsam),
        by_loss("m-CR-SAM, sharpened", 3, crsam_jax.crsam),
        of_batch("sam", 2, optax.chain(crsam_jax.sam(whole, has_aux=True), base)),
        of_batch("crsam", 3, optax.chain(crsam_jax.crsam(whole, has_aux=True), base)),
    ]


def lowered(program: Program, initial: Initial, batch: Callable[[], Any], mesh: Mesh, layout: Layout) -> Any:
    """The program for the devices of a mesh, with a batch divided among them."""
    params, model_state = jax.eval_shape(initial)
    inputs = jax.tree.map(lambda leaf: _placed(leaf, NamedSharding(mesh, PartitionSpec(AXIS))), jax.eval_shape(batch))
    state = params, model_state, jax.eval_shape(program.init, params)
    at = jax.tree.map(lambda leaf: NamedSharding(mesh, specs_of(leaf, mesh.size, layout)), state)
    everywhere = NamedSharding(mesh, _REPLICATED)
    jitted = jax.jit(program.step, donate_argnums=(0, 1, 2), out_shardings=(*at, everywhere))
    with jax.set_mesh(mesh):
        return jitted.lower(*jax.tree.map(_placed, state, at), inputs)


def _placed(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def specs_of(leaf: Any, devices: int, layout: Layout) -> PartitionSpec:
    """On every device, or the longest dimension that the devices divide, divided among them."""
    lengths = [(length, -i) for i, length in enumerate(leaf.shape) if length % devices == 0]
    if layout == "replicated" or not lengths:
        return _REPLICATED
    return PartitionSpec(*[None] * -max(lengths)[1], AXIS)


def _gathering(loss_fn: LossFn) -> LossFn:
    """The loss, which gathers the weights; their gradients are divided as the weights are.

    Inside the network shardings are left to the compiler: not every layer traces on explicit axes.
    """
    network = jax.sharding.auto_axes(loss_fn, axes=AXIS, out_sharding=_REPLICATED)

    def gathering(params: Any, model_state: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        return network(jax.sharding.reshard(params, _REPLICATED), model_state, images, labels)

    return gathering


_PartGradient = Callable[..., tuple[Any, Any, Any, jax.Array]]
"""``(params, model_state, state, batch) -> gradient, model_state, state, loss`` of a device's part, all averaged."""


def _by_stage(loss_fn: LossFn, tx: optax.GradientTransformationExtraArgs) -> _PartGradient:
    """The method averages its result itself: ``sync_perturbation=False``."""
    step = make_step(loss_fn, tx)

    def gradient(params: Any, model_state: Any, state: Any, batch: Any) -> Any:
        gradient, model_state, state, loss = step(params, model_state, state, batch)
        model_state, loss = jax.lax.pmean((model_state, loss), AXIS)
        return gradient, model_state, state, loss

    return gradient


def _by_loss(loss_fn: LossFn, method: Any, mesh: Mesh, layout: Layout) -> _PartGradient:
    """The gradient of a sharpened loss, averaged as any gradient is."""

    def gradient(params: Any, model_state: Any, state: Any, batch: Any) -> Any:
        own = lambda params: loss_fn(params, model_state, **batch)
        sharp = crsam_jax.sharpened(own, method, has_aux=True)
        (loss, model_state), grads = jax.value_and_grad(sharp, has_aux=True)(params)
        model_state, loss = jax.lax.pmean((model_state, loss), AXIS)
        return jax.tree.map(lambda leaf: _mean(leaf, mesh.size, layout), grads), model_state, state, loss

    return gradient


def _mean(leaf: jax.Array, devices: int, layout: Layout) -> jax.Array:
    """The mean over the devices, on each of them or divided among them."""
    spec = specs_of(leaf, devices, layout)
    if spec == _REPLICATED:
        return jax.lax.pmean(leaf, AXIS)
    return jax.lax.psum_scatter(leaf, AXIS, scatter_dimension=tuple(spec).index(AXIS), tiled=True) / devices


def _in_parts(
    gradient: _PartGradient, base: optax.GradientTransformation, mesh: Mesh, layout: Layout
) -> Callable[..., Any]:
    """Each device makes the gradient of its part; the base optimizer takes the step with the mean.

    The mean comes in ``layout``, and is brought into the layout of the params.
    """

    def local(params: Any, model_state: Any, state: Any, batch: Any) -> Any:
        own = jax.lax.pcast((params, model_state), AXIS, to="varying")
        return gradient(*own, state, batch)

    def train(params: Any, model_state: Any, opt_state: Any, batch: Any) -> Any:
        state, base_state = opt_state
        specs = jax.tree.map(lambda leaf: specs_of(leaf, mesh.size, layout), params)
        mean = jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_REPLICATED, _REPLICATED, _REPLICATED, PartitionSpec(AXIS)),
            out_specs=(specs, _REPLICATED, _REPLICATED, _REPLICATED),
        )
        whole = jax.sharding.reshard(params, _REPLICATED)
        grads, model_state, state, loss = mean(whole, model_state, state, batch)
        grads = jax.tree.map(lambda g, w: jax.sharding.reshard(g, jax.typeof(w).sharding), grads, params)
        updates, base_state = base.update(grads, base_state, params)
        return optax.apply_updates(params, updates), model_state, (state, base_state), loss

    return train
