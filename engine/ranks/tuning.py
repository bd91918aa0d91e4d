"""Environment variables for the libraries under torch, which read them when torch is imported."""

from __future__ import annotations

TUNING = {
    # libgomp's threads spin at the end of every parallel region, some 300,000 times by default. A token has
    # hundreds of small regions: where anything else uses the cores, the engine nearly stood still. Measured
    # on two cores: about a tenth slower when quiet, three times as fast beside two busy processes.
    "GOMP_SPINCOUNT": "1000",
    # torch asks for huge pages: filling new memory is most of the time of loading from a warm cache, and in
    # pages of 4 KiB half of that is page faults.
    "THP_MEM_ALLOC_ENABLE": "1",
}
