"""CRC-32C (Castagnoli), the sum that TensorFlow keeps of every tensor, at some 80 MB/s without an extension.

A CRC is linear over bits: the register after `left + right` is the register after `left`, moved past as many
zero bytes as `right` has, XOR that after `right`. So a message is a tree of halves, and each level of it one
operation on a whole tensor. Polynomial: RFC 3720, appendix B.4.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

POLYNOMIAL = 0x82F63B78  # reflected
ONES = 0xFFFFFFFF
MAX_CHUNK = 1 << 18  # bytes that one call of torch handles


def _moved(registers: Tensor, table: Tensor) -> Tensor:
    """Every register moved past the zero bytes that `table` stands for."""
    moved = table[0].index_select(0, registers & 0xFF)
    for place in (1, 2, 3):
        moved ^= table[place].index_select(0, registers >> 8 * place & 0xFF)
    return moved


@cache
def _tables() -> tuple[Tensor, ...]:
    """Table k moves a register past 2**k zero bytes: row j holds what byte j of the register becomes."""
    table = torch.arange(256, device="cpu") << torch.tensor([[0], [8], [16], [24]], device="cpu")
    for _ in range(8):
        table = (table >> 1) ^ (table & 1) * POLYNOMIAL
    tables = [table.to(torch.int32)]
    while 1 << len(tables) <= MAX_CHUNK:
        tables.append(_moved(tables[-1].flatten(), tables[-1]).reshape(4, 256))
    return tuple(tables)


def _register_after(chunk: memoryview) -> Tensor:
    """The register, begun at 0, after at most MAX_CHUNK bytes."""
    tables = _tables()
    padded = bytearray(1 << max(len(chunk) - 1, 3).bit_length())  # in front, where zeros leave 0 as it is
    padded[len(padded) - len(chunk) :] = chunk
    words = torch.frombuffer(padded, dtype=torch.int32)
    for table in tables[2:]:
        if len(words) == 1:
            break
        words = _moved(words[0::2], table) ^ words[1::2]
    return _moved(words, tables[2])


def crc32c(chunks: Iterable[bytes | memoryview]) -> int:
    """The CRC-32C of all chunks in a row, as 32 bits. Costs about 2 MiB of host memory."""
    tables = _tables()
    register = torch.tensor([-1], dtype=torch.int32, device="cpu")
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        for part in (view[at : at + MAX_CHUNK] for at in range(0, len(view), MAX_CHUNK)):
            for k, table in enumerate(tables):
                if len(part) >> k & 1:
                    register = _moved(register, table)
            register = register ^ _register_after(part)
    return ~int(register) & ONES


def masked(crc: int) -> int:
    """How LevelDB and TensorFlow store a CRC, lest a CRC of bytes that hold CRCs goes wrong."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & ONES
