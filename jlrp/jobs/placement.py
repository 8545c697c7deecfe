"""Which devices compute a batch, and which part of the source is whose."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlrp.arguments import shown
from jlrp.jobs.errors import JobError
from jlrp.typing import Array, ArrayLike, PyTree


@dataclass(frozen=True)
class Placement:
    """How batches and parameters lie on the devices.

    Attributes:
      mesh: None for the default device alone.
      axis: of the mesh, that batches are divided over.
    """

    mesh: Mesh | None = None
    axis: str = "data"

    @property
    def is_global(self) -> bool:
        """Whether other processes compute with this one, step by step."""
        if self.mesh is None:
            return False
        return any(
            d.process_index != jax.process_index() for d in self.mesh.devices.flat
        )

    @property
    def batches(self) -> NamedSharding | None:
        return self.mesh and NamedSharding(self.mesh, PartitionSpec(self.axis))

    @property
    def devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def parameters(self, params: PyTree) -> PyTree:
        """Params on the devices: as they were sharded on this mesh, else replicated."""
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, params)
        mesh = self.mesh

        def place(leaf: ArrayLike) -> Array:
            given = getattr(leaf, "sharding", None)
            spec = PartitionSpec()
            if isinstance(given, NamedSharding) and given.mesh.shape == mesh.shape:
                spec = given.spec
            return jax.device_put(leaf, NamedSharding(mesh, spec))

        return jax.tree.map(place, params)

    def batch(self, tree: PyTree) -> PyTree:
        """This process's rows of a batch, on its devices."""
        if self.mesh is None:
            return tree
        sharding = self.batches
        return jax.tree.map(
            lambda a: jax.make_array_from_process_local_data(sharding, a), tree
        )

    def shape(self, size: int, spec: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        """What the program is compiled for, of a batch of ``size`` in each process."""
        if self.is_global:
            size *= jax.process_count()
        shape = (size, *spec.shape)
        return jax.ShapeDtypeStruct(shape, spec.dtype, sharding=self.batches)

    def local(self, array: jax.Array) -> np.ndarray:
        """This process's rows of a result."""
        if not self.is_global:
            return np.asarray(array)
        # Along other axes of the mesh a row has copies.
        shards = {s.index[0].start or 0: s.data for s in array.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)])


def placement(devices: str | Mesh | None, batch: int) -> Placement:
    """The placement that the argument ``devices`` of a job asks for.

    Raises:
      JobError: if it cannot be had, or batches do not divide over it.
    """
    if devices is None:
        return Placement()
    if not isinstance(devices, Mesh):
        if not isinstance(devices, str) or devices != "data":
            raise JobError(f'devices is "data", a mesh or None; got {shown(devices)}.')
        local = np.array(jax.local_devices())
        mesh, axis = Mesh(local, ("data",)), "data"
    else:
        axis = "data" if "data" in devices.axis_names else devices.axis_names[0]
        # A function is traced as it is for one device: the compiler divides it.
        automatic = (AxisType.Auto,) * len(devices.axis_names)
        mesh = Mesh(devices.devices, devices.axis_names, axis_types=automatic)
    placed = Placement(mesh, axis)
    processes = len({d.process_index for d in mesh.devices.flat})
    shares, left = divmod(mesh.shape[axis], processes)
    if left or _is_shared(mesh, axis):
        raise JobError(
            f"Each place along the axis {axis!r} of the mesh, of {mesh.shape[axis]}, "
            f"must be in one of the {processes} processes, with all other axes inside "
            "it: a process reads and writes its own rows."
        )
    if batch % shares:
        raise JobError(
            f"A batch of {batch} does not divide over {shares} devices. Make it a "
            "multiple."
        )
    return placed


def _is_shared(mesh: Mesh, axis: str) -> bool:
    """Whether the rows of a batch would be in several processes at once."""
    places = np.moveaxis(mesh.devices, mesh.axis_names.index(axis), 0)
    places = places.reshape(mesh.shape[axis], -1)
    return any(len({d.process_index for d in place}) > 1 for place in places)


def blocks_of(part: tuple[int, int], examples: int | None, rows: int) -> range | None:
    """The blocks that one part of a job reads and writes; None for all of a stream.

    Raises:
      JobError: if the part would have none.
    """
    index, parts = part
    if not 0 <= index < parts:
        raise JobError(f"There is no part {index} of {parts}.")
    if examples is None:
        if parts > 1:
            raise JobError(
                f"A stream has no length, so it cannot be divided over {parts} "
                "processes. Give a source with a length and an index, or run one "
                "job for each process, with its own stream and store."
            )
        return None
    blocks = -(-examples // rows)
    if parts > blocks:
        raise JobError(
            f"{parts} processes are more than the {blocks} blocks of {rows} examples "
            f"that {examples} examples make. Start fewer, or make the batch smaller."
        )
    return range(blocks * index // parts, blocks * (index + 1) // parts)
