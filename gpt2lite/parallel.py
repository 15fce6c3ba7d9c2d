"""One model over the processes that `torchrun` starts: how torch.distributed divides it, and who has what.

FSDP2, tensor parallelism and DDP are torch's; here is which layers they divide and how, and which part of a
tensor is this rank's own. `torch.distributed` is imported only where something is divided.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gpt2lite.dialects.reading import Narrow
from gpt2lite.errors import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Divide = Callable[[nn.Module, "DeviceMesh"], object]
FSDP, TP, DDP = "fsdp", "tp", "ddp"
MESHES = ((FSDP,), (TP,), (DDP,), (FSDP, TP))  # the names of a mesh's dimensions

# ---- which part is whose -----------------------------------------------------------------------------------


def is_divided(tensor: Tensor | None) -> bool:
    """Whether a tensor is a DTensor; asked without importing what one is."""
    return hasattr(tensor, "device_mesh")


def local_of(tensor: Tensor) -> Tensor:
    """This rank's own part of a tensor, which is all of it where it is not divided. No copy."""
    return tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[operator, no-any-return]


def box_of(tensor: Any) -> list[range]:
    """The range of each axis of a whole tensor that is this rank's."""
    if not is_divided(tensor):
        return [range(size) for size in tensor.shape]
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    spec = tensor.shape, tensor.device_mesh, tensor.placements
    sizes, begins = compute_local_shape_and_global_offset(*spec)
    return [range(begin, begin + size) for size, begin in zip(sizes, begins, strict=True)]


def views_of(tensor: Tensor) -> tuple[Narrow, ...]:
    """What leads from a whole tensor to this rank's part of it."""
    ranges = zip(box_of(tensor), tensor.shape, strict=True)
    parts = ((axis, rows) for axis, (rows, size) in enumerate(ranges) if len(rows) != size)
    return tuple(Narrow(axis, rows.start, rows.stop) for axis, rows in parts)


def part_like(whole: Any, local: Tensor) -> Tensor:
    """A rank's part in the place of a tensor that is divided: a DTensor like it; else the part itself."""
    if not is_divided(whole) or is_divided(local):
        return local
    from torch.distributed.tensor import DTensor

    spec = whole.device_mesh, whole.placements
    return DTensor.from_local(local, *spec, run_check=False, shape=whole.shape, stride=whole.stride())


# ---- how a model is divided --------------------------------------------------------------------------------


def names_of(mesh: DeviceMesh) -> tuple[str, ...]:
    """What each dimension of a mesh is for. Raises UsageError for a mesh that no model is divided over."""
    names = tuple(mesh.mesh_dim_names or (FSDP,) * mesh.ndim)
    if names not in MESHES:
        wanted = ", ".join(map(str, MESHES))
        raise UsageError(f"a mesh with the dimensions {names}; known mesh_dim_names: {wanted}")
    return names


def divide(module: nn.Module, mesh: DeviceMesh) -> None:
    """Divide a module on meta over a mesh: in layers ("tp"), then in rows ("fsdp"); "ddp" divides nothing.

    Raises UsageError for a module that has no plan, and for heads that do not divide.
    """
    names = names_of(mesh)
    if TP in names:
        _divide_layers(module, mesh[TP])
    if FSDP in names:
        _divide_rows(module, mesh[FSDP] if mesh.ndim > 1 else mesh)


def _divide_layers(model: Any, mesh: DeviceMesh) -> None:
    """Attention and feed-forward: the first layers by columns, which are heads, the last ones by rows.

    Embeddings, norms and the head stay whole on every rank.
    """
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    blocks = getattr(model, "trf_blocks", ())
    if not blocks:
        raise UsageError(f"{type(model).__name__} has no plan for tensor parallelism; pass parallelize")
    if blocks[0].att.n_heads % mesh.size():
        raise UsageError(f"{blocks[0].att.n_heads} heads do not divide by {mesh.size()} ranks")
    columns = dict.fromkeys(("att.W_query", "att.W_key", "att.W_value", "ff.layers.0"), ColwiseParallel())
    rows = dict.fromkeys(("att.out_proj", "ff.layers.2"), RowwiseParallel())
    for block in blocks:
        parallelize_module(block, mesh, columns | rows, src_data_rank=None)  # nothing is there to send
        block.att.n_heads //= mesh.size()


def _divide_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: each block is a unit, all the rest one more, so a head and what it is tied to are together."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for block in getattr(module, "trf_blocks", [each for part in reversed(lists) for each in part]):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if hasattr(module, "hidden"):
        register_fsdp_forward_method(module, "hidden")
