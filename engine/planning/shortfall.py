"""Why a model does not fit, and what would help."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nybble.engine.planning.gpu_specs import GIB, GpuSet, format_gib
from nybble.engine.planning.inventory import KVDtype
from nybble.engine.planning.placement import Split


@dataclass(frozen=True)
class Shortfall:
    """No split of `gpus` holds a request of `max_model_len` tokens.

    `split` is the one that comes nearest; its fullest rank needs the bytes of weights and cache, and the
    GPU's workspace. Of the ways out, `shorter_context` is 0 and `num_gpus` None if there is none of the
    kind.
    """

    split: Split
    weight_bytes: int
    cache_bytes: int
    gpus: GpuSet
    max_model_len: int
    kv_dtype: KVDtype
    shorter_context: int
    fits_without_draft: bool
    num_gpus: int | None

    @property
    def needed_bytes(self) -> int:
        return self.weight_bytes + self.cache_bytes + self.gpus.gpu.workspace_bytes

    @property
    def reason(self) -> str:
        gpu = self.gpus.gpu
        return (
            f"as {self.split} a {gpu.noun} needs {format_gib(self.needed_bytes)} GiB "
            f"({format_gib(self.weight_bytes)} weights, {format_gib(gpu.workspace_bytes)} workspace, "
            f"{format_gib(self.cache_bytes)} {self.kv_dtype} KV cache for one request of "
            f"{self.max_model_len:,} tokens) and has {format_gib(gpu.memory_bytes)}"
        )

    def changes(self) -> Iterator[str]:
        """Each would do by itself; the smallest first."""
        if self.shorter_context:
            yield f"a context of at most {self.shorter_context:,} tokens"
        if self.fits_without_draft:
            yield "leave out the draft layer"
        if self.num_gpus is not None:
            yield str(replace(self.gpus, count=self.num_gpus))
        yield f"{self.gpus.gpu.noun}s with {-(-self.needed_bytes // GIB)} GiB usable"

    def __str__(self) -> str:
        changes = "; or ".join(self.changes())
        return f"{self.gpus}: does not fit: {self.reason}. Smallest change first: {changes}."
