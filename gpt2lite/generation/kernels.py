"""A few new tokens on the CPU, at the speed of memory: torch's many calls as loops over the weights.

numba compiles these functions when they are first called and keeps the result beside this file. x is (R, C)
in fp32, one row per new token (T of them) of each of B texts; a weight is fp32, bf16 (its bits, as uint16) or
int8, in (out, in) or, as the official files have it, (in, out) order. It is read in place, and for a single
row once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba import njit, prange, types
from numba.extending import overload
from torch import Tensor

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise RuntimeError("NUMBA_DISABLE_JIT is set")

EPSILON = np.float32(1e-5)
GELU_SLOPE, GELU_CUBE = np.float32(-2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
HALF, ROOT_HALF = np.float32(0.5), np.float32(math.sqrt(0.5))
NONE, GELU_TANH, GELU_EXACT, ADD = range(4)
# numpy's division: 0 / 0 is NaN, where Python's would raise from inside of a pool that cannot carry it
FAST: Any = {"fastmath": True, "cache": True, "error_model": "numpy"}
Array = Any  # np.ndarray of numba's choosing


class Matrix(NamedTuple):
    """A linear layer: y = scale × (W x) + bias; W[o, i] is `flat[o * step + i]`, or `flat[i * step + o]`."""

    flat: Array
    step: int
    transposed: bool
    scale: Array
    bias: Array


Norm = tuple[Array, Array]  # scale, shift
Block = tuple[Norm, Norm, Matrix, Matrix, Matrix, Matrix, Matrix, Matrix]  # as `run_block` unpacks it


def _vector(tensor: Tensor | None, size: int, default: float) -> Array:
    made = torch.full((size,), default, dtype=torch.float32, device="cpu")
    return (made if tensor is None else made.copy_(tensor.detach())).numpy()


def norm_of(layer: Any) -> Norm:
    """A layer norm's scale and shift, in fp32."""
    return _vector(layer.scale, len(layer.scale), 1.0), _vector(layer.shift, len(layer.scale), 0.0)


def matrix_of(linear: Any) -> Matrix:
    """A linear layer, its weight's own memory as one row of numbers."""
    weight = linear.weight.detach()
    transposed = weight.stride(1) != 1
    n_outer, n_inner = (weight.T if transposed else weight).shape
    step, size = weight.stride(1 if transposed else 0), len(weight)
    flat = weight.as_strided(((n_outer - 1) * step + n_inner,), (1,))
    flat = flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat
    scale = _vector(getattr(linear, "scale", None), size, 1.0)
    return Matrix(flat.numpy(), step, transposed, scale, _vector(linear.bias, size, 0.0))


