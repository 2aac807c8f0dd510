"""Every item of a task, made and scored once without a model, so that no row ends a run after its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from unittest import mock

from halve.errors import CorpusError, HalveError, RecipeError
from halve.evaluation.building import unusable
from halve.evaluation.harness import FEWSHOT_SEED, Built, PartRows, is_code
from halve.evaluation.metrics import is_of_items
from halve.evaluation.rows import PlacedRow
from halve.evaluation.suites import Ask

_ANSWER = "An answer."
"""What is scored in place of generated text."""

Doc = Mapping[str, Any]


def try_items(built: Built) -> None:
    """Make the requests of all items as a run would, and score a made-up answer to each. Programs are not scored.

    Call it in `quiet_harness`. Raises `CorpusError` for a row with which the harness's code fails, for one whose right
    answer is none of its choices, and for too few examples; `RecipeError` for a task without a metric of items.
    """
    of_items: dict[str, bool] = {}
    for name, part in built.parts.items():
        of_items |= _try_part(built.ask, part, built.rows[name])
    if of_items and not any(of_items.values()):
        ask = built.ask
        raise RecipeError(
            f"{ask.asked_in} names {ask.task}, whose items have no scores",
            why=f"models are compared item by item, and these are made of all answers at once: {', '.join(of_items)}",
            fix=f"leave {ask.task} out",
        )


def _try_part(ask: Ask, part: Any, rows: PartRows) -> dict[str, bool]:
    """The metrics of a part, and whether they are metrics of items."""
    found: dict[str, bool] = {}
    part.set_fewshot_seed(FEWSHOT_SEED)
    drawn = _Drawn(ask, part.sampler)
    with mock.patch.object(part.sampler, "sample", drawn.sample):
        for number, doc in part.doc_iterator():
            try:
                values = _values(ask, part, number, doc)
                is_answerable = _is_answerable(part, doc)
            except HalveError:
                raise
            except Exception as error:  # any error of a task file's templates and functions
                row = _guilty_example(part, doc, drawn, rows) or _row(rows.asked, part.task_docs, number)
                raise unusable(ask, row, error) from error
            if not is_answerable:
                raise _no_choice(ask, part, doc, _row(rows.asked, part.task_docs, number))
            for metric, value in values.items():
                found[metric] = found.get(metric, True) and is_of_items(part, metric, value)
    return found


class _Drawn:
    """The examples that the harness draws. Each is given to it once, since it is made the same way every time."""

    def __init__(self, ask: Ask, sampler: Any) -> None:
        self._ask, self._sampler, self._draw = ask, sampler, sampler.sample
        self._seen: set[int] = set()
        self.last: list[Doc] = []
        """Those that were given to it for the last item."""

    def sample(self, n: int, **how: Any) -> list[Doc]:
        try:
            examples = self._draw(n=n, **how)
        except (AssertionError, ValueError) as error:
            raise CorpusError(
                f"{self._ask.task} has too few rows for {n} shots",
                why=f"its examples are {len(self.pool)} rows",
                fix="add rows to the split of its examples, or ask for fewer shots",
            ) from error
        self.last = [example for example in examples if id(example) not in self._seen]
        self._seen |= {id(example) for example in self.last}
        return self.last

    @property
    def pool(self) -> Sequence[Doc]:
        """All examples from which it draws."""
        drawn_from: Sequence[Doc] = self._sampler.df
        return drawn_from


def _context(part: Any, doc: Doc) -> Any:
    return part.fewshot_context(doc, num_fewshot=part.config.num_fewshot or 0, gen_prefix=part.doc_to_prefix(doc))


def _values(ask: Ask, part: Any, number: int, doc: Doc) -> dict[str, Any]:
    """What the made-up answer is worth by each metric."""
    about = (part.config.task, number, part.config.repeats)
    made = part.construct_requests(doc=doc, ctx=_context(part, doc), metadata=about)
    requests = made if isinstance(made, list) else [made]
    for place, request in enumerate(requests):
        answer = _ANSWER if request.request_type == "generate_until" else (-1.0 - place, False)
        request.resps = [answer] * request.repeats
    if is_code(ask):
        return {}
    part._instances = requests
    part.apply_filters()
    values: dict[str, Any] = {}
    for chosen in requests[0].filtered_resps:
        values |= part.process_results(doc, [request.filtered_resps[chosen] for request in requests])
    return values


def _is_answerable(part: Any, doc: Doc) -> bool:
    """Whether the right answer of a multiple-choice item is one of its choices. The harness counts others as wrong."""
    if part.OUTPUT_TYPE != "multiple_choice" or callable(part.config.process_results):
        return True
    gold, choices = _gold(part, doc), part.doc_to_choice(doc)
    return all(
        one in choices if isinstance(one, str) else 0 <= one < len(choices)
        for one in (gold if isinstance(gold, list) else [gold])
    )


def _gold(part: Any, doc: Doc) -> Any:
    return part.doc_to_text(doc) if part.multiple_input else part.doc_to_target(doc)


def _no_choice(ask: Ask, part: Any, doc: Doc, row: PlacedRow | None) -> CorpusError:
    choices = part.doc_to_choice(doc)
    return CorpusError(
        f"{'a row' if row is None else row.place} of {ask.task} has a right answer that is none of its choices",
        why=f"the answer is {_gold(part, doc)!r}, and the choices are {len(choices)}: {choices!r}",
        fix="correct the answer in that row; numbers count from 0",
    )


def _guilty_example(part: Any, doc: Doc, drawn: _Drawn, rows: PartRows) -> PlacedRow | None:
    """The example with which the harness's code fails, if the item itself can be made without examples."""

    def works(examples: Sequence[Doc]) -> bool:
        with mock.patch.object(part.sampler, "sample", return_value=examples):
            try:
                _context(part, doc)
            except Exception:  # the caller has it already, and looks for its cause
                return False
        return True

    if not works([]):
        return None
    guilty = [example for example in drawn.last if not works([example])]
    numbers = [number for number, example in enumerate(drawn.pool) if any(example is one for one in guilty)]
    return _row(rows.examples, drawn.pool, numbers[0]) if numbers else None


def _row(rows: Sequence[PlacedRow], docs: Any, number: int) -> PlacedRow | None:
    """The row of an item, unless the task file leaves some rows out."""
    return rows[number] if len(rows) == len(docs) else None
