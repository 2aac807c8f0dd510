"""Steps of TRL's trainers as halve runs them, beside loops by hand; adapters, resuming, and what ends a training."""

from __future__ import annotations

import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from halve.align import measured, trainers
from halve.align.examples import Dialogue, Preference
from halve.align.losses import PAIR_LOSSES
from halve.align.setting import StepSetting
from halve.errors import Stopped, TrainError
from halve.progress import SILENT
from halve.train.loop.adapters import linears

MakeSetting = Callable[..., StepSetting]


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def opened(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder)
    return model.eval()


def logp(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> Tensor:
    """The log-probability of an answer, by the plain model."""
    logs = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].float().log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return torch.stack([logs[place, token] for place, token in zip(places, answer, strict=True)]).sum()


def by_hand(model: PreTrainedModel, loss: Callable[[], Tensor], how: StepSetting, steps: int) -> list[float]:
    """A plain loop over one batch: AdamW, cosine to zero after the warm-up, gradients clipped to 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=how.step.lr, weight_decay=0.0)
    warmup, values = how.step.warmup_steps, []
    for step in range(steps):
        rate = step / warmup if step < warmup else (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = how.step.lr * rate
        value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values.append(value.item())
    return values


# ---- losses


@pytest.mark.parametrize("form", sorted(PAIR_LOSSES))
def test_rpo_trains_as_a_loop_by_hand(
    form: str,
    chat_folder: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
    pairs: list[Preference],
    make_setting: MakeSetting,
) -> None:
    pairs = [*pairs[:5], pairs[5]._replace(gap=0.0)]
    how = make_setting(kind="rpo", form=form, batch=6, micro_batch=3, epochs=4, lr=1e-3)
    done = trainers.train_on_pairs(opened(chat_folder), chat_tokenizer, pairs, how)

    model, start = opened(chat_folder), opened(chat_folder)
    with torch.no_grad():
        before = [logp(start, p.prompt, p.chosen) - logp(start, p.prompt, p.rejected) for p in pairs]
    gaps = torch.tensor([pair.gap for pair in pairs])

    def loss() -> Tensor:
        now = [logp(model, p.prompt, p.chosen) - logp(model, p.prompt, p.rejected) for p in pairs]
        return PAIR_LOSSES[how.step.form](torch.stack(now) - torch.stack(before), gaps, beta=0.1, eta=1.0).mean()

    values = by_hand(model, loss, how, steps=4)
    assert [line["loss"] for line in done.log] == pytest.approx(values, rel=1e-3)
    trained = weights(done.model)
    for name, want in weights(model).items():
        torch.testing.assert_close(trained[name], want, rtol=1e-3, atol=2e-4)


def test_dpo_and_ipo_begin_where_they_have_to(
    chat_folder: Path, chat_tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], make_setting: MakeSetting
) -> None:
    """Before the first step no answer has gained anything: DPO's loss is ln 2 and IPO's (1 / (2 beta))^2."""
    for kind, first in (("dpo", math.log(2)), ("ipo", 25.0)):
        how = make_setting(kind=kind, batch=24, epochs=2, scratch=kind)
        done = trainers.train_on_pairs(opened(chat_folder), chat_tokenizer, pairs, how)
        assert done.log[0]["loss"] == pytest.approx(first, rel=1e-4)
        assert done.log[0]["tokens"] == sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)


def test_packed_conversations_train_as_each_alone_by_hand(
    chat_folder: Path, chat_tokenizer: PreTrainedTokenizerBase, talks: list[Dialogue], make_setting: MakeSetting
) -> None:
    how = make_setting(kind="sft", batch=64, micro_batch=4, epochs=3, lr=1e-3)
    done = trainers.train_on_dialogues(opened(chat_folder), chat_tokenizer, talks, how)
    model = opened(chat_folder)
    count = sum(int(talk.counts[1:].sum()) for talk in talks)

    def loss() -> Tensor:
        total = torch.zeros(())
        for talk in talks:
            logs = model(input_ids=torch.from_numpy(talk.ids.astype("int64"))[None]).logits[0].log_softmax(-1)
            places = np.flatnonzero(talk.counts[1:])
            total = total - torch.stack([logs[place, int(talk.ids[place + 1])] for place in places]).sum()
        return total / count

    assert [line["loss"] for line in done.log] == pytest.approx(by_hand(model, loss, how, steps=3), rel=1e-3)
    trained = weights(done.model)
    for name, want in weights(model).items():
        torch.testing.assert_close(trained[name], want, rtol=1e-3, atol=2e-4)


def test_a_model_that_mixes_packed_conversations_reads_them_padded(
    chat_folder: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
    talks: list[Dialogue],
    make_setting: MakeSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    how = make_setting(kind="sft", batch=64, epochs=2)
    packed = trainers.train_on_dialogues(opened(chat_folder), chat_tokenizer, talks, how)
    monkeypatch.setattr(trainers, "_packs", lambda model: False)
    how = replace(how, scratch=how.scratch.with_name("padded"))
    padded = trainers.train_on_dialogues(opened(chat_folder), chat_tokenizer, talks, how)
    assert [line["loss"] for line in padded.log] == pytest.approx([line["loss"] for line in packed.log], rel=1e-4)


def test_preferences_are_learned(
    model: PreTrainedModel, chat_tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], make_setting: MakeSetting
) -> None:
    train, heldout = pairs[:16], pairs[16:]
    before = measured.pair_logps(model, heldout)
    done = trainers.train_on_pairs(model, chat_tokenizer, train, make_setting(kind="rpo", epochs=4))
    told = measured.told_of_pairs(heldout, before, measured.pair_logps(done.model.eval(), heldout), beta=0.1)
    assert told["accuracy"]["value"] == 1.0
    assert told["margin"]["value"] > 0.1


# ---- how a model is given back


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_model_is_the_plain_one_again(
    method: str,
    chat_folder: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
    pairs: list[Preference],
    make_setting: MakeSetting,
) -> None:
    model = opened(chat_folder)
    before, config, padding = weights(model), model.config.to_dict(), chat_tokenizer.pad_token
    how = make_setting(kind="dpo", method=method, lora_rank=4, epochs=1)
    done = trainers.train_on_pairs(model, chat_tokenizer, pairs, how)
    assert done.model is model
    assert done.model.config.to_dict() == config
    assert chat_tokenizer.pad_token == padding
    assert "forward" not in vars(done.model)
    after = weights(done.model)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    if method == "lora":
        assert changed == {f"{name}.weight" for name in linears(model)}
    else:
        assert changed == set(after)


# ---- killed and resumed


class Killed(Exception):
    """Stands for a kill."""


def dying(how: StepSetting, *, at: int) -> StepSetting:
    """The same setting, in which the process ends when a step is logged for the `at`-th time."""
    left = [at]

    class Task:
        def advance(self, tokens: int, **metrics: float) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise Killed

    class Dying:
        @contextmanager
        def task(self, name: str, total_tokens: int | None, *, done: int = 0) -> Iterator[Any]:
            yield Task()

        def say(self, line: str) -> None:
            return None

    return replace(how, progress=Dying())


@pytest.mark.parametrize(("kind", "method"), [("rpo", "full"), ("rpo", "lora"), ("ipo", "full"), ("sft", "full")])
def test_a_killed_training_ends_with_the_same_bits(
    kind: str,
    method: str,
    chat_folder: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
    pairs: list[Preference],
    talks: list[Dialogue],
    make_setting: MakeSetting,
) -> None:
    def train(how: StepSetting) -> trainers.AlignedModel:
        if kind == "sft":
            return trainers.train_on_dialogues(opened(chat_folder), chat_tokenizer, talks, how)
        return trainers.train_on_pairs(opened(chat_folder), chat_tokenizer, pairs, how)

    usual = {"kind": kind, "method": method, "lora_rank": 4, "batch": 4, "micro_batch": 2, "checkpoint_every": 3}
    whole = train(make_setting(**usual, epochs=1.5, scratch="whole"))
    how = make_setting(**usual, epochs=1.5)
    with pytest.raises(Killed):
        train(dying(how, at=5))
    (last,) = how.scratch.glob("checkpoint-*")
    assert last.name == "checkpoint-3"
    torn = last.with_name("checkpoint-6")  # a kill in the middle of writing
    shutil.copytree(last, torn)
    (torn / "trainer_state.json").write_text('{"global_step": 6, "log')
    resumed = train(how)
    assert resumed.log == whole.log
    want = weights(whole.model)
    assert all(torch.equal(value, want[name]) for name, value in weights(resumed.model).items())


def test_sigterm_ends_with_a_checkpoint(
    chat_folder: Path, chat_tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], make_setting: MakeSetting
) -> None:
    how = make_setting(kind="rpo", batch=4, epochs=1)

    class Task:
        def advance(self, tokens: int, **metrics: float) -> None:
            os.kill(os.getpid(), signal.SIGTERM)

    class Ending:
        @contextmanager
        def task(self, name: str, total_tokens: int | None, *, done: int = 0) -> Iterator[Any]:
            yield Task()

        def say(self, line: str) -> None:
            return None

    with pytest.raises(Stopped, match="after step 2 of align"):
        trainers.train_on_pairs(opened(chat_folder), chat_tokenizer, pairs, replace(how, progress=Ending()))
    assert trainers.last_checkpoint(how.scratch) == how.scratch / "checkpoint-2"
    done = trainers.train_on_pairs(opened(chat_folder), chat_tokenizer, pairs, replace(how, progress=SILENT))
    assert [line["step"] for line in done.log] == [1, 2, 3, 4, 5, 6]


# ---- what cannot be trained


def test_a_loss_that_is_not_finite_ends_the_training(
    chat_folder: Path, chat_tokenizer: PreTrainedTokenizerBase, pairs: list[Preference], make_setting: MakeSetting
) -> None:
    model = opened(chat_folder)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = math.nan
    with pytest.raises(TrainError, match=r"is not finite in step 1\n.*\n  fix: set a lower lr"):
        trainers.train_on_pairs(model, chat_tokenizer, pairs, make_setting(kind="rpo"))


def test_nothing_is_sent_anywhere(
    chat_folder: Path,
    chat_tokenizer: PreTrainedTokenizerBase,
    pairs: list[Preference],
    talks: list[Dialogue],
    make_setting: MakeSetting,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sent(*_: Any, **__: Any) -> None:
        raise AssertionError("telemetry")

    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", sent)
    monkeypatch.setattr("socket.socket.connect", sent)
    trainers.train_on_pairs(opened(chat_folder), chat_tokenizer, pairs, make_setting(kind="dpo", batch=24))
    trainers.train_on_dialogues(
        opened(chat_folder), chat_tokenizer, talks, make_setting(kind="sft", batch=24, scratch="sft")
    )
