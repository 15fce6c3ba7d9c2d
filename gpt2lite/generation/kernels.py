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
from functools import partial, reduce
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import binding as llvm
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor

if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
    raise RuntimeError("NUMBA_DISABLE_JIT is set")

EPSILON = np.float32(1e-5)
GELU_SLOPE, GELU_CUBE = np.float32(-2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
HALF, ROOT_HALF = np.float32(0.5), np.float32(math.sqrt(0.5))
LOG2_E, LN_2, LN_2_REST = np.float32(math.log2(math.e)), np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_FACTORS = tuple(np.float32(1 / math.factorial(n)) for n in (7, 6, 5, 4, 3, 2))  # of Taylor's series
NONE, GELU_TANH, GELU_EXACT, ADD = range(4)
# numpy's division: 0 / 0 is NaN, where Python's would raise from inside of a pool that cannot carry it
FAST: Any = {"fastmath": True, "cache": True, "error_model": "numpy"}
Array = Any  # np.ndarray of numba's choosing
FEATURES = numba.config.CPU_FEATURES or llvm.get_host_cpu_features().flatten()  # type: ignore[attr-defined]
LANES = 16 if "+avx512f" in FEATURES else 8  # numbers in a register
FLOATS, INTS = ir.VectorType(ir.FloatType(), LANES), ir.VectorType(ir.IntType(32), LANES)
INT, BYTES = ir.IntType(32), ir.IntType(8).as_pointer()
WHOLE, BLOCK, AHEAD, QUERIES = 4 * LANES, 32, 4096, 16
_integer = partial(ir.Constant, ir.IntType(64))


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


# ---- dot products in registers -----------------------------------------------------------------------------


def _widened(builder: Any, address: Any, stored: Any) -> Any:
    """LANES stored numbers as fp32."""
    size = stored.bitwidth // 8
    kind = ir.FloatType() if stored == types.float32 else ir.IntType(stored.bitwidth)
    numbers = builder.load(builder.bitcast(address, ir.VectorType(kind, LANES).as_pointer()), align=size)
    if stored == types.float32:
        return numbers
    if stored == types.int8:
        return builder.sitofp(builder.sext(numbers, INTS), FLOATS)
    upper = builder.shl(builder.zext(numbers, INTS), ir.Constant(INTS, [16] * LANES))
    return builder.bitcast(upper, FLOATS)


def _tile(outs: int, rows: int, unrolled: int) -> Any:
    """What multiplies so many rows of a weight with so many of x, all of their sums in registers.

    Of (flat, at, step, x, row, n, y, out): y[row + r, out + o] is the product of `flat[at + o * step :]` and
    `x[row + r]` over n numbers, a multiple of `unrolled` × LANES. What LLVM makes of Python's loops uses half
    of a wide register, and waits for memory; this one asks for each row AHEAD bytes before it is read.
    """

    @intrinsic
    def products(typing, flat, at, step, x, row, n, y, out):  # type: ignore[no-untyped-def]
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            kinds, (_, at, step, _, row, n, _, out) = signature.args, args
            arrays = {k: context.make_array(kinds[k])(context, builder, args[k]) for k in (0, 3, 6)}
            weight, given, made = (builder.bitcast(array.data, BYTES) for array in arrays.values())
            given_step, made_step = (builder.extract_value(arrays[k].strides, 0) for k in (3, 6))
            size = _integer(kinds[0].dtype.bitwidth // 8)
            called = partial(cgutils.get_or_insert_function, builder.module)

            def moved(address: Any, count: Any, nbytes: Any) -> Any:
                return builder.gep(address, [builder.mul(count, nbytes)])

            def next_rows(address: Any, first: Any, count: int, nbytes: Any) -> list[Any]:
                return [moved(address, builder.add(first, _integer(k)), nbytes) for k in range(count)]

            weights = next_rows(moved(weight, at, size), _integer(0), outs, builder.mul(step, size))
            inputs = next_rows(given, row, rows, given_step)
            cells = [(o, r, u) for o in range(outs) for r in range(rows) for u in range(unrolled)]
            sums = {cell: cgutils.alloca_once(builder, FLOATS) for cell in cells}
            for cell in cells:
                builder.store(ir.Constant(FLOATS, None), sums[cell])
            multiply_add = called(ir.FunctionType(FLOATS, [FLOATS] * 3), f"llvm.fma.v{LANES}f32")
            prefetch = called(ir.FunctionType(ir.VoidType(), [BYTES, INT, INT, INT]), "llvm.prefetch.p0")
            stride = unrolled * LANES
            with cgutils.for_range_slice(builder, _integer(0), n, _integer(stride), _integer(0).type) as (
                i,
                _,
            ):
                for address in weights:
                    for line in range(0, stride * kinds[0].dtype.bitwidth // 8, 64):
                        early = moved(moved(address, i, size), _integer(AHEAD + line), _integer(1))
                        builder.call(prefetch, [early, *(ir.Constant(INT, flag) for flag in (0, 3, 1))])
                for u in range(unrolled):
                    at_u = builder.add(i, _integer(u * LANES))
                    wide = [
                        _widened(builder, moved(address, at_u, size), kinds[0].dtype) for address in weights
                    ]
                    for r, address in enumerate(inputs):
                        vector = _widened(builder, moved(address, at_u, _integer(4)), types.float32)
                        for o in range(outs):
                            total = builder.load(sums[o, r, u])
                            builder.store(builder.call(multiply_add, [wide[o], vector, total]), sums[o, r, u])
            add_up = ir.FunctionType(ir.FloatType(), [ir.FloatType(), FLOATS])
            add_up = called(add_up, f"llvm.vector.reduce.fadd.v{LANES}f32")
            for r, address in enumerate(next_rows(made, row, rows, made_step)):
                for o, into in enumerate(next_rows(address, out, outs, _integer(4))):
                    whole = reduce(builder.fadd, [builder.load(sums[o, r, u]) for u in range(unrolled)])
                    zero = ir.Constant(ir.FloatType(), 0.0)
                    whole = builder.call(add_up, [zero, whole], fastmath=("fast",))
                    builder.store(whole, builder.bitcast(into, ir.FloatType().as_pointer()))
            return context.get_dummy_value()

        integers = types.int64, types.int64
        return types.none(flat, *integers, x, *integers, y, types.int64), generate

    return products


_one, _sixteen = _tile(1, 1, 4), _tile(4, 4, 1)


@njit(**FAST)
def _rows(flat: Array, step: int, x: Array, y: Array, start: int, stop: int) -> None:
    """y[:, start:stop] of a weight that is stored row by row, BLOCK of its rows at a time: they stay cached."""
    n_rows, n = x.shape
    fours, whole = n_rows // 4 * 4, n // WHOLE * WHOLE
    for first in range(start, stop, BLOCK):
        last = min(first + BLOCK, stop)
        even = first + (last - first) // 4 * 4
        for r in range(0, fours, 4):
            for o in range(first, even, 4):
                _sixteen(flat, o * step, step, x, r, whole, y, o)
        for r in range(n_rows):
            for o in range(even if r < fours else first, last):
                _one(flat, o * step, step, x, r, whole, y, o)
    for r in range(n_rows if whole < n else 0):
        for o in range(start, stop):
            for i in range(whole, n):
                y[r, o] += _number(flat[o * step + i]) * x[r, i]


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


@njit(fastmath={"contract"}, cache=True, error_model="numpy")
def _exp(x: float) -> float:
    """e^x within 2e-7 of its size, where the compiler's own is called for each number: 2^k × a polynomial."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    k = math.floor(x * LOG2_E + HALF)
    r = x - k * LN_2 - k * LN_2_REST
    tail = np.float32(0)
    for factor in EXP_FACTORS:
        tail = tail * r + factor
    power = np.uint32((np.int32(k) + np.int32(127)) << np.int32(23)).view(np.float32)
    return (tail * r * r + r + np.float32(1)) * power


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
                    v = v / (np.float32(1) + _exp(GELU_SLOPE * (v + GELU_CUBE * v * v * v)))
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
def _softmax(scores: Array, start: int, stop: int) -> None:
    """scores[start:stop] as shares of 1, all others 0."""
    seen = scores[start:stop]
    most, whole = np.float32(-np.inf), np.float32(0)
    for s in range(seen.size):
        most = max(most, seen[s])
    for s in range(seen.size):
        seen[s] = _exp(seen[s] - most)
        whole += seen[s]
    scores[:start], scores[stop:] = 0, 0
    for s in range(seen.size):
        seen[s] /= whole


@njit(parallel=True, **FAST)
def _attention(
    query: Array, key: Array, value: Array, cache: Array, length: int, pads: Array, y: Array, parts: int
) -> None:
    """All heads of all rows, after their new keys and values are put into the cache.

    Keys are rows of a weight, values its columns; some rows of the query at a time see what is before their
    last. A row that sees nothing, a padding token's, gets 0.
    """
    batch, n_heads, capacity, width = cache.shape[1:]
    T = len(y) // batch
    factor = np.float32(1) / math.sqrt(np.float32(width))
    scores = np.empty((parts, min(T, QUERIES) * capacity), np.float32)
    for part in prange(parts):
        for item in range(batch * n_heads * part // parts, batch * n_heads * (part + 1) // parts):
            b, h = item // n_heads, item % n_heads
            head = slice(h * width, (h + 1) * width)
            keys, values = cache[0, b, h].reshape(-1), cache[1, b, h].reshape(-1)
            for t in range(T):
                own_key, own_value = key[b * T + t, head], value[b * T + t, head]
                for d in range(width):
                    _store(own_key[d], keys, (length + t) * width + d)
                    _store(own_value[d], values, (length + t) * width + d)
            for first in range(0, T, QUERIES):
                rows = slice(b * T + first, b * T + min(first + QUERIES, T))
                n_rows, seen = rows.stop - rows.start, length + min(first + QUERIES, T)
                own = scores[part, : n_rows * seen].reshape(n_rows, seen)
                _rows(keys, width, query[rows, head] * factor, own, pads[b], seen)
                for t in range(n_rows):
                    _softmax(own[t], pads[b], max(length + first + t + 1, pads[b]))
                sums = np.empty((n_rows, width), np.float32)
                _columns(values, width, own, sums, 0, width)
                y[rows, head] = sums


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
