"""One model over the processes that `torchrun` starts: how torch.distributed divides it, and who has what.

FSDP2, tensor parallelism and DDP are torch's; here is which layers they divide and how, and which part of a
tensor is this rank's own. `torch.distributed` is imported only where something is divided.
"""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.reading import map_tensors
from gpt2lite.checkpoint.safetensors import make_header, open_safetensors
from gpt2lite.checkpoint.source import ByteSource
from gpt2lite.checkpoint.writing import Config, TensorToWrite, Wrote, chunks_of, making, replacing
from gpt2lite.dialects.reading import Narrow
from gpt2lite.errors import GPT2LiteError, UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Made = TypeVar("Made")
Divide = Callable[[nn.Module, "DeviceMesh"], object]
FSDP, TP, DDP = "fsdp", "tp", "ddp"
MESHES = ((FSDP,), (TP,), (DDP,), (FSDP, TP))  # the names of a mesh's dimensions

# ---- which part is whose -----------------------------------------------------------------------------------


def is_divided(tensor: object) -> bool:
    """Whether a tensor is a DTensor; asked without importing what one is."""
    return hasattr(type(tensor), "device_mesh")


def local_of(tensor: Any) -> Tensor:
    """This rank's own part of a tensor, which is all of it where it is not divided. No copy."""
    return tensor.to_local() if is_divided(tensor) else tensor


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
    axes = enumerate(zip(box_of(tensor), tensor.shape, strict=True))
    return tuple(Narrow(axis, rows.start, rows.stop) for axis, (rows, size) in axes if len(rows) != size)


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
        raise UsageError(f"a mesh with the dimensions {names}; known mesh_dim_names: {MESHES}")
    return names


def require_mesh(mesh: DeviceMesh, device: torch.device) -> None:
    """Raise UsageError for a mesh on another kind of device, or not of all processes."""
    import torch.distributed as dist

    if mesh.device_type != device.type:
        raise UsageError(f"the mesh is on {mesh.device_type}, the model was asked for on {device}")
    if mesh.size() != dist.get_world_size():
        raise UsageError(f"the mesh has {mesh.size()} of {dist.get_world_size()} processes; give it all")


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
    columns, rows = (
        ("att.W_query", "att.W_key", "att.W_value", "ff.layers.0"),
        ("att.out_proj", "ff.layers.2"),
    )
    plan = {**dict.fromkeys(columns, ColwiseParallel()), **dict.fromkeys(rows, RowwiseParallel())}
    for block in blocks:
        parallelize_module(block, mesh, plan, src_data_rank=None)  # nothing is there to send
        block.att.n_heads //= mesh.size()
    model.local_heads = blocks[0].att.n_heads


def _divide_rows(module: nn.Module, mesh: DeviceMesh) -> None:
    """FSDP2: each block is a unit, all the rest one more, so a head and what it is tied to are together."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for block in getattr(module, "trf_blocks", [each for part in reversed(lists) for each in part]):
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)
    if hasattr(module, "hidden"):
        register_fsdp_forward_method(module, "hidden")


# ---- starting ----------------------------------------------------------------------------------------------


@contextmanager
def started(kind: str, device: torch.device, imagined: int = 0) -> Iterator[DeviceMesh]:
    """The mesh of the processes that `torchrun` started. Raises UsageError elsewhere.

    Or that of so many `imagined` ones, seen from the first, which has the largest part of everything.
    """
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if imagined:
        dist.init_process_group("fake", rank=0, world_size=imagined)
    elif "LOCAL_RANK" in os.environ:
        dist.init_process_group()
    else:
        said = "torchrun --nproc-per-node 2 -m gpt2lite … --parallel"
        raise UsageError(f"several processes share a model where torchrun starts them: {said} {kind}")
    try:
        yield init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=(kind,))
    finally:
        dist.destroy_process_group()


def forecast_gathered(module: nn.Module, itemsize: int) -> int:
    """Bytes that FSDP takes beside a rank's part once the module computes: weights of one unit twice, as they
    come and as they are used, beside the outermost unit's, which stay; and `forecast_filled_up`.
    """
    from torch.distributed.fsdp import FSDPModule

    seen, whole = set[Tensor](), []
    for unit in reversed([part for part in module.modules() if isinstance(part, FSDPModule)]):
        own: Any = set(unit.parameters()) - seen
        whole.append(sum(local_of(p).numel() * p.device_mesh.size(0) for p in own) * itemsize)
        seen |= own
    gathered = max(2 * whole[-1], whole[-1] + 2 * max(whole[:-1], default=0)) if whole else 0
    return gathered + forecast_filled_up(module, itemsize)


def forecast_filled_up(module: nn.Module, itemsize: int) -> int:
    """Bytes of the copies that FSDP makes, at the first forward, of parts with fewer rows than the first."""
    if not hasattr(module, "reshard"):
        return 0
    uneven = (p for p in module.parameters() if is_divided(p) and p.shape[0] % mesh_of(p).size(0))  # type: ignore[union-attr]
    return sum(local_of(p).numel() for p in uneven) * itemsize


# ---- what ranks know of each other -------------------------------------------------------------------------
# Everywhere `mesh` is None for a process that is alone.


def mesh_of(thing: object) -> DeviceMesh | None:
    """The mesh that a model was loaded over, or a tensor is divided over; None for other ones."""
    return getattr(thing, "device_mesh", None)


def is_first(mesh: DeviceMesh | None) -> bool:
    """Whether this is the rank that writes and reports."""
    return mesh is None or mesh.get_rank() == 0


def turn_of(mesh: DeviceMesh | None) -> slice:
    """Of things that one rank has to look at for all, those that are this one's."""
    return slice(None) if mesh is None else slice(mesh.get_rank(), None, mesh.size())


