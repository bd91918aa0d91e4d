"""The cases of the kernel benchmark: what GLM-4.7 asks of one GPU of a tensor-parallel group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from nybble.kernels.ops import AttentionShape

TPS = (1, 4, 8)
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512, 4096, 16384)
SEQUENCES = (1, 8, 32, 128)
CONTEXTS = (1024, 8192, 32768, 131072, 202752)
ROUTINGS = ("uniform", "zipf")
FP4_FORMATS = ("nvfp4", "mxfp4")
LINEAR_OPS = ("qkv", "output", "dense_gate_up", "dense_down", "head")
OPS = ("experts", *LINEAR_OPS, "router", "attention", "prefill_attention", "norm", "store_qkv", "sampling")


@dataclass(frozen=True)
class ModelShape:
    """What a rank holds of a model. Heads, expert_width, dense_width and vocabulary are its share; there are
    `num_experts` for every rank. Widths are of one matrix: gate and up have 2 * expert_width rows."""

    hidden: int
    heads: AttentionShape
    num_experts: int
    top_k: int
    expert_width: int
    dense_width: int
    vocabulary: int

    def shard(self, tp: int) -> ModelShape:
        """The share of one of tp ranks. A KV head is held by several ranks where there are too few."""
        heads = replace(
            self.heads,
            num_heads=self.heads.num_heads // tp,
            num_kv_heads=max(self.heads.num_kv_heads // tp, 1),
        )
        return replace(
            self,
            heads=heads,
            expert_width=self.expert_width // tp,
            dense_width=self.dense_width // tp,
            vocabulary=self.vocabulary // tp,
        )

    def matrix(self, op: str) -> tuple[int, int]:
        """Rows and columns of the weight of one of LINEAR_OPS."""
        return {
            "qkv": (self.heads.query_width + 2 * self.heads.kv_width, self.hidden),
            "output": (self.hidden, self.heads.query_width),
            "dense_gate_up": (2 * self.dense_width, self.hidden),
            "dense_down": (self.hidden, self.dense_width),
            "head": (self.vocabulary, self.hidden),
        }[op]


# config.json of zai-org/GLM-4.7.
GLM_4_7 = ModelShape(
    hidden=5120,
    heads=AttentionShape(num_heads=96, num_kv_heads=8, head_dim=128, rotary_dim=64),
    num_experts=160,
    top_k=8,
    expert_width=1536,
    dense_width=12288,
    vocabulary=151552,
)


@dataclass(frozen=True)
class BenchCase:
    """One op at one shape.

    tokens: rows of activations; of attention the sequences, of prefill_attention the tokens of one chunk
    format: of the weights or the cache
    """

    op: str
    tp: int
    tokens: int
    format: str
    routing: str | None = None
    context: int | None = None

    @property
    def name(self) -> str:
        parts = [f"{self.op} {self.format}", f"tp {self.tp}", f"tokens {self.tokens}"]
        parts += [f"context {self.context}"] if self.context is not None else []
        parts += [self.routing] if self.routing is not None else []
        return ", ".join(parts)

    @property
    def options(self) -> str:
        """That select this case alone on the command line."""
        text = f"--op {self.op} --tp {self.tp} --tokens {self.tokens} --format {self.format}"
        text += f" --context {self.context}" if self.context is not None else ""
        return text + (f" --routing {self.routing}" if self.routing is not None else "")


@dataclass(frozen=True)
class Selection:
    """Which cases; an empty tuple does not restrict. quick: some two dozen that say most."""

    ops: tuple[str, ...] = ()
    tps: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    formats: tuple[str, ...] = ()
    contexts: tuple[int, ...] = ()
    routings: tuple[str, ...] = ()
    quick: bool = False

    def admits(self, case: BenchCase) -> bool:
        wanted = (
            (self.ops, case.op),
            (self.tps, case.tp),
            (self.tokens, case.tokens),
            (self.formats, case.format),
            (self.contexts, case.context),
            (self.routings, case.routing),
        )
        return all(not values or value in values for values, value in wanted)


def select_cases(selection: Selection) -> list[BenchCase]:
    """In the order of OPS. Numbers that the usual cases lack may be asked for, too: tokens, tp, contexts."""
    if selection.quick:
        return [case for case in _quick_cases() if selection.admits(case)]
    tps, contexts = selection.tps or TPS, selection.contexts or CONTEXTS
    ops = [op for op in OPS if not selection.ops or op in selection.ops]
    cases = (case for op in ops for case in _op_cases(op, tps, selection.tokens, contexts))
    return [case for case in cases if selection.admits(case)]


def _op_cases(
    op: str, tps: Iterable[int], tokens: tuple[int, ...], contexts: Iterable[int]
) -> Iterator[BenchCase]:
    if op == "experts":
        for format, tp, count, routing in product(FP4_FORMATS, tps, tokens or TOKENS, ROUTINGS):
            yield BenchCase(op, tp, count, format, routing)
    elif op in LINEAR_OPS:
        counts = tokens or (SEQUENCES if op == "head" else TOKENS)
        for format, tp, count in product((*FP4_FORMATS, "fp8", "bf16"), tps, counts):
            yield BenchCase(op, tp, count, format)
    elif op == "attention":
        for format, tp, count, context in product(("bf16", "fp8"), tps, tokens or SEQUENCES, contexts):
            yield BenchCase(op, tp, count, format, context=context)
    elif op == "prefill_attention":
        for format, tp, count, context in product(("bf16", "fp8"), tps, tokens or (512, 4096), contexts):
            if count <= context:
                yield BenchCase(op, tp, count, format, context=context)
    elif op == "store_qkv":
        for format, tp, count in product(("bf16", "fp8"), tps, tokens or TOKENS):
            yield BenchCase(op, tp, count, format)
    else:  # the same on every rank
        format, counts = {
            "router": ("fp32", TOKENS),
            "norm": ("bf16", TOKENS),
            "sampling": ("fp32", SEQUENCES),
        }[op]
        for count in tokens or counts:
            yield BenchCase(op, 1, count, format)


def _quick_cases() -> Iterator[BenchCase]:
    """Eight GPUs, a few sizes of everything."""
    for count in (1, 8, 32, 512):
        yield BenchCase("experts", 8, count, "nvfp4", "zipf")
    yield BenchCase("experts", 8, 1, "mxfp4", "zipf")
    yield BenchCase("experts", 1, 128, "nvfp4", "uniform")
    for format, count in product(("nvfp4", "fp8"), (1, 128)):
        yield BenchCase("qkv", 8, count, format)
    yield BenchCase("output", 8, 1, "nvfp4")
    yield BenchCase("head", 8, 8, "bf16")
    for count in (1, 512):
        yield BenchCase("router", 1, count, "fp32")
    for format, (count, context) in product(("bf16", "fp8"), ((1, 131072), (32, 8192))):
        yield BenchCase("attention", 8, count, format, context=context)
    yield BenchCase("prefill_attention", 8, 4096, "bf16", context=32768)
    yield BenchCase("norm", 1, 8, "bf16")
    yield BenchCase("store_qkv", 8, 8, "fp8")
    yield BenchCase("sampling", 1, 8, "fp32")
