"""The section of a recipe that says what is measured."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from halve.recipe.values import Count, CountFromZero, PathOrName, Section, Switch

SuiteName = Literal["minitron-base", "minitron-instruct"]
TaskName = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9][\w.+:-]*$")]

CHAT_PROMPTS = (
    "What is the capital of France, and what is it known for?",
    "Explain in two sentences why the sky is blue.",
    "Write a short, friendly message to a colleague who starts today.",
)
OF_TASKS = (
    "suites",
    "tasks",
    "data",
    "limit",
    "chat_template",
    "fewshot_as_turns",
    "task_batch",
    "check_batch",
    "max_new_tokens",
    "run_untrusted_code",
)
"""Keys that only matter where a recipe names suites or tasks."""


class Imported(Section):
    """The result file of another tool, for the page and the card."""

    tool: Literal["mt_bench", "bfcl", "chatrag"] = Field(description="the tool that wrote it")
    file: PathOrName = Field(description="the file")
    model: str = Field(min_length=1, description="the model of the run that was asked, such as teacher or distilled")
    version: str = Field(min_length=1, description="version of the tool, such as a release or a commit")
    row: str | None = Field(None, min_length=1, description="with bfcl: how the name of the model's row begins")


class Evaluate(Section):
    """What is measured for every model of the run."""

    samples: Count = Field(64, description="packed held-out samples for perplexity, KL and agreement")
    choices: tuple[PathOrName, ...] = Field(
        (),
        description="multiple-choice files: JSON lines with the keys context, choices and answer, or contexts, ending"
        " and answer",
    )
    prompts: tuple[str, ...] = Field((), description="prompts whose completions the report shows")
    chat_prompts: tuple[str, ...] = Field(
        CHAT_PROMPTS,
        description="what a user asks; the report shows the answers of models with a chat template, given through it",
    )
    completion_tokens: Annotated[Count, Field(le=100_000)] = Field(48, description="tokens generated for each prompt")
    speed: Switch = Field(True, description="measure prefill speed, decode speed and peak memory")
    suites: tuple[SuiteName, ...] = Field(
        (), description="tasks of the papers with their shots: of Table 1 (base models) or Table 2 (instruct models)"
    )
    tasks: dict[TaskName, CountFromZero] = Field(
        {}, description="single tasks of lm-evaluation-harness by name, with their number of shots"
    )
    data: dict[TaskName, PathOrName] = Field(
        {}, description="where the rows of a task are: a file, or a folder with a file for each split"
    )
    limit: Count | None = Field(None, description="at most this many items of each task; default: all")
    chat_template: Switch = Field(False, description="ask the tasks through the tokenizer's chat template")
    fewshot_as_turns: Switch = Field(
        False, description="with chat_template: examples are earlier turns of the conversation, not one user message"
    )
    task_batch: Count = Field(8, description="requests of a task in one forward pass")
    check_batch: Switch = Field(
        False, description="ask the reference model its tasks once more one by one, and name the answers that change"
    )
    max_new_tokens: Count | None = Field(
        None, description="cut generated answers of tasks after this many tokens; default: what the task allows"
    )
    run_untrusted_code: Switch = Field(
        False,
        description="DANGER: run the programs that models write (humaneval, mbpp) on this machine, in a sandbox without"
        " network, home and writable files; without a sandbox that holds, this is an error",
    )

    imported: tuple[Imported, ...] = Field(
        (), description="result files of MT-Bench, BFCL and ChatRAG-Bench, which run against an endpoint"
    )

    @property
    def asks_tasks(self) -> bool:
        """Whether there are tasks of lm-evaluation-harness to answer."""
        return bool(self.suites or self.tasks)

    @model_validator(mode="after")
    def _of_the_template(self) -> Evaluate:
        if self.fewshot_as_turns and not self.chat_template:
            raise ValueError("fewshot_as_turns makes turns of a conversation: set chat_template as well")
        return self


class Gates(Section):
    """A few generative items during a distillation, with a warning when they collapse while KL falls."""

    every: Count = Field(description="tokens between measurements")
    tasks: dict[TaskName, CountFromZero] = Field(
        {"gsm8k": 5, "ifeval": 0},
        min_length=1,
        description="tasks with their shots; their data is in evaluate.data. Only those count that the teacher solves"
        " better than chance by three standard errors",
    )
    items: Count = Field(32, description="items of each task")
    max_new_tokens: Count = Field(256, description="cut answers after this many tokens")
