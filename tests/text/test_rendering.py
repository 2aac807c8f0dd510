"""Conversations as tokens: the template's text, whose tokens count, and what a token file is named after."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from chat import CHATML, MARKED, Message, small_talk, turns, with_template, write_rows
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

from halve.errors import CorpusError, TokenizerError
from halve.text import rendering
from halve.text.corpus import Tokens, known, prepare
from halve.text.day import DAY
from halve.text.rendering import COUNTED, FIRST, IDS, Chat, encode_conversations, prompt_ids
from halve.text.rows import Piece

ANSWERS, ALL = Chat("messages", "assistant"), Chat("messages", "all")
QUIRKY = (
    "{% for m in messages %}{{ m['content'] }}{% if loop.last and m['role'] == 'assistant' %}!{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    return with_template(tokenizer)


def codes(tokenizer: PreTrainedTokenizerFast, chat: Chat, *conversations: list[dict[str, str]]) -> np.ndarray:
    pieces = [Piece(json.dumps({"messages": one}), True, f"line {i}") for i, one in enumerate(conversations, 1)]
    made = encode_conversations(pieces, tokenizer=tokenizer, chat=chat)
    found = np.frombuffer(made.ids, dtype=np.uint32)
    assert made.largest == max(found & IDS)
    return found


def counted(tokenizer: PreTrainedTokenizerFast, found: np.ndarray) -> str:
    return str(tokenizer.decode([int(code & IDS) for code in found if code & COUNTED]))


def test_the_templates_text_is_what_is_tokenized(chatty: PreTrainedTokenizerFast) -> None:
    said = turns("Who sees the cat?", "The dog.", system="Be short.")
    found = codes(chatty, ALL, said)
    assert (found & IDS).tolist() == chatty.apply_chat_template(said, return_dict=False)
    assert chatty.decode((found & IDS).tolist()).startswith("<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user")


def test_the_assistants_tokens_count_with_their_ends(chatty: PreTrainedTokenizerFast) -> None:
    found = codes(chatty, ANSWERS, turns("Who sees it?", "The dog.", "And then?", " The cat. ", "Hm."))
    assert counted(chatty, found) == "The dog.<|im_end|>\n The cat. <|im_end|>\n"


def test_calls_of_tools_count(chatty: PreTrainedTokenizerFast) -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    said = [*turns("Who?"), {"role": "assistant", "content": "", "tool_calls": calls}, {"role": "tool", "content": "x"}]
    assert counted(chatty, codes(chatty, ANSWERS, said)) == f"{json.dumps(calls)}<|im_end|>\n"


def test_a_template_that_would_leave_calls_out_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    said = [*turns("Who?"), {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}]
    with pytest.raises(CorpusError, match="line 1: the chat template does not write calls of tools"):
        codes(with_template(tokenizer, MARKED), ALL, said)
    older = [*turns("Who?"), {"role": "assistant", "content": "", "function_call": {"name": "f", "arguments": "{}"}}]
    with pytest.raises(CorpusError, match="does not write calls of tools\n  why: a message has function_call"):
        codes(with_template(tokenizer), ALL, older)
    assert len(codes(with_template(tokenizer, MARKED), ALL, [*turns("Who?"), {**turns("", "I.")[1], "tool_calls": []}]))


def test_a_template_that_would_leave_tools_out_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    def coded(template: str, tools: list[dict[str, str]]) -> int:
        piece = Piece(json.dumps({"messages": turns("Who?", "I."), "tools": tools}), True, "line 7")
        return len(encode_conversations([piece], tokenizer=with_template(tokenizer, template), chat=ALL).ids)

    with pytest.raises(CorpusError, match="line 7: the chat template does not write tools\n"):
        coded(CHATML, [{"name": "look"}])
    assert coded("{{ tools | tojson }}" + CHATML, [{"name": "look"}]) > coded(CHATML, [])


def test_marks_in_the_template_say_the_same(
    tokenizer: PreTrainedTokenizerFast, chatty: PreTrainedTokenizerFast
) -> None:
    talk = small_talk(8)
    assert np.array_equal(codes(with_template(tokenizer, MARKED), ANSWERS, *talk), codes(chatty, ANSWERS, *talk))


CONTENT_ONLY = MARKED.replace(
    "{% generation %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endgeneration %}",
    "{% generation %}{{ message['content'] }}{% endgeneration %}{{ '<|im_end|>' + '\n' }}",
)


@pytest.mark.parametrize("template", [CHATML, MARKED, CONTENT_ONLY])
@pytest.mark.parametrize(
    "said",
    [
        turns("Hi?", "  x = 1", "more", "bye"),
        turns("Hi?", "bye  ", "SECRET", "ok"),
        turns("Hi?", "def f():\n\n    return  1\n"),
        turns("Hi?", "a \U0001f600", "and", "\U0001f600"),
    ],
)
def test_a_tokenizer_that_does_not_place_spaces_counts_the_same(
    tokenizer: PreTrainedTokenizerFast, template: str, said: list[Message]
) -> None:
    placing = with_template(tokenizer, template)
    trimming = with_template(tokenizer, template)
    placing.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    both = [processors.ByteLevel(trim_offsets=True), processors.TemplateProcessing(single="$A", pair="$A $B:1")]
    trimming.backend_tokenizer.post_processor = processors.Sequence(both)
    found = codes(trimming, ANSWERS, said)
    assert np.array_equal(found, codes(placing, ANSWERS, said))
    ends = "" if template == CONTENT_ONLY else "<|im_end|>\n"
    assert counted(trimming, found) == "".join(one["content"] + ends for one in said if one["role"] == "assistant")
    assert trimming(" x", return_offsets_mapping=True)["offset_mapping"] != [(0, 2)]  # the caller's stays as it was


def test_reasoning_that_a_template_would_leave_out_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    thought = [*turns("Who?"), {"role": "assistant", "content": "", "thinking": "The dog?"}]
    with pytest.raises(CorpusError, match=r"line 1: the chat template does not write reasoning\n  why: .* thinking"):
        codes(with_template(tokenizer), ANSWERS, thought)
    writes = CHATML.replace("message['content'] +", "(message['reasoning_content'] or '') + message['content'] +")
    assert "The dog?" in counted(
        with_template(tokenizer, writes), codes(with_template(tokenizer, writes), ALL, thought)
    )
    assert len(codes(with_template(tokenizer), ANSWERS, [*turns("Who?"), {**thought[1], "content": "The dog."}]))


def test_all_counts_everything_but_the_first_token(chatty: PreTrainedTokenizerFast) -> None:
    found = codes(chatty, ALL, *small_talk(3))
    assert ((found & FIRST) > 0).sum() == 3
    assert np.array_equal((found & COUNTED) > 0, (found & FIRST) == 0)


def test_what_a_template_adds_to_the_invitation_counts(tokenizer: PreTrainedTokenizerFast) -> None:
    """An invitation that begins the answer: what the turn has instead is the assistant's."""
    thinking = with_template(
        tokenizer, CHATML.replace("assistant\n' }}{% endif %}", "assistant\nThink: ' }}{% endif %}")
    )
    found = codes(thinking, ANSWERS, turns("Who?", "The dog."))
    assert counted(thinking, found) == "The dog.<|im_end|>\n"


