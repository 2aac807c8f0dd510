from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from families import config
from transformers import AutoConfig, LlamaConfig, MistralConfig

from halve.anatomy import CUT_AXES, Arch, discover
from halve.cut.plan.plan import Plan, select
from halve.cut.plan.sizes import candidates, format_count, near, parse_count, parse_layers, target
from halve.cut.proof.twins import RandomScores
from halve.errors import AnatomyError, PlanError
from halve.recipe.schema import Prune

LLAMA_8B = LlamaConfig(
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
NEMO_12B = MistralConfig(
    hidden_size=5120,
    intermediate_size=14336,
    num_hidden_layers=40,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=131072,
)


@pytest.mark.parametrize(
    ("teacher", "prune", "total", "non_embedding"),
    [
        # 2408.11796, Table 3 (version 003): totals and non-embedding parameters in billions
        (LLAMA_8B, Prune(hidden=3072, ffn=9216), "4.5", "3.7"),
        (LLAMA_8B, Prune(drop_layers="16-31"), "4.5", "3.5"),
        (NEMO_12B, Prune(hidden=4096, ffn=11520), "8.4", "7.3"),
    ],
)
def test_the_papers_shapes(teacher: LlamaConfig, prune: Prune, total: str, non_embedding: str) -> None:
    counts = near(discover(teacher), prune)[0].counts
    assert (f"{counts.params / 1e9:.1f}", f"{counts.non_embedding / 1e9:.1f}") == (total, non_embedding)


def test_a_budget_finds_the_papers_width() -> None:
    anatomy = discover(LLAMA_8B)
    arch, _ = target(anatomy, Prune(params="4.5B"))
    assert abs(anatomy.ledger.count(arch).params / 4.5e9 - 1) < 0.005
    found = [c.arch for c in candidates(anatomy, 4_500_000_000)]
    assert (3072, 9216) in {(arch.hidden, arch.ffn) for arch in found}
    depths = [arch.layers for arch in found if arch.layers < 32]
    assert depths == [16]


def test_candidates_are_legal_and_near() -> None:
    anatomy = discover(LLAMA_8B)
    found = candidates(anatomy, 4_500_000_000)
    assert len(found) > 20
    for candidate in found:
        assert abs(candidate.counts.params / 4.5e9 - 1) <= 0.05
        assert candidate.arch.hidden % 128 == 0
        assert candidate.arch.ffn % 128 == 0


_SPEED = """
import time
from transformers import AutoConfig, LlamaConfig
from halve.anatomy import discover
anatomy = discover(LlamaConfig())
archs = [anatomy.sizes.at(ffn=n) for n in range(1, 1001)]
began = time.perf_counter()
for arch in archs:
    anatomy.ledger.count(arch)
print(time.perf_counter() - began)
"""


def test_thousands_of_candidates_a_second() -> None:
    """In a process of its own: here every call is checked against its annotations."""
    done = subprocess.run([sys.executable, "-c", _SPEED], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0


@pytest.mark.parametrize(
    ("family", "prune", "message"),
    [
        (
            "llama",
            Prune(heads=5),
            r"cannot keep 5 query heads in 3 key-value groups\n.*6 heads / 3 groups = 2.*\n.*--heads 3 or 6",
        ),
        ("llama", Prune(hidden=97), r"cannot keep 97 of 96 hidden\n.*\n  fix: --hidden between 1 and 96"),
        ("llama", Prune(hidden=95), r"llama does not accept .*hidden 95"),
        ("llama", Prune(params="1"), r"no valid sizes have about 1 parameters\n.*\n  fix: nearest: \d"),
        ("llama", Prune(params="900M"), r"no valid sizes have about 900M parameters\n.*\n  fix: nearest: \d"),
        ("llama", Prune(params="many"), r"cannot read 'many' as a parameter count"),
        ("llama", Prune(drop_layers="0-5"), r"cannot drop layers 0-5\n.*layers 0 to 5 and must keep one"),
        ("llama", Prune(drop_layers="x"), r"cannot read 'x' as layers"),
        ("gpt2", Prune(hidden=90), r"cannot keep hidden 90 with 6 heads in gpt2\n.*\n  fix: --hidden 96, or --heads 5"),
        ("gpt2", Prune(kv_heads=2), r"."),
        ("gpt_bigcode", Prune(kv_heads=2), r"cannot cut kv_heads of gpt_bigcode\n  why: all query heads share one"),
        ("mixtral", Prune(ffn=64), r"cannot cut ffn of mixtral\n  why: a mixture of 8 experts"),
    ],
)
def test_sizes_that_are_refused(family: str, prune: Prune, message: str) -> None:
    anatomy = discover(config(family))
    if family == "gpt2" and prune.kv_heads:
        arch, _ = target(anatomy, prune)  # groups of one: heads go along, and hidden with them
        assert arch.heads == arch.kv_heads == 2
        return
    with pytest.raises(PlanError, match=f"(?s){message}"):
        target(anatomy, prune)


def test_coupled_sizes_follow_each_other() -> None:
    anatomy = discover(config("gpt2"))
    assert target(anatomy, Prune(hidden=64))[0] == anatomy.sizes.at(hidden=64, heads=4, kv_heads=4)
    assert target(anatomy, Prune(heads=3))[0] == anatomy.sizes.at(hidden=48, heads=3, kv_heads=3)


def test_a_ratio_is_met_within_five_percent() -> None:
    for family in ("llama", "gpt2", "gemma2"):
        anatomy = discover(config(family))
        whole = anatomy.ledger.count(anatomy.sizes).non_embedding
        arch, _ = target(anatomy, Prune(non_embedding_ratio=0.6))
        assert abs(anatomy.ledger.count(arch).non_embedding / whole / 0.6 - 1) < 0.05


def test_selection_by_hand() -> None:
    anatomy = discover(config("llama"))
    scores = RandomScores(anatomy.sizes, 0)
    scores.hidden = torch.arange(96.0).flip(0)
    scores.heads = torch.tensor([[1.0, 2, 4, 3, 6, 5]] * 6)
    scores.kv_heads = torch.tensor([[3.0, 7, 11]] * 6)
    scores.layers = torch.tensor([5.0, 1, 5, 5, 2, 5])
    after = anatomy.sizes.at(hidden=12, heads=2, kv_heads=2, layers=4)
    plan = select(anatomy, after, scores, gain="none")
    assert plan.hidden == tuple(range(12))
    assert plan.layers == (0, 2, 3, 5)
    assert plan.kv_heads == ((1, 2),) * 4
    assert plan.heads == ((2, 4),) * 4
    assert all(len(row) == 160 for row in plan.ffn)


def test_what_is_asked_for_is_refused_by_its_own_name() -> None:
    """Heads and hidden go together in this family: who asks for fewer heads is not told about hidden."""
    small = {"num_hidden_layers": 2, "hidden_size": 96, "num_attention_heads": 6, "vocab_size": 128}
    anatomy = discover(AutoConfig.for_model("falcon", **small))
    anatomy = replace(anatomy, refusals={**anatomy.refusals, **dict.fromkeys(("hidden", "heads"), "no one can tell")})
    with pytest.raises(PlanError, match="cannot cut heads of falcon\n"):
        target(anatomy, Prune(heads=3))


def test_a_model_of_one_layer_is_told_so() -> None:
    with pytest.raises(PlanError, match=r"cannot drop layers 0\n  why: the model has one layer and must keep it\n"):
        parse_layers("0", 1)


def test_no_width_at_all_is_said_with_what_helps() -> None:
    """A budget in a family that nothing can be cut of names a way on, not an empty list."""
    anatomy = discover(config("llama"))
    fixed = replace(anatomy, refusals=dict.fromkeys(CUT_AXES, "it is fixed"))
    with pytest.raises(PlanError, match=r"(?s)no smaller width or depth is valid\n  fix: .*by hand") as caught:
        target(fixed, Prune(params="100k"))
    assert "between 0 and 0" not in str(caught.value)


def test_layers_named_by_hand_keep_their_kinds() -> None:
    small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    teacher = AutoConfig.for_model("jamba", num_hidden_layers=8, attn_layer_period=4, attn_layer_offset=1, **small)
    anatomy = replace(discover(teacher), refusals={})
    with pytest.raises(AnatomyError, match=r"cannot keep layers .* of jamba"):
        target(anatomy, Prune(drop_layers="2"))


def test_equal_scores_keep_the_earlier_entry() -> None:
    anatomy = discover(config("llama"))
    scores = RandomScores(anatomy.sizes, 0)
    scores.hidden = torch.ones(96)
    assert select(anatomy, anatomy.sizes.at(hidden=6), scores, gain="none").hidden == tuple(range(6))


def test_a_plan_is_read_back() -> None:
    anatomy = discover(config("qwen3"))
    plan = select(anatomy, anatomy.sizes.at(ffn=32, layers=3), RandomScores(anatomy.sizes, 0), gain="fitted")
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(("text", "count"), [("4.5B", 4_500_000_000), ("350m", 350_000_000), ("12k", 12_000), ("7", 7)])
def test_counts_are_read(text: str, count: int) -> None:
    assert parse_count(text) == count


def test_counts_are_written() -> None:
    assert format_count(4_512_700_000) == "4.51B"
    assert format_count(999) == "999"
    assert [format_count(count) for count in (10**12, 3_800_000_000_000, 999_960_000_000)] == ["1T", "3.8T", "1T"]
    assert [format_count(count) for count in (999_400_000_000, 10**15 - 1)] == ["999B", "1,000T"]
    assert parse_count(format_count(94_000_000_000_000)) == 94_000_000_000_000


def test_layers_are_read() -> None:
    assert parse_layers("3,5,7-9", 12) == {3, 5, 7, 8, 9}


def test_an_arch_is_printed_in_the_vocabulary() -> None:
    assert str(Arch(2, 4, 8, 2, 1, 2, 16)) == "layers 2, hidden 4, ffn 8, heads 2/1 x 2, vocab 16"
