"""Devices that this machine need not have, an NVIDIA H100 or TPUs, and what XLA's compilers plan for them.

The compilers run on any x86-64 Linux machine. They plan memory, choose kernels and place collectives as they would
on a machine with the device; only what is found out by running kernels, the tuning on GPUs, is left out.
"""

import importlib.util
import math
import os
import re
from collections import Counter
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

_KERNELS = ("fusion", "custom-call", "copy", "copy-start", "sort", "reduce", "transpose", "concatenate")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_INSTRUCTION = re.compile(r"^ +(?:ROOT )?%?[\w.-]+ = .*?[\])}] ([a-z][\w-]*)\(", re.MULTILINE)
_COLLECTIVE = re.compile(
    r"^ +(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<shape>.*?[\])}]) "
    rf"(?P<kind>{'|'.join(_COLLECTIVES)})(?P<part>-start|-done)?"
    r"\(%?(?P<operand>[\w.-]*)(?P<attributes>.*)$",
    re.MULTILINE,
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
_H100_BYTES = 84_978_434_048
_TUNED_BY_RUNNING = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}

_WITHOUT_TPU = {  # there is none to ask for its kind and its place in a pod, or to keep from other processes
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
      name: what :func:`find` knows it by.
      mesh: over the devices, one axis, ``"data"``, or two.
      compiler_options: that a compilation without the device needs.
      memory: bytes of a device; None for TPUs, whose compiler itself refuses what does not fit.
    """

    name: str
    mesh: Mesh
    compiler_options: dict[str, Any]
    memory: int | None

    @property
    def unit(self) -> Literal["launches", "cycles"]:
        """What the compiler tells of a program's cost."""
        return "cycles" if self.memory is None else "launches"

    @property
    def everywhere(self) -> NamedSharding:
        """The sharding of arrays that are on every device."""
        return NamedSharding(self.mesh, PartitionSpec())

    def placed(self, tree: Any, *axes: str | tuple[str, ...]) -> Any:
        """Shapes on the mesh: on every device, or divided among them along the first dimensions."""
        sharding = NamedSharding(self.mesh, PartitionSpec(*axes))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)

    def with_probe_axis(self) -> "Target":
        """The same devices on a mesh with an axis of two, ``"probe"``, beside ``"data"``."""
        pairs = self.mesh.devices.reshape(-1, 2)
        return self._replace(mesh=Mesh(pairs, ("data", "probe"), axis_types=(AxisType.Auto,) * 2))

    def compile(self, lowered: Any) -> Any:
        """The compiled program, which cannot be run here."""
        return lowered.compile(compiler_options=self.compiler_options)


class Memory(NamedTuple):
    """Bytes of one device while a step runs, and whether it has them.

    Attributes:
      used: arguments, results and temporaries together.
      temporaries: what exists within the step only; None where the compiler refused it and says the sum only.
      fits: whether the device has so much.
    """

    used: int
    temporaries: int | None
    fits: bool


class Counts(NamedTuple):
    """Of one execution of a program without loops; a loop's body is counted once.

    Attributes:
      launches: kernels that a GPU starts: fusions, calls of libraries, copies, and what else computes by itself.
      cycles: that a TPU takes, as its compiler estimates instruction by instruction; 0 in a GPU's program.
      collectives: how many of each kind, by name.
      collective_bytes: of the arrays that they sum, gather, scatter or move, whole ones, by name.
      sent_bytes: what each device sends in all, along a ring of n: in an all-reduce 2(n − 1)/n of the array, in a
        permutation the array, and in all others (n − 1)/n of it.
    """

    launches: int
    cycles: int
    collectives: dict[str, int]
    collective_bytes: dict[str, int]
    sent_bytes: int


def find(name: str, devices: int | None = None) -> Target:
    """The target of that name; programs for it are traced on the CPU, whatever devices are here.

    Args:
      name: ``"h100"``, or a topology of TPUs such as ``"v5e:2x2"``.
      devices: how many of its devices; by default one H100, or all of a topology.

    Raises:
      ImportError: without the compilers' packages.
      ValueError: if there is no such target, or it has fewer devices.
    """
    jax.config.update("jax_platforms", "cpu")
    is_h100 = name == "h100"
    if not is_h100 and ":" not in name:
        raise ValueError(f"There is no target {name!r}: it is h100, or a topology of TPUs such as v5e:2x2.")
    if importlib.util.find_spec("jax_cuda12_plugin" if is_h100 else "libtpu") is None:
        raise ImportError(
            f"--target {name} needs XLA's compiler for it, which is not installed: pip install 'crsam_jax[targets]'."
        )
    found = _h100s(devices or 1) if is_h100 else _tpus(name)
    if devices is not None and devices > len(found):
        raise ValueError(f"--devices {devices}, but {name} has {len(found)}: name a larger topology.")
    mesh = Mesh(np.array(found[:devices]), ("data",), axis_types=(AxisType.Auto,))
    return Target(name, mesh, _TUNED_BY_RUNNING, _H100_BYTES) if is_h100 else Target(name, mesh, {}, None)


def _h100s(count: int) -> list[jax.Device]:
    try:
        shape = f"1x1x{count}"
        return list(topologies.get_topology_desc("h100", "cuda", target_config=_H100, topology=shape).devices)
    except NotImplementedError as error:
        raise ImportError("jax did not load the compiler for GPUs; set JAX_PLATFORMS=cpu before it starts.") from error


