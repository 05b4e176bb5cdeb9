"""What the methods send between devices: collectives in the compiled training step, on virtual CPU devices."""

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh

pytest.importorskip("flax", reason="the experiments need pip install crsam_jax[experiments]")
pytest.importorskip("rich", reason="the experiments need pip install crsam_jax[experiments]")

from experiments.costs import communication, problems
from experiments.costs.communication import LAYOUTS, lowered, programs
from experiments.costs.targets import count

DEVICES = 2
SCALARS = 100  # bytes: the loss and the diagnostics


@pytest.fixture(scope="module")
def counted():
    """Counts by layout and program, of a multilayer perceptron, and the bytes of its parameters."""
    if len(jax.devices()) < DEVICES:
        pytest.skip(f"needs {DEVICES} devices")
    mesh = Mesh(np.array(jax.devices()[:DEVICES]), (communication.AXIS,), axis_types=(AxisType.Explicit,))
    problem = problems.dense(batch_size=8, inputs=8, width=16, depth=1)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(jax.eval_shape(problem.initial)[0]))
    found = {}
    for layout in LAYOUTS:
        for program in programs(problem.loss_fn, optax.sgd(0.1, momentum=0.9), mesh, layout):
            text = lowered(program, problem.initial, problem.batch, mesh, layout).compile().as_text()
            found[layout, program.name] = count(text)
    return found, size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_summed_as_often_as_the_method_needs(counted, layout):
    """Once in m-SAM, whatever it evaluates, as in SGD; global SAM sums two gradients, CR-SAM three."""
    found, size = counted
    both = lambda sizes: sizes["all-reduce"] + sizes.get("reduce-scatter", 0)
    summed = {name: both(counts.collective_bytes) for (at, name), counts in found.items() if at == layout}
    assert size <= summed["SGD"] < size + SCALARS
    expected = {"msam": 1, "m-SAM": 1, "m-CR-SAM": 1, "sam": 2, "crsam": 3}
    for name, times in expected.items():
        surplus = 3 * SCALARS if layout == "fsdp" else SCALARS
        assert times * size <= summed[name] < times * size + surplus, name
    for name in ("m-SAM, sharpened", "m-CR-SAM, sharpened"):
        assert summed[name] == summed["SGD"]
        assert found[layout, name].sent_bytes <= found[layout, "SGD"].sent_bytes


def test_what_m_sam_reports_is_summed_together_with_its_gradient(counted):
    found, _ = counted
    for name in ("m-SAM", "m-SAM, sharpened", "m-CR-SAM", "m-CR-SAM, sharpened"):
        assert found["replicated", name].collectives == found["replicated", "SGD"].collectives == {"all-reduce": 1}


def test_weights_are_gathered_once_for_each_evaluation_of_a_whole_batch(counted):
    found, _ = counted
    gathered = {name: counts.collective_bytes["all-gather"] for (at, name), counts in found.items() if at == "fsdp"}
    expected = {"SGD": 1, "msam": 1, "m-SAM": 1, "m-SAM, sharpened": 1, "m-CR-SAM": 1, "sam": 2, "crsam": 3}
    for name, times in expected.items():
        assert gathered[name] == times * gathered["SGD"], name
