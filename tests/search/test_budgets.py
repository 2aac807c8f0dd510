"""Legal shapes, what they cost, and what is said where no budget can be met."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from budgeted import anatomy, looked, search
from families import config
from transformers import LlamaConfig

from halve.anatomy import Anatomy, Arch, discover
from halve.cut.plan.sizes import Candidate
from halve.errors import HalveError
from halve.recipe.searching import MemoryLimits
from halve.recipe.spoken import spoken_search
from halve.search.budgets import resolve
from halve.search.candidates import candidates_of, look, within_budget
from halve.search.quantities import Prices, price
from halve.search.space import Space, legal_shapes

# ---- legal shapes


def widths_of(**axes: Any) -> Space:
    return legal_shapes(anatomy(), search({"total": "50%"}, axes=axes))


def test_groups_go_with_all_their_query_heads_unless_heads_are_allowed() -> None:
    assert {(h, g) for _, h, g in widths_of().widths} == {(8, 4), (6, 3), (4, 2), (2, 1)}
    pairs = {(h, g) for _, h, g in widths_of(heads="allowed").widths}
    assert pairs == {(g * n, g) for g in (1, 2, 3, 4) for n in (1, 2)}
    assert {(h, g) for _, h, g in widths_of(kv_heads="frozen", heads=[4, 8]).widths} == {(8, 4), (4, 4)}


def test_heads_that_are_frozen_by_name_keep_their_number_and_all_groups() -> None:
    assert {(h, g) for _, h, g in widths_of(heads="frozen").widths} == {(8, 4)}
    assert {(h, g) for _, h, g in widths_of(heads="frozen", kv_heads=[2, 4]).widths} == {(8, 4)}
    with pytest.raises(HalveError, match="no heads that are allowed divide into the groups that are allowed"):
        widths_of(heads="frozen", kv_heads=[2])


def test_an_axis_is_frozen_stepped_or_listed() -> None:
    space = widths_of(hidden="frozen", ffn=100, kv_heads=[4], layers=[2, 5])
    assert ([*space.widths], space.ffns, space.depths) == ([(96, 8, 4)], (256, 200, 100), (5, 2))
    assert len(space) == 6


def test_heads_and_groups_of_one_are_one_axis_under_both_names() -> None:
    in_ones = discover(LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4))

    def heads(**axes: Any) -> list[int]:
        space = legal_shapes(in_ones, search({"total": "50%"}, axes={"hidden": "frozen", **axes}))
        assert all(heads == groups for _, heads, groups in space.widths)
        return [heads for _, heads, _ in space.widths]

    assert heads() == heads(heads="allowed") == heads(kv_heads="allowed", heads="allowed") == [4, 3, 2, 1]
    assert heads(heads="frozen") == heads(kv_heads="allowed", heads="frozen") == [4]
    assert heads(kv_heads="frozen", heads="allowed") == [4]
    assert heads(kv_heads="allowed", heads=[2]) == heads(kv_heads=[1, 2], heads=[2, 3]) == [2]
    with pytest.raises(HalveError, match=r"heads leaves 2, kv_heads leaves 4\n  fix: leave one of the two out"):
        heads(kv_heads="frozen", heads=[2])


def test_coupled_widths_move_together() -> None:
    coupled = discover(config("gpt_neox"))
    space = legal_shapes(coupled, search({"total": "50%"}))
    assert len(space.widths) == 6
    assert all(hidden == heads * 16 for hidden, heads, _ in space.widths)


def test_layers_that_stay_bound_the_depth() -> None:
    space = legal_shapes(anatomy(), search({"total": "50%"}, layers={"max": 5, "keep": [0, 1, 7]}))
    assert space.depths == (5, 4, 3)


def of_two_kinds() -> Anatomy:
    """The first half of the layers attends to a window, the second to everything."""
    kinds = ["sliding_attention"] * 4 + ["full_attention"] * 4
    return discover(config("gemma3_text", num_hidden_layers=8, sliding_window=16, layer_types=kinds))


OF_TWO_KINDS = {"memory": {"max": "60%", "batch": 64, "context": 512}}
IN_DEPTH = {"hidden": "frozen", "ffn": "frozen", "kv_heads": "frozen"}


def test_layers_that_stay_are_priced() -> None:
    anatomy = of_two_kinds()
    limits = MemoryLimits.model_validate(OF_TWO_KINDS["memory"])
    sizes = anatomy.sizes.at(layers=5)
    first, last = (price(anatomy, sizes, "memory", limits, kept_layers=kept) for kept in ((), (4, 5, 6, 7)))
    assert first == price(anatomy, sizes, "memory", limits, kept_layers=(0, 1, 2, 3, 4))
    assert last == price(anatomy, sizes, "memory", limits, kept_layers=(0, 4, 5, 6, 7)) > 2 * first
    asked = search(OF_TWO_KINDS, axes=IN_DEPTH, layers={"keep": [4, 6]})
    space = legal_shapes(anatomy, asked)
    for layers in space.depths:
        kept = (4, 6, *(layer for layer in range(8) if layer not in (4, 6)))[:layers]
        cost = price(anatomy, anatomy.sizes.at(layers=layers), "memory", limits, kept_layers=kept)
        assert Prices(space).values("memory", limits, layers).item() == cost


def test_a_budget_is_met_with_the_layers_that_stay() -> None:
    anatomy, budget = of_two_kinds(), {"memory": {**OF_TWO_KINDS["memory"], "max": "40%"}}
    free, bound = (search(budget, axes=IN_DEPTH, layers={"max": 3, "keep": keep}) for keep in ([], [4, 5, 6]))
    assert free.budget is not None
    (shape,) = candidates_of(look(anatomy, free.budget, free), 1)
    assert shape.counts == anatomy.ledger.count(shape.arch)
    with pytest.raises(HalveError, match="no legal shape has memory"):
        look(anatomy, free.budget, bound)


def test_shapes_are_counted_with_the_layers_that_stay() -> None:
    moe = discover(config("qwen3_moe", num_hidden_layers=6, mlp_only_layers=[0, 1, 2], num_experts=4))
    asked = search({"total": {"max": "80%"}}, axes=IN_DEPTH, layers={"max": 4, "keep": [4, 5]})
    assert asked.budget is not None
    found = look(moe, asked.budget, asked)
    for shape in candidates_of(found, 2):
        kept = (4, 5, *range(shape.arch.layers - 2))
        assert shape.counts == moe.ledger.count(shape.arch, kept_layers=kept)
        assert shape.counts != moe.ledger.count(shape.arch)
        assert found.allows(shape.arch, kept)


def test_candidates_that_break_a_bound_with_their_own_layers_are_dropped() -> None:
    anatomy = of_two_kinds()
    asked = search(OF_TWO_KINDS, axes=IN_DEPTH)
    assert asked.budget is not None
    seen = look(anatomy, asked.budget, asked)
    candidates = [
        Candidate(anatomy.sizes.at(layers=n), anatomy.ledger.count(anatomy.sizes.at(layers=n))) for n in (5, 2)
    ]
    kept = {5: (1, 4, 5, 6, 7), 2: (6, 7)}
    (left,) = within_budget(seen, candidates, kept)
    assert (left.arch.layers, left.kept_layers) == (2, (6, 7))
    assert left.counts == anatomy.ledger.count(left.arch, kept_layers=(6, 7))
    assert len(within_budget(seen, candidates, {5: (0, 1, 2, 3, 4), 2: (0, 1)})) == 2
    with pytest.raises(HalveError) as raised:
        within_budget(seen, candidates[:1], kept)
    what, why, fix = str(raised.value).split("\n")
    assert "no candidate has memory <= " in what
    assert "with the layers that it keeps" in what
    assert "where layers 1, 4, 5, 6, 7 stay; it was priced with layers 0, 1, 2, 3, 4" in why
    assert fix.startswith("  fix: search.layers.keep: [1, 4, 5, 6, 7]")


# ---- shares


def test_a_share_is_of_the_teachers_own_cost() -> None:
    asked = search({"throughput": {"min": "150%", "batch": 2}, "memory": {"max": "50%", "context": 64}})
    assert asked.budget is not None

    class Steady:
        """Ten seconds of a token for the teacher, less for fewer layers."""

        def prefill_seconds(self, space: Space, layers: int, *, batch: int, context: int) -> Any:
            return np.full((len(space.widths), len(space.ffns)), float(layers))

        decode_seconds = prefill_seconds

    memory, throughput = resolve(anatomy(), asked.budget, clock=Steady())
    params = anatomy().ledger.count(anatomy().sizes).params
    assert memory.high == (2 * params + 2 * 64 * 8 * 2 * 4 * 16) / 2
    assert throughput.low == 1.5 * 2 / 8
    found = look(anatomy(), asked.budget, asked, clock=Steady()).front
    assert {shape.arch.layers for shape in found} <= {1, 2, 3, 4, 5}
    assert max(shape.arch.layers for shape in found) == 5


# ---- budgets that cannot be met


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda: looked({"total": "1k"}), r"the embeddings alone have 8\.19k parameters at hidden 8, the narrowest"),
        (
            lambda: looked({"total": "50%"}, axes={"hidden": [91, 93]}),
            r"the config of llama refuses hidden 93; hidden 91: .*93\) is not a multiple .* attention heads \(8\)\n"
            r"  fix: allow other sizes in search.axes.hidden, such as 88 or 96$",
        ),
        (
            lambda: looked({"weight_bytes": "4kB"}),
            r"the embeddings alone take 16\.4 kB in bfloat16 at hidden 8, the narrowest that is allowed",
        ),
        (
            lambda: looked({"memory": {"max": "30kB", "context": 1, "dtype": "float32"}}),
            r"the embeddings alone take 32\.8 kB in float32 at hidden 8",
        ),
        (lambda: looked({"total": "1k"}), r"fix: nearest: total 9\.08k \(layers 1, hidden 8, ffn 4, heads 2/1\);"),
        (
            lambda: looked({"total": {"min": "2B"}}),
            r"total >= 2B\n  why: total of legal shapes is between 9.08k and 985k",
        ),
        (lambda: looked({"total": {"min": "60%"}, "flops": {"max": "20%"}}), "each bound can be met alone, but no"),
        (
            lambda: looked({"total": {"min": "60%", "max": "100k"}}),
            r"min 60% is above max 100k\n.*the teacher has.*\n  fix: lower the min, now 60%, or raise the max",
        ),
        (lambda: looked({"total": "50%"}, axes={"hidden": 200}), "search.axes.hidden in steps of 200 leaves nothing"),
        (lambda: looked({"total": "50%"}, axes={"ffn": [512]}), r"lists 512, this llama has 256"),
        (lambda: looked({"total": "50%"}, layers={"keep": [8]}), r"keeps layer 8, this llama has 8"),
        (lambda: looked({"total": "50%"}, layers={"min": 9}), r"wants at least 9 layers, this llama has 8"),
        (lambda: looked({"total": "50%"}, layers={"max": 3}, axes={"layers": [6]}), "allows no number of layers"),
        (
            lambda: looked({"total": "50%"}, axes=dict.fromkeys(("hidden", "ffn", "kv_heads", "layers"), "frozen")),
            r"allow one shape alone: total 985k \(layers 8, hidden 96, .*\), the teacher itself\n",
        ),
        (
            lambda: looked({"total": "100%"}, axes=dict.fromkeys(("hidden", "ffn", "kv_heads", "layers"), "frozen")),
            r"the teacher alone has that: total 985k \(layers 8, hidden 96",
        ),
        (
            lambda: looked({"total": "50%"}, axes={"heads": [7]}),
            r"leaves no width of llama\n.*\(this model: 8 heads / 4 groups = 2\)",
        ),
        (lambda: spoken_search(["memory<=1GB@9999999999"], [], candidates=1), "less than or equal to 1000000000"),
        (lambda: spoken_search(["params<=1B"], [], candidates=1), r"cannot read --budget 'params<=1B'"),
        (
            lambda: spoken_search(["total<=1B@4096"], [], candidates=1),
            r"total has no context, and nothing else behind @\n  fix: write --budget .total<=1B.$",
        ),
        (
            lambda: spoken_search(["total>=900k", "total<=800k"], [], candidates=1),
            r'"total>=900k" and --budget "total<=800k" contradict .*\n.*900k is above max 800k\n'
            r'  fix: lower "total>=900k" or raise "total<=800k"',
        ),
        (
            lambda: spoken_search(["total<=60% float32"], [], candidates=1),
            r"'60% float32' is no amount of parameters.*\n  fix: write --budget .total<=60%.$",
        ),
        (
            lambda: spoken_search(["memory<=60% float32"], [], candidates=1),
            r"is no amount of bytes.*\n  fix: write --budget .memory<=60%@4096 float32.$",
        ),
        (
            lambda: spoken_search(["flops<=70%@1x512"], [], candidates=1),
            r"flops has no batch, only context\n  fix: write --budget .flops<=70%@512.$",
        ),
        (lambda: spoken_search(["memory<=8GB@8 int8"], [], candidates=1), "types are float32, bfloat16, float16"),
        (lambda: spoken_search(["total<="], [], candidates=1), "no amount behind the sign\n  fix: write --budget"),
        (lambda: spoken_search(["total<=1B", "total=1B"], [], candidates=1), 'fix: leave out "total=1B" or the others'),
        (lambda: spoken_search([], [], candidates=1), "these flags make no search\n  why: give at least one of total"),
        (lambda: spoken_search(["total<=1X"], [], candidates=1), "no amount of parameters"),
        (lambda: spoken_search(["total<=1B"], ["depth=3"], candidates=1), "cannot read --axis 'depth=3'"),
        (
            lambda: spoken_search(["total<=700k", "total < 900k"], [], candidates=1),
            r"--budget bounds total twice\n  why: '700k' and '900k' are two bounds of one kind \(max\)\n  fix: leave",
        ),
        (
            lambda: spoken_search(["memory<=9MB@8192", "memory>=1MB@16"], [], candidates=1),
            r"--budget gives memory under two different conditions\n  why: .*\n  fix: write the same after @",
        ),
        (
            lambda: spoken_search(["total<=1B"], ["ffn=frozen", "ffn=64"], candidates=1),
            r"--axis names ffn twice\n  why: .*'frozen' and 64 are two\n  fix: leave out one",
        ),
        (
            lambda: spoken_search(["total<=1B"], ["ffn=\N{SUPERSCRIPT TWO}"], candidates=1),
            "cannot read --axis ffn",
        ),
        (
            lambda: spoken_search(["total<=1B"], ["ffn=8,\N{SUPERSCRIPT TWO}"], candidates=1),
            r"cannot read --axis ffn\n.*\n  fix: write --axis ffn=64 \(steps\), ffn=frozen or ffn=12,16,20",
        ),
        (
            lambda: spoken_search(["total<=1B"], ["ffn=" + "9" * 5000], candidates=1),
            "cannot read --axis ffn",
        ),
    ],
)
def test_a_budget_that_cannot_be_met_says_why_and_what_can(ask: Callable[[], Any], message: str) -> None:
    with pytest.raises(HalveError, match=message):
        ask()


def test_a_refused_axis_stays_whole_and_is_refused_where_it_is_asked_for() -> None:
    asked = search({"non_embedding": "50%"})
    assert asked.budget is not None
    found = look(anatomy(), asked.budget, asked, refused={"hidden": "not proved"}).front
    assert {shape.arch.hidden for shape in found} == {96}
    asked = search({"non_embedding": "50%"}, axes={"hidden": 8})
    assert asked.budget is not None
    with pytest.raises(HalveError, match=r"search\.axes\.hidden cannot be cut in llama\n  why: not proved"):
        look(anatomy(), asked.budget, asked, refused={"hidden": "not proved"})


@pytest.mark.parametrize("second", ["memory>=1MB", "memory>=1MB@2x8192"])
def test_two_bounds_of_a_quantity_have_one_condition(second: str) -> None:
    for flags in (["memory<=9MB@2x8192", second], [second, "memory<=9MB@2x8192"]):
        budget = spoken_search(flags, [], candidates=1).budget
        assert budget is not None
        assert budget.memory == MemoryLimits(min="1MB", max="9MB", batch=2, context=8192)


def test_plan_reads_a_budget_in_words(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from halve.cli.app import main

    anatomy().config.save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--budget", "memory<=60%@2x4096 float32", "--axis", "ffn=64", "--most", "3"]
    assert main([*words, "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["candidates"]
    assert len(listed) == 3
    limits = MemoryLimits(max="60%", batch=2, context=4096, dtype="float32")
    most = 0.6 * price(anatomy(), anatomy().sizes, "memory", limits)
    for shape in listed:
        arch = Arch.of(shape["arch"])
        assert arch.ffn % 64 == 0
        assert shape["costs"]["memory"] == price(anatomy(), arch, "memory", limits) <= most
    assert main([*words[:-1], "1"]) == 0
    assert "1 shape; the front has" in capsys.readouterr().out
    assert main([*words, "--params", "1M"]) == 2
    assert "--params and --budget are two ways" in capsys.readouterr().err


def test_plan_counts_flops_at_the_context_that_is_asked_for(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from halve.cli.app import main

    anatomy().config.save_pretrained(tmp_path)
    words = ["plan", str(tmp_path), "--budget", "flops<=60%@128", "--most", "2"]

    def said(*more: str) -> str:
        assert main([*words, *more]) == 0
        return capsys.readouterr().out

    def flops(*more: str) -> list[tuple[float, int, Arch]]:
        found = json.loads(said("--json", *more))["candidates"]
        return [(one["costs"]["flops"], one["counts"]["flops_per_token"], Arch.of(one["arch"])) for one in found]

    for cost, count, arch in flops():
        assert count == anatomy().ledger.count(arch, context=4096).flops_per_token > cost
    for cost, count, _ in flops("--context", "128"):
        assert count == cost
    assert "FLOPs at 128" in said()
    assert "FLOPs at" not in said("--context", "128")


def test_plan_lists_the_shapes_of_every_target_of_a_recipe(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from halve.cli.app import main

    anatomy().config.save_pretrained(tmp_path / "teacher")
    text = "name: s\nmodel: ./teacher\ndata: {train: [t], valid: [v]}\n"
    (tmp_path / "r.yaml").write_text(text + "search:\n  targets: [70%, {total: {max: 400k}}]\n", encoding="utf-8")
    (tmp_path / "none.yaml").write_text(text + "prune: {ffn: 8}\n", encoding="utf-8")
    assert main(["plan", str(tmp_path / "r.yaml"), "--most", "3", "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    whole = anatomy().ledger.count(anatomy().sizes).non_embedding
    assert {round(shape["costs"]["non_embedding"] / whole, 1) for shape in first["candidates"]} == {0.7}
    assert all(shape["counts"]["params"] <= 400_000 for shape in second["candidates"])
    assert main(["plan", str(tmp_path / "r.yaml"), "--budget", "total=50%"]) == 2
    assert "--budget is not combined with a recipe" in capsys.readouterr().err
    assert main(["plan", str(tmp_path / "none.yaml")]) == 2
    assert "recipe s has no budget to list shapes for" in capsys.readouterr().err