def _tpus(name: str) -> list[jax.Device]:
    for variable, value in _WITHOUT_TPU.items():
        os.environ.setdefault(variable, value)
    try:
        return list(topologies.get_topology_desc(name, platform="tpu").devices)
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(f"The TPU compiler knows no topology {name!r}: {error}") from error


def memory_of(target: Target, lowered: Any) -> Memory:
    """Compiles a lowered step for a target and reads its memory, also where the compiler refuses so much.

    Raises:
      JaxRuntimeError: if the compiler refuses the step for another reason.
    """
    try:
        plan = target.compile(lowered).memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        figure = re.search(r"(\d+(?:\.\d+)?)([KMGT])\b", str(error))  # the first one is what the step takes
        if "RESOURCE_EXHAUSTED" not in str(error) or figure is None:
            raise
        return Memory(round(float(figure[1]) * _UNITS[figure[2]]), None, fits=False)
    temporaries = plan.temp_size_in_bytes
    # Results that take a donated argument's place count once.
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    used = plan.argument_size_in_bytes + results + temporaries + plan.generated_code_size_in_bytes
    return Memory(used, temporaries, fits=target.memory is None or used <= target.memory)


def entry(text: str) -> str:
    """The entry computation in an optimized program's text; what it calls is inside of kernels.

    Raises:
      ValueError: if the text is no program's.
    """
    found = re.search(r"^ENTRY .*?^}", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise ValueError(f"This is not the text of a compiled program: {text[:80]!r}")
    return found[0]


def count(text: str) -> Counts:
    """Counts in the optimized program's text, ``compiled.as_text()``.

    Example:
      >>> counts = count('''HloModule step, num_partitions=4
      ... ENTRY %main (x: f32[2]) -> f32[2] {
      ...   %x = f32[2]{0} parameter(0)
      ...   %sum = f32[2]{0} all-reduce(%x), replica_groups={}, to_apply=%add
      ...   ROOT %y = f32[2]{0} fusion(%sum), kind=kLoop, backend_config={"estimated_cycles":"120"}
      ... }''')
      >>> counts.launches, counts.cycles, counts.collectives, counts.collective_bytes, counts.sent_bytes
      (1, 120, {'all-reduce': 1}, {'all-reduce': 8}, 12)
    """
    numbers, sizes, sent = Counter[str](), Counter[str](), 0.0
    partitions = re.search(r"\bnum_partitions=(\d+)", text)
    started: dict[str, int] = {}  # devices in a group of each collective in flight
    fused = set[tuple[str, str, int]]()
    for found in _COLLECTIVE.finditer(text):
        if found["part"] == "-done":
            devices = started[found["operand"]]
        else:
            devices = _group_size(found["attributes"]) or (int(partitions[1]) if partitions else 1)
        if found["part"] == "-start":  # its shape holds operands and results, the shape of its end only results
            started[found["name"]] = devices
            continue
        kind, size = found["kind"], _bytes(found["shape"])
        size *= devices if kind == "reduce-scatter" else 1
        channel = re.search(r"\bchannel_id=(\d+)", found["attributes"])
        if channel is not None and (kind, channel[1], size) in fused:
            continue  # a TPU's collective runs beside several fusions, and each of them names it
        fused |= {(kind, channel[1], size)} if channel else set()
        numbers[kind] += 1
        sizes[kind] += size
        rounds = 1.0 if kind == "collective-permute" else (devices - 1) / devices
        sent += size * rounds * (2 if kind == "all-reduce" else 1)
    return Counts(
        launches=sum(name in _KERNELS for name in _INSTRUCTION.findall(entry(text))),
        cycles=sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', text))),
        collectives=dict(sorted(numbers.items())),
        collective_bytes=dict(sorted(sizes.items())),
        sent_bytes=round(sent),
    )


def by_name(numbers: dict[str, int]) -> str:
    """As a cell of a table.

    Example:
      >>> by_name({"all-gather": 2, "all-reduce": 1})
      '2 all-gather, 1 all-reduce'
    """
    return ", ".join(f"{number} {name}" for name, number in numbers.items())


def _group_size(attributes: str) -> int | None:
    """How many devices a collective runs over, of ``{{0,1},{2,3}}``, ``[2,2]<=[4]`` or ``mesh['a'=2,'b'=2] {'b'}``."""
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", attributes)
    if listed is not None:
        return listed[1].count(",") + 1
    counted = re.search(r"replica_groups=\[\d+,(\d+)\]", attributes)
    if counted is not None:
        return int(counted[1])
    meshed = re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", attributes)
    if meshed is None:
        return None
    lengths = dict(re.findall(r"'(\w+)'=(\d+)", meshed[1]))
    return math.prod(int(lengths[axis]) for axis in re.findall(r"'(\w+)'", meshed[2]))


def _bytes(shape: str) -> int:
    """Of an array, or of the arrays of a tuple, as ``(f32[8,4]{1,0}, pred[])``."""
    return sum(
        math.prod(map(int, filter(None, lengths.split(",")))) * max(1, int(bits or 8) // 8)
        for _, bits, lengths in _ARRAY.findall(shape)
    )
