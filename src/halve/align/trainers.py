"""The trainers of alignment: those of TRL, fed with halve's own tokens, and RPO as a small subclass.

TRL keeps checkpoints and resumes. Nothing here is sent anywhere: TRL's telemetry is off.
"""

from __future__ import annotations

import copy
import inspect
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from transformers.pytorch_utils import Conv1D
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from halve.align.examples import Dialogue, Preference
from halve.align.losses import PAIR_LOSSES
from halve.align.setting import StepSetting
from halve.anatomy.configs import quiet
from halve.disk.plain_json import parse_json
from halve.errors import AnatomyError, Stopped, TrainError
from halve.progress import Task
from halve.recipe.schema import Alignment
from halve.text.documents import require_apart
from halve.train.loop.adapters import linears
from halve.train.ranks.group import sigterm

_CHECKPOINT = "checkpoint-"
_STATE = "trainer_state.json"
_LOGGED = {
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "num_tokens": "tokens",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
}


@dataclass(frozen=True)
class AlignedModel:
    """The trained model, adapters merged, and the log of its steps."""

    model: PreTrainedModel
    log: list[dict[str, Any]]


class _Private:
    """Sends nothing, and takes data as they are."""

    def _send_telemetry(self) -> None:
        """Nothing."""


class TalkTrainer(_Private, SFTTrainer):  # type: ignore[misc]
    """TRL's supervised fine-tuning."""


class _PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        return batch | {"gaps": torch.tensor([example["gap"] for example in examples])}


class PairTrainer(_Private, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer of preferences, for pairs that are tokens already; with RPO's losses if the step's kind is rpo.

    The log-probabilities of the reference, which is the model before the step, are computed before the first step, so
    that no second model is kept.
    """

    def __init__(self, *, step: Alignment, **kwargs: Any) -> None:
        self.step = step
        super().__init__(**kwargs)

    def _prepare_dataset(self, dataset: datasets.Dataset, *_: Any) -> datasets.Dataset:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        self._signature_columns = list(dict.fromkeys([*columns, "gap"]))

    def _precompute_ref_logps(self, dataset: datasets.Dataset, name: str, batch_size: int) -> datasets.Dataset:
        """Without files of the library's own, and without a bar."""
        columns: dict[str, list[float]] = {"ref_chosen_logps": [], "ref_rejected_logps": []}
        for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator):
            logps = self.compute_ref_log_probs(self.model, self._prepare_inputs(batch))
            for column, values in zip(columns.values(), logps, strict=True):
                column += values.tolist()
        return dataset.map(
            lambda _, indices: {key: [column[i] for i in indices] for key, column in columns.items()},
            with_indices=True,
            batched=True,
        )

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the chosen and the rejected answers."""
        logps: tuple[Tensor, Tensor] = super().compute_ref_log_probs(model, _without_gaps(inputs))
        return logps

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch of pairs."""
        if self.step.kind != "rpo":
            return super().compute_loss(model, _without_gaps(inputs), return_outputs, num_items_in_batch)
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        asked = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        outputs = model(**asked, **router, use_cache=False, fused_lm_head=True)
        chosen, rejected = outputs.log_probs.sum(dim=1).chunk(2)
        margins = (chosen - inputs["ref_chosen_logps"]) - (rejected - inputs["ref_rejected_logps"])
        losses = PAIR_LOSSES[self.step.form](margins, inputs["gaps"], beta=self.step.beta, eta=self.step.eta)
        loss = losses.mean()
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss
        self._note(margins.detach(), inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _note(self, margins: Tensor, attended: Tensor) -> None:
        """The same figures as TRL's own losses."""
        figures = self._metrics["train"]
        figures["rewards/accuracies"].append((margins > 0).float().mean().item())
        figures["rewards/margins"].append(self.beta * margins.mean().item())
        self._total_train_tokens += int(attended.sum())
        figures["num_tokens"] = [self._total_train_tokens]


def _without_gaps(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "gaps"}


# ---- the two trainings


def train_on_dialogues(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, talks: Sequence[Dialogue], how: StepSetting
) -> AlignedModel:
    """Supervised fine-tuning of a float32 model: cross-entropy on what the assistant says.

    Conversations are packed into samples of `context` tokens, if the model keeps them apart there; otherwise each is
    padded. Resumes from the last checkpoint in `how.scratch`. Raises `TrainError` for a loss that is not finite, and
    `Stopped` after a SIGTERM.
    """
    labels = [talk.ids.astype("int64") * talk.counts - 100 * ~talk.counts for talk in talks]
    data = datasets.Dataset.from_dict({"input_ids": [talk.ids for talk in talks], "labels": labels})
    packs = _packs(model)
    if not packs:
        how.progress.say(f"{how.name}: {type(model).__name__} does not keep packed conversations apart: each is padded")
    length = float(how.context) if packs else sum(len(talk.ids) for talk in talks) / len(talks)
    with _quiet(model):
        packing = {"max_length": how.context, "packing": packs, "shuffle_dataset": True}
        trainer = TalkTrainer(
            model=model,
            args=_one_device(SFTConfig(**_options(how, tokens_a_sample=length), **packing)),
            train_dataset=data,
            processing_class=_with_padding(tokenizer),
            peft_config=_adapters(model, how.step),
        )
        return _trained(trainer, how, tokens_a_sample=length)


def train_on_pairs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Preference], how: StepSetting
) -> AlignedModel:
    """Preference optimization of a float32 model, by the kind of the step.

    Resumes from the last checkpoint in `how.scratch`. Raises `TrainError` for a loss that is not finite, and `Stopped`
    after a SIGTERM.
    """
    columns = {"prompt_ids": "prompt", "chosen_ids": "chosen", "rejected_ids": "rejected", "gap": "gap"}
    data = datasets.Dataset.from_dict(
        {column: [getattr(pair, name) for pair in pairs] for column, name in columns.items()}
    )
    length = sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs) / len(pairs)
    losses = {"loss_type": ["ipo" if how.step.kind == "ipo" else "sigmoid"], "beta": how.step.beta}
    padded = _with_padding(tokenizer)
    with _quiet(model):
        options = DPOConfig(
            **_options(how, tokens_a_sample=length), **losses, max_length=None, precompute_ref_log_probs=True
        )
        trainer = PairTrainer(
            step=how.step,
            model=model,
            args=_one_device(options),
            data_collator=_PairCollator(pad_token_id=padded.pad_token_id),
            train_dataset=data,
            processing_class=padded,
            peft_config=_adapters(model, how.step),
        )
        return _trained(trainer, how, tokens_a_sample=length)


