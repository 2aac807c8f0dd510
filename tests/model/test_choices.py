"""Items that people bring, and the rules of lm-evaluation-harness beside ours, on a tiny random Llama."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halve.errors import CorpusError
from halve.model import choices
from halve.model.choices import Answers, Item, answer_encoded, encode, load_items

GOOD = '{"context": "a", "choices": ["b", "c"], "answer": 1}\n'
SEVERAL = '{"contexts": ["a", "b"], "ending": " c", "answer": 1}\n'


def byte_tokenizer(*, bos: bool = True) -> PreTrainedTokenizerFast:
    """Every byte is a token, ` c` is one more, and <s> begins a text if asked for."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}, "Ġc": 257}
    inner = Tokenizer(models.BPE(vocab, [("Ġ", "c")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, **({"bos_token": "<s>"} if bos else {}))


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


# ---- scores


def harness(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, context: str, continuation: str) -> float:
    """The log-probability of a continuation as lm-evaluation-harness 0.4 computes it, request by request."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, before = tokenizer.encode(context + continuation), tokenizer.encode(context)
    log_probs_SV = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return sum(log_probs_SV[t - 1, whole[t]].item() for t in range(len(before), len(whole)))


def texts(random: torch.Generator, low: int, high: int) -> str:
    size = int(torch.randint(low, high, (1,), generator=random))
    return "".join("abcé d"[i] for i in torch.randint(6, (size,), generator=random).tolist())


@torch.no_grad()
def test_acc_and_acc_norm_are_those_of_the_harness() -> None:
    random, model, tokenizer = torch.Generator().manual_seed(5), tiny(), byte_tokenizer()
    questions = [
        (
            f"x{texts(random, 0, 6)}" + " " * (i % 3 == 0),
            [f"{'acé'[i % 3]}{texts(random, 0, 9)}{c}" for c in "xyz"],
            i % 3,
        )
        for i in range(60)
    ]
    acc, acc_norm = [], []
    for context, endings, gold in questions:
        lls = torch.tensor([harness(model, tokenizer, context, " " + ending) for ending in endings])
        lengths = torch.tensor([float(len(ending)) for ending in endings])
        acc.append(int(lls.argmax()) == gold)
        acc_norm.append(int((lls / lengths).argmax()) == gold)
    items = [Item(context, tuple(" " + e for e in endings), gold) for context, endings, gold in questions]
    found = answer_encoded(model, encode(tokenizer, items, max_tokens=None))
    assert found.acc.tolist() == acc
    assert found.acc_norm is not None
    assert found.acc_norm.tolist() == acc_norm
    assert acc != acc_norm
    assert found.right.tolist() != acc


@torch.no_grad()
def test_the_first_of_equals_wins_by_the_rules_of_the_harness_and_none_by_ours() -> None:
    nats = [torch.tensor([[-2.0, -2.0], [-2.0, -2.0]], dtype=torch.float64)]
    (item,) = encode(byte_tokenizer(), [Item("a", ("b", "c"), 0)], max_tokens=None)
    found = choices.answers([item], choices.batch_up([item]), nats)
    assert (found.right.tolist(), found.acc.tolist()) == ([False], [True])


@torch.no_grad()
def test_several_contexts_and_one_ending() -> None:
    random, model, tokenizer = torch.Generator().manual_seed(5), tiny(), byte_tokenizer()
    items, want = [], []
    for number in range(40):
        contexts = (f"{texts(random, 1, 9)}x", f"{texts(random, 1, 9)}y")
        ending = f" {texts(random, 1, 6)}"
        lls = torch.tensor([harness(model, tokenizer, context, ending) for context in contexts])
        items.append(Item(contexts, (ending, ending), number % 2))
        want.append(int(lls.argmax()) == number % 2)
    found = answer_encoded(model, encode(tokenizer, items, max_tokens=None))
    assert found.acc.tolist() == found.right.tolist() == want
    assert found.acc_norm is None
    assert 0 < sum(want) < len(want)
    assert isinstance(found, Answers)


def test_where_contexts_differ_each_ending_begins_after_its_own() -> None:
    tokenizer = byte_tokenizer()
    (encoded,) = encode(tokenizer, [Item(("ab", "abab"), (" cd", " cd"), 0)], max_tokens=None)
    assert encoded.starts == encoded.after == (3, 5)
    ending = tuple(tokenizer.convert_tokens_to_ids(["Ġc", "d"]))
    assert [row[start:] for row, start in zip(encoded.sequences, encoded.starts, strict=True)] == [ending, ending]


def test_a_space_at_the_end_of_the_context_is_scored_by_both_rules() -> None:
    (encoded,) = encode(byte_tokenizer(), [Item("ab ", ("c", "d"), 0)], max_tokens=None)
    assert [len(row) for row in encoded.sequences] == [4, 5]
    assert encoded.starts == encoded.after == (3, 3)


def test_an_empty_context_without_a_first_token_is_refused() -> None:
    tokenizer = byte_tokenizer(bos=False)
    with pytest.raises(CorpusError, match=r"t line 1 has no token before its choices\n"):
        encode(tokenizer, [Item("", ("b", "c"), 0, "t line 1")], max_tokens=None)
    (encoded,) = encode(tokenizer, [Item("a", ("b", "c"), 0)], max_tokens=None)
    assert encoded.starts == (1, 1)


# ---- files


def test_both_kinds_of_items_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("\ufeff" + GOOD + SEVERAL, encoding="utf-8")
    one, other = load_items(tmp_path / "t.jsonl")
    assert (one.context, one.choices, one.contexts) == ("a", ("b", "c"), ("a", "a"))
    assert (other.contexts, other.choices, other.answer) == (("a", "b"), (" c", " c"), 1)
    assert [json.loads(choices.json_line(item)) for item in (one, other)] == [json.loads(GOOD), json.loads(SEVERAL)]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("[" * 100_000, "it is not JSON: it is nested deeper"),
        ('{"context": "\\ud83d", "choices": ["b", "c"], "answer": 0}', "half a surrogate pair"),
        ('{"context": "a", "choices": ["b", "c\\udc00"], "answer": 0}', "half a surrogate pair"),
        ('{"context": "a", "choices": ["b", "c"], "answer": ' + "9" * 6000 + "}", "it is not JSON: Exceeds the limit"),
        ('{"context": ' + "9" * 4000 + ', "choices": ["b", "c"], "answer": 0}', "context is not text: 9999"),
        ('{"contexts": ["a", "b"], "answer": 0}', "it lacks context and choices"),
        ('{"contexts": ["a", "a"], "ending": "c", "answer": 0}', "two of its contexts are the same"),
        ('{"contexts": ["a"], "ending": "c", "answer": 0}', "contexts is not a list of two or more"),
        ('{"contexts": ["a", "b"], "ending": "", "answer": 0}', "ending is not a text"),
        ('{"contexts": ["a", "b"], "ending": "c", "answer": 2}', "answer 2 is not an index into its 2 choices"),
        ('{"contexts": ["a", "b"], "ending": "c"}', "it lacks answer"),
    ],
)
def test_what_is_no_item_is_refused(tmp_path: Path, line: str, why: str) -> None:
    (tmp_path / "t.jsonl").write_text(GOOD + line + "\n")
    with pytest.raises(CorpusError) as caught:
        load_items(tmp_path / "t.jsonl")
    assert "t.jsonl line 2 is not a multiple-choice item" in caught.value.what
    assert why in caught.value.why
    assert len(caught.value.why) < 300


def test_damaged_files_and_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "t.jsonl.gz"
    packed.write_bytes(b"\x1f\x8b\x08" + b"\0" * 7 + b"\xff" * 40)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (packed, tmp_path / "pipe", tmp_path / "folder", "/dev/zero", "a\0b", "\ud800", "a" * 5000):
        with pytest.raises(CorpusError, match="cannot read multiple-choice file"):
            load_items(path)
    monkeypatch.setattr(choices, "LONGEST_ITEM_BYTES", 20)
    (tmp_path / "long.jsonl").write_text(json.dumps({"context": "a" * 99}))
    with pytest.raises(CorpusError, match=r"long\.jsonl line 1 is not a multiple-choice item\n  why: it is longer"):
        load_items(tmp_path / "long.jsonl")
