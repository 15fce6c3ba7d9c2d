"""The ways to load: the article's five recipes and `stream`, one function each, in one dict.

Every function takes a `LoadPlan` and returns the filled module. Order and place of every allocation in the
five are the article's, so that comparing them is honest; the holes are mended (buffers filled, ties kept).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from gpt2lite.checkpoint.reading import map_tensors, read_tensors
from gpt2lite.errors import UsageError
from gpt2lite.loading.plan import LoadPlan, Target
from gpt2lite.loading.skeleton import replace_tensor, saved_tensors
from gpt2lite.loading.stream import fill, make_source

CPU = torch.device("cpu")
SMALL_BLOCK = 1 << 20  # what torch's CUDA allocator serves from segments of their own


@torch.no_grad()
def _built_for_real(plan: LoadPlan) -> nn.Module:
    """`build().to(device)`: the whole model with its initial values, on the host first."""
    module = plan.build()
    tensors = saved_tensors(module)
    for target in plan.targets:
        tensor = tensors[target.names[0]]
        tensor.data = tensor.data.to(plan.device, target.dtype)
    for _, tensor in (*module.named_parameters(), *module.named_buffers()):
        tensor.data = tensor.data.to(plan.device)
    return module


def _allocated(plan: LoadPlan) -> nn.Module:
    """The skeleton with memory on the device, one by one, tied ones once: `to_empty` without its holes."""
    for target in plan.targets:
        memory = torch.empty(target.shape, dtype=target.dtype, device=plan.device)
        replace_tensor(plan.skeleton, target.names, memory)
    return plan.skeleton


def _reserve_one_segment(plan: LoadPlan) -> None:
    """Let CUDA's caching allocator fetch the model's memory at once and keep it, for `_allocated` to split.

    Fetched tensor by tensor, each large one would be rounded up by as much as 1 MiB (135 MiB on gpt2-xl).
    """
    if plan.device.type != "cuda":
        return
    rounded = (-(-target.nbytes // 512) * 512 for target in plan.targets)
    try:
        torch.empty(sum(n for n in rounded if n > SMALL_BLOCK), dtype=torch.uint8, device=plan.device)
    except torch.OutOfMemoryError:  # no such piece is free; tensor by tensor it may still fit
        return


@torch.no_grad()
def _copy_all(plan: LoadPlan, module: nn.Module, value_of: Callable[[Target], Tensor]) -> nn.Module:
    """`parameter.copy_(value)` for each, as `load_state_dict` does."""
    tensors, done = saved_tensors(module), 0
    for target in plan.targets:
        tensors[target.names[0]].copy_(target.placement.of(value_of(target)))
        done += target.nbytes
        plan.progress(done, plan.model_bytes)
    return module


def _from(state: Mapping[str, Tensor]) -> Callable[[Target], Tensor]:
    return lambda target: state[target.span.name]


def baseline(plan: LoadPlan) -> nn.Module:
    """Build, move, `load_state_dict(torch.load(path, map_location=device))`: what everybody writes.

    Device: the model and the whole file, at once. Host: the model with its initial values.
    """
    module = _built_for_real(plan)
    return _copy_all(plan, module, _from(read_tensors(plan.manifest, plan.spans, plan.device)))


def sequential(plan: LoadPlan) -> nn.Module:
    """Build, move, load the file to the host, copy parameter by parameter.

    Device: the model and its largest tensor. Host: the model, then the whole file.
    """
    module = _built_for_real(plan)
    state = read_tensors(plan.manifest, plan.spans, CPU)
    return _copy_all(plan, module, lambda target: state[target.span.name].to(plan.device))


def meta(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, load the file onto the device, copy.

    Device: the model and the whole file, at once, as in the article; `stream` needs the model once. Host: one
    tensor at a time, unless the host is the device.
    """
    module = _allocated(plan)
    return _copy_all(plan, module, _from(read_tensors(plan.manifest, plan.spans, plan.device)))


@torch.no_grad()
def mmap(plan: LoadPlan) -> nn.Module:
    """Build on meta, map the file, assign: `load_state_dict(torch.load(path, mmap=True), assign=True)`.

    On CPU nothing is read before it is used, and all of it can be reclaimed. **While the model lives, do not
    overwrite the file in place** (`torch.save` to the same path does): that kills the process. Elsewhere
    each tensor is copied over once; device: the model, plus its largest tensor where that is cast or
    transposed.
    """
    by_span = defaultdict(list)
    for target in plan.targets:
        by_span[target.span.name].append(target)
    mapped, done = map_tensors(plan.spans.values()), 0
    for name, span in plan.spans.items():
        _assign(plan, mapped.pop(name).to(plan.device), by_span[name])
        done += span.nbytes
        plan.progress(done, sum(span.nbytes for span in plan.spans.values()))
    return plan.skeleton


def _assign(plan: LoadPlan, stored: Tensor, targets: list[Target]) -> None:
    """Put views of one stored tensor in the place of parameters; on CPU zero-copy where nothing is cast."""
    for i, target in enumerate(targets):
        view = target.placement.of(stored)
        is_zero_copy = plan.device == CPU and target.dtype == stored.dtype
        value = view if is_zero_copy else view.to(target.dtype).contiguous()
        untied = i > 0 and target.placement.parts == 1  # the file ties what the module does not
        replace_tensor(plan.skeleton, target.names, value.clone() if untied else value)


def per_tensor(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, load and copy one file a tensor.

    Device: the model and its largest tensor. Host: the largest tensor. Needs a folder that
    `gpt2lite.save_per_tensor` wrote; raises UsageError for a single file.
    """
    if plan.manifest.format != "tensor_folder":
        raise UsageError(
            f'{plan.manifest.path} is one file, strategy="per_tensor" reads a folder with a file a tensor. '
            'Make one with gpt2lite.save_per_tensor(path, folder), or take strategy="stream", which needs no '
            "other file."
        )

    def load_one(target: Target) -> Tensor:
        return read_tensors(plan.manifest, [target.span.name], CPU)[target.span.name].to(plan.device)

    return _copy_all(plan, _allocated(plan), load_one)


def stream(plan: LoadPlan) -> nn.Module:
    """Build on meta, allocate on the device, read byte ranges of the ordinary file through a small ring.

    Device: the model once, plus a quarter of the ring. Host: the ring (64 MiB), or less; on a CPU target the
    parameters' own memory is what is read into.
    """
    _reserve_one_segment(plan)
    module = _allocated(plan)
    tensors, filled = saved_tensors(module), defaultdict(list)
    for target in plan.targets:
        filled[target.span.name].append((target, tensors[target.names[0]]))
    sources = [make_source(span, filled[name]) for name, span in plan.spans.items()]
    fill(sources, plan.device, plan.ring_bytes, plan.progress)
    return module


STRATEGIES: dict[str, Callable[[LoadPlan], nn.Module]] = {
    "baseline": baseline,
    "sequential": sequential,
    "meta": meta,
    "mmap": mmap,
    "per_tensor": per_tensor,
    "stream": stream,
}
AUTO = "stream"