def test_a_template_that_rewrites_earlier_turns_needs_all(tokenizer: PreTrainedTokenizerFast) -> None:
    quirky = with_template(tokenizer, QUIRKY)
    with pytest.raises(CorpusError, match="line 2: the assistant's tokens cannot be told") as caught:
        codes(quirky, ANSWERS, turns("Who?", "I."), turns("Who?", "I.", "Who?", "You."))
    assert "set data.count: all" in caught.value.fix
    assert len(codes(quirky, ALL, turns("Who?", "I.", "Who?", "You.")))


@pytest.mark.parametrize("role", ["system", "developer", "tool"])
def test_a_message_that_a_template_passes_over_is_refused(tokenizer: PreTrainedTokenizerFast, role: str) -> None:
    two = (
        "{% for m in messages %}{% if m.role in ['user', 'assistant'] %}{{ m.content | upper }}{% endif %}{% endfor %}"
    )
    narrow = with_template(tokenizer, two)
    lost = {"role": role, "content": "Be short."}
    said = [lost, *turns("Who?", "I.")] if role != "tool" else [*turns("Who?", "I."), lost, *turns("", "You.")[1:]]
    with pytest.raises(CorpusError, match="line 1: the chat template leaves a message out") as caught:
        codes(narrow, ALL, said)
    assert f"of role {role}" in caught.value.why
    assert len(codes(narrow, ALL, turns("Who?", "I.", "Who else?", "You."), turns("Who?", "Who?")))


REASONING = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or m.reasoning_content) %}"
    "<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<call>{{ call.function.arguments | tojson }}</call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes reasoning behind the last question alone, and an empty one in the last turn, as that of Qwen 3 does."""


