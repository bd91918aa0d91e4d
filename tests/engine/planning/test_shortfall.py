from __future__ import annotations

from dataclasses import replace

from nybble.engine.planning.gpu_specs import GIB, GpuSet, GpuSpec
from nybble.engine.planning.placement import Split
from nybble.engine.planning.shortfall import Shortfall

GPUS = GpuSet(2, GpuSpec("H100 80GB", 79, 3.35, workspace_gib=4))
NO_WAY = Shortfall(
    split=Split(2, 1, 1),
    weight_bytes=100 * GIB,
    cache_bytes=15 * GIB // 2,
    gpus=GPUS,
    max_model_len=202_752,
    kv_dtype="fp8",
    shorter_context=0,
    fits_without_draft=False,
    num_gpus=None,
)


def test_a_rank_needs_weights_cache_and_workspace() -> None:
    assert NO_WAY.needed_bytes == 111.5 * GIB


def test_the_reason_adds_up() -> None:
    assert NO_WAY.reason == (
        "as TP 2, EP 1, PP 1 a GPU needs 111.5 GiB (100.0 weights, 4.0 workspace, 7.5 fp8 KV cache for one "
        "request of 202,752 tokens) and has 79.0"
    )


def test_gpus_that_are_large_enough_always_help() -> None:
    """112, as 111.5 would not quite do in whole GiB."""
    assert list(NO_WAY.changes()) == ["GPUs with 112 GiB usable"]
    whole = replace(NO_WAY, cache_bytes=7 * GIB)
    assert list(whole.changes()) == ["GPUs with 111 GiB usable"]


def test_the_smallest_change_comes_first() -> None:
    changes = replace(NO_WAY, shorter_context=83_300, fits_without_draft=True, num_gpus=4).changes()
    assert list(changes) == [
        "a context of at most 83,300 tokens",
        "leave out the draft layer",
        "4 x H100 80GB",
        "GPUs with 112 GiB usable",
    ]


def test_in_words() -> None:
    shortfall = replace(NO_WAY, num_gpus=4)
    assert str(shortfall) == (
        f"2 x H100 80GB: does not fit: {NO_WAY.reason}. "
        "Smallest change first: 4 x H100 80GB; or GPUs with 112 GiB usable."
    )
