"""Train the demo's teacher from scratch on the standard library's code without its docstrings.

    python scripts/train_demo_teacher.py prepare PREPARED      text, tokenizer, token files, baselines
    python scripts/train_demo_teacher.py train PREPARED DIR    a Llama of 1.5 M parameters, by halve's own loop
    python scripts/train_demo_teacher.py check PREPARED DIR    must beat a 5-gram model and xz

`prepare` reads this Python's library and needs no GPU; `train` and `check` read PREPARED alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ngram
import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from halve.anatomy.configs import context_length
from halve.demo import corpus, task
from halve.disk.files import read_json, write_json
from halve.model import measure, saving
from halve.model.checkpoint import Checkpoint, resolve_device
from halve.model.choices import answer_encoded, encode, load_items
from halve.progress import RichProgress
from halve.recipe.schema import Training
from halve.text.corpus import Samples, Tokens, prepare, reopen
from halve.text.course import Course
from halve.train.loop import loop
from halve.train.objectives.logits import cross_entropy, heldout_loss

END = "<|endoftext|>"
VOCAB = 2048
CONTEXT = 256
SEED = 0
SHAPE = {
    "hidden_size": 104,
    "intermediate_size": 280,
    "num_hidden_layers": 10,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


def prepare_all(out: Path) -> None:
    """Write PREPARED: tokenizer/, train and valid token files, items.jsonl, baselines.json."""
    modules = list(corpus.read_modules(corpus.standard_library(), tests=True))
    train = [module for module in modules if not module.held_out and module.code.strip()]
    # Tests of held-out modules are in neither text: they quote what they test.
    valid = [module for module in modules if module.held_out and "test" not in module.name.split(".")]
    tokenizer = train_tokenizer(module.code for module in train)
    tokenizer.save_pretrained(out / "tokenizer")
    tokens: dict[str, Tokens] = {}
    with tempfile.TemporaryDirectory() as folder:
        for split, chosen in (("train", train), ("valid", valid)):
            file = write_code(Path(folder, f"{split}.jsonl"), chosen)
            tokens[split] = prepare(
                [str(file)],
                tokenizer=tokenizer,
                text_field="text",
                cache=out / split,
                progress=RichProgress(),
            )
            size = f"{tokens[split].text_bytes:,} bytes, {len(tokens[split]):,} tokens"
            print(f"{split}: {len(chosen)} modules, {size}")
    items = task.build_items(valid, seed=SEED)
    task.write_items(out / "items.jsonl", items)
    print(f"{len(items)} multiple-choice items")
    figures = measure_baselines(tokens, code_bytes(train), code_bytes(valid))
    write_json(out / "baselines.json", figures)
    print(json.dumps(figures, indent=2))


def train_tokenizer(texts: Iterable[str]) -> transformers.PreTrainedTokenizerFast:
    """Byte-level BPE with the end-of-text token as id 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        bos_token=END,
        pad_token=END,
        model_max_length=2 * CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def write_code(path: Path, modules: Iterable[corpus.Module]) -> Path:
    """Modules as JSON lines, one document each."""
    with path.open("w", encoding="utf-8") as file:
        for module in modules:
            file.write(json.dumps({"module": module.name, "text": module.code}) + "\n")
    return path


def code_bytes(modules: Iterable[corpus.Module]) -> bytes:
    """The modules' code as one text."""
    return "\n".join(module.code for module in modules).encode()


def measure_baselines(tokens: dict[str, Tokens], train: bytes, valid: bytes) -> dict[str, float]:
    """Bits per byte of the held-out code under each baseline, all trained on the training code."""
    train_ids, valid_ids = tokens["train"].ids, tokens["valid"].ids
    by_token = ngram.fit(train_ids, vocab=VOCAB).bits(valid_ids).sum() / tokens["valid"].text_bytes
    train_bytes, valid_bytes = (np.frombuffer(text, dtype=np.uint8) for text in (train, valid))
    by_byte = ngram.fit(train_bytes, vocab=256).bits(valid_bytes).mean()
    return {
        "5-gram of tokens": float(by_token),
        "5-gram of bytes": float(by_byte),
        "xz alone": ngram.xz_bits(valid) / len(valid),
        "xz after the training code": ngram.xz_bits(valid, after=train) / len(valid),
    }


