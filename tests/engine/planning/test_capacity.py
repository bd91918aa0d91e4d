"""Expected numbers are those of a calculation by hand from GLM-4.7's published dimensions."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nybble.engine.checkpoint.checkpoint import TensorEntry
from nybble.engine.checkpoint.model_config import ModelConfig
from nybble.engine.errors import CheckpointError, ConfigError, OptionError
from nybble.engine.planning.capacity import (
    Plan,
    SplitPlan,
    decode_ceiling,
    decode_ceilings,
    make_plan,
    plan_split,
)
from nybble.engine.planning.gpu_specs import GIB, custom_gpus, parse_gpus
from nybble.engine.planning.inventory import Inventory, assume_inventory, distinct_experts, read_inventory
from nybble.engine.planning.placement import Split
from nybble.engine.planning.splits import split_problem

DATA = Path(__file__).parents[1] / "data"
BF16: dict[str, Any] = json.loads((DATA / "glm-4.7-config.json").read_text())
NVFP4: dict[str, Any] = json.loads((DATA / "glm-4.7-nvfp4-config.json").read_text())
FULL = 202_752

Tensor = tuple[str, str, tuple[int, ...]]


def _assumed(fields: dict[str, Any]) -> Inventory:
    return assume_inventory(ModelConfig.from_fields(fields), fields)


def _matrix(name: str, rows: int, columns: int, is_nvfp4: bool) -> Iterator[Tensor]:
    if not is_nvfp4:
        yield f"{name}.weight", "BF16", (rows, columns)
        return
    yield f"{name}.weight", "U8", (rows, columns // 2)
    yield f"{name}.weight_scale", "F8_E4M3", (rows, columns // 16)
    yield f"{name}.weight_scale_2", "F32", ()
    yield f"{name}.input_scale", "F32", ()


def _mlp(name: str, width: int, is_nvfp4: bool) -> Iterator[Tensor]:
    yield from _matrix(f"{name}.gate_proj", width, 5120, is_nvfp4)
    yield from _matrix(f"{name}.up_proj", width, 5120, is_nvfp4)
    yield from _matrix(f"{name}.down_proj", 5120, width, is_nvfp4)


def _attention(name: str, has_kv_scales: bool) -> Iterator[Tensor]:
    for letter, rows in (("q", 12288), ("k", 1024), ("v", 1024)):
        yield f"{name}.{letter}_proj.weight", "BF16", (rows, 5120)
        yield f"{name}.{letter}_proj.bias", "BF16", (rows,)
    yield f"{name}.o_proj.weight", "BF16", (5120, 12288)
    yield f"{name}.q_norm.weight", "BF16", (128,)
    yield f"{name}.k_norm.weight", "BF16", (128,)
    if has_kv_scales:
        yield f"{name}.k_proj.k_scale", "F32", ()
        yield f"{name}.v_proj.v_scale", "F32", ()


def _layer(layer: int) -> Iterator[Tensor]:
    name, is_main = f"model.layers.{layer}", layer < 92
    yield f"{name}.input_layernorm.weight", "BF16", (5120,)
    yield f"{name}.post_attention_layernorm.weight", "BF16", (5120,)
    yield from _attention(f"{name}.self_attn", is_main)
    if layer < 3:
        yield from _mlp(f"{name}.mlp", 12288, True)
        return
    yield f"{name}.mlp.gate.weight", "BF16", (160, 5120)
    yield f"{name}.mlp.gate.e_score_correction_bias", "F32", (160,)
    for expert in range(160):
        yield from _mlp(f"{name}.mlp.experts.{expert}", 1536, is_main)
    yield from _mlp(f"{name}.mlp.shared_experts", 1536, is_main)


def _nvidia_tensors() -> Iterator[Tensor]:
    """Every tensor of nvidia/GLM-4.7-NVFP4."""
    for name in ("model.embed_tokens", "lm_head", "model.layers.92.embed_tokens"):
        yield f"{name}.weight", "BF16", (151552, 5120)
    yield "model.layers.92.shared_head.head.weight", "BF16", (151552, 5120)
    for name in ("norm", "layers.92.enorm", "layers.92.hnorm", "layers.92.shared_head.norm"):
        yield f"model.{name}.weight", "BF16", (5120,)
    yield "model.layers.92.eh_proj.weight", "BF16", (5120, 10240)
    for layer in range(93):
        yield from _layer(layer)


def _entries(tensors: Iterator[Tensor]) -> dict[str, TensorEntry]:
    return {name: TensorEntry(name, Path("shard"), dtype, shape) for name, dtype, shape in tensors}


@pytest.fixture(scope="module")
def nvidia() -> Inventory:
    return _assumed(NVFP4)


@pytest.fixture(scope="module")
def read() -> Inventory:
    entries = _entries(_nvidia_tensors())
    assert len(entries) == 173_863  # what the real checkpoint has
    return read_inventory(ModelConfig.from_fields(NVFP4), entries)


def _main_bytes(inventory: Inventory) -> int:
    return sum(group.num_bytes for group in inventory.main)


def _plan(inventory: Inventory, gpus: str, max_model_len: int | None = None) -> Plan:
    return make_plan(inventory, parse_gpus(gpus), max_model_len)


def _requests(plan: SplitPlan) -> tuple[float, float]:
    return plan.max_tokens["bf16"] / FULL, plan.max_tokens["fp8"] / FULL


PARAMETERS = {
    "attention": 12.542,
    "dense MLP": 0.566,
    "routed experts": 335.964,
    "shared experts": 2.100,
    "router": 0.0729,
    "embedding": 0.776,
    "lm_head": 0.776,
    "norms": 0.001,
    "draft layer": 3.988,
    "draft copies, not loaded": 1.552,
}


@pytest.mark.parametrize("source", ["nvidia", "read"])
def test_parameters_by_part(source: str, request: pytest.FixtureRequest) -> None:
    inventory: Inventory = request.getfixturevalue(source)
    parts = {part.part: part.num_parameters / 1e9 for part in inventory.part_sizes()}
    assert parts == pytest.approx(PARAMETERS, abs=5e-4)
    assert sum(group.num_parameters for group in inventory.main) / 1e9 == pytest.approx(352.80, abs=0.005)
    assert sum(parts.values()) == pytest.approx(358.34, abs=0.005)


@pytest.mark.parametrize("source", ["nvidia", "read"])
def test_bytes_of_the_nvidia_layout(source: str, request: pytest.FixtureRequest) -> None:
    inventory: Inventory = request.getfixturevalue(source)
    sizes = {part.part: part.num_bytes for part in inventory.part_sizes()}
    fp4 = sizes["dense MLP"] + sizes["routed experts"] + sizes["shared experts"]
    assert _main_bytes(inventory) / GIB == pytest.approx(203.8, abs=0.05)
    assert fp4 / GIB == pytest.approx(177.40, abs=0.01)
    assert (_main_bytes(inventory) - fp4) / GIB == pytest.approx(26.39, abs=0.01)
    assert sizes["draft layer"] / GIB == pytest.approx(7.43, abs=0.005)
    assert sum(sizes.values()) / GIB == pytest.approx(214.1, abs=0.05)


def test_headers_say_each_byte(read: Inventory) -> None:
    """One layer's router, and the shared experts with their scales."""
    sizes = {part.part: part.num_bytes for part in read.part_sizes()}
    assert sizes["router"] == 89 * (160 * 5120 * 2 + 160 * 4)
    assert sizes["shared experts"] == 89 * 3 * (1536 * 5120 // 2 + 1536 * 5120 // 16 + 8)


def test_layouts_are_named(read: Inventory, nvidia: Inventory) -> None:
    for inventory in (read, nvidia):
        layouts = {part.part: part.layouts for part in inventory.part_sizes()}
        assert layouts["routed experts"] == layouts["dense MLP"] == ("ModelOpt NVFP4",)
        assert layouts["attention"] == layouts["router"] == layouts["draft layer"] == ("BF16",)


def test_bytes_in_bf16() -> None:
    inventory = _assumed(BF16)
    assert _main_bytes(inventory) / GIB == pytest.approx(657, abs=0.5)
    assert {layout for part in inventory.part_sizes() for layout in part.layouts} == {"BF16"}


def test_a_checkpoint_in_fp8() -> None:
    """The main model with every matrix of attention and MLPs in FP8 and the head in BF16: 330 GiB and 0.8."""

    def stored(name: str, dtype: str, shape: tuple[int, ...]) -> Iterator[Tensor]:
        is_matrix = "_proj.weight" in name
        yield name, "F8_E4M3" if is_matrix else dtype, shape
        if is_matrix:
            yield f"{name}_scale", "BF16", (shape[0], 1)

    def tensors() -> Iterator[Tensor]:
        for name, dtype, shape in _nvidia_tensors():
            if name.endswith(("weight", "bias")) and "layers.92" not in name:
                logical = (shape[0], shape[1] * 2) if dtype == "U8" else shape
                yield from stored(name, dtype, logical)

    config = ModelConfig.from_fields(BF16 | {"num_nextn_predict_layers": 0})
    inventory = read_inventory(config, _entries(tensors()))
    assert _main_bytes(inventory) / GIB == pytest.approx(330.8, abs=0.5)
    assert {part.part: part.layouts for part in inventory.part_sizes()}["attention"] == (
        "BF16",
        "FP8 per channel",
    )


def test_tensors_without_a_place() -> None:
    entries = _entries(iter([("model.layers.0.visual.weight", "BF16", (2, 2))]))
    with pytest.raises(CheckpointError, match=r"no place for .*layers\.0\.visual"):
        read_inventory(ModelConfig.from_fields(BF16), entries)


@pytest.mark.parametrize("quantization", [{"quant_method": "compressed-tensors"}, {"quant_algo": "FP8"}, "x"])
def test_an_unknown_recipe_is_refused(quantization: object) -> None:
    with pytest.raises(ConfigError, match=r"quantization_config.*give the checkpoint directory"):
        _assumed(BF16 | {"quantization_config": quantization})


def test_matrices_that_are_no_whole_blocks() -> None:
    with pytest.raises(ConfigError, match="routed experts: 1000 columns"):
        _plan(_assumed(NVFP4 | {"moe_intermediate_size": 1000}), "8xH100")


def test_what_a_token_uses(nvidia: Inventory) -> None:
    assert nvidia.active_parameters() / 1e9 == pytest.approx(32.86, abs=0.005)
    assert nvidia.step_bytes(1) / 1e9 == pytest.approx(37.7, abs=0.05)


@pytest.mark.parametrize(
    ("batch", "hit"), [(1, 8), (4, 30), (8, 54), (16, 90), (32, 129), (64, 154), (128, 160)]
)
def test_distinct_experts(batch: int, hit: int) -> None:
    assert round(distinct_experts(160, 8, batch)) == hit


@pytest.mark.parametrize(("batch", "gigabytes"), [(1, 37.7), (4, 63.4), (16, 134), (128, 217)])
def test_weights_read_by_a_batch(batch: int, gigabytes: float, nvidia: Inventory) -> None:
    """26.8 GB outside of the experts, dense layers and shared experts 1.5 GB, and 1.18 GB an expert."""
    assert nvidia.step_bytes(batch) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_kv_cache(nvidia: Inventory) -> None:
    main = nvidia.without_draft()
    assert main.kv_bytes_per_token("bf16") == 376_832
    assert main.kv_bytes_per_token("fp8") == 188_416
    assert main.kv_bytes_per_token("bf16") * FULL / GIB == pytest.approx(71.16, abs=0.005)
    assert main.kv_bytes_per_token("fp8") * FULL / GIB == pytest.approx(35.58, abs=0.005)
    assert nvidia.kv_bytes_per_token("bf16") * FULL / GIB == pytest.approx(71.93, abs=0.005)


@pytest.mark.parametrize(
    ("gpus", "room", "requests"),
    [
        ("4xH100", 88, (1.2, 2.4)),
        ("8xH100", 389, (5.4, 10.8)),
        ("2xH200", 59, (0.8, 1.6)),
        ("4xH200", 329, (4.5, 9.1)),
        ("2xB200", 137, (1.9, 3.8)),
        ("1xB300", 53, (0.7, 1.45)),
        ("4xRTX PRO 6000", 153, (2.1, 4.2)),
        ("8xRTX PRO 6000", 517, (7.1, 14.4)),
    ],
)
def test_what_fits(gpus: str, room: float, requests: tuple[float, float], nvidia: Inventory) -> None:
    """The published sums share nothing twice; ranks each hold the router, up to 1 GiB over 8 of them."""
    plan = _plan(nvidia, gpus)
    assert plan.shortfall is None
    assert room - 2 < plan.best.kv_room_bytes / GIB < room + 0.5
    assert _requests(plan.best) == pytest.approx(requests, abs=0.09)
    assert plan.best.split == Split(plan.gpus.count, 1, 1)


@pytest.mark.parametrize("gpus", ["1xH100", "1xH200", "1xB200", "2xH100", "3xH100", "7xRTX 5090"])
def test_what_does_not_fit(gpus: str, nvidia: Inventory) -> None:
    plan = _plan(nvidia, gpus)
    assert plan.shortfall is not None
    assert plan.shortfall.needed_bytes > plan.shortfall.gpus.gpu.memory_bytes
    assert set(plan.best.max_tokens.values()) == {0}


def test_the_split_that_comes_nearest_is_explained(nvidia: Inventory) -> None:
    """Three stages of 31 layers need less of each GPU than two ranks, each with half of the model."""
    plan = _plan(nvidia, "3xH100")
    shortfall = plan.shortfall
    assert shortfall is not None and shortfall.split == plan.best.split == Split(1, 1, 3)
    assert shortfall.needed_bytes / GIB == pytest.approx(77.7 + 4 + 35.97 / 3, abs=0.1)


@pytest.mark.parametrize(
    ("tensor_parallel", "gib", "kv_gib"), [(4, 52.9, 17.8), (8, 26.5, 8.9), (16, 13.3, 8.9)]
)
def test_weights_and_kv_cache_of_a_rank(
    tensor_parallel: int, gib: float, kv_gib: float, nvidia: Inventory
) -> None:
    """Beyond 8 ranks, KV heads are replicated: a rank keeps a whole one."""
    split = Split(tensor_parallel, 1, 1)
    plan = plan_split(nvidia.without_draft(), split, 100 * GIB)
    room = 100 * GIB - plan.rank_bytes
    assert room / plan.max_tokens["bf16"] * FULL / GIB == pytest.approx(kv_gib, abs=0.05)
    assert plan_split(nvidia, split, 100 * GIB).rank_bytes / GIB == pytest.approx(gib, abs=0.3)


@pytest.mark.parametrize(("tensor_parallel", "gib"), [(1, 203.79), (8, 204.75), (16, 207.65)])
def test_what_ranks_share_and_what_each_holds(tensor_parallel: int, gib: float, nvidia: Inventory) -> None:
    """Each holds routers and norms (0.1376 GiB); 16 hold each key and value projection twice (1.797 GiB)."""
    plan = plan_split(nvidia.without_draft(), Split(tensor_parallel, 1, 1), 300 * GIB)
    assert tensor_parallel * plan.rank_bytes / GIB == pytest.approx(gib, abs=0.01)


def test_pipeline_stages_hold_everything_once(nvidia: Inventory) -> None:
    """Two stages of 47 and 46 layers; only the draft layer's embedding (1.45 GiB) is there twice."""
    plan = plan_split(nvidia, Split(1, 1, 2), 200 * GIB)
    assert [stage.num_layers for stage in plan.stages] == [47, 46]
    total = sum(stage.rank_bytes for stage in plan.stages) / GIB
    assert total == pytest.approx(211.2 + 1.445, abs=0.05)
    main = plan_split(nvidia.without_draft(), Split(1, 1, 4), 200 * GIB)
    assert sum(stage.rank_bytes for stage in main.stages) / GIB == pytest.approx(203.8, abs=0.05)
    assert [stage.num_layers for stage in main.stages] == [23, 23, 23, 23]


def test_a_tied_head_stands_on_the_last_stage() -> None:
    tied = BF16 | {"tie_word_embeddings": True, "num_nextn_predict_layers": 0}
    stages = plan_split(_assumed(tied), Split(1, 1, 92), 100 * GIB).stages
    dense, sparse = 136_329_472 + 188_743_680 + 10_240, 136_329_472 + 161 * 23_592_960 + 819_360 + 10_240
    table = 151_552 * 5120
    assert stages[0].rank_bytes == 2 * (dense + table)
    assert stages[1].rank_bytes == 2 * dense
    assert stages[-1].rank_bytes == 2 * (sparse + table + 5120)


def test_whole_experts_need_no_whole_blocks() -> None:
    narrow = {"moe_intermediate_size": 48, "n_shared_experts": 8}  # 48 / 8 = 6; 8 x 48 / 8 = 48
    inventory = _assumed(NVFP4 | narrow)
    assert split_problem(inventory, Split(8, 8, 1)) is None
    assert split_problem(inventory, Split(8, 1, 1)) is not None
    assert _plan(inventory, "8xH100").best.split == Split(8, 8, 1)


def test_gpus_that_no_split_can_use_stay_idle(nvidia: Inventory) -> None:
    assert _plan(nvidia, "5xH200").best.split == Split(4, 1, 1)
    assert _plan(nvidia, "3xGB10").best.split == Split(1, 1, 3)  # two do not hold it


def test_more_gpus_are_the_way_out(nvidia: Inventory) -> None:
    one, two = _plan(nvidia, "1xH200").shortfall, _plan(nvidia, "2xH100").shortfall
    assert one is not None and two is not None
    assert (one.num_gpus, two.num_gpus) == (2, 4)
    assert (one.shorter_context, one.fits_without_draft) == (0, False)
    assert one.needed_bytes / GIB == pytest.approx(211.2 + 4 + 35.97, abs=0.05)
    assert one.weight_bytes / GIB == pytest.approx(211.2, abs=0.05)


def test_what_was_proposed_does(nvidia: Inventory) -> None:
    shortfall = make_plan(nvidia, custom_gpus(230, 4, 1)).shortfall
    assert shortfall is not None
    # 230 - 4 - 211.2 = 14.8 GiB, of 190,464 B a token.
    assert shortfall.shorter_context == pytest.approx(83_300, rel=0.01)
    assert make_plan(nvidia, custom_gpus(230, 4, 1), shortfall.shorter_context).shortfall is None
    assert make_plan(nvidia, custom_gpus(230, 4, 1), shortfall.shorter_context + 1).shortfall is not None
    enough = shortfall.needed_bytes / GIB
    assert make_plan(nvidia, custom_gpus(enough + 0.01, 4, 1)).shortfall is None
    assert make_plan(nvidia, custom_gpus(enough - 0.01, 4, 1)).shortfall is not None


def test_leaving_out_the_draft_layer_may_be_enough(nvidia: Inventory) -> None:
    gpus = custom_gpus(245, 4, 1)  # 203.8 + 4 + 35.6 = 243.4 without, 251.2 with
    shortfall = make_plan(nvidia, gpus).shortfall
    assert shortfall is not None and shortfall.fits_without_draft
    assert make_plan(nvidia.without_draft(), gpus).shortfall is None


def test_gpus_without_room_for_their_workspace(nvidia: Inventory) -> None:
    shortfall = make_plan(nvidia, custom_gpus(4, 1, 8)).shortfall
    assert shortfall is not None and shortfall.num_gpus is None


@pytest.mark.parametrize("length", [0, -1, FULL + 1])
def test_a_context_beyond_the_model(length: int, nvidia: Inventory) -> None:
    with pytest.raises(OptionError, match=f"max_model_len is {length}, expected 1 to the model's 202752"):
        _plan(nvidia, "8xH100", length)


def _one_device(inventory: Inventory) -> SplitPlan:
    return plan_split(inventory, Split(1, 1, 1), 1000 * GIB)


@pytest.mark.parametrize(("bandwidth", "speed"), [(13.4, 355), (26.8, 710), (9.6, 254), (64, 1696)])
def test_decode_ceiling_of_one_request(bandwidth: float, speed: float, nvidia: Inventory) -> None:
    assert decode_ceiling(_one_device(nvidia), nvidia, bandwidth, "fp8", 1, 0) == pytest.approx(
        speed, rel=2e-3
    )


@pytest.mark.parametrize(
    ("dtype", "batch", "gigabytes"),
    [("bf16", 1, 37.7 + 76.4), ("fp8", 1, 37.7 + 38.2), ("fp8", 4, 63.4 + 152.8)],
)
def test_decode_ceiling_at_full_context(dtype: Any, batch: int, gigabytes: float, nvidia: Inventory) -> None:
    speed = decode_ceiling(_one_device(nvidia), nvidia, 10, dtype, batch, FULL)
    assert speed == pytest.approx(batch * 10_000 / gigabytes, rel=2e-3)


def test_ranks_read_side_by_side_and_stages_in_turn(nvidia: Inventory) -> None:
    def speed(split: Split) -> float:
        return decode_ceiling(plan_split(nvidia, split, 200 * GIB), nvidia, 3.35, "fp8", 1, 0)

    assert 345 < speed(Split(4, 1, 1)) < 355  # 355, less the router on each rank
    assert speed(Split(1, 1, 4)) == pytest.approx(355 / 4, rel=2e-3)
    assert speed(Split(2, 1, 2)) == pytest.approx(355 / 2, rel=0.01)


def test_the_head_tied_to_the_embedding_is_read() -> None:
    plain, tied = _assumed(BF16), _assumed(BF16 | {"tie_word_embeddings": True})
    assert tied.step_bytes(1) == plain.step_bytes(1)
    for split in (Split(1, 1, 1), Split(1, 1, 2)):
        speeds = [
            decode_ceiling(plan_split(inventory, split, 1000 * GIB), inventory, 1, "fp8", 1, 0)
            for inventory in (plain, tied)
        ]
        assert speeds[0] == pytest.approx(speeds[1])


def test_ceilings_end_where_the_cache_does(nvidia: Inventory) -> None:
    plan = _plan(nvidia, "4xH100")
    ceilings = {(c.kv_dtype, c.context, c.batch): c.tokens_per_second for c in decode_ceilings(plan)}
    assert sorted({context for _, context, _ in ceilings}) == [4096, 32_768, 131_072, FULL]
    assert ceilings["bf16", FULL, 1] is not None and ceilings["bf16", FULL, 4] is None  # 1.2 requests fit
    assert ceilings["fp8", 131_072, 4] is None and ceilings["fp8", 131_072, 1] is not None
    one, many = ceilings["fp8", 4096, 1], ceilings["fp8", 4096, 64]
    assert one is not None and many is not None and one < many < 64 * one


def test_ceilings_stop_at_the_context_that_was_asked_for(nvidia: Inventory) -> None:
    contexts = {ceiling.context for ceiling in decode_ceilings(_plan(nvidia, "4xH100", 10_000))}
    assert contexts == {4096, 10_000}
