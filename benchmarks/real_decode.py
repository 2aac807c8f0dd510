"""Decode speed of a teacher and its students: in plain transformers, and in llama.cpp.

    python benchmarks/real_decode.py --results FILE [--llama-cpp PYTHON --llama-cpp-source FOLDER] \\
        teacher=FOLDER student=FOLDER ...

The first model has the tokenizer of all. In each runtime the models take turns, each time with one prompt and one new
token at a time, and a line has the median of the repeats. PYTHON is an interpreter with llama-cpp-python, whose source
package FOLDER holds llama.cpp's converter. Files for llama.cpp are bfloat16, as the models are here.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from real_model import Lines, where
from transformers import AutoModelForCausalLM

from halve.model.speed import compare_speed

PROMPT, NEW, REPEATS = 64, 64, 7


def main() -> None:
    """Time, and add a line for each runtime and model."""
    parser = argparse.ArgumentParser(description="Decode speed of a teacher and its students.")
    parser.add_argument("models", nargs="+", help="name=folder, the teacher first")
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--llama-cpp", type=Path, help="an interpreter with llama-cpp-python")
    parser.add_argument("--llama-cpp-source", type=Path, help="its source package")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folders = {name: Path(folder) for name, _, folder in (each.partition("=") for each in args.models)}
    rates = {"transformers": in_transformers(folders)}
    if args.llama_cpp:
        rates["llama.cpp"] = in_llama_cpp(folders, args.llama_cpp, args.llama_cpp_source, args.threads)
    book = Lines(args.results)
    for runtime, by_name in rates.items():
        for name, rate in by_name.items():
            book.add({"decoded": name, "runtime": runtime, "tokens_per_second": rate, "prompt": PROMPT, **where()})


def in_transformers(folders: dict[str, Path]) -> dict[str, float]:
    """Tokens a second of one sequence, in the precision that the folders are in."""
    models = {name: AutoModelForCausalLM.from_pretrained(folder).eval() for name, folder in folders.items()}
    prompt = torch.arange(100, 100 + PROMPT)[None]
    found = compare_speed(models, prompt, num_new_tokens=NEW, repeats=REPEATS)
    return {name: speed.decode_tokens_per_second for name, speed in found.items()}


def in_llama_cpp(folders: dict[str, Path], python: Path, source: Path, threads: int) -> dict[str, float]:
    """The same in llama.cpp, in an interpreter of its own."""
    convert = source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py"
    teacher = next(iter(folders.values()))
    with tempfile.TemporaryDirectory() as place:
        files: list[Path] = []
        for name, folder in folders.items():
            whole, file = Path(place, f"{name}-hf"), Path(place, f"{len(files)}.gguf")
            shutil.copytree(teacher, whole, ignore=shutil.ignore_patterns("*.safetensors*"))
            shutil.copytree(folder, whole, dirs_exist_ok=True)
            settings = whole / "tokenizer_config.json"
            named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
            settings.write_text(json.dumps(named))  # the converter's transformers may be older than the name there
            subprocess.run(
                [python, convert, whole, "--outfile", file, "--outtype", "bf16"], check=True, stdout=sys.stderr
            )
            files.append(file)
        timer = Path(__file__).with_name("llama_cpp_decode.py")
        asked = [str(value) for value in (threads, PROMPT, NEW, REPEATS)]
        said = subprocess.run([python, timer, *asked, *files], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(zip(folders, json.loads(said), strict=True))


if __name__ == "__main__":
    main()
