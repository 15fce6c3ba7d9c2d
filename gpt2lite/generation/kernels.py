"""A few new tokens on the CPU, at the speed of memory: torch's many calls as loops over the weights.

numba compiles these functions when they are first called and keeps the result beside this file. x is (R, C)
in fp32, one row per new token (T of them) of each of B texts; a weight is fp32, bf16 (its bits, as uint16) or
int8, in (out, in) or, as the official files have it, (in, out) order. It is read in place, and for a single
row once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, reduce
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.core.registry import cpu_target
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
FEATURES = cpu_target.target_context.codegen()._get_host_cpu_features()  # what numba compiles for
LANES = 16 if "+avx512f" in FEATURES else 8  # numbers in a register
HAS_INTEGERS = "+avx512vnni" in FEATURES and "+avx512vl" in FEATURES  # int8 × uint8, four to a sum
FEWEST_IN_INTEGERS = 8  # rows
FEWEST_TO_SHARE = 16  # rows whose norms are worth waking the other threads
MOST_16, MIDDLE_16 = np.float32(2**15 - 1), np.float32(2**15 + 0.5)  # + 0.5: rounded where it is cut
INFINITY_BITS, ABSOLUTE = np.int32(0x7F800000), np.int32(0x7FFFFFFF)
NO_BYTES = np.empty(0, np.uint8)
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


class Lane(NamedTuple):
    """How a tile multiplies: what its sums are, how many numbers of a row a register of them takes in."""

    number: ir.Type
    many: int
    multiply_add: str  # in LLVM
    add: str

    @property
    def register(self) -> ir.Type:
        """LANES sums."""
        return ir.VectorType(self.number, LANES)


IN_FLOATS = Lane(ir.FloatType(), LANES, f"llvm.fma.v{LANES}f32", "fadd")
IN_INTS = Lane(INT, 4 * LANES, f"llvm.x86.avx512.vpdpbusd.{32 * LANES}", "add")


def _loaded(builder: Any, address: Any, stored: Any, lane: Lane) -> Any:
    """The next numbers of a row: as they lie for integer products, else as fp32."""
    if lane is IN_INTS:
        return builder.load(builder.bitcast(address, lane.register.as_pointer()), align=1)
    kind = ir.FloatType() if stored == types.float32 else ir.IntType(stored.bitwidth)
    pointer = ir.VectorType(kind, LANES).as_pointer()
    numbers = builder.load(builder.bitcast(address, pointer), align=stored.bitwidth // 8)
    ints = ir.VectorType(INT, LANES)
    if stored == types.int8:
        return builder.sitofp(builder.sext(numbers, ints), lane.register)
    if stored == types.uint16:
        upper = builder.shl(builder.zext(numbers, ints), ir.Constant(ints, [16] * LANES))
        return builder.bitcast(upper, lane.register)
    return numbers


def _totals(builder: Any, registers: list[Any], add: Any) -> Any:
    """Registers of LANES sums → the total of each, in one: halves of two at a time are added."""
    group = LANES  # numbers that belong to one total
    while group > 1:
        pairs = list(itertools.zip_longest(registers[::2], registers[1::2]))
        registers = []
        for left, right in pairs:
            together = left.type.count * (1 if right is None else 2)
            halves = [
                ir.Constant(
                    ir.VectorType(INT, together // 2),
                    [g + k for g in range(0, together, group) for k in half],
                )
                for half in (range(group // 2), range(group // 2, group))
            ]
            right = left if right is None else right
            registers.append(add(*(builder.shuffle_vector(left, right, half) for half in halves)))
        group //= 2
    return registers[0]


def _tile(outs: int, rows: int, unrolled: int) -> Any:
    """What multiplies so many rows of a weight with so many of x, all of their sums in registers.

    Of (flat, at, step, x, row, n, y, out): y[row + r, out + o] is the product of `flat[at + o * step :]` and
    `x[row + r]` over n numbers, a multiple of `unrolled` registers: in fp32, or of int8 and an x in uint8 in
    int32. What LLVM makes of Python's loops uses half of a wide register, and waits for memory; this one asks
    for each row AHEAD bytes before it is read.
    """

    @intrinsic
    def products(typing, flat, at, step, x, row, n, y, out):  # type: ignore[no-untyped-def]
        lane = IN_INTS if x.dtype == types.uint8 else IN_FLOATS

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> None:
            _, at, step, _, row, n, _, out = args
            arrays = [context.make_array(signature.args[k])(context, builder, args[k]) for k in (0, 3, 6)]
            weight, given, made = (builder.bitcast(array.data, BYTES) for array in arrays)
            _, x_step, y_step = (builder.extract_value(array.strides, 0) for array in arrays)
            size, x_size = (_integer(kind.dtype.bitwidth // 8) for kind in (flat, x))
            called = partial(cgutils.get_or_insert_function, builder.module)
            fma = called(ir.FunctionType(lane.register, [lane.register] * 3), lane.multiply_add)
            prefetch = called(ir.FunctionType(ir.VoidType(), [BYTES, INT, INT, INT]), "llvm.prefetch.p0")
            to_be_read = [ir.Constant(INT, flag) for flag in (0, 3, 1)]  # kept in all caches, as data

            def moved(address: Any, count: Any, nbytes: Any) -> Any:
                return builder.gep(address, [builder.mul(count, nbytes)])

            def next_rows(address: Any, first: Any, count: int, nbytes: Any) -> list[Any]:
                return [moved(address, builder.add(first, _integer(k)), nbytes) for k in range(count)]

            weights = next_rows(moved(weight, at, size), _integer(0), outs, builder.mul(step, size))
            inputs = next_rows(given, row, rows, x_step)
            cells = list(itertools.product(range(outs), range(rows), range(unrolled)))
            sums = {cell: cgutils.alloca_once(builder, lane.register) for cell in cells}
            for cell in cells:
                builder.store(ir.Constant(lane.register, None), sums[cell])
            stride = _integer(unrolled * lane.many)
            with cgutils.for_range_slice(builder, _integer(0), n, stride, stride.type) as (i, _):
                for address in weights:
                    for line in range(0, unrolled * lane.many * flat.dtype.bitwidth // 8, 64):
                        early = moved(moved(address, i, size), _integer(AHEAD + line), _integer(1))
                        builder.call(prefetch, [early, *to_be_read])
                for u in range(unrolled):
                    at_u = builder.add(i, _integer(u * lane.many))
                    wide = [_loaded(builder, moved(each, at_u, size), flat.dtype, lane) for each in weights]
                    for r, address in enumerate(inputs):
                        vector = _loaded(builder, moved(address, at_u, x_size), x.dtype, lane)
                        for o in range(outs):
                            operands = (
                                (vector, wide[o], builder.load(sums[o, r, u]))
                                if lane is IN_FLOATS
                                else (builder.load(sums[o, r, u]), vector, wide[o])
                            )
                            builder.store(builder.call(fma, operands), sums[o, r, u])
            for r, address in enumerate(next_rows(made, row, rows, y_step)):
                add = getattr(builder, lane.add)
                parts = [[builder.load(sums[o, r, u]) for u in range(unrolled)] for o in range(outs)]
                totals = _totals(builder, [reduce(add, part) for part in parts], add)
                into = moved(address, out, _integer(4))
                builder.store(totals, builder.bitcast(into, totals.type.as_pointer()), align=4)

        integers = types.int64, types.int64
        return types.none(flat, *integers, x, *integers, y, types.int64), generate

    return products


_one, _sixteen = _tile(1, 1, 4), _tile(4, 4, 1)


@njit(**FAST)
def _rows(flat: Array, step: int, x: Array, y: Array, start: int, stop: int) -> None:
    """y[:, start:stop] of a weight that is stored row by row, BLOCK rows at a time, which stay cached."""
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


def _in_integers(flat: Array, step: int, x: Array, y: Array, start: int, stop: int) -> Any:
    """The same of an int8 weight with integer products, if they suit it; says whether it was done."""


@overload(_in_integers)
def _in_integers_of(flat, step, x, y, start, stop):  # type: ignore[no-untyped-def]
    def multiplied(flat, step, x, y, start, stop):  # type: ignore[no-untyped-def]
        n_rows, n = x.shape
        if n_rows < FEWEST_IN_INTEGERS or n % WHOLE:
            return False
        planes, scales = _planes(x)
        products = np.empty((len(planes), BLOCK), np.int32)
        even = start + (stop - start) // 4 * 4
        for first in range(start, even, BLOCK):
            last = min(first + BLOCK, even)
            for p in range(0, len(planes), 4):
                for o in range(first, last, 4):
                    _sixteen(flat, o * step, step, planes, p, n, products, o - first)
            sums = products[2 * n_rows]
            for r in range(n_rows):
                high, low, scale = products[2 * r], products[2 * r + 1], scales[r]
                for o in range(first, last):
                    upper = np.float32(high[o - first] - np.int32(128) * sums[o - first])
                    y[r, o] = scale * (np.float32(256) * upper + np.float32(low[o - first]))
        _rows(flat, step, x, y, even, stop)
        return True

    is_done = HAS_INTEGERS and flat.dtype == types.int8  # else LLVM has no such instruction, and aborts
    return multiplied if is_done else lambda flat, step, x, y, start, stop: False


@njit(**FAST)
def _aligned(n_rows: int, n: int, like: Array) -> Array:
    """(n_rows, n) of the dtype of `like`, not filled: no register's numbers lie in two lines of the cache."""
    flat = np.empty(n_rows * n + 64 // like.itemsize, like.dtype)
    start = -flat.ctypes.data % 64 // like.itemsize
    return flat[start : start + n_rows * n].reshape(n_rows, n)


@njit(**FAST)
def _planes(x: Array) -> tuple[Array, Array]:
    """Each row of x as whole numbers of 16 bits times a scale; of those + 2^15 the upper and lower bytes.

    Integer products take one operand without a sign, and 8 bits of each: two rows of bytes say as much as
    the 16 bits, which is what an fp32 activation needs. A row of ones follows, whose product is a weight's
    sum, since 2^15 times that was added; filled up to a multiple of four rows.
    """
    n_rows, n = x.shape
    planes, scales = _aligned((2 * n_rows + 4) // 4 * 4, n, NO_BYTES), np.empty(n_rows, np.float32)
    planes[2 * n_rows :] = 1
    for r in range(n_rows):
        row, high, low, most = x[r], planes[2 * r], planes[2 * r + 1], np.int32(0)
        bits = row.view(np.int32)  # without signs in the order of the numbers, infinity and NaN last
        for i in range(n):
            most = np.int32(max(most, bits[i] & ABSOLUTE))
        largest = np.int32(most).view(np.float32) if most < INFINITY_BITS else np.float32(np.nan)
        scales[r] = largest / MOST_16
        factor = MOST_16 / largest if most > 0 else np.float32(0)
        for i in range(n):
            whole = np.int32(row[i] * factor + MIDDLE_16)
            high[i], low[i] = whole >> np.int32(8), whole
    return planes, scales


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
            if not _in_integers(flat, step, x, products, start, stop):
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


@njit(parallel=True, **FAST)
def _norms(x: Array, norm: Norm, y: Array, parts: int) -> None:
    """The same, of so many rows that it is worth all threads."""
    if len(x) < FEWEST_TO_SHARE:
        _norm(x, norm, y)
        return
    for part in prange(parts):
        rows = slice(len(x) * part // parts, len(x) * (part + 1) // parts)
        _norm(x[rows], norm, y[rows])


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
    normed, wide = _aligned(*x.shape, x), _aligned(len(x), expand.bias.size, x)
    query, key, value = np.empty_like(x), np.empty_like(x), np.empty_like(x)
    _norms(x, norm1, normed, parts)
    _linear(W_query, normed, query, NONE, parts)
    _linear(W_key, normed, key, NONE, parts)
    _linear(W_value, normed, value, NONE, parts)
    _attention(query, key, value, cache, length, pads, normed, parts)
    _linear(out_proj, normed, x, ADD, parts)
    _norms(x, norm2, normed, parts)
    _linear(expand, normed, wide, activation, parts)
    _linear(contract, wide, x, ADD, parts)


@njit(**FAST)
def run_head(norm: Norm, head: Matrix, x: Array, logits: Array, parts: int) -> None:
    """x (B, C) → logits (B, V), through the last norm."""
    normed = _aligned(*x.shape, x)
    _norms(x, norm, normed, parts)
    _linear(head, normed, logits, NONE, parts)
