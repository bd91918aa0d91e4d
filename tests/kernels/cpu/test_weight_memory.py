from __future__ import annotations

import gc
import mmap
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from nybble.kernels.cpu import weight_memory
from nybble.kernels.cpu.weight_memory import WeightMemory


def test_areas_are_apart_and_begin_at_lines() -> None:
    memory = WeightMemory()
    sizes = [1, 63, 64, 65, 1000, 1 << 20, (1 << 26) - 100, 3, (1 << 26) + 1, 0, 7]
    areas = [memory.area(size) for size in sizes]
    for number, area in enumerate(areas):
        area.fill_(number + 1)
    for number, (size, area) in enumerate(zip(sizes, areas, strict=True)):
        assert (area.dtype, area.shape) == (torch.uint8, (size,))
        assert size == 0 or area.data_ptr() % 64 == 0
        assert (area == number + 1).all()


def test_areas_of_threads() -> None:
    memory = WeightMemory()

    def filled(number: int) -> torch.Tensor:
        return memory.area(10_000).fill_(number)

    with ThreadPoolExecutor(4) as threads:
        areas = list(threads.map(filled, range(100)))
    assert all((area == number).all() for number, area in enumerate(areas))


def test_a_mapping_ends_with_its_areas(monkeypatch: pytest.MonkeyPatch) -> None:
    mappings: list[weakref.ref[mmap.mmap]] = []

    class Noted(mmap.mmap):
        def __new__(cls, *arguments: int, **options: int) -> Noted:
            made = super().__new__(cls, *arguments, **options)
            mappings.append(weakref.ref(made))
            return made

    monkeypatch.setattr(weight_memory.mmap, "mmap", Noted)
    area = WeightMemory().area(100)
    gc.collect()
    assert area.fill_(1).sum() == 100
    assert mappings[0]() is not None
    del area
    gc.collect()
    assert mappings[0]() is None


def test_a_kernel_without_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing(mmap.mmap):
        def madvise(self, *arguments: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(weight_memory.mmap, "mmap", Refusing)
    assert WeightMemory().area(100).fill_(1).sum() == 100
