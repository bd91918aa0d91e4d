"""Items and bytes of a pass, against sizes counted by hand."""

from __future__ import annotations

import pytest

from nybble.kernels.bench.cases import GLM_4_7, BenchCase
from nybble.kernels.bench.static import case_launches
from nybble.kernels.compiled.loop_pass import argument, kernel_name, loop_pass
from nybble.kernels.triton.launch import KernelLaunch


def launches(op: str, tokens: int, format: str, arch: int = 90, **rest: object) -> dict[str, KernelLaunch]:
    case = BenchCase(op, 8, tokens, format, **rest)  # type: ignore[arg-type]
    return {kernel_name(launch): launch for launch in case_launches(case, GLM_4_7, arch)}


def test_fp4_weights() -> None:
    """Codes, a scale for each 16 of them, and activations of two bytes."""
    launch = launches("qkv", 1, "nvfp4")["_fp4_linear_kernel"]
    found, options = loop_pass(launch), launch.options
    rows = options["SPLITS"] * options["ROWS"]
    assert found is not None and found.items == rows * 256
    assert found.loaded_bytes == rows * (128 + 16) + options["SPLITS"] * options["TOKENS"] * 512


def test_gate_and_up_are_twice_the_rows() -> None:
    launch = launches("experts", 1, "mxfp4", routing="uniform")["_gate_up_kernel"]
    found = loop_pass(launch)
    assert found is not None and found.items == 2 * launch.options["ROWS"] * launch.options["SPLITS"] * 256


@pytest.mark.parametrize(("format", "x_bytes"), [("nvfp4", 0.5), ("mxfp4", 1.0)])
def test_native_fp4(format: str, x_bytes: float) -> None:
    launch = launches("qkv", 512, format, arch=100)["_native_linear_kernel"]
    found, options = loop_pass(launch), launch.options
    rows, tokens, width = options["ROWS"], options["TOKENS"], options["WIDTH"]
    scales = (rows + tokens) * width / options["BLOCK_SIZE"]
    assert found is not None and found.items == rows * width
    assert found.loaded_bytes == rows * width / 2 + tokens * width * x_bytes + scales


def test_fp8_weights() -> None:
    launch = launches("qkv", 1, "fp8")["_fp8_linear_kernel"]
    found, options = loop_pass(launch), launch.options
    assert found is not None and found.items == options["SPLITS"] * options["ROWS"] * 128
    assert found.loaded_bytes == found.items + options["SPLITS"] * options["TOKENS"] * 256


@pytest.mark.parametrize(("format", "item_bytes"), [("bf16", 2), ("fp8", 1)])
@pytest.mark.parametrize("op", ["attention", "prefill_attention"])
def test_attention(op: str, format: str, item_bytes: int) -> None:
    found_launches = launches(op, 16, format, context=4096)
    launch = found_launches["_split_kernel" if op == "attention" else "_prefill_kernel"]
    found = loop_pass(launch)
    assert found is not None and found.items == 2 * launch.options["TILE"] * 128
    assert found.loaded_bytes == found.items * item_bytes


def test_what_reads_no_weights_has_no_items() -> None:
    assert all(loop_pass(launch) is None for launch in launches("sampling", 1, "fp32").values())
    assert all(loop_pass(launch) is None for launch in launches("norm", 1, "bf16").values())


def test_arguments_by_name() -> None:
    launch = launches("qkv", 3, "nvfp4")["_fp4_linear_kernel"]
    assert (argument(launch, "num_tokens"), argument(launch, "width")) == (3, 5120)
