"""measure, choices and speed, on a tiny random Llama and a tokenizer made here."""

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from halve.errors import CorpusError
from halve.model import choices, measure
from halve.model.checkpoint import Checkpoint
from halve.model.choices import Item, answer_encoded, encode, load_items
from halve.model.measure import Estimate
from halve.model.speed import compare_speed, weight_bytes, working_bytes

CONTEXT = 32


def tiny(seed: int = 0, vocab: int = 258) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, `ab` is one more, and <s> begins a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}, "ab": 257}
    inner = Tokenizer(models.BPE(vocab, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<s>")


@pytest.fixture
def samples() -> torch.Tensor:
    return torch.randint(1, 258, (5, 12), generator=torch.Generator().manual_seed(1))


def reference_log_probs(model: LlamaForCausalLM, samples: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.double()(input_ids=samples).logits[:, :-1].double().log_softmax(-1)


def test_nll_is_the_models_own_loss(samples: torch.Tensor) -> None:
    nll = measure.language_modeling(tiny(), samples, micro_batch=2)
    want = -reference_log_probs(tiny(), samples).gather(-1, samples[:, 1:, None])[..., 0].mean(1)
    torch.testing.assert_close(nll, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("elements", [300, 10_000, 1 << 24])
def test_no_figure_depends_on_micro_batch_or_chunk(
    samples: torch.Tensor, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measure.divergence(tiny(1), tiny(0), samples, micro_batch=5)
    monkeypatch.setattr(measure, "CHUNK_ELEMENTS", elements)
    parts = measure.divergence(tiny(1), tiny(0), samples, micro_batch=2)
    for name in ("nll", "kl", "agreement"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-5, atol=1e-6)
    assert all(sl.stop - sl.start <= max(1, elements // 258) for sl in measure.row_chunks(55, 258))


def test_divergence_against_float64(samples: torch.Tensor) -> None:
    found = measure.divergence(tiny(1), tiny(0), samples, micro_batch=3)
    log_s, log_t = (reference_log_probs(tiny(seed), samples) for seed in (1, 0))
    torch.testing.assert_close(found.kl, (log_t.exp() * (log_t - log_s)).sum(-1).mean(1), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.agreement, (log_t.argmax(-1) == log_s.argmax(-1)).double().mean(1))
    assert found.kl.min() > 0.01
    same = measure.divergence(tiny(0), tiny(0), samples, micro_batch=3)
    assert same.kl.abs().max() < 1e-6
    assert same.agreement.eq(1).all()


def test_a_padded_vocabulary_is_compared_over_the_shared_entries(samples: torch.Tensor) -> None:
    student, padded = tiny(0), tiny(0, vocab=264)
    padded.load_state_dict(
        {
            name: torch.cat([value, torch.randn(6, 16)]) if value.shape[0] == 258 else value
            for name, value in student.state_dict().items()
        }
    )
    assert measure.divergence(student, padded, samples, micro_batch=5).kl.abs().max() < 1e-6


def test_a_sample_longer_than_the_context_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"held-out sample has 33 tokens, the model's context has 32"):
        measure.language_modeling(tiny(), torch.ones(1, CONTEXT + 1, dtype=torch.long), micro_batch=1)


def test_standard_errors() -> None:
    values = torch.tensor([1.0, 2.0, 4.0])
    assert measure.average(values).value == pytest.approx(7 / 3)
    assert measure.average(values).stderr == pytest.approx(
        math.sqrt(((4 / 3) ** 2 + (1 / 3) ** 2 + (5 / 3) ** 2) / 2 / 3)
    )
    assert math.isnan(measure.average(torch.ones(1)).stderr)
    assert measure.perplexity(values).value == pytest.approx(math.exp(7 / 3))
    assert measure.perplexity(values).stderr == pytest.approx(math.exp(7 / 3) * measure.average(values).stderr)
    assert measure.proportion(torch.tensor([True, True, True, False])) == Estimate(0.75, math.sqrt(0.75 * 0.25 / 4))


def test_pairs_cancel_what_both_find_hard() -> None:
    hard = torch.tensor([1.0, 5.0, 9.0])
    ours, theirs = hard + torch.tensor([0.1, 0.0, 0.2]), hard
    paired = measure.difference(ours, theirs)
    assert paired.value == pytest.approx(0.1)
    assert paired.stderr < 0.1 < measure.average(ours).stderr


def test_bits_per_byte() -> None:
    # 4 predictions of ln 2 nats are 4 bits; on 4, 2 and 8 bytes
    found = measure.bits_per_byte(torch.full((3,), math.log(2)), torch.tensor([4, 2, 8]), num_targets=4)
    assert found.value == pytest.approx(12 / 14)
    # bits in proportion to bytes leave nothing uncertain
    exact = measure.bits_per_byte(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2, 4, 8]), num_targets=1)
    assert exact.stderr == pytest.approx(0, abs=1e-12)


def test_the_ratio_error_agrees_with_a_bootstrap() -> None:
    random = torch.Generator().manual_seed(0)
    num_bytes = torch.randint(20, 80, (200,), generator=random)
    nll = 1 + 0.02 * num_bytes + 0.3 * torch.randn(200, generator=random)
    draws = torch.randint(200, (2000, 200), generator=random)
    bits = (nll[draws].sum(1) * 10 / math.log(2)) / num_bytes[draws].sum(1)
    found = measure.bits_per_byte(nll, num_bytes, num_targets=10)
    assert found.stderr == pytest.approx(bits.std().item(), rel=0.1)


def test_target_bytes_are_those_of_the_predicted_text(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = byte_tokenizer("xabé!").input_ids
    assert len(ids) == 5  # x, ab, two bytes of é, !
    separated = [*ids[:2], byte_tokenizer.bos_token_id, *ids[2:]]
    assert measure.target_bytes(byte_tokenizer, torch.tensor([ids])).tolist() == [len("abé!".encode())]
    assert measure.target_bytes(byte_tokenizer, torch.tensor([separated])).tolist() == [len("abé!".encode())]


# ---- multiple choice ---------------------------------------------------------------------------------------


def choice_score(model: LlamaForCausalLM, ids: list[int], start: int, num_bytes: int) -> float:
    log_probs = reference_log_probs(model, torch.tensor([ids]))[0]
    return sum(log_probs[t - 1, ids[t]].item() for t in range(start, len(ids))) / num_bytes


def test_answers_are_those_of_a_loop_over_single_sequences(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    random = torch.Generator().manual_seed(3)
    letters = "abcdxyz "

    def text(low: int, high: int) -> str:
        size = int(torch.randint(low, high, (1,), generator=random))
        return "".join(letters[i] for i in torch.randint(len(letters), (size,), generator=random).tolist())

    items = [Item(text(2, 9), (text(1, 6) + "x", text(1, 9) + "y", text(2, 4) + "z"), i % 3) for i in range(24)]
    want = []
    for item in items:
        (encoded,) = encode(byte_tokenizer, [item], max_tokens=CONTEXT)
        scores = [
            choice_score(tiny(), list(row), start, len(choice))
            for row, start, choice in zip(encoded.sequences, encoded.starts, item.choices, strict=True)
        ]
        want.append(max(range(3), key=scores.__getitem__) == item.answer)
    assert 0 < sum(want) < len(want)
    encoded_items = encode(byte_tokenizer, items, max_tokens=CONTEXT)
    for batch_tokens in (1, 50, 4096):
        assert answer_encoded(tiny(), encoded_items, batch_tokens=batch_tokens).right.tolist() == want


def test_a_token_across_the_boundary_is_scored_with_every_choice(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    """`xa` + `b` merges into `x ab`: both choices are then scored from after the x."""
    (encoded,) = encode(byte_tokenizer, [Item("xa", ("b", "c"), 0)], max_tokens=None)
    assert encoded.starts == (1, 1)
    assert [len(row) for row in encoded.sequences] == [2, 3]


def test_an_empty_context_begins_with_the_first_token(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    (encoded,) = encode(byte_tokenizer, [Item("", ("x", "y"), 0)], max_tokens=None)
    assert encoded.starts == (1, 1)
    assert {row[0] for row in encoded.sequences} == {byte_tokenizer.bos_token_id}


def test_an_item_longer_than_the_context_is_named(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    items = [Item("x", ("y", "z"), 0, "t.jsonl line 1"), Item("x" * 40, ("y", "z"), 0, "t.jsonl line 2")]
    with pytest.raises(CorpusError, match=r"t\.jsonl line 2 has 41 tokens, the model's context has 32"):
        encode(byte_tokenizer, items, max_tokens=CONTEXT)


GOOD = json.dumps({"context": "a", "choices": ["b", "c"], "answer": 1, "id": 7}).encode()


def test_items_are_read_also_compressed(tmp_path) -> None:
    plain, packed = tmp_path / "t.jsonl", tmp_path / "t.jsonl.gz"
    plain.write_bytes(GOOD + b"\n\n" + GOOD)
    packed.write_bytes(gzip.compress(GOOD))
    assert [item.source for item in load_items(plain)] == [f"{plain} line 1", f"{plain} line 3"]
    assert load_items(packed)[0].choices == ("b", "c")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (b"[1]", "is a list, not an object"),
        (b'{"context": "a", "answer": 0}', "lacks choices"),
        (b'{"context": 1, "choices": ["b", "c"], "answer": 0}', "context is not text: 1"),
        (b'{"context": "a", "choices": ["b"], "answer": 0}', "two or more"),
        (b'{"context": "a", "choices": ["b", ""], "answer": 0}', "not empty"),
        (b'{"context": "a", "choices": ["b", "b"], "answer": 0}', "the same"),
        (
            b'{"context": "a", "choices": ["b", "c"], "answer": 2}',
            "answer 2 is not an index into its 2 choices",
        ),
        (b'{"context": "a", "choices": ["b", "c"], "answer": true}', "answer True"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line: bytes, why: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n")
    with pytest.raises(CorpusError) as caught:
        load_items(path)
    assert caught.value.what == f"{path} line 2 is not a multiple-choice item"
    assert why in caught.value.why


def test_a_missing_an_empty_and_a_truncated_file(tmp_path) -> None:
    with pytest.raises(CorpusError, match="cannot read multiple-choice file"):
        load_items(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    with pytest.raises(CorpusError, match="is empty"):
        load_items(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(GOOD * 99)[:-12])
    with pytest.raises(CorpusError, match="cannot read multiple-choice file"):
        load_items(tmp_path / "cut.jsonl.gz")


def test_batches_hold_all_sequences_and_no_more_tokens_than_allowed() -> None:
    flat = [(i, 0, (0,) * size) for i, size in enumerate([1, 2, 2, 5, 9])]
    batches = choices._batches(flat, 6)
    assert [entry for batch in batches for entry in batch] == flat
    assert [len(batch) for batch in batches] == [3, 1, 1]


# ---- speed -------------------------------------------------------------------------------------------------


def test_speed_and_memory(samples: torch.Tensor, capfd: pytest.CaptureFixture[str]) -> None:
    speeds = compare_speed({"a": tiny(0), "b": tiny(1)}, samples[:1], num_new_tokens=4, repeats=2)
    assert list(speeds) == ["a", "b"]
    for speed in speeds.values():
        assert speed.prefill_tokens_per_second > speed.decode_tokens_per_second > 0
        assert speed.weight_bytes == weight_bytes(tiny()) == 4 * sum(p.numel() for p in tiny().parameters())
        assert speed.peak_memory_bytes > speed.weight_bytes
    assert capfd.readouterr() == ("", "")


def test_working_memory_grows_with_the_prompt(samples: torch.Tensor) -> None:
    short, long = (working_bytes(tiny(), samples[:rows, :12].reshape(1, -1)[:, :28]) for rows in (1, 5))
    assert short < long < 40 * short


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 5.0},
        {"num_beams": 3},
        {"stop_strings": ["a"]},
        {"forced_bos_token_id": 7, "forced_eos_token_id": 8},
        {"do_sample": True, "temperature": 9.0},
        {"suppress_tokens": list(range(160))},
        {"min_new_tokens": 40, "max_length": 3},
    ],
)
def test_greedy_is_greedy_whatever_the_checkpoint_asks_for(tiny_llama: Path, asked: dict[str, Any]) -> None:
    model = Checkpoint.open(tiny_llama).load()
    model.generation_config = GenerationConfig(**asked)
    ids = torch.arange(40, 52)[None]
    want = ids
    with torch.no_grad():
        for _ in range(8):
            want = torch.cat([want, model(want).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(measure.generate_greedily(model, ids, num_new_tokens=8), want)
    assert model.generation_config.to_diff_dict().items() >= asked.items()
    end = int(want[0, 14])
    assert torch.equal(
        measure.generate_greedily(model, ids, num_new_tokens=8, end=end), want[:, : want[0].tolist().index(end, 12) + 1]
    )
