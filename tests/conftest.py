"""What many tests share: a text, a tokenizer trained on it and a tiny llama, made on the fly.

Everything is drawn from fixed seeds and is read-only: a test that changes a folder copies it first.
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import checks  # noqa: F401  before anything of halve is imported
import pytest
import torch
from chat import CHATML, small_talk
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from halve.process import fresh, waits
from halve.recipe import read as reading
from halve.recipe.schema import Recipe

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts what runs in its background
    signal.signal(signal.SIGINT, signal.default_int_handler)
torch.set_num_threads(1)
waits.AFTER_S = 600.0  # a busy machine says no more than an idle one
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

# programs that tests start; they import what lies beside them
collect_ignore = ["train/loop/ranks_driver.py", "train/teachers/cache_driver.py"]


SLOW = Path(__file__).with_name("slow.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cases", type=int, default=3, help="spoiled worlds of each area in tests/fuzz")
    parser.addoption("--every-family", action="store_true", help="tests that draw some families look at all of them")
    parser.addoption("--cuts", type=int, default=1, help="random cuts of the demo's teacher in tests/cut")
    parser.addoption("--quick", action="store_true", help="leave out the tests that tests/slow.txt names")
    parser.addoption("--note-slow", action="store_true", help="write tests/slow.txt: who has a case of over a second")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under `--quick` the tests stay that finish in a second each; workers begin with the files that take longest."""
    slow = _slow()
    if config.getoption("--quick"):
        left_out = [item for item in items if item.nodeid.partition("[")[0] in slow]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item.nodeid.partition("[")[0] not in slow]
    if hasattr(config, "workerinput"):
        seconds: Counter[str] = Counter()
        for name, took in slow.items():
            seconds[_file(name)] += took
        items.sort(key=lambda item: -seconds[_file(item.nodeid)])


def _slow() -> dict[str, int]:
    """The tests with a case of over a second, and the seconds of all their cases; one where a line says none."""
    found = {}
    for line in SLOW.read_text(encoding="utf-8").splitlines():
        *seconds, name = line.split()
        found[name] = int(seconds[0]) if seconds else 1
    return found


def _file(name: str) -> str:
    return name.partition("::")[0]


_SET_UP: dict[tuple[str, str], float] = {}
"""By file and name the seconds that a fixture took which tests of the file share."""


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> Any:
    began = time.perf_counter()
    made = yield
    if fixturedef.baseid.endswith(".py") and fixturedef.scope != "function":
        _SET_UP[fixturedef.baseid, fixturedef.argname] = time.perf_counter() - began
    return made


def pytest_runtest_call(item: pytest.Item) -> None:
    """Tell the reports what a test would take that is run alone."""
    shared = sum(_SET_UP.get((_file(item.nodeid), name), 0.0) for name in getattr(item, "fixturenames", ()))
    item.user_properties.append((_SHARED, shared))


_SHARED = "seconds of shared set-up"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Under `--note-slow` note who takes over a second with all of its set-up, and what all its cases took."""
    if not config.getoption("--note-slow"):
        return
    seconds: Counter[str] = Counter()
    shared: Counter[str] = Counter()
    for report in (one for reports in terminalreporter.stats.values() for one in reports if hasattr(one, "duration")):
        seconds[report.nodeid] += report.duration
        shared |= Counter({report.nodeid: dict(report.user_properties).get(_SHARED, 0.0)})
    whole: Counter[str] = Counter()
    for case, took in seconds.items():
        whole[case.partition("[")[0]] += took
    slow = sorted({case.partition("[")[0] for case, took in seconds.items() if took + shared[case] > 1})
    SLOW.write_text("".join(f"{whole[name]:4.0f} {name}\n" for name in slow), encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def kept() -> Iterator[None]:
    """What reopens students loads transformers once for all of a worker's tests."""
    with fresh.kept():
        yield