def train_teacher(prepared: Path, out: Path, *, training: Training, device: str) -> None:
    """Train from scratch and write `out`, a Hugging Face folder in bfloat16. A killed run resumes."""
    tokenizer = Checkpoint.open(prepared / "tokenizer").tokenizer
    train, valid = open_tokens(prepared / "train"), open_tokens(prepared / "valid")
    config = transformers.LlamaConfig(
        **SHAPE,
        vocab_size=VOCAB,
        max_position_embeddings=2 * CONTEXT,
        rms_norm_eps=1e-5,
        initializer_range=0.04,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(SEED)
    model = transformers.LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, {training.tokens / len(train):.1f} epochs")
    work = out.with_name(f".{out.name}.work")
    work.mkdir(parents=True, exist_ok=True)
    heldout = Samples(valid, context=CONTEXT, seed=SEED).heldout(training.eval_samples)
    lesson = loop.Lesson(cross_entropy(), heldout=heldout_loss(heldout, micro_batch=min(64, training.eval_samples)))
    course = Course(training, Samples(train, context=CONTEXT, seed=SEED))
    files = loop.TrainFiles(work, out.with_name(f"{out.name}.metrics.jsonl"), SEED, "teacher")
    result = loop.train(model, lesson, course, files, device=device, progress=RichProgress())
    record = {
        "made_by": "scripts/train_demo_teacher.py",
        "text": "the Python standard library's code without its docstrings",
        "held_out": list(corpus.HELD_OUT),
        "training": training.model_dump(mode="json"),
        **result.as_dict(),
    }
    saving.save_model(model.to(torch.bfloat16), out, extra_from=prepared / "tokenizer", record=record)
    print(json.dumps(result.as_dict()))


def check_teacher(prepared: Path, folder: Path, *, device: str) -> bool:
    """Compare a teacher with the baselines and with chance; prints the figures, returns whether it holds up.

    The teacher sees packed samples, on average half a context before a token, and nothing of the held-out
    text outside of it; xz sees all of the held-out text before a byte.
    """
    teacher = Checkpoint.open(folder)
    model, tokenizer = teacher.load(dtype="float32", device=device), teacher.tokenizer
    samples = Samples(open_tokens(prepared / "valid"), context=CONTEXT, seed=SEED)
    ids = samples.take(range(len(samples)))
    nll = measure.language_modeling(model, ids, micro_batch=64)
    num_bytes = measure.target_bytes(tokenizer, ids)
    bits = measure.bits_per_byte(nll, num_bytes, num_targets=CONTEXT - 1)
    items = load_items(prepared / "items.jsonl")
    encoded = encode(tokenizer, items, max_tokens=context_length(model.config))
    accuracy = measure.proportion(answer_encoded(model, encoded).right)
    bound = read_json(prepared / "baselines.json")
    chance = 1 / len(items[0].choices)
    figures: dict[str, Any] = {
        "bits_per_byte": bits.as_dict(),
        "baselines": bound,
        "accuracy": accuracy.as_dict(),
        "chance": chance,
        "items": len(items),
    }
    print(json.dumps(figures, indent=2))
    beaten = bits.value + 3 * bits.stderr < min(bound.values())
    return bool(beaten) and accuracy.value - 4 * accuracy.stderr > chance


def open_tokens(folder: Path) -> Tokens:
    """The one token file of a folder that `prepare` wrote."""
    (note,) = folder.glob("*.json")
    tokens = reopen(note)
    assert tokens is not None, f"{folder} is not whole; run prepare again"
    return tokens


def main() -> int:
    """Run one verb; 1 if a check fails."""
    parser = argparse.ArgumentParser(description="Train the teacher that the demo ships.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("prepare", "train", "check"):
        options = verbs.add_parser(verb)
        options.add_argument("prepared", type=Path)
        if verb != "prepare":
            options.add_argument("folder", type=Path)
            options.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
        if verb == "train":
            options.add_argument("--tokens", type=int, default=20_480_000)
            options.add_argument("--batch", type=int, default=32, help="samples in a step")
            options.add_argument("--micro-batch", type=int, default=8, help="samples in one forward pass")
            options.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    if args.verb == "prepare":
        prepare_all(args.prepared)
        return 0
    device = resolve_device(args.device)
    if args.verb == "check":
        return 0 if check_teacher(args.prepared, args.folder, device=device) else 1
    steps = args.tokens // (args.batch * CONTEXT)
    training = Training.model_validate(
        {
            "tokens": args.tokens,
            "batch": args.batch,
            "lr": args.lr,
            "min_lr": args.lr / 100,
            "warmup_steps": min(200, steps // 10),
            "weight_decay": 0.1,
            "checkpoint_every": max(steps // 10, 1),
            "eval_every": max(steps // 40, 1),
            "eval_samples": 128,
        }
    )
    train_teacher(args.prepared, args.folder, training=training, device=device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