@contextmanager
def threads_of_torch() -> Iterator[int]:
    """Run in as many threads as torch has, where numba has so many; yields how many.

    Afterwards both have as many as before: OpenMP keeps one number for the two, which numba's pool sets.
    """
    count = torch.get_num_threads()
    with ExitStack() as afterwards:
        afterwards.callback(torch.set_num_threads, count)
        afterwards.callback(numba.set_num_threads, numba.get_num_threads())
        parts = min(count, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        numba.set_num_threads(parts)
        yield parts


def _number(stored: Any) -> Any:
    """A stored weight, key or value as fp32."""


@overload(_number, inline="always")
def _number_of(stored):  # type: ignore[no-untyped-def]  # numba compares the signatures
    if stored == types.uint16:  # the upper half of a float's bits
        return lambda stored: np.uint32(np.uint32(stored) << np.uint32(16)).view(np.float32)
    return lambda stored: np.float32(stored)


def _store(number: Any, into: Array, d: int) -> None:
    """An fp32 number into the cache, in its dtype."""


@overload(_store, inline="always")
def _store_of(number, into, d):  # type: ignore[no-untyped-def]
    def nearest(number, into, d):  # type: ignore[no-untyped-def]
        bits = np.float32(number).view(np.uint32)
        ties_to_even = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        into[d] = np.uint16((bits + ties_to_even) >> np.uint32(16))

    def same(number, into, d):  # type: ignore[no-untyped-def]
        into[d] = number

    return nearest if into.dtype == types.uint16 else same


@njit(**FAST)
def _rows(flat: Array, step: int, x: Array, y: Array, start: int, stop: int) -> None:
    """y[:, start:stop] of a weight that is stored row by row: dot products, of four rows of x with two."""
    n_rows, n = x.shape
    fours, even = n_rows // 4 * 4, start + (stop - start) // 2 * 2
    for o in range(start, even, 2):
        w, v = flat[o * step : o * step + n], flat[(o + 1) * step : (o + 1) * step + n]
        for r in range(0, fours, 4):
            x0, x1, x2, x3 = x[r], x[r + 1], x[r + 2], x[r + 3]
            w0 = w1 = w2 = w3 = v0 = v1 = v2 = v3 = np.float32(0)
            for i in range(n):
                a, b = _number(w[i]), _number(v[i])
                w0, w1, w2, w3 = w0 + a * x0[i], w1 + a * x1[i], w2 + a * x2[i], w3 + a * x3[i]
                v0, v1, v2, v3 = v0 + b * x0[i], v1 + b * x1[i], v2 + b * x2[i], v3 + b * x3[i]
            y[r, o], y[r + 1, o], y[r + 2, o], y[r + 3, o] = w0, w1, w2, w3
            y[r, o + 1], y[r + 1, o + 1], y[r + 2, o + 1], y[r + 3, o + 1] = v0, v1, v2, v3
    for o in range(start, stop):
        row = flat[o * step : o * step + n]
        for r in range(fours if o < even else 0, n_rows):
            vector, total = x[r], np.float32(0)
            for i in range(n):
                total += _number(row[i]) * vector[i]
            y[r, o] = total


@njit(**FAST)
def _columns(flat: Array, step: int, x: Array, y: Array, start: int, stop: int) -> None:
    """y[:, start:stop] of a weight that is stored column by column: sums of columns, eight at a time."""
    batch, n_in = x.shape
    n = stop - start
    y[:, start:stop] = 0
    whole = n_in // 8 * 8
    for i in range(0, whole, 8):
        at = i * step + start
        w0, w1 = flat[at : at + n], flat[at + step : at + step + n]
        w2, w3 = flat[at + 2 * step : at + 2 * step + n], flat[at + 3 * step : at + 3 * step + n]
        w4, w5 = flat[at + 4 * step : at + 4 * step + n], flat[at + 5 * step : at + 5 * step + n]
        w6, w7 = flat[at + 6 * step : at + 6 * step + n], flat[at + 7 * step : at + 7 * step + n]
        for b in range(batch):
            x0, x1, x2, x3 = x[b, i], x[b, i + 1], x[b, i + 2], x[b, i + 3]
            x4, x5, x6, x7 = x[b, i + 4], x[b, i + 5], x[b, i + 6], x[b, i + 7]
            total = y[b, start:stop]
            for o in range(n):
                first = x0 * _number(w0[o]) + x1 * _number(w1[o]) + x2 * _number(w2[o]) + x3 * _number(w3[o])
                second = x4 * _number(w4[o]) + x5 * _number(w5[o]) + x6 * _number(w6[o]) + x7 * _number(w7[o])
                total[o] += first + second
    for i in range(whole, n_in):
        column = flat[i * step + start : i * step + stop]
        for b in range(batch):
            total = y[b, start:stop]
            for o in range(n):
                total[o] += x[b, i] * _number(column[o])


@njit(parallel=True, **FAST)
def _linear(matrix: Matrix, x: Array, y: Array, activation: int, parts: int) -> None:
    """y (B, out) = activation(W x + bias), or for ADD what y was and W x + bias."""
    flat, step, transposed, scale, bias = matrix
    batch, n_out = y.shape
    products = np.empty_like(y) if activation == ADD else y
    for part in prange(parts):
        start, stop = n_out * part // parts, n_out * (part + 1) // parts
        if transposed:
            _columns(flat, step, x, products, start, stop)
        else:
            _rows(flat, step, x, products, start, stop)
        for b in range(batch):
            for o in range(start, stop):
                v = products[b, o] * scale[o] + bias[o]
                if activation == GELU_TANH:
                    v = v / (np.float32(1) + math.exp(GELU_SLOPE * (v + GELU_CUBE * v * v * v)))
                elif activation == GELU_EXACT:
                    v = HALF * v * (np.float32(1) + math.erf(v * ROOT_HALF))
                y[b, o] = y[b, o] + v if activation == ADD else v


@njit(**FAST)
def _norm(x: Array, norm: Norm, y: Array) -> None:
    """Layer normalisation of each row."""
    scale, shift = norm
    size = np.float32(scale.size)
    for b in range(len(x)):
        centred = x[b] - x[b].sum() / size
        y[b] = centred / math.sqrt((centred * centred).sum() / size + EPSILON) * scale + shift


@njit(**FAST)
def _attend(query: Array, keys: Array, values: Array, scores: Array, y: Array) -> None:
    """One head of one token: softmax(query keys / √D) values, into y (D,); 0 where there are no keys."""
    n, width = keys.shape
    factor = np.float32(1) / math.sqrt(np.float32(width))
    for s in range(n):
        key, total = keys[s], np.float32(0)
        for d in range(width):
            total += query[d] * _number(key[d])
        scores[s] = total * factor
    if n:
        scores[:] = np.exp(scores - scores.max())
    whole = scores.sum()
    y[:] = 0
    for s in range(n):
        share, value = scores[s] / whole, values[s]
        for d in range(width):
            y[d] += share * _number(value[d])


@njit(parallel=True, **FAST)
def _attention(
    query: Array, key: Array, value: Array, cache: Array, length: int, pads: Array, y: Array, parts: int
) -> None:
    """All heads of all rows, after their new keys and values are put into the cache."""
    batch, n_heads, capacity, width = cache.shape[1:]
    T = len(y) // batch
    scores = np.empty((parts, capacity), np.float32)
    for part in prange(parts):
        for item in range(batch * n_heads * part // parts, batch * n_heads * (part + 1) // parts):
            b, h = item // n_heads, item % n_heads
            head = slice(h * width, (h + 1) * width)
            for t in range(T):
                own_key, own_value = key[b * T + t, head], value[b * T + t, head]
                into_keys, into_values = cache[0, b, h, length + t], cache[1, b, h, length + t]
                for d in range(width):
                    _store(own_key[d], into_keys, d)
                    _store(own_value[d], into_values, d)
            for t in range(T):
                row, seen = b * T + t, slice(pads[b], max(length + t + 1, pads[b]))
                own = scores[part, : seen.stop - seen.start]
                _attend(query[row, head], cache[0, b, h, seen], cache[1, b, h, seen], own, y[row, head])


@njit(**FAST)
def run_block(
    block: Block, x: Array, cache: Array, length: int, pads: Array, activation: int, parts: int
) -> None:
    """x (B × T, C) through one block, in place; its keys and values follow the first `length` of `cache`.

    cache is (2, B, H, capacity, D), in fp32 or bf16's bits; text b sees what stands from `pads[b]` on.
    """
    norm1, norm2, W_query, W_key, W_value, out_proj, expand, contract = block
    normed, query, key, value = np.empty_like(x), np.empty_like(x), np.empty_like(x), np.empty_like(x)
    wide = np.empty((len(x), expand.bias.size), np.float32)
    _norm(x, norm1, normed)
    _linear(W_query, normed, query, NONE, parts)
    _linear(W_key, normed, key, NONE, parts)
    _linear(W_value, normed, value, NONE, parts)
    _attention(query, key, value, cache, length, pads, normed, parts)
    _linear(out_proj, normed, x, ADD, parts)
    _norm(x, norm2, normed)
    _linear(expand, normed, wide, activation, parts)
    _linear(contract, wide, x, ADD, parts)


@njit(**FAST)
def run_head(norm: Norm, head: Matrix, x: Array, logits: Array, parts: int) -> None:
    """x (B, C) → logits (B, V), through the last norm."""
    normed = np.empty_like(x)
    _norm(x, norm, normed)
    _linear(head, normed, logits, NONE, parts)
