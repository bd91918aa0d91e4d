from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from safetensors_file import entry, write

from nybble.engine.errors import CheckpointError, ConfigError, OptionError
from nybble.engine.planning.gpu_specs import custom_gpus, parse_gpus
from nybble.server.commands.plan_report import print_plan

DATA = Path(__file__).parents[2] / "engine" / "data"
NVFP4 = DATA / "glm-4.7-nvfp4-config.json"


def _print(gpus: str, path: Path = NVFP4, **options: Any) -> str:
    out = io.StringIO()
    print_plan(path, parse_gpus(gpus), out, **options)
    return out.getvalue()


def _json(gpus: str, path: Path = NVFP4, **options: Any) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(_print(gpus, path, as_json=True, **options))
    return fields


def _cells(text: str, first: str) -> list[str]:
    """The cells of the table row that begins with `first`."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"│ {first} "))
    return [cell.strip() for cell in line.strip("│").split("│")]


@pytest.fixture(scope="module")
def four_h100() -> str:
    return _print("4xH100")


def test_parts(four_h100: str) -> None:
    assert _cells(four_h100, "routed experts") == ["routed experts", "ModelOpt NVFP4", "335.964", "176.00"]
    assert _cells(four_h100, "attention") == ["attention", "BF16", "12.542", "23.36"]
    assert _cells(four_h100, "main model") == ["main model", "", "352.798", "203.79"]
    assert _cells(four_h100, "draft layer") == ["draft layer", "BF16", "3.988", "7.43"]
    assert "A token uses 32.86 B parameters and at batch 1 reads 37.7 GB of weights." in four_h100


def test_a_set_that_fits(four_h100: str) -> None:
    assert "4 x H100 80GB: fits, best as TP 4, EP 1, PP 1; longest context 202,752 tokens (bf16" in four_h100
    splits = [line for line in four_h100.splitlines() if line.startswith("│  4 │")]
    assert len(splits) == 2  # EP 1 and EP 4
    cells = [cell.strip() for cell in splits[0].strip("│").split("│")]
    assert cells[:4] == ["4", "1", "1", "53.0"]
    assert cells[7:] == ["1.2", "2.4", "351"]


def test_everything_modelled_says_so(four_h100: str) -> None:
    lines = four_h100.splitlines()
    titles = [line for line in lines if "best split first" in line or "Decode ceiling" in line]
    assert len(titles) == 3
    assert all("(modelled)" in title for title in titles)
    memory, decode = lines[-2:]
    assert memory.startswith("memory (modelled)") and "4 GiB of workspace" in memory
    assert decode.startswith("tokens/s (modelled: an upper bound, not measured)")


def test_ceilings(four_h100: str) -> None:
    bf16, fp8 = four_h100.split("Decode ceiling")[1:]
    assert _cells(bf16, "202,752")[2:] == ["-"] * 6
    # 37.7 GB of weights and 76.4 or 38.2 GB of KV cache at 13.4 TB/s: 117 and 176, less the shared router.
    assert 114 < int(_cells(bf16, "202,752")[1]) < 118
    assert 172 < int(_cells(fp8, "202,752")[1]) < 177


def test_no_line_is_wider_than_a_page(four_h100: str) -> None:
    tables = [line for line in four_h100.splitlines() if line[:1] in "┏┃┡│├└"]
    assert len(tables) > 30
    assert max(map(len, tables)) <= 110
    assert "…" not in four_h100


def test_a_set_that_does_not_fit() -> None:
    printed = _print("1xH200")
    assert (
        "1 x H200: does not fit: as TP 1, EP 1, PP 1 a GPU needs 251.2 GiB (211.2 weights, 4.0 workspace, "
        "36.0 fp8 KV cache for one request of 202,752 tokens) and has 139.0. Smallest change first: "
        "2 x H200; or GPUs with 252 GiB usable." in printed
    )
    assert "Decode ceiling" not in printed


def test_a_shorter_context_is_the_smallest_change() -> None:
    out = io.StringIO()
    print_plan(NVFP4, custom_gpus(240, 4, 1), out)
    assert "Smallest change first: a context of at most 139," in out.getvalue()
    assert "Decode ceiling" in out.getvalue()  # for the contexts that do fit
    assert ": fits, best as" in _print("1xB300", max_model_len=100_000)


def test_without_the_draft_layer() -> None:
    with_draft, without = _json("4xH100"), _json("4xH100", with_draft=False)
    assert {part["part"] for part in with_draft["parts"]} - {part["part"] for part in without["parts"]} == {
        "draft layer",
        "draft copies, not loaded",
    }
    gained = (
        without["splits"][0]["kv_room_bytes_all_gpus"] - with_draft["splits"][0]["kv_room_bytes_all_gpus"]
    )
    assert 7.43 < gained / 2**30 < 8  # its router and projection are on each rank
    assert without["kv_bytes_per_token"] == {"bf16": 376_832, "fp8": 188_416}


def test_idle_gpus_are_mentioned() -> None:
    assert "best as TP 4, EP 1, PP 1, which leaves 1 unused;" in _print("5xH200")


def test_json() -> None:
    fields = _json("4xH100", max_model_len=4096)
    assert fields["gpus"] == {
        "count": 4,
        "name": "H100 80GB",
        "memory_gib": 79,
        "bandwidth_tbps": 3.35,
        "workspace_gib": 4,
    }
    assert (fields["fits"], fields["shortfall"], fields["max_model_len"]) == (True, None, 4096)
    assert fields["main_model"]["num_parameters"] == pytest.approx(352.80e9, abs=5e6)
    assert fields["main_model"]["num_bytes"] == pytest.approx(203.8 * 2**30, rel=5e-4)
    best = fields["splits"][0]
    assert (best["tensor_parallel"], best["expert_parallel"], best["pipeline_parallel"]) == (4, 1, 1)
    assert best["tokens_per_second_batch_1"] == pytest.approx(355, rel=0.02)
    assert {ceiling["context"] for ceiling in fields["decode_ceilings"]} == {4096}
    assert len(fields["decode_ceilings"]) == 2 * 7
    assert all("modelled" in line for line in fields["modelled"])


def test_json_of_a_set_that_does_not_fit() -> None:
    fields = _json("1xH200")
    assert fields["fits"] is False
    assert fields["shortfall"]["changes"] == ["2 x H200", "GPUs with 252 GiB usable"]
    assert fields["splits"][0]["tokens_per_second_batch_1"] is None
    assert {ceiling["tokens_per_second"] for ceiling in fields["decode_ceilings"]} == {None}


def _write_checkpoint(directory: Path, dtype: str) -> None:
    """One dense layer: hidden 32, 2 query heads and 1 KV head of 16, MLP 48, vocabulary 100."""
    config = json.loads((DATA / "glm-4.7-config.json").read_text()) | {
        "hidden_size": 32, "num_hidden_layers": 1, "first_k_dense_replace": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "attention_bias": False, "use_qk_norm": False,
        "intermediate_size": 48, "vocab_size": 100, "eos_token_id": 0, "num_nextn_predict_layers": 0,
        "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": [100, 32], "model.norm": [32], f"{layer}.input_layernorm": [32],
        f"{layer}.post_attention_layernorm": [32], f"{layer}.self_attn.q_proj": [32, 32],
        f"{layer}.self_attn.k_proj": [16, 32], f"{layer}.self_attn.v_proj": [16, 32],
        f"{layer}.self_attn.o_proj": [32, 32], f"{layer}.mlp.gate_proj": [48, 32],
        f"{layer}.mlp.up_proj": [48, 32], f"{layer}.mlp.down_proj": [32, 48],
    }  # fmt: skip
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + {"BF16": 2, "F32": 4}[dtype] * (shape[0] if len(shape) == 1 else shape[0] * shape[1])
        header[f"{name}.weight"] = entry(dtype, shape, position, end)
        position = end
    write(directory / "model.safetensors", header, bytes(position))


@pytest.mark.parametrize(("dtype", "item_bytes"), [("BF16", 2), ("F32", 4)])
def test_a_checkpoint_is_read_by_its_headers(dtype: str, item_bytes: int, tmp_path: Path) -> None:
    _write_checkpoint(tmp_path, dtype)
    fields = _json("1xRTX 5090", tmp_path, max_model_len=100)
    parts = {part["part"]: (part["layouts"], part["num_bytes"]) for part in fields["parts"]}
    assert parts == {
        "attention": ([dtype], 3072 * item_bytes),
        "dense MLP": ([dtype], 4608 * item_bytes),
        "embedding": ([dtype], 3200 * item_bytes),
        "norms": ([dtype], 96 * item_bytes),
    }
    assert fields["fits"]


def test_a_path_that_is_neither(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        _print("1xH200", tmp_path / "missing")
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        _print("1xH200", tmp_path)


def test_an_incomplete_checkpoint_is_refused(tmp_path: Path) -> None:
    _write_checkpoint(tmp_path, "BF16")
    write(tmp_path / "model.safetensors", {"model.norm.weight": entry("BF16", [32], 0, 64)}, bytes(64))
    with pytest.raises(CheckpointError, match="the checkpoint lacks"):
        _print("1xH200", tmp_path)


def test_a_config_of_another_recipe_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    fields = json.loads(NVFP4.read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    config.write_text(json.dumps(fields))
    with pytest.raises(ConfigError, match="give the checkpoint directory"):
        _print("1xH200", config)


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(OptionError, match="max_model_len is 300000"):
        _print("8xH200", max_model_len=300_000)