def share_of(mesh: DeviceMesh | None) -> tuple[int, int]:
    """Which part of a batch is this rank's, and of how many. Ranks that share layers have the same one."""
    if mesh is None or names_of(mesh) == (TP,):
        return 0, 1
    return mesh.get_local_rank(0), mesh.size(0)


def total(mesh: DeviceMesh | None, value: float) -> float:
    """A number that each rank has of its part of a batch, of all parts; the same on every rank."""
    if mesh is None:
        return value
    ranks_per_part = mesh.size() // share_of(mesh)[1]
    return sum(gathered(mesh, value)) / ranks_per_part


class _Failed(str):
    """What a rank gathers instead of a value: the error that it ends with."""


def gathered(mesh: DeviceMesh | None, value: Made) -> list[Made]:
    """What each rank has, on every rank. Raises GPT2LiteError where another failed on its way here."""
    if mesh is None:
        return [value]
    import torch.distributed as dist

    found: list[Any] = [None] * mesh.size()
    dist.all_gather_object(found, value)
    for rank, each in enumerate(found):
        if isinstance(each, _Failed):
            raise _marked(GPT2LiteError(f"rank {rank}: {each}"))
    return found


def _marked(error: Exception) -> Exception:
    """An error of which all ranks know."""
    vars(error)["is_known"] = True
    return error


@contextmanager
def telling(mesh: DeviceMesh | None) -> Iterator[None]:
    """An error in here is raised on the others where they gather next, before which they must not compute."""
    try:
        yield
    except Exception as error:
        if mesh is not None and not hasattr(error, "is_known"):
            with suppress(GPT2LiteError):  # this one, and what others failed with meanwhile
                gathered(mesh, _Failed(f"{type(_marked(error)).__name__}: {error}"))
        raise


@contextmanager
def together(mesh: DeviceMesh | None) -> Iterator[None]:
    """All ranks leave this together, or with an error: that of one is raised on all, and nobody waits."""
    with telling(mesh):
        yield
        gathered(mesh, None)


def require_same(mesh: DeviceMesh | None, what: str, value: object) -> None:
    """Raise UsageError, on all ranks, where they were not given the same, as `repr` shows it.

    They would compute a mixture, or one would wait for another that has less to do.
    """
    if mesh is None:
        return
    values = gathered(mesh, sha256(repr(value).encode()).digest())
    if odd := [rank for rank, each in enumerate(values) if each != values[0]]:
        said = f"rank {odd[0]} was given other {what} than rank 0"
        raise _marked(UsageError(f"{said}; ranks that share a model must be given the same"))


def computing_over(model: Any) -> DeviceMesh | None:
    """The mesh whose ranks compute a model together; None where each has all of it."""
    return mesh_of(model) if any(map(is_divided, model.parameters())) else None


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Fill tensors with what the first rank has in its own."""
    import torch.distributed as dist

    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.detach().view(-1).view(torch.uint8), 0)


@contextmanager
def shared(mesh: DeviceMesh | None, manage: Callable[[], AbstractContextManager[Made]]) -> Iterator[Made]:
    """What the first rank enters, and leaves when all have left; the others get what it gave them."""
    with ExitStack() as stack:
        with together(mesh):
            own = stack.enter_context(manage()) if is_first(mesh) else None
        given = gathered(mesh, own)[0]
        with together(mesh):
            yield given  # type: ignore[misc]
        with together(mesh):
            stack.close()


# ---- training ----------------------------------------------------------------------------------------------


def rest(model: object) -> None:
    """Give back the whole weights that FSDP's last forward gathered, and left for a backward."""
    if reshard := getattr(model, "reshard", None):
        reshard()


