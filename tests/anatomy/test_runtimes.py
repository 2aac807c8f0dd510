"""What is said of runtimes rests on rows of the table, and a missing row says nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import families
import pytest
from scripted import script
from transformers import AutoConfig

from halve.anatomy import Anatomy, discover
from halve.anatomy.runtimes import (
    DEPTH_CUT,
    IN_PLACE,
    PROPORTION,
    ROUNDING,
    WHOLE,
    Measurement,
    cuts,
    family_and_traits,
    measured,
    period,
    runtimes,
    worst,
)
from halve.cut.plan.sizes import parse_layers

WINDOW = {"sliding_window": 8, "max_position_embeddings": 64}


def anatomy_of(family: str, **changes: object) -> Anatomy:
    values = {"head_dim": 16} if family not in families.COUPLED else {}
    return discover(families.config(family, **{**values, **changes}))


def said(anatomy: Anatomy, runtime: str, kept_layers: Sequence[int] | None = None, **sizes: int) -> tuple[str, str]:
    (found,) = (r for r in runtimes(anatomy, anatomy.sizes.at(**sizes), kept_layers) if r.name == runtime)
    return found.opens, found.remedy


# ---- the table


def test_every_row_of_the_table_says_one_thing() -> None:
    rows = measured()
    assert max(Counter((row.runtime, row.kind, row.cut) for row in rows).values()) == 1
    assert all((row.difference is None) == bool(row.reason) for row in rows)
    versions = {row.runtime: {other.version for other in rows if other.runtime == row.runtime} for row in rows}
    assert versions.keys() == {"llama.cpp", "transformers", "vLLM"}
    assert all(len(found) == 1 and all(found) for found in versions.values())
    named = {WHOLE, DEPTH_CUT, IN_PLACE, PROPORTION, "ffn", "hidden", "heads", "kv_heads"}
    assert {row.cut for row in rows} == named


def test_rounding_and_faults_are_far_apart() -> None:
    differences = [row.difference for row in measured() if row.difference is not None]
    assert not [d for d in differences if 0.8 * ROUNDING < d < 1.5 * ROUNDING]
    assert Measurement("r", "1", "llama", "ffn", 0.9 * ROUNDING, "").opens == "yes"
    assert Measurement("r", "1", "llama", "ffn", 1.1 * ROUNDING, "").opens == "no"
    assert Measurement("r", "1", "llama", "ffn", None, "does not load").opens == "no"


def test_rows_are_replaced_and_the_others_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import halve.anatomy.runtimes as module

    write_table = script("runtimes").write_table
    monkeypatch.setattr(module, "TABLE", tmp_path / "table.csv")
    measured.cache_clear()
    try:
        kept = Measurement("r", "1", "llama", "layers", None, "no, it says")
        write_table([Measurement("r", "1", "llama", "ffn", 0.5, ""), kept])
        write_table([Measurement("r", "2", "llama", "ffn", 1e-6, "")])
        assert measured() == (
            Measurement("r", "2", "llama", "ffn", 1e-6, ""),
            Measurement("r", "1", "llama", "layers", None, "no, it says"),
        )
    finally:
        monkeypatch.undo()
        measured.cache_clear()


# ---- verdicts


def test_an_axis_cut_alone_is_said_from_its_row() -> None:
    llama, qwen2 = anatomy_of("llama"), anatomy_of("qwen2")
    assert said(llama, "llama.cpp", hidden=48) == ("yes", "")
    assert said(llama, "transformers", hidden=48) == ("yes", "")
    assert said(qwen2, "llama.cpp", ffn=48) == ("yes", "")
    opens, remedy = said(qwen2, "llama.cpp", hidden=48)
    assert opens == "no"
    assert remedy == (
        "--heads 3 (hidden = heads x head_dim), or --hidden 96 (= heads x head_dim); or cut only ffn and layers"
    )


def test_a_cut_of_several_axes_needs_a_row_for_each() -> None:
    qwen2 = anatomy_of("qwen2")
    assert cuts(qwen2, qwen2.sizes.at(ffn=48, hidden=48, layers=4)) == (IN_PLACE, "ffn", "hidden")
    assert said(qwen2, "llama.cpp", ffn=48, layers=4)[0] == "yes"
    assert said(qwen2, "llama.cpp", ffn=48, layers=4, hidden=48)[0] == "no"
    assert worst(["yes", "unknown"]) == "unknown"
    assert worst(["unknown", "no", "yes"]) == "no"


def test_hidden_cut_in_proportion_with_heads_has_a_row_of_its_own() -> None:
    qwen2 = anatomy_of("qwen2")
    assert cuts(qwen2, qwen2.sizes.at(hidden=48, heads=3, kv_heads=3)) == (PROPORTION,)
    assert said(qwen2, "llama.cpp", hidden=48, heads=3, kv_heads=3)[0] == "yes"
    granite = anatomy_of("granite")
    assert said(granite, "llama.cpp", hidden=48, heads=3, kv_heads=3)[0] == "yes"
    assert said(granite, "llama.cpp", hidden=48)[0] == "no"
    assert cuts(qwen2, qwen2.sizes) == (WHOLE,)


def test_what_was_not_measured_is_unknown() -> None:
    falcon = discover(
        AutoConfig.for_model("falcon", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64)
    )
    assert [r.opens for r in runtimes(falcon, falcon.sizes.at(layers=1))] == ["yes", "unknown", "unknown"]


def test_a_family_that_a_runtime_does_not_know_is_no_for_every_cut() -> None:
    sizes = {"hidden_size": 64, "word_embed_proj_dim": 64, "ffn_dim": 96, "num_attention_heads": 4, "vocab_size": 100}
    opt = discover(AutoConfig.for_model("opt", num_hidden_layers=4, **sizes))
    assert said(opt, "llama.cpp", layers=3) == ("no", "")
    assert said(opt, "llama.cpp", hidden=32, heads=2, kv_heads=2) == ("no", "")


def test_a_family_is_known_by_what_sets_its_models_apart() -> None:
    assert family_and_traits(families.config("mistral", sliding_window=None)) == "mistral"
    assert family_and_traits(families.config("mistral", **WINDOW)) == "mistral with a window"
    assert family_and_traits(families.config("mistral", sliding_window=64, max_position_embeddings=64)) == "mistral"
    own = families.config("gemma2", query_pre_attn_scalar=24, head_dim=16, **WINDOW)
    assert family_and_traits(own) == "gemma2 with a window and with a scale"


@pytest.mark.parametrize("family", ["bloom", "mpt", "mamba", "mamba2", "falcon_mamba", "recurrent_gemma"])
def test_a_family_may_count_positions_by_another_name_or_not_at_all(family: str) -> None:
    """Configs that have no `max_position_embeddings`."""
    assert family_and_traits(AutoConfig.for_model(family)).removesuffix(" with a window") == family


# ---- depth


def test_a_runtime_may_take_kinds_from_numbers_where_another_reads_them() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    gemma3 = anatomy_of("gemma3_text", layer_types=kinds, query_pre_attn_scalar=16, **WINDOW)
    moved = [0, 1, 3, 4, 5]
    assert said(gemma3, "llama.cpp", moved, layers=5)[0] == "no"
    assert said(gemma3, "vLLM", moved, layers=5)[0] == "yes"


@pytest.mark.parametrize(
    ("family", "layers", "changes"),
    [
        ("gemma3_text", 12, {**WINDOW, "query_pre_attn_scalar": 16}),
        ("gemma2", 8, {**WINDOW, "query_pre_attn_scalar": 16}),
        ("smollm3", 8, {"no_rope_layers": [1, 1, 1, 0] * 2}),
        ("cohere2", 8, {**WINDOW, "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 2}),
    ],
)
def test_layers_whose_kind_comes_from_their_number_cannot_move(
    family: str, layers: int, changes: dict[str, object]
) -> None:
    anatomy = anatomy_of(family, num_hidden_layers=layers, **changes)
    moved = [i for i in range(layers) if i != 2]
    assert said(anatomy, "llama.cpp", moved, layers=layers - 1)[0] == "no"
    opens, remedy = said(anatomy, "llama.cpp", layers=layers - 1)  # which layers go is not known yet
    assert opens == "no"
    dropped = parse_layers(remedy.removeprefix("--drop-layers ").split(" ")[0], layers)
    kept = [i for i in range(layers) if i not in dropped]
    assert len(dropped) == period(anatomy)
    assert said(anatomy, "llama.cpp", kept, layers=len(kept)) == ("yes", "")


def test_layers_that_are_all_alike_may_go_anywhere() -> None:
    llama = anatomy_of("llama")
    assert period(llama) == 1
    assert (
        cuts(llama, llama.sizes.at(layers=5)) == cuts(llama, llama.sizes.at(layers=5), [0, 1, 3, 4, 5]) == (IN_PLACE,)
    )
    assert said(llama, "llama.cpp", layers=5) == ("yes", "")


def test_a_teacher_whose_layers_were_cut_before_stays_that_way() -> None:
    kinds = ["sliding_attention"] * 4 + ["full_attention"] * 2
    cut = anatomy_of("gemma3_text", layer_types=kinds, query_pre_attn_scalar=16, **WINDOW)
    assert cuts(cut, cut.sizes.at(ffn=48)) == (DEPTH_CUT, "ffn")
    assert said(cut, "llama.cpp", ffn=48)[0] == "no"
