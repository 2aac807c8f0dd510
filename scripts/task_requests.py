"""The requests of lm-evaluation-harness for given rows, by its own task files alone.

    python scripts/task_requests.py tests/evaluation/requests.json

Nothing of halve is imported. `tests/evaluation/test_requests.py` compares halve's runs with the result. Run it again
for a newer version of the harness.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
ITEMS = 3
SHOTS = {
    "winogrande": 5,
    "arc_challenge": 25,
    "mmlu_anatomy": 5,
    "mmlu_astronomy": 5,
    "hellaswag": 10,
    "gsm8k": 5,
    "truthfulqa_mc2": 0,
    "mbpp": 0,
    "humaneval_64": 0,
    "gpqa_main_zeroshot": 0,
    "humaneval_instruct": 0,
    "mbpp_instruct": 0,
    "ifeval": 0,
}
DATA = {
    "mmlu_anatomy": "mmlu",
    "mmlu_astronomy": "mmlu",
    "humaneval_64": "humaneval",
    "humaneval_instruct": "humaneval",
    "mbpp_instruct": "mbpp",
    "gpqa_main_zeroshot": "gpqa",
}


def main(out: Path) -> None:
    """Write hashes of every task's requests, plain and through a chat template with examples as turns."""
    sys.path.insert(0, str(ROOT / "tests"))
    rows, chat = (importlib.import_module(name) for name in ("task_rows", "chat"))
    # what the harness's code tasks would download at import; nothing is scored here
    sys.modules["evaluate"] = SimpleNamespace(load=lambda _: SimpleNamespace(compute=lambda **_: [{}]))  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(BPE()), chat_template=chat.CHATML)
    found: dict[str, Any] = {"harness": version("lm_eval"), "plain": {}, "chat": {}}
    with tempfile.TemporaryDirectory() as folder:
        for task in SHOTS:
            loaded = _loaded(task, rows, Path(folder) / task)
            for words, options in (("plain", {}), ("chat", _chat_options(tokenizer))):
                loaded.set_fewshot_seed(1234)
                loaded.build_all_requests(**options)
                found[words][task] = _hashes(loaded.instances)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _loaded(task: str, rows: Any, folder: Path) -> Any:
    """A task on files of made-up rows, read by the harness's own loader."""
    from lm_eval.tasks import TaskManager

    name = DATA.get(task, task)
    place = rows.write_data(folder, name, 2 * ITEMS if name == "mmlu" else ITEMS, shots=30)
    files = {}
    for file in sorted(place.iterdir()):
        kept = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        if name == "mmlu":
            kept = [row for row in kept if f"mmlu_{row['subject']}" == task]
        files[file.stem] = str(rows.write_rows(file, kept))
    random.seed(0)  # as its simple_evaluate does
    changes = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files}}
    member = {"task": task, "num_fewshot": SHOTS[task], **changes}
    return TaskManager().load([{"group": "made", "task": [member]}])["tasks"][task]


def _chat_options(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        ending = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **ending))

    return {"apply_chat_template": True, "fewshot_as_multiturn": True, "chat_template": render}


def _hashes(instances: list[Any]) -> list[str]:
    """One hash for the requests of each item."""
    by_item: dict[int, list[Any]] = {}
    for instance in instances:
        by_item.setdefault(instance.doc_id, []).append(instance)
    listed = [sorted(several, key=lambda one: one.idx) for several in by_item.values()]
    texts = [json.dumps([one.args for one in several], sort_keys=True, default=str) for several in listed]
    return [hashlib.sha256(text.encode()).hexdigest() for text in texts]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