def _with_padding(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy with a token to pad with. Which one does not matter: nothing attends to it and no loss counts it."""
    padded = copy.deepcopy(tokenizer)
    if padded.pad_token is None:
        padded.pad_token = padded.eos_token or padded.convert_ids_to_tokens(0)
    return padded


def _options(how: StepSetting, *, tokens_a_sample: float) -> dict[str, Any]:
    """The arguments that all trainings share."""
    step = how.step
    if step.tokens is not None:
        length: dict[str, Any] = {"max_steps": max(1, -int(-step.tokens // (tokens_a_sample * step.batch)))}
    else:
        length = {"num_train_epochs": step.passes}
    return {
        "output_dir": str(how.scratch),
        **length,
        "per_device_train_batch_size": how.micro_batch,
        "gradient_accumulation_steps": step.batch // how.micro_batch,
        "learning_rate": step.lr,
        "lr_scheduler_type": "cosine",
        "warmup_steps": step.warmup_steps,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "gradient_checkpointing": step.activation_checkpointing == "full",
        "bf16": how.half,
        "use_cpu": how.device == "cpu",
        "seed": how.seed,
        "data_seed": how.seed,
        "save_strategy": "steps",
        "save_steps": step.checkpoint_every,
        "save_total_limit": 1,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": how.device != "cpu",
    }


def _one_device(options: Any) -> Any:
    """The first GPU alone, however many are visible."""
    if options.n_gpu > 1:
        options._n_gpu = 1
    return options


def _adapters(model: PreTrainedModel, step: Alignment) -> LoraConfig | None:
    if step.method != "lora":
        return None
    names = linears(model)
    transposed = any(isinstance(model.get_submodule(name), Conv1D) for name in names)
    rank, alpha = step.lora_rank, step.lora_alpha
    return LoraConfig(
        target_modules=names,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        fan_in_fan_out=transposed,
        task_type="CAUSAL_LM",
    )


def _packs(model: PreTrainedModel) -> bool:
    """Whether the model reads packed conversations as it reads each alone, and takes what the trainer gives it."""
    takes = inspect.signature(type(model).forward).parameters.values()
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in takes):
        return False
    try:
        require_apart(model)
    except AnatomyError:
        return False
    return True


# ---- one run of a trainer


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Shows progress, keeps the log short, and ends the training where it has to end."""

    def __init__(self, trainer: Any, task: Task, asked_to_stop: Any) -> None:
        self.trainer, self.task, self.asked_to_stop = trainer, task, asked_to_stop
        self.stopped_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A resumed training goes on counting."""
        if state.log_history:
            self.trainer._total_train_tokens = int(state.log_history[-1].get("tokens", 0))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Keep what the report shows of a step."""
        line = state.log_history[-1]
        if "loss" not in line:
            return
        before = state.log_history[-2].get("tokens", 0) if len(state.log_history) > 1 else 0
        kept = {ours: float(line[theirs]) for theirs, ours in _LOGGED.items() if theirs in line}
        state.log_history[-1] = {"step": line["step"], **kept}
        if not all(map(_finite, (kept["loss"], kept.get("grad_norm", 0.0)))):
            raise TrainError(
                f"the loss of {self.trainer.args.output_dir} is not finite in step {line['step']}",
                why=f"it is {kept['loss']}, and the norm of its gradient {kept.get('grad_norm')}",
                fix="set a lower lr in that step of align, or more warmup_steps",
            )
        self.task.advance(int(kept.get("tokens", 0) - before), loss=kept["loss"])

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After a SIGTERM write a checkpoint and end."""
        if self.asked_to_stop() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step


def _finite(value: float) -> bool:
    return value - value == 0


def _trained(trainer: Any, how: StepSetting, *, tokens_a_sample: float) -> AlignedModel:
    """Train from the last whole checkpoint to the end."""
    trainer.remove_callback(PrinterCallback)
    resumed = last_checkpoint(how.scratch)
    total = None if how.step.tokens is None else how.step.tokens
    if total is None:
        total = round((how.step.passes or 1.0) * len(trainer.train_dataset) * tokens_a_sample)
    with sigterm() as asked_to_stop, how.progress.task(how.name, total) as task:
        watch = _Watch(trainer, task, asked_to_stop)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
    if watch.stopped_at is not None:
        raise Stopped(
            f"stopped by SIGTERM after step {watch.stopped_at} of {how.name}",
            why=f"the process was asked to end; its state is in {last_checkpoint(how.scratch)}",
            fix="the same command resumes from there",
        )
    model = trainer.accelerator.unwrap_model(trainer.model)
    if how.step.method == "lora":
        model = model.merge_and_unload()
    log = [
        {key: line[key] for key in ("step", *_LOGGED.values()) if key in line}
        for line in trainer.state.log_history
        if "loss" in line
    ]
    return AlignedModel(model, log)


def last_checkpoint(scratch: Path) -> Path | None:
    """The last checkpoint that was written whole; what a kill left half written is removed.

    The trainer writes the file with its state last.
    """
    kept = None
    by_step = {int(path.name.removeprefix(_CHECKPOINT)): path for path in scratch.glob(f"{_CHECKPOINT}[0-9]*")}
    for step in sorted(by_step, reverse=True):
        try:
            parse_json((by_step[step] / _STATE).read_bytes())
        except (OSError, ValueError):
            shutil.rmtree(by_step[step])
            continue
        kept = kept or by_step[step]
    return kept


@contextmanager
def _quiet(model: PreTrainedModel) -> Iterator[None]:
    """No bars of the libraries, and a model whose settings are afterwards what they were."""
    config, generation = copy.deepcopy(model.config), copy.deepcopy(model.generation_config)
    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        with quiet():
            yield
    finally:
        if shown:
            datasets.enable_progress_bars()
        model.__dict__.pop("forward", None)  # TRL's, with its own head
        model.config, model.generation_config = config, generation