def no_gradients(model: Any) -> Any:
    """`torch.inference_mode()`; where FSDP gathers weights into memory that it keeps, which then could not
    train, `torch.no_grad()`.
    """
    return torch.no_grad() if any(map(is_divided, model.parameters())) else torch.inference_mode()


def clip_gradients(parameters: Iterable[Tensor], most: float) -> float:
    """`clip_grad_norm_` of parameters that may lie on several meshes; returns the norm of all gradients."""
    groups = defaultdict[object, list[Tensor]](list)
    for parameter in parameters:
        if parameter.grad is not None:
            groups[mesh_of(parameter.grad)].append(parameter)
    norms = [whole_of(nn.utils.get_total_norm([p.grad for p in own])) for own in groups.values()]  # type: ignore[misc]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for own in groups.values():
        nn.utils.clip_grads_with_norm_(own, most, norm)
    return float(norm)


# ---- writing -----------------------------------------------------------------------------------------------


def whole_of(tensor: Any) -> Tensor:
    """A tensor gathered from all ranks, which must all ask; itself where it is not divided."""
    return tensor.full_tensor() if is_divided(tensor) else tensor


def _is_writer(tensor: Any, mesh: DeviceMesh) -> bool:
    """Whether this rank writes its part: of equal parts, the first."""
    if not is_divided(tensor):
        return is_first(mesh)
    places = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
    return all(place == 0 for place, placement in places if placement.is_replicate())


def _write_part(file: BinaryIO, tensor: Tensor, at: int, wrote: Wrote) -> None:
    """Write this rank's rows, or its part of each row, of a tensor that begins at a byte of a file."""
    local, box = local_of(tensor).detach(), box_of(tensor)
    local, box = (local, box) if box else (local.reshape(1), [range(1)])
    if not local.numel():
        return
    sizes, itemsize = tuple(tensor.shape[1:]), tensor.dtype.itemsize
    step, width = (math.prod(shape) * itemsize for shape in (sizes, local.shape[1:]))
    begin = at + box[0].start * step + (box[1].start * itemsize if step != width else 0)
    for chunk in chunks_of([local], 0, tensor.dtype):
        run = len(chunk) if width == step else width
        for place in range(0, len(chunk), run):
            file.seek(begin)
            file.write(chunk[place : place + run])
            begin += run if width == step else step
        wrote(len(chunk))


def _fill(
    path: Path, tensors: Mapping[str, Tensor], mesh: DeviceMesh, wrote: Wrote, config: Config | None
) -> None:
    """Write a new safetensors file, every rank its own parts of it, a chunk in memory at a time."""
    entries = [TensorToWrite(name, t.dtype, tuple(t.shape), tuple) for name, t in tensors.items()]
    header = make_header(entries, config)
    with together(mesh):
        if is_first(mesh):
            path.write_bytes(header)
    with together(mesh), open(path, "r+b") as file:
        at = len(header)
        for tensor in tensors.values():
            if _is_writer(tensor, mesh):
                _write_part(file, tensor, at, wrote)
            at += tensor.nbytes
        file.flush()
        os.fsync(file.fileno())


def distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors, each under the first of its names."""
    first = {id(tensor): name for name, tensor in reversed([*tensors.items()])}
    return {name: tensor for name, tensor in tensors.items() if first[id(tensor)] == name}


def save_divided(
    path: Path, tensors: Mapping[str, Tensor], mesh: DeviceMesh, wrote: Wrote, config: Config | None
) -> None:
    """A safetensors file that appears whole or not at all. All ranks must see the same file system."""
    with shared(mesh, partial(replacing, path)) as temporary:
        _fill(temporary, distinct(tensors), mesh, wrote, config)


@contextmanager
def whole(
    tensors: Mapping[str, Tensor], mesh: DeviceMesh | None, beside: Path
) -> Iterator[Mapping[str, Tensor]]:
    """Tensors undivided: themselves, or mapped over a temporary file `beside` to which all ranks write.

    Takes disk, no memory. All ranks must see the same file system.
    """
    if mesh is None or not any(map(is_divided, tensors.values())):
        yield tensors
        return
    with shared(mesh, partial(making, beside.with_name(f"{beside.name}.whole"))) as made:
        path, own = made / "whole.safetensors", distinct(tensors)
        _fill(path, own, mesh, lambda nbytes: None, None)
        mapped = map_tensors(open_safetensors(ByteSource(path)).tensors.values())
        first = {id(tensor): name for name, tensor in own.items()}
        yield {name: mapped[first[id(tensor)]] for name, tensor in tensors.items()}
