"""The suites are the papers': 2408.11796, Tables 1 and 2, with the shots and metrics of its evaluation section."""

from __future__ import annotations

from halve.evaluation.sandbox import SandboxLimits
from halve.evaluation.suites import SAMPLING, SUITES

BASE = {
    "winogrande": (5, "acc"),
    "arc_challenge": (25, "acc_norm"),
    "mmlu": (5, "acc"),
    "hellaswag": (10, "acc_norm"),
    "gsm8k": (5, "exact_match"),
    "truthfulqa_mc2": (0, "acc"),
    "xlsum_en": (3, "rougeL"),
    "mbpp": (0, "pass_at_1"),
    "humaneval": (0, "pass@1"),
}
INSTRUCT = {"mmlu": 5, "gsm8k": 0, "gpqa": 0, "humaneval": 0, "mbpp": 0, "ifeval": 0}


def test_the_base_suite_is_the_paper_s() -> None:
    suite = SUITES["minitron-base"]
    assert {ask.task: (ask.shots, ask.metric.partition(",")[0]) for ask in suite} == BASE
    assert {ask.task: ask.share for ask in suite if ask.share != 1} == {"xlsum_en": 0.2}
    assert {ask.task: ask.answers for ask in suite if ask.answers != 1} == {"humaneval": 20}
    assert SAMPLING == {"do_sample": True, "temperature": 0.2, "top_p": 0.95}


def test_the_instruct_suite_is_the_paper_s() -> None:
    assert {ask.task: ask.shots for ask in SUITES["minitron-instruct"]} == INSTRUCT


def test_a_program_gets_ten_seconds_one_gigabyte_and_32_processes() -> None:
    assert SandboxLimits() == SandboxLimits(seconds=10, memory_bytes=1 << 30, processes=32, file_bytes=1 << 24)
