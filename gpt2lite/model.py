"""GPT-2 with the book's parameter names, top to bottom in the order it runs.

B = batch, T = tokens, C = emb_dim, H = heads, D = head_dim, V = vocab_size, S = cached + new tokens.
Architecture: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt2lite.checkpoint.safetensors import fill_safetensors
from gpt2lite.checkpoint.torch_zip import fill_torch_zip
from gpt2lite.checkpoint.writing import counting, require_space, stored_bytes, tensors_of, write_whole
from gpt2lite.config import ACTIVATIONS, EMBEDDED, GPTConfig, Purpose
from gpt2lite.devices import emulates
from gpt2lite.errors import UsageError
from gpt2lite.generation import KVCache, classify, generate, generate_tokens
from gpt2lite.loading.forecast import Forecast
from gpt2lite.loading.options import OpenOptions, Options, Progress, check_names, split
from gpt2lite.loading.skeleton import state_of
from gpt2lite.opening import Device, Opened, Source, locate, open_as, open_to_plan
from gpt2lite.parallel import is_divided, is_first, require_same, save_divided, together, whole
from gpt2lite.quantization import Int8Linear, multiply
from gpt2lite.tokenizer import Beside

if TYPE_CHECKING:
    from typing_extensions import Unpack

FEWEST_TO_WIDEN = 32  # rows for which it is faster to widen a weight than to let the CPU emulate its dtype
SAVERS = {".pth": (fill_torch_zip, True), ".safetensors": (fill_safetensors, False)}  # whether it can tie


def _is_recorded() -> bool:
    """Whether a model is traced or exported, for lengths and processors that are not known yet."""
    return torch.jit.is_tracing() or torch.compiler.is_exporting()  # type: ignore[attr-defined]


class Linear(nn.Linear):
    """nn.Linear that leaves its initial values to `GPTModel`: no initialiser runs twice, and none on meta."""

    def reset_parameters(self) -> None:
        """Do nothing."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) → (..., out); many rows in a dtype that the CPU emulates are multiplied in fp32."""
        is_plain = x.dtype != self.weight.dtype or not emulates(x.device, x.dtype) or is_divided(self.weight)
        is_plain = is_plain or torch.is_grad_enabled() or _is_recorded()
        if is_plain or x.numel() < FEWEST_TO_WIDEN * self.in_features:
            return super().forward(x)
        y = multiply(x, self.weight)
        return (y if self.bias is None else y.add_(self.bias)).to(x.dtype)