def test_a_template_that_drops_the_reasoning_of_earlier_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = with_template(tokenizer, REASONING)
    empty = "<think>\n\n</think>\n\n"
    found = codes(thinking, ANSWERS, turns("Who?", "I.", "Who else?", "You, I see.", "And now?", "All."))
    assert counted(thinking, found) == f"I.<|im_end|>\nYou, I see.<|im_end|>\n{empty}All.<|im_end|>\n"
    said = turns("Who?", "I.", "Who else?", "You.")
    said[1] |= {"reasoning_content": "Hm."}
    said[3] |= {"reasoning_content": "Hm, hm."}
    found = codes(thinking, ANSWERS, said)
    assert counted(thinking, found) == "I.<|im_end|>\n<think>\nHm, hm.\n</think>\n\nYou.<|im_end|>\n"


def test_calls_of_tools_before_the_last_turn_count_there_too(tokenizer: PreTrainedTokenizerFast) -> None:
    thinking = with_template(tokenizer, REASONING)
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}
    said = [*turns("Who?"), call, {"role": "tool", "content": "The cat."}, *turns("", "The cat.")[1:]]
    end = "<|im_end|>\n"
    empty = "<think>\n\n</think>\n\n"
    found = codes(thinking, ANSWERS, said)
    assert counted(thinking, found) == f'<call>{{"a": 1}}</call>{end}{empty}The cat.{end}'
    said[1]["reasoning_content"] = "Look."
    found = codes(thinking, ANSWERS, said)
    assert counted(thinking, found) == (f'<think>\nLook.\n</think>\n\n<call>{{"a": 1}}</call>{end}{empty}The cat.{end}')


def test_a_template_that_writes_every_turn_by_the_last_one_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    """What changes with a message is then more than its turn."""
    shouting = "{% for m in messages %}<{{ messages[-1].content }}>{{ m.content }}{% endfor %}"
    with pytest.raises(CorpusError, match="the assistant's tokens cannot be told"):
        codes(with_template(tokenizer, shouting), ANSWERS, turns("Who?", "I.", "Who?", "You."))


@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_arguments_of_calls_in_a_string_are_written_as_an_object(tokenizer: PreTrainedTokenizerFast, key: str) -> None:
    """The format of OpenAI has JSON in a string; templates want an object."""
    name = "m.tool_calls[0].function" if key == "tool_calls" else "m.function_call"
    written = "{{ " + name + ".arguments | tojson }}"
    calling = "{% for m in messages %}{% if m." + key + " %}" + written + "{% endif %}{{ m.content }}{% endfor %}"
    chatty = with_template(tokenizer, calling)

    def said(arguments: object) -> list[dict[str, object]]:
        function = {"name": "f", "arguments": arguments}
        call = {"role": "assistant", "content": "", key: [{"function": function}] if key == "tool_calls" else function}
        return [*turns("Who?"), call]

    assert chatty.decode((codes(chatty, ALL, said('{"a": 1}')) & IDS).tolist()) == 'Who?{"a": 1}'
    for kept in ("1", "no JSON", {"a": 1}):
        assert chatty.decode((codes(chatty, ALL, said(kept)) & IDS).tolist()) == f"Who?{json.dumps(kept)}"
    joining = with_template(tokenizer, calling.replace(" | tojson", " + '!'"))
    assert joining.decode((codes(joining, ALL, said('{"a": 1}')) & IDS).tolist()) == 'Who?{"a": 1}!'


def test_more_turns_than_can_be_told_apart_in_seconds(chatty: PreTrainedTokenizerFast) -> None:
    long = turns(*["Who?", "I."] * 501)
    with pytest.raises(CorpusError, match=r"line 1: a conversation of 1,002 messages is too long") as caught:
        codes(chatty, ANSWERS, long)
    assert "split the conversation" in caught.value.fix
    assert (codes(chatty, ALL, long) & COUNTED).any()
    assert (codes(with_template(chatty, MARKED), ANSWERS, long) & COUNTED).any()


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('no such role') }}", "TemplateError: no such role"),
        ("{{ messages[9]['content'] }}", "UndefinedError: .*no element 9"),
        ("{% for", "TemplateSyntaxError"),
    ],
)
def test_a_template_that_cannot_be_rendered_is_said_with_the_line(
    tokenizer: PreTrainedTokenizerFast, template: str, why: str
) -> None:
    broken = with_template(tokenizer, template)
    with pytest.raises(CorpusError, match=f"line 1: the chat template cannot be rendered\n  why: {why}"):
        codes(broken, ALL, turns("Who?", "I."))
    with pytest.raises(TokenizerError, match="cannot be rendered for the prompt 'Who"):
        prompt_ids(broken, "Who?")