END = "<|endoftext|>"
# fmt: off
_NOUNS = ("cat", "dog", "tree", "river", "house", "stone", "bird", "cloud", "child", "king", "road", "lamp")
_VERBS = ("sees", "finds", "takes", "keeps", "loses", "paints", "follows", "forgets", "carries", "watches")
_ADJECTIVES = ("small", "old", "red", "quiet", "bright", "cold", "happy", "strange", "round", "long")
# fmt: on


def make_text(*, seed: int, num_documents: int) -> list[str]:
    """Documents of a few simple sentences: enough structure for a model to learn something in seconds."""
    draw = random.Random(seed)

    def thing() -> str:
        return f"the {draw.choice(_ADJECTIVES)} {draw.choice(_NOUNS)}"

    def sentence() -> str:
        return f"{thing()} {draw.choice(_VERBS)} {thing()}.".capitalize()

    return [" ".join(sentence() for _ in range(draw.randint(3, 9))) for _ in range(num_documents)]


def teach(model: LlamaForCausalLM, ids: list[int], *, steps: int = 60) -> None:
    """A second of training, so that the model is better than guessing and can be a teacher."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    draw = torch.Generator().manual_seed(0)
    tokens = torch.tensor(ids)
    for _ in range(steps):
        starts = torch.randint(len(tokens) - 64, (8,), generator=draw)
        batch = torch.stack([tokens[start : start + 64] for start in starts])
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with train.txt (about 80 kB) and valid.txt (about 8 kB)."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "train.txt").write_text("\n\n".join(make_text(seed=0, num_documents=400)), encoding="utf-8")
    (folder / "valid.txt").write_text("\n\n".join(make_text(seed=1, num_documents=40)), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus: Path) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 320 entries with an end-of-text token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train([str(corpus / "train.txt")], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, bos_token=END)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast, corpus: Path) -> Path:
    """A folder with a llama of 4 layers and hidden 32 that has read a little, its tokenizer and chat template."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config)
    teach(model, tokenizer((corpus / "train.txt").read_text(encoding="utf-8"))["input_ids"])
    model.save_pretrained(folder)
    GenerationConfig(bos_token_id=0, eos_token_id=0, max_new_tokens=17).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def chat_model(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with a ChatML template that it has read a little in."""
    folder = tmp_path_factory.mktemp("models") / "chat"
    shutil.copytree(tiny_llama, folder)
    (folder / "chat_template.jinja").write_text(CHATML, encoding="utf-8")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = "".join(tokenizer.apply_chat_template(talk, tokenize=False) for talk in small_talk(60))
    rows = torch.tensor(tokenizer(text)["input_ids"][: 64 * 60]).view(-1, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for step in range(40):
        batch = rows[torch.arange(8) + 7 * step % (len(rows) - 8)]
        model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    return folder


FEW_TOKENS = 2_048
"""For a refit where a test does not say; by default it would take 32,768, which is most of the time of a tiny run."""


@pytest.fixture(scope="session")
def make_recipe(tiny_llama: Path, corpus: Path) -> Callable[..., Recipe]:
    """`make_recipe(distill={...}, ...)`: a recipe on the tiny llama that runs in seconds, its refit on few tokens."""

    def make(**changes: Any) -> Recipe:
        raw: dict[str, Any] = {
            "name": "tiny",
            "model": str(tiny_llama),
            "device": "cpu",
            "data": {
                "train": [str(corpus / "train.txt")],
                "valid": [str(corpus / "valid.txt")],
                "context": 32,
            },
            "score": {"samples": 8, "micro_batch": 4},
            "prune": {"ffn": 40, "layers": 3},
            "evaluate": {"samples": 4, "speed": False},
        }
        sections = {**raw, **changes}
        if "prune" in sections and not {"refit", "refit_tokens", "refit_samples"} & sections["prune"].keys():
            sections["prune"] = {"refit_tokens": FEW_TOKENS, **sections["prune"]}
        return reading.parse(sections, folder=corpus, source="the test")

    return make
