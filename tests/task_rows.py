"""Made-up rows of every task of the suites, in the form of the task's own data set, and a model to ask."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

Row = dict[str, Any]
_WORDS = ("cat", "dog", "tree", "river", "house", "stone", "bird", "cloud", "child", "king", "road", "lamp")


def rows_of(task: str, num: int, *, seed: int = 0) -> list[Row]:
    """`num` rows of a task that no data set has."""
    draw = random.Random(f"{task} {seed}")
    return [_ROWS[task](draw, number) for number in range(num)]


def write_data(folder: Path, task: str, num: int, *, shots: int = 8) -> Path:
    """A folder with the splits of a task: rows to ask, and more for its examples."""
    place = folder / task
    place.mkdir(parents=True)
    asked_in, shown_in = _SPLITS[task]
    write_rows(place / f"{asked_in}.jsonl", rows_of(task, num))
    if shown_in:
        write_rows(place / f"{shown_in}.jsonl", rows_of(task, shots, seed=1))
    return place


def write_rows(path: Path, rows: list[Row]) -> Path:
    """JSON lines."""
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def small_model(folder: Path, tokenizer: Any, *, layers: int = 1, seed: int = 0) -> Path:
    """A random llama with a context of 4096 in which every task's prompt has room."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=4096,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.4,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _sentence(draw: random.Random) -> str:
    return f"The {draw.choice(_WORDS)} sees the {draw.choice(_WORDS)}."


def _four(draw: random.Random) -> list[str]:
    return [f"{draw.choice(_WORDS)} {i}" for i in range(4)]


def _arc(draw: random.Random, number: int) -> Row:
    choices = {"text": _four(draw), "label": ["A", "B", "C", "D"]}
    return {"question": f"What is {number}? {_sentence(draw)}", "choices": choices, "answerKey": draw.choice("ABCD")}


def _winogrande(draw: random.Random, number: int) -> Row:
    first, second = draw.sample(_WORDS, 2)
    sentence = f"The {first} saw the {second} because the _ was number {number}."
    return {"sentence": sentence, "option1": first, "option2": second, "answer": draw.choice("12")}


def _hellaswag(draw: random.Random, number: int) -> Row:
    labels = {"label": str(draw.randrange(4)), "activity_label": f"Walking {number}"}
    return {"ctx_a": _sentence(draw), "ctx_b": "then the", "endings": _four(draw), **labels}


def _mmlu(draw: random.Random, number: int) -> Row:
    subject = ("anatomy", "astronomy")[number % 2]
    return {"subject": subject, "question": _sentence(draw), "choices": _four(draw), "answer": draw.randrange(4)}


def _gsm8k(draw: random.Random, number: int) -> Row:
    one, two = draw.randrange(9), draw.randrange(9)
    question = f"A {draw.choice(_WORDS)} has {one} stones and finds {two}. How many are there?"
    return {"question": question, "answer": f"{one} + {two} = {one + two}\n#### {one + two}"}


def _truthfulqa(draw: random.Random, number: int) -> Row:
    choices = _four(draw)
    targets = {"choices": choices, "labels": [1, 1, 0, 0]}
    first = {"choices": choices, "labels": [1, 0, 0, 0]}
    return {"question": f"{_sentence(draw)[:-1]}?", "mc1_targets": first, "mc2_targets": targets}


def _xlsum(draw: random.Random, number: int) -> Row:
    return {"text": " ".join(_sentence(draw) for _ in range(4)), "summary": _sentence(draw)}


def _mbpp(draw: random.Random, number: int) -> Row:
    tests = [f"assert add_{number}({i}, 2) == {i + 2}" for i in range(3)]
    code = f"def add_{number}(a, b):\n    return a + b"
    return {"task_id": 11 + number, "text": "Write a function that adds.", "code": code, "test_list": tests}


def _humaneval(draw: random.Random, number: int) -> Row:
    prompt = f'def twice_{number}(x):\n    """Return x times two."""\n'
    test = "def check(candidate):\n    assert candidate(3) == 6"
    return {"task_id": f"Made/{number}", "prompt": prompt, "entry_point": f"twice_{number}", "test": test}


def _gpqa(draw: random.Random, number: int) -> Row:
    right, *wrong = draw.sample(_WORDS, 4)
    return {"Question": _sentence(draw), "Correct Answer": right} | {
        f"Incorrect Answer {i}": answer for i, answer in enumerate(wrong, 1)
    }


def _ifeval(draw: random.Random, number: int) -> Row:
    kinds = [
        ("punctuation:no_comma", {}),
        ("length_constraints:number_words", {"relation": "less than", "num_words": 9}),
    ]
    chosen = kinds[: 1 + number % 2]
    return {
        "key": number,
        "prompt": f"{_sentence(draw)} Use no comma.",
        "instruction_id_list": [name for name, _ in chosen],
        "kwargs": [settings for _, settings in chosen],
    }


_ROWS = {
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "winogrande": _winogrande,
    "hellaswag": _hellaswag,
    "mmlu": _mmlu,
    "gsm8k": _gsm8k,
    "truthfulqa_mc2": _truthfulqa,
    "xlsum_en": _xlsum,
    "mbpp": _mbpp,
    "humaneval": _humaneval,
    "gpqa": _gpqa,
    "ifeval": _ifeval,
}
_SPLITS = {
    "arc_easy": ("test", "train"),
    "arc_challenge": ("test", "train"),
    "winogrande": ("validation", "train"),
    "hellaswag": ("validation", "train"),
    "mmlu": ("test", "dev"),
    "gsm8k": ("test", "train"),
    "truthfulqa_mc2": ("validation", ""),
    "xlsum_en": ("test", "train"),
    "mbpp": ("test", ""),
    "humaneval": ("test", ""),
    "gpqa": ("train", ""),
    "ifeval": ("train", ""),
}
SUITE_TASKS = tuple(task for task in _ROWS if task != "arc_easy")