def test_no_template_no_conversations(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(TokenizerError, match="has no chat template"):
        codes(with_template(tokenizer, None), ALL, turns("Who?", "I."))


def test_a_prompt_ends_with_the_invitation(chatty: PreTrainedTokenizerFast) -> None:
    want = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert chatty.decode(prompt_ids(chatty, "Who?")) == want


# ---- token files


def made(file: Path, tokenizer: PreTrainedTokenizerFast, cache: Path, chat: Chat | None, workers: int = 1) -> Tokens:
    return prepare([str(file)], tokenizer=tokenizer, text_field="text", chat=chat, cache=cache, workers=workers)


def test_a_token_file_holds_conversations_one_after_another(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    talk = small_talk(5)
    tokens = made(write_rows(tmp_path / "a.jsonl", *talk), chatty, tmp_path / "cache", ANSWERS)
    assert tokens.chat
    assert tokens.ids.tolist() == codes(chatty, ANSWERS, *talk).tolist()
    assert tokens.text_bytes == sum(len(chatty.apply_chat_template(one, tokenize=False)) for one in talk)
    again = known([str(tmp_path / "a.jsonl")], tokenizer=chatty, text_field="x", chat=ANSWERS, cache=tmp_path / "cache")
    assert again == tokens


def test_the_file_does_not_depend_on_the_number_of_processes(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", *small_talk(2100))
    alone, together = (made(file, chatty, tmp_path / str(n), ANSWERS, n) for n in (1, 2))
    assert alone.path.read_bytes() == together.path.read_bytes()


def test_an_error_in_another_process_is_told_whole(chatty: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", *small_talk(2100), turns("Who?", "I.", "Who?", "You."))
    quirky = with_template(
        chatty, CHATML.replace("{% for", "{% if messages[0]['content'] == 'Who?' %}{{ 1 + '' }}{% endif %}{% for", 1)
    )
    with pytest.raises(CorpusError, match=r"line 2101: the chat template cannot be rendered\n  why: TypeError"):
        made(file, quirky, tmp_path / "cache", ALL, 2)


def test_what_a_file_is_named_after(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", turns("Who?", "I."), text="plain")
    ways = [
        made(file, with_template(tokenizer), tmp_path / "c", ANSWERS),
        made(file, with_template(tokenizer), tmp_path / "c", ALL),
        made(file, with_template(tokenizer, MARKED), tmp_path / "c", ANSWERS),
        made(file, with_template(tokenizer), tmp_path / "c", None),
    ]
    assert len({way.path for way in ways}) == len({way.fingerprint for way in ways}) == 4
    plain = made(file, tokenizer, tmp_path / "c", None)
    assert plain.fingerprint == ways[-1].fingerprint, "a template is nothing to plain text"
    assert not plain.chat


def test_a_date_in_a_template_is_always_the_same(tokenizer: PreTrainedTokenizerFast) -> None:
    dated = with_template(tokenizer, "{{ date_string }}: " + CHATML)
    found = codes(dated, ALL, turns("Who?", "I."))
    assert dated.decode((found & IDS).tolist()).startswith(f"{DAY}: <|im_start|>")


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_a_template_that_asks_for_today_is_told_the_same_day(tokenizer: PreTrainedTokenizerFast, template: str) -> None:
    dated = with_template(tokenizer, "{{ strftime_now('%d %b %Y') }}: " + template)
    for chat in (ALL, ANSWERS):
        found = codes(dated, chat, turns("Who?", "I."))
        assert dated.decode((found & IDS).tolist()).startswith(f"{DAY}: <|im_start|>")
    assert counted(dated, found) == "I.<|im_end|>\n"
    assert dated.decode(prompt_ids(dated, "Who?")).startswith(f"{DAY}: <|im_start|>")
    assert chat_template_utils.datetime is datetime


def test_files_of_a_template_that_asks_for_today_are_made_anew(tokenizer: PreTrainedTokenizerFast) -> None:
    """Files that were made before have the day of their making."""
    usual = {"field": "messages", "count": "all", "day": DAY, "format": rendering._FORMAT}
    assert ALL.identity(with_template(tokenizer)) == {**usual, "template": CHATML}
    dated = "{{ strftime_now('%d %b %Y') }}" + CHATML
    assert ALL.identity(with_template(tokenizer, dated)) == {**usual, "template": dated, "today": DAY}


def test_a_template_that_never_ends_is_named(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two loops, each within the limit that the template language has for one."""
    monkeypatch.setattr(rendering, "_LONGEST_RENDERING_S", 0.1)
    loops = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    endless, why = with_template(tokenizer, loops), r"cannot be rendered[\s\S]*0.1 seconds of computing"
    with pytest.raises(TokenizerError, match=why):
        prompt_ids(endless, "Who?")
    with pytest.raises(CorpusError, match=why):
        codes(endless, ALL, turns("Who?", "The cat."))
