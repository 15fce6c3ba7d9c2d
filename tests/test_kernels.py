"""The CPU's loops against float64: every dtype, both orders, any size, and what is not finite."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gpt2lite.devices import CPU, emulates
from gpt2lite.model import Linear
from gpt2lite.quantization import Int8Linear

kernels = pytest.importorskip("gpt2lite.generation.kernels", reason="the extra [cpu] is not installed")
DTYPES = [torch.float32, torch.bfloat16, torch.int8]
OLDER = "+avx2,+fma,+f16c,+sse4.2,+popcnt"  # what a processor before AVX-512 has


def layer(n_out: int, n_in: int, dtype: torch.dtype, is_transposed: bool = False) -> nn.Module:
    torch.manual_seed(n_out * n_in)
    shape = (n_in, n_out) if is_transposed else (n_out, n_in)
    weight = (
        torch.randint(-127, 128, shape).to(dtype) if dtype == torch.int8 else torch.randn(shape).to(dtype)
    )
    weight = weight.T if is_transposed else weight
    bias = torch.randn(n_out)
    if dtype == torch.int8:
        return Int8Linear(nn.Parameter(weight, False), nn.Parameter(torch.rand(n_out), False), bias)
    made = nn.Linear(n_in, n_out)
    made.weight, made.bias = nn.Parameter(weight, False), nn.Parameter(bias, False)
    return made


def product(linear: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the loops say, and float64."""
    scale = getattr(linear, "scale", torch.ones(len(linear.weight)))
    wanted = (x.double() @ linear.weight.double().T) * scale.double() + linear.bias.double()
    y = torch.full((len(x), len(linear.weight)), 7.0)
    with kernels.threads_of_torch() as parts:
        kernels._linear(kernels.matrix_of(linear), x.numpy(), y.numpy(), kernels.NONE, parts)
    return y.double(), wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 4, 9, 18])
@pytest.mark.parametrize(("n_out", "n_in"), [(7, 20), (50, 64), (33, 192), (70, 256), (101, 300)])
def test_products_are_those_of_float64(
    dtype: torch.dtype, is_transposed: bool, rows: int, n_out: int, n_in: int
):
    linear, x = layer(n_out, n_in, dtype, is_transposed), torch.randn(rows, n_in)
    found, wanted = product(linear, x)
    size = linear.weight.double().abs().sum(1) * getattr(linear, "scale", torch.ones(1)).double()
    largest = x.abs().amax(1, keepdim=True).double()
    # fp32's sums; of int8 also half a step of 16 bits in each activation
    torch.testing.assert_close(found, wanted, rtol=0, atol=float((size * largest).max() * 2**-16))
    if dtype != torch.int8 or is_transposed or rows < kernels.FEWEST_IN_INTEGERS:
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=float(wanted.abs().max() * 2e-6))


def test_rows_that_are_not_finite_or_zero_stay_what_they_are_and_alone():
    linear, x = layer(40, 128, torch.int8), torch.randn(12, 128)
    x[1], x[3, 5], x[6, 7], x[9] = 0, float("nan"), float("inf"), x[9] * 1e30
    found, wanted = product(linear, x)
    assert torch.equal(found[1], linear.bias.double())
    assert not found[3].isfinite().any()
    assert not found[6].isfinite().any()
    whole = [0, 2, 4, 5, 7, 8, 9, 10, 11]
    torch.testing.assert_close(found[whole], wanted[whole], rtol=1e-2, atol=0.5)


def test_exp_is_numpys():
    x = torch.linspace(-87, 88, 100_001).numpy()
    found = torch.tensor([kernels._exp(number) for number in x[::10]], dtype=torch.float64)
    wanted = torch.from_numpy(x[::10]).double().exp()
    torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)


@pytest.mark.skipif("+avx2" not in kernels.FEATURES, reason="not an x86 processor with AVX2")
def test_an_older_processors_registers_give_the_same(tmp_path: Path):
    lines = ["import gpt2lite.generation.kernels as k", "assert (k.LANES, k.HAS_INTEGERS) == (8, False)"]
    tests = [f"{__file__}::test_products_are_those_of_float64", f"{__file__}::test_exp_is_numpys"]
    lines += ["import sys, pytest", f"sys.exit(pytest.main(['-q', '-p', 'no:cacheprovider', *{tests}]))"]
    older = {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": OLDER, "NUMBA_CACHE_DIR": f"{tmp_path}"}
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], env=os.environ | older, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("told", [{"NUMBA_ENABLE_AVX": "0"}, {"NUMBA_CPU_NAME": "generic"}], ids=str)
def test_what_numba_is_told_to_compile_for_is_believed(told: dict[str, str], tmp_path: Path):
    test = f"{__file__}::test_products_are_those_of_float64[33-192-9-False-dtype2]"  # int8, nine rows
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test]
    environment = os.environ | told | {"NUMBA_CACHE_DIR": f"{tmp_path}"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [31, 32, 300])
def test_a_dtype_that_the_cpu_emulates_rounds_once(dtype: torch.dtype, rows: int):
    linear = Linear(96, 200)
    with torch.no_grad():
        linear.weight.normal_()
        linear.bias.normal_()
    linear, x = linear.to(dtype), torch.randn(2, rows, 96).to(dtype)
    with torch.no_grad():
        found = linear(x)
    wanted = x.double() @ linear.weight.double().T + linear.bias.double()
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-4)
    assert emulates(CPU, torch.float32) is False
    assert emulates(torch.device("cuda"), dtype) is False
