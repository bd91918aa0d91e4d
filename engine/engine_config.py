"""Options of the engine.

Fields that default to None or "auto" are settled once, by `resolution.resolve`. Option names are vLLM's
where the meaning is the same. A field's metadata is its help text on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nybble.engine.checkpoint.weight_dtypes import WeightDtypes
from nybble.engine.errors import OptionError
from nybble.engine.log_format import LogFormat
from nybble.engine.planning.placement import Split


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    kv_cache_dtype: Literal["auto", "fp32", "bf16", "fp8"] = field(
        default="auto",
        metadata={
            "help": "keys and values (auto: fp8 where the checkpoint declares it and Triton runs on a GPU of "
            "compute capability 9.0 or more, bf16 on backend cpu, else as activations)"
        },
    )
    block_size: int = field(default=16, metadata={"help": "tokens in a KV-cache block"})
    kv_cache_memory: float | None = field(
        default=None,
        metadata={"help": "GiB of KV cache on each rank (default: what is left, at most 4 on a CPU)"},
    )
    enable_prefix_caching: bool = field(
        default=True, metadata={"help": "reuse the KV cache of equal prompt prefixes"}
    )


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    max_num_seqs: int = field(default=64, metadata={"help": "requests that run at once"})
    max_num_batched_tokens: int = field(
        default=1024, metadata={"help": "tokens in one step; a longer prompt is prefilled in chunks"}
    )
    max_waiting: int | None = field(
        default=1024, metadata={"help": "requests that may wait to be run; more are refused"}
    )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    tensor_parallel_size: int = field(
        default=1, metadata={"help": "ranks that divide heads, neurons and vocabulary"}
    )
    pipeline_parallel_size: int = field(default=1, metadata={"help": "stages of layers, one after the other"})
    enable_expert_parallel: bool = field(
        default=False, metadata={"help": "tensor-parallel ranks hold whole experts, not a share of each"}
    )

    @property
    def split(self) -> Split:
        """Raises OptionError if a size is not positive."""
        for name in ("tensor_parallel_size", "pipeline_parallel_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"{name} is {getattr(self, name)}, expected at least 1")
        return Split(
            tensor_parallel=self.tensor_parallel_size,
            expert_parallel=self.tensor_parallel_size if self.enable_expert_parallel else 1,
            pipeline_parallel=self.pipeline_parallel_size,
        )


@dataclass(frozen=True, kw_only=True)
class SpeculationConfig:
    num_speculative_tokens: int = field(
        default=0,
        metadata={
            "help": "tokens drafted ahead for each request with the checkpoint's MTP layer, at most: 1 to 4, "
            "fewer where that is measured to be faster (0: off)"
        },
    )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    checkpoint: str = field(metadata={"help": "checkpoint directory"})
    backend: Literal["auto", "reference", "cpu", "triton"] = field(
        default="auto",
        metadata={
            "help": "implementation of the model's operations: plain torch, native code for CPUs, Triton "
            "(auto: triton on a GPU; without one cpu, where its library was built; else reference)"
        },
    )
    cpu_threads: int | None = field(
        default=None,
        metadata={
            "help": "threads of backend cpu on each rank (default: one for each physical core that the "
            "process may use, shared by the ranks of a machine)"
        },
    )
    device: Literal["auto", "cpu", "cuda"] = field(
        default="auto", metadata={"help": "where to compute (auto: a GPU if there is one)"}
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "activations (auto: float32 on a CPU, else bfloat16)"}
    )
    enforce_eager: bool = field(
        default=False,
        metadata={"help": "launch every operation of a decode step, instead of repeating recorded ones"},
    )
    deterministic: bool = field(
        default=False,
        metadata={
            "help": "a request gives the same tokens, bit for bit, whatever runs beside it and however its "
            "prompt is divided, cached or recomputed; on the same machine, with the same versions, options "
            "and number of ranks; slower"
        },
    )
    launch_table: str = field(
        default="auto",
        metadata={
            "help": "launch configurations that `nybble bench ops --tune` measured: a file, or none "
            "(auto: where --tune writes them, if they are for this GPU)"
        },
    )
    log_format: LogFormat = field(default="text", metadata={"help": "how log lines look"})
    max_model_len: int | None = field(
        default=None, metadata={"help": "longest prompt plus answer (default: the model's limit)"}
    )
    null_step_ms: float | None = field(
        default=None,
        metadata={
            "help": "for `nybble bench serving`: compute nothing, take so many milliseconds a step, answer "
            "with one word over and over; of the checkpoint only the tokenizer is read"
        },
    )
    weights: WeightDtypes = field(default_factory=WeightDtypes)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
