from __future__ import annotations

import math

import pytest

from nybble.engine.errors import OptionError
from nybble.engine.planning.gpu_specs import KNOWN_GPUS, custom_gpus, parse_gpus, select_gpus


@pytest.mark.parametrize(
    ("text", "count", "name", "memory_gib"),
    [
        ("8xH100", 8, "H100 80GB", 79),
        ("8XH100", 8, "H100 80GB", 79),
        (" 4 x h100 80gb ", 4, "H100 80GB", 79),
        ("2*H100-80GB", 2, "H100 80GB", 79),
        ("h200", 1, "H200", 139),
        ("2xB200", 2, "B200", 178),
        ("1xb300", 1, "B300", 268),
        ("16xA100", 16, "A100 80GB", 79),
        ("4xRTX PRO 6000", 4, "RTX PRO 6000", 95),
        ("4xrtx_pro-6000", 4, "RTX PRO 6000", 95),
        ("8xRTXPRO6000", 8, "RTX PRO 6000", 95),
        ("8xRTX5090", 8, "RTX 5090", 31),
        ("4xGB10", 4, "GB10", 101),
        ("4xDGX Spark", 4, "GB10", 101),
        ("8xMI300X", 8, "MI300X", 191),
        ("256xH200", 256, "H200", 139),
    ],
)
def test_a_set_is_a_count_and_a_name(text: str, count: int, name: str, memory_gib: float) -> None:
    gpus = parse_gpus(text)
    assert (gpus.count, gpus.gpu.name, gpus.gpu.memory_gib) == (count, name, memory_gib)
    assert str(gpus) == f"{count} x {name}"


def test_bandwidth_of_four_h100() -> None:
    """13.4 TB/s, as public roofline tables have it."""
    gpus = parse_gpus("4xH100")
    assert gpus.count * gpus.gpu.bandwidth_tbps == pytest.approx(13.4)


def test_figures_are_plausible() -> None:
    """Memory in GiB and bandwidth in TB/s: a slip of the unit would be off by at least 1,000."""
    assert len({gpu.name for gpu in KNOWN_GPUS}) == len(KNOWN_GPUS) == 9
    for gpu in KNOWN_GPUS:
        assert 24 < gpu.memory_gib < 300, gpu.name
        assert 0.2 < gpu.bandwidth_tbps < 9, gpu.name


def test_an_unknown_gpu_is_answered_with_the_known_ones() -> None:
    with pytest.raises(OptionError) as caught:
        parse_gpus("8xH1000")
    assert "'H1000' is not known" in str(caught.value)
    assert [gpu.name for gpu in KNOWN_GPUS if gpu.name not in str(caught.value)] == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected a count and a name"),
        ("  ", "expected a count and a name"),
        ("8x", "GPU '8x' is not known"),
        ("-1xH100", "GPU '-1xH100' is not known"),
        ("0xH100", "0 GPUs: expected 1 to 256"),
        ("257xH100", "257 GPUs: expected 1 to 256"),
        ("9" * 5000 + "xH100", "is not known"),
    ],
)
def test_bad_sets(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse_gpus(text)


def test_gpus_by_their_numbers() -> None:
    gpus = custom_gpus(94.5, 3.9, 3)
    assert (gpus.count, gpus.gpu.memory_gib, gpus.gpu.bandwidth_tbps) == (3, 94.5, 3.9)
    assert str(gpus) == "3 x GPU of 94.5 GiB, 3.9 TB/s"


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_numbers_must_be_positive(value: float) -> None:
    with pytest.raises(OptionError, match="memory is"):
        custom_gpus(value, 1.0, 1)
    with pytest.raises(OptionError, match="bandwidth is"):
        custom_gpus(80.0, value, 1)


def test_either_way_of_saying_it() -> None:
    assert select_gpus("2xH200", None, None, None) == parse_gpus("2xH200")
    assert select_gpus(None, 139.0, 4.8, None) == custom_gpus(139.0, 4.8, 1)
    assert select_gpus(None, 139.0, 4.8, 2) == custom_gpus(139.0, 4.8, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("2xH200", 139.0, None, None), "gpus already says"),
        (("2xH200", None, 4.8, None), "gpus already says"),
        (("2xH200", None, None, 2), "gpus already says"),
        ((None, None, None, None), "which GPUs"),
        ((None, 139.0, None, None), "both memory and bandwidth"),
        ((None, None, 4.8, 8), "both memory and bandwidth"),
        ((None, 139.0, 4.8, 0), "0 GPUs"),
    ],
)
def test_neither_or_both_ways(
    options: tuple[str | None, float | None, float | None, int | None], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        select_gpus(*options)
