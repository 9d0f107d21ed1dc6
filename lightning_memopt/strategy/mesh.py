"""The device mesh: data-parallel ranks, tensor-parallel ranks and replicas."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

DATA, TENSOR, REPLICATE, SHARD = "data_parallel", "tensor_parallel", "replicate", "shard"


def check_sizes(data_parallel_size: Any, tensor_parallel_size: Any, replicate_size: Any) -> None:
    """Check the sizes as far as possible before the number of ranks is known.

    Raises:
        TypeError: If a size is not an integer.
        ValueError: If a size is not positive, or if ``replicate_size`` does not divide ``data_parallel_size``.
    """
    sizes = {"tensor_parallel_size": tensor_parallel_size, "replicate_size": replicate_size}
    if data_parallel_size != "auto":
        sizes["data_parallel_size"] = data_parallel_size
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise TypeError(f"`{name}` must be an integer, got {size!r}.")
        if size < 1:
            raise ValueError(f"`{name}` must be at least 1, got {size}.")
    if data_parallel_size != "auto" and data_parallel_size % replicate_size:
        raise ValueError(
            f"`replicate_size` {replicate_size} does not divide `data_parallel_size` {data_parallel_size}: "
            "data-parallel ranks are arranged as replicas times shards."
        )


def resolved_data_size(data_parallel_size: Any, tensor_parallel_size: int, replicate_size: int, world_size: int) -> int:
    """Return the number of data-parallel ranks.

    Raises:
        RuntimeError: If the sizes do not multiply to the number of ranks.
    """
    known = tensor_parallel_size * (replicate_size if data_parallel_size == "auto" else data_parallel_size)
    fits = world_size % known == 0 if data_parallel_size == "auto" else world_size == known
    if not fits:
        raise RuntimeError(
            f"The sizes `data_parallel_size={data_parallel_size}` and `tensor_parallel_size={tensor_parallel_size}` "
            f"multiplied should equal the world size ({world_size}), with `replicate_size={replicate_size}` dividing "
            "the data-parallel ranks. Change a size or the number of devices."
        )
    return world_size // tensor_parallel_size


def make_meshes(
    device_type: str, data_size: int, tensor_size: int, replicate_size: int
) -> tuple[DeviceMesh, DeviceMesh, DeviceMesh]:
    """Return the mesh of all ranks, its data-parallel submesh, and the submesh for ``fully_shard``.

    Without replicas, the mesh has the dimensions of Lightning's ModelParallelStrategy: ``data_parallel`` and
    ``tensor_parallel``. With replicas, it has ``replicate``, ``shard`` and ``tensor_parallel``, and ``data_parallel``
    is the first two, flattened.
    """
    if replicate_size == 1:
        mesh = init_device_mesh(device_type, (data_size, tensor_size), mesh_dim_names=(DATA, TENSOR))
        return mesh, mesh[DATA], mesh[DATA]
    shape = (replicate_size, data_size // replicate_size, tensor_size)
    mesh = init_device_mesh(device_type, shape, mesh_dim_names=(REPLICATE, SHARD, TENSOR))
    hybrid = mesh[REPLICATE, SHARD]
    return mesh, hybrid._flatten(DATA), hybrid


def shard_size(mesh: DeviceMesh) -> int:
    """Return the number of ranks over which ``fully_shard`` shards a parameter on this mesh."""
    return mesh.size(mesh.ndim - 1)