class Embedding(nn.Embedding):
    """nn.Embedding that leaves its initial values to `GPTModel`."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with the book's names: scale and shift."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(config.emb_dim))
        self.shift = nn.Parameter(torch.empty(config.emb_dim)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) → (..., C)."""
        own = self.scale, self.shift
        # x is wider where a caller's autocast adds two kinds of 16 bits
        is_wider = x.dtype.itemsize > self.scale.dtype.itemsize
        scale, shift = (p.to(x.dtype) if is_wider and p is not None else p for p in own)
        return F.layer_norm(x, self.scale.shape, scale, shift, 1e-5)


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        C, bias = config.emb_dim, config.qkv_bias
        self.layer, self.n_heads, self.drop_rate = layer, config.n_heads, config.drop_rate
        self.W_query, self.W_key, self.W_value = (Linear(C, C, bias=bias) for _ in range(3))
        self.out_proj = Linear(C, C, bias=config.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) → (B, T, C); with a cache, the T tokens follow those that it holds.

        `mask`, (T, S) or (B, 1, T, S), says which tokens each may see; None: itself and all before it.
        """
        B, T, _ = x.shape
        projected = (W(x).view(B, T, self.n_heads, -1) for W in (self.W_query, self.W_key, self.W_value))
        q, k, v = (each.transpose(1, 2) for each in projected)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        drop = self.drop_rate if self.training else 0.0
        # is_causal aligns to the first key: it is right where nothing precedes the T tokens. Without a cache
        # it does not depend on T, so that a traced or exported model takes any length.
        is_causal = mask is None and (cache is None or T > 1)
        y = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal=is_causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers around a GELU (in GPT-2 its tanh approximation)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        C = config.emb_dim
        self.layers = nn.Sequential(
            Linear(C, 4 * C, bias=config.bias),
            nn.GELU(approximate=ACTIVATIONS[config.activation]),
            Linear(4 * C, C, bias=config.bias),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        return self.layers(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and beside a shortcut."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.att = CausalSelfAttention(config, layer)
        self.ff = FeedForward(config)
        self.norm1, self.norm2 = LayerNorm(config), LayerNorm(config)
        self.drop_resid = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None) -> Tensor:
        """(B, T, C) → (B, T, C)."""
        x = x + self.drop_resid(self.att(self.norm1(x), cache, mask))
        return x + self.drop_resid(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """GPT-2 as the book names it: `GPTModel(cfg)` with the article's dict or a `GPTConfig`.

    Allocates 4 bytes per parameter (5.80 GiB for the tied gpt2-xl) and draws GPT-2's initial values; under
    `torch.device("meta")` it allocates and draws nothing and takes milliseconds.
    """

    generate = generate
    generate_tokens = generate_tokens
    classify = classify
    device_mesh: Any = None  # over which ranks the model was loaded
    purpose = Purpose()  # what it was trained for
    beside: Beside | None = None  # the tokenizer of the checkpoint that it was loaded from

    def __init__(self, config: GPTConfig | Mapping[str, Any]) -> None:
        super().__init__()
        self.config = config = GPTConfig.of(config)
        self.tok_emb = Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*[TransformerBlock(config, i) for i in range(config.n_layers)])
        self.final_norm = LayerNorm(config)
        self.out_head = Linear(config.emb_dim, config.n_classes or config.vocab_size, bias=config.head_bias)
        if config.tied_head:
            self.out_head.weight = self.tok_emb.weight
        if not self.tok_emb.weight.is_meta:
            self.initialise()

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled: a module's own, without what is said of the checkpoint on this machine."""
        return {name: value for name, value in vars(self).items() if name not in ("purpose", "beside")}

    def __deepcopy__(self, memo: dict[int, Any]) -> GPTModel:
        memo[id(self)] = copied = type(self).__new__(type(self))
        vars(copied).update(deepcopy(vars(self), memo))
        return copied

    @classmethod
    def from_checkpoint(
        cls, path: Source, device: Device = "cpu", strategy: str = "auto", **options: Unpack[Options]
    ) -> GPTModel:
        """A GPT-2 from any checkpoint that `gpt2lite.dialects` knows, in eval mode.

        `path` may be an address, `hf://owner/name@revision/file` or `https://…`: read there, by ranges.
        The config is found; `config` may say what the file does not, such as {"n_heads": 12}, and must agree
        with what it does. `strategy` is one of `gpt2lite.STRATEGIES`, each of which says there what it costs
        on host and device, or auto: the fastest whose forecast fits into the memory that this process has,
        copying (stream, with a ring as small as is needed) before mapping (mmap, on the CPU a model that
        stands on the file). The other keywords are those of `gpt2lite.LoadOptions` and `lora_alpha`, what the
        book's LoRA layers were made with, which no file says.

        Raises CheckpointError for a file that is damaged, contradicts itself or the caller, or does not fit
        the model, InsufficientMemoryError, before anything is allocated, where no strategy or the one named
        does not fit in memory, UsageError for a wrong argument.
        """
        check_names(options, Options)
        opening, loading = split(options)
        with together(loading.get("mesh")):
            opened = open_as(cls, path, opening)
        return opened.load(device, strategy, **loading)

    @classmethod
    def from_pretrained(
        cls, name: Source, device: Device = "cpu", strategy: str = "auto", **options: Unpack[Options]
    ) -> GPTModel:
        """A GPT-2 by its name on the Hub: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or "owner/name".

        A path that is there wins over a name. Fetches config and weights into the client's cache once
        (`gpt2lite.hub.fetch` says what `revision`, `token`, `cache_dir` and `local_files_only` mean), which
        takes disk, no memory; with cache=False they are read where they lie, and nothing is written. The rest
        is `from_checkpoint`, with its arguments, costs and errors.

        Raises CheckpointNotFoundError where nothing has this name, CheckpointError also where the Hub
        cannot be reached and the cache does not have it.
        """
        check_names(options, Options)
        return cls.from_checkpoint(locate(name, options), device, strategy, **options)

    def save_checkpoint(
        self, path: Source, *, labels: Sequence[str] = (), progress: Progress | None = None
    ) -> Path:
        """Write the weights and the config to one `.pth` or `.safetensors`, and its tokenizer beside it.

        `from_checkpoint` of it needs nothing said; other programs pass over the config, with which goes what
        the model was trained for; `labels` are a classifier's, if it does not have them. The file is replaced
        whole or not at all, so a model that stands on `model.pth` (strategy="mmap") can be saved over it. A
        tied head stays tied: in a `.pth` one storage, in safetensors no second copy. Holds two chunks of 8
        MiB on the host. Ranks of one mesh write one file together; a `.pth` takes its size on disk again
        for a moment. Raises UsageError for another suffix, a folder that is not there, weights on meta, or
        labels that do not name each row of the head once, DiskFullError for a full disk.
        """
        path, mesh, progress = Path(path), self.device_mesh, progress or (lambda done, total: None)
        purpose = replace(self.purpose, labels=labels) if labels else self.purpose  # type: ignore[arg-type]
        with together(mesh):
            config, state = self.config.as_dict(purpose), state_of(self)
            alphas = {part.alpha for part in self.modules() if hasattr(part, "alpha")}  # of LoRA layers
            if len(alphas) > 1:
                raise UsageError(f"{path}: LoRA layers of several alphas; call gpt2lite.merge_lora first")
            config |= {"lora_alpha": alphas.pop()} if alphas else {}
            if any(isinstance(part, Int8Linear) for part in self.modules()):
                raise UsageError(
                    f"{path}: cannot save an int8 model; quantize the checkpoint when loading it"
                )
            if path.suffix not in SAVERS:
                raise UsageError(f"{path}: the name must end in {' or '.join(SAVERS)}")
            fill, ties = SAVERS[path.suffix]
            tensors = [tensor for tensor in tensors_of(state) if ties or not tensor.shares]
            require_space(path, stored_bytes(tensors))
            require_same(mesh, "paths", f"{path}")
        if not ties and any(map(is_divided, state.values())):
            save_divided(path, state, mesh, counting(progress, tensors), config)
        else:
            with whole(state, mesh, path) as undivided, together(mesh):
                tensors = [tensor for tensor in tensors_of(undivided) if ties or not tensor.shares]
                if is_first(mesh):
                    write_whole(fill, path, tensors, progress, config)
        with together(mesh):
            if self.beside and is_first(mesh):
                self.beside.save(path)
        return path

    @torch.no_grad()
    def initialise(self) -> None:
        """Draw GPT-2's initial values: normal(0, 0.02), the shortcuts' last layers / sqrt(2 × n_layers)."""
        shortcut_std = 0.02 / math.sqrt(2 * self.config.n_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(name.endswith(".scale"))
            else:
                is_last = name.endswith(("out_proj.weight", "ff.layers.2.weight"))
                parameter.normal_(0.0, shortcut_std if is_last else 0.02)

    def hidden(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) → what the head reads, (B, T, C); a cache is extended by T tokens."""
        T, seen = ids.shape[1], cache.length if cache else 0
        if not _is_recorded() and seen + T > self.config.context_length:
            raise UsageError(f"{seen + T} tokens do not fit the context of {self.config.context_length}")
        positions = self.pos_emb(cache.positions(T) if cache else torch.arange(T, device=ids.device))
        mask = cache.mask(T) if cache else None
        x = self.drop_emb(self.tok_emb(ids).to(positions.dtype) + positions)  # int8 embeddings give fp32
        for block in self.trf_blocks:
            x = block(x, cache, mask)
        if cache:
            cache.advance(T)
        return self.final_norm(x)

    def forward(self, ids: Tensor, cache: KVCache | None = None) -> Tensor:
        """Token ids (B, T) → logits (B, T, V), of a classifier (B, T, n_classes)."""
        return self.out_head(self.hidden(ids, cache))


def open_model(source: Source, **options: Unpack[OpenOptions]) -> Opened[GPTModel]:
    """Open a checkpoint by its path or address, or a model by its Hub name, and look before loading it.

    `open_model("model.pth").config`, `.forecast("cuda")`, `.load("cuda")`; `options` are those of
    `gpt2lite.OpenOptions`. Reads headers; raises as `GPTModel.from_pretrained`, but for memory.
    """
    return open_as(GPTModel, locate(source, options), options)


def embedded(device: Device = "cpu") -> GPTModel:
    """The small model that ships with the package, in fp32: 4 MB, and it writes stories for children."""
    return GPTModel.from_checkpoint(EMBEDDED, device, dtype=torch.float32)


def forecast(path: Source, device: Device = "cpu", **options: Unpack[Options]) -> dict[str, Forecast]:
    """What each strategy would add to host and device memory: `open_model(path).forecast(device)`.

    The name of an official size needs no file and no network: what is neither a path nor in the Hub's cache
    is taken to be as its file on the Hub is, float32 and its head tied.
    """
    check_names(options, Options)
    opening, loading = split(options)
    return open_to_plan(GPTModel, path, opening).forecast(device, **loading)
