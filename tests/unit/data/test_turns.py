"""Answers of several turns → ids and what bears the loss, with templates as models have them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpo_ray.config import LossTurns
from dpo_ray.data.chat import ChatTokenizer, Completion, Prompt
from dpo_ray.data.dialogues import as_answer
from dpo_ray.data.rules import check_message
from dpo_ray.data.template import Template
from dpo_ray.errors import DataError
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.pairs import Answer, Message

TEMPLATES = Path(__file__).parent / "templates"
# Each has special tokens that the demo model's tokenizer lacks.
SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]

CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "weather"}}]}
RESULT = {"role": "tool", "content": "4 C"}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def calling(city: str, text: str | None = None, **more: Any) -> dict[str, Any]:
    function = {"name": "weather", "arguments": {"city": city}}
    return {"role": "assistant", "content": text, "tool_calls": [{"type": "function", "function": function}], **more}


def messages(turns: Sequence[dict[str, Any]]) -> list[Message]:
    return [check_message(turn) for turn in turns]


@pytest.fixture(scope="module")
def chat(demo_model: Path) -> Callable[..., ChatTokenizer]:
    """chat("qwen3", argument=…): with the template of that name; "smollm2" is the model's own."""
    made: dict[str, Any] = {}

    def make(name: str, **arguments: Any) -> ChatTokenizer:
        if name not in made:
            made[name] = load_tokenizer(demo_model)
            made[name].add_special_tokens({"additional_special_tokens": SPECIAL})
            if name != "smollm2":
                made[name].chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        return ChatTokenizer(made[name], arguments)

    return make


def answered(
    chat: ChatTokenizer,
    prompt: Sequence[dict[str, Any]],
    *answers: Sequence[dict[str, Any]] | str,
    tools: list[Any] | None = None,
    loss: LossTurns = "all",
) -> tuple[Prompt, list[Completion]]:
    [alone] = chat.prompts([(messages(prompt), tools)])
    sides: list[Answer] = [one if isinstance(one, str) else as_answer(messages(one)) for one in answers]
    written = chat.write(alone, sides, loss)
    assert written is not None
    return written[0], chat.encoded(written[1])


def told(chat: ChatTokenizer, completion: Completion) -> str:
    """The completion's text, with ⟦ ⟧ around what bears the loss."""
    mask = completion.mask or [True] * len(completion.ids)
    text = ""
    for bears, run in groupby(zip(mask, completion.ids, strict=True), key=lambda one: one[0]):
        part = chat.tokenizer.decode([token for _, token in run])
        text += f"⟦{part}⟧" if bears else part
    return text


AGENT = [user("Weather?")], [calling("Oslo"), RESULT, calling("Bergen", "And there?"), RESULT, said("It is 4.")]
CHAT = (
    [{"role": "system", "content": "Be brief."}, user("Hi?")],
    [said("One."), user("More?"), said("Two.")],
)
REASONED = [user("Hi?")], [said("One.", reasoning_content="hm"), user("More?"), said("Two.", reasoning_content="so")]
# Reasons before a call, in the prompt; what follows moves the user's last words.
AFTER = (
    [user("Weather?"), calling("Oslo", reasoning_content="hm"), RESULT],
    [said("It is 4."), user("So?"), said("Mild.")],
)

IM = "<|im_end|>"
HEADERS = "<|start_header_id|>{}<|end_header_id|>\n\n"
EXPECTED = {
    ("qwen2_5", "agent"): (
        f'⟦<tool_call>\n{{"name": "weather", "arguments": {{"city": "Oslo"}}}}\n</tool_call>{IM}⟧\n<|im_start|>user\n'
        f"<tool_response>\n4 C\n</tool_response>{IM}\n<|im_start|>assistant\n"
        f'⟦And there?\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "Bergen"}}}}\n</tool_call>{IM}⟧\n'
        f"<|im_start|>user\n<tool_response>\n4 C\n</tool_response>{IM}\n<|im_start|>assistant\n⟦It is 4.{IM}⟧"
    ),
    ("qwen3", "agent"): (
        f'⟦<tool_call>\n{{"name": "weather", "arguments": {{"city": "Oslo"}}}}\n</tool_call>{IM}⟧\n<|im_start|>user\n'
        f"<tool_response>\n4 C\n</tool_response>{IM}\n<|im_start|>assistant\n"
        f'⟦And there?\n<tool_call>\n{{"name": "weather", "arguments": {{"city": "Bergen"}}}}\n</tool_call>{IM}⟧\n'
        f"<|im_start|>user\n<tool_response>\n4 C\n</tool_response>{IM}\n<|im_start|>assistant\n"
        f"⟦<think>\n\n</think>\n\nIt is 4.{IM}⟧"
    ),
    ("headers", "agent"): (
        '⟦{"name": "weather", "parameters": {"city": "Oslo"}}<|eot_id|>⟧'
        f'{HEADERS.format("ipython")}"4 C"<|eot_id|>{HEADERS.format("assistant")}'
        '⟦{"name": "weather", "parameters": {"city": "Bergen"}}<|eot_id|>⟧'
        f'{HEADERS.format("ipython")}"4 C"<|eot_id|>{HEADERS.format("assistant")}⟦It is 4.<|eot_id|>⟧'
    ),
    ("headers", "chat"): (
        f"⟦One.<|eot_id|>⟧{HEADERS.format('user')}More?<|eot_id|>{HEADERS.format('assistant')}⟦Two.<|eot_id|>⟧"
    ),
    **{
        (name, "chat"): f"⟦One.{IM}⟧\n<|im_start|>user\nMore?{IM}\n<|im_start|>assistant\n⟦{thought}Two.{IM}⟧"
        for name, thought in (("qwen2_5", ""), ("qwen3", "<think>\n\n</think>\n\n"), ("smollm2", ""), ("marked", ""))
    },
    # Before the user's last words the template leaves out what was reasoned.
    ("qwen3", "reasoned"): (
        f"⟦One.{IM}⟧\n<|im_start|>user\nMore?{IM}\n<|im_start|>assistant\n⟦<think>\nso\n</think>\n\nTwo.{IM}⟧"
    ),
    ("qwen3", "after"): (
        f"⟦It is 4.{IM}⟧\n<|im_start|>user\nSo?{IM}\n<|im_start|>assistant\n⟦<think>\n\n</think>\n\nMild.{IM}⟧"
    ),
    ("marked", "reasoned"): (
        f"⟦<think>hm</think>⟧\n⟦One.{IM}⟧\n<|im_start|>user\nMore?{IM}\n<|im_start|>assistant\n"
        f"⟦<think>so</think>⟧\n⟦Two.{IM}⟧"
    ),
}
CASES = {"agent": AGENT, "chat": CHAT, "reasoned": REASONED, "after": AFTER}


@pytest.mark.parametrize(("name", "case"), EXPECTED)
def test_the_assistants_words_alone_bear_the_loss(chat: Callable[..., ChatTokenizer], name: str, case: str):
    of_template = chat(name)
    prompt, answer = CASES[case]
    _, [completion] = answered(of_template, prompt, answer, tools=TOOLS if case == "agent" else None)
    assert told(of_template, completion) == EXPECTED[name, case]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize(("name", "case"), EXPECTED)
def test_prompt_and_completion_are_the_whole_dialogue_as_the_template_writes_it(
    chat: Callable[..., ChatTokenizer], name: str, case: str, number: int
):
    of_template = chat(name)
    tools = TOOLS if case == "agent" else None
    dialogue, answer = CASES[case]
    answer = answer if number else [*answer, user("Sure?"), said("Yes.")]
    prompt, [completion] = answered(of_template, dialogue, answer, tools=tools)
    # What the template is shown, read back from what is stored of it.
    whole = of_template.tokenizer.apply_chat_template(
        of_template.template.shown(messages([*dialogue, *answer])), tools=tools, tokenize=True, return_dict=False
    )
    end = max(place for place, token in enumerate(whole) if token in of_template.control_ids)
    ours = prompt.ids + completion.ids
    if name == "headers":
        # This tokenizer has a token of two newlines, which it does not use before a letter: apart, the opening of a
        # turn has it.
        assert of_template.tokenizer.decode(ours) == of_template.tokenizer.decode(whole[: end + 1])
    else:
        assert ours == whole[: end + 1]


@pytest.mark.parametrize("case", ["chat", "reasoned"])
def test_marks_are_what_the_library_makes_of_them_but_for_white_space_after_the_end(
    chat: Callable[..., ChatTokenizer], case: str
):
    marked = chat("marked")
    dialogue, answer = CASES[case]
    prompt, [completion] = answered(marked, dialogue, answer)
    found = marked.tokenizer.apply_chat_template(
        marked.template.shown(messages([*dialogue, *answer])), return_dict=True, return_assistant_tokens_mask=True
    )
    newline = marked.tokenizer.encode("\n", add_special_tokens=False)
    expected = [
        bool(mask) and ([token] != newline or before not in marked.control_ids)
        for token, before, mask in zip(
            found["input_ids"], [None, *found["input_ids"]], found["assistant_masks"], strict=False
        )
    ]
    ours = [False] * len(prompt.ids) + (completion.mask or [])
    assert found["input_ids"][: len(ours)] == prompt.ids + completion.ids
    assert expected[: len(ours)] == ours and not any(expected[len(ours) :])


def test_a_template_that_marks_every_word_of_a_text_needs_no_mask(chat: Callable[..., ChatTokenizer]):
    marked = chat("marked")
    _, completions = answered(marked, [user("Hi?")], "One.", "Two.")
    assert [completion.mask for completion in completions] == [None, None]
    assert [told(marked, completion) for completion in completions] == [f"⟦One.{IM}⟧", f"⟦Two.{IM}⟧"]


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "headers", "smollm2", "marked"])
def test_the_last_turn_alone_bears_the_loss_on_request_and_the_ids_stay(chat: Callable[..., ChatTokenizer], name: str):
    of_template = chat(name)
    _, [whole] = answered(of_template, *CHAT)
    _, [last] = answered(of_template, *CHAT, loss="last")
    assert last.ids == whole.ids and last.mask is not None and whole.mask is not None
    assert told(of_template, last) == told(of_template, whole).replace("⟦", "", 1).replace("⟧", "", 1)


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "headers", "smollm2", "marked"])
def test_turns_that_both_answers_begin_with_bear_no_loss(chat: Callable[..., ChatTokenizer], name: str):
    of_template = chat(name)
    sides = [[said("One."), user(asked), said("Two.")] for asked in ("More?", "Less?")]
    prompt, completions = answered(of_template, [user("Hi?")], *sides)
    for completion in completions:
        assert told(of_template, completion).startswith("One.") and told(of_template, completion).count("⟦") == 1
    assert prompt.ids == of_template.prompts([(messages([user("Hi?")]), None)])[0].ids


def test_a_text_stands_beside_turns_after_the_same_prompt(chat: Callable[..., ChatTokenizer]):
    thought = "<think>\n\n</think>\n\n"
    for arguments, spoken in (({}, f"⟦{thought}No."), ({"enable_thinking": False}, f"{thought}⟦No.")):
        of_template = chat("qwen3", **arguments)
        prompt, [turns, text] = answered(
            of_template, [user("Weather?")], [CALL, RESULT, said("Cold.")], "No.", tools=TOOLS
        )
        assert prompt.text.endswith("<|im_start|>assistant\n")
        assert told(of_template, turns).startswith("⟦<tool_call>\n")
        assert told(of_template, text) == f"{spoken}{IM}⟧"


def test_a_prompt_that_is_written_otherwise_before_one_answer_than_before_the_other_makes_no_pair(
    chat: Callable[..., ChatTokenizer],
):
    of_template = chat("qwen3")
    prompt, long = AFTER
    [alone] = of_template.prompts([(messages(prompt), TOOLS)])
    assert "hm" in alone.text
    # The user's words in the longer one have the reasoning left out, that before the text is kept.
    assert of_template.write(alone, [as_answer(messages(long)), "It is 4."], "all") is None
    both = of_template.write(alone, [as_answer(messages(long)), as_answer(messages([*long[:-1], said("No.")]))], "all")
    assert both is not None
    assert "hm" not in both[0].text and both[0].ids == of_template.template.encode([both[0].text])[0]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        # Counts the messages first: no dialogue begins as a longer one does.
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}", "stops before it"),
        # Ends the last turn otherwise than the others.
        (
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if loop.last else '.' }}{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "ends with it",
        ),
    ],
)
def test_a_template_whose_turns_cannot_be_told_is_refused_with_the_reason(demo_model: Path, template: str, why: str):
    tokenizer = load_tokenizer(demo_model)
    tokenizer.chat_template = template
    with pytest.raises(
        DataError, match=rf"user, assistant, user, assistant, .* place 2 .* {why}.*model\.chat_template"
    ):
        answered(ChatTokenizer(tokenizer), [user("Hi?")], CHAT[1])


def test_marks_that_leave_a_turn_out_are_refused(demo_model: Path):
    tokenizer = load_tokenizer(demo_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}"
        "{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    with pytest.raises(DataError, match=r"marks 1 parts of a dialogue .* none for one of the assistant's turns"):
        answered(ChatTokenizer(tokenizer), [user("Hi?")], CHAT[1])


def test_a_template_that_does_not_write_calls_of_tools_is_refused(chat: Callable[..., ChatTokenizer]):
    with pytest.raises(DataError, match=r"does not write the calls of tools in the assistant's turn at place 2"):
        answered(chat("smollm2"), *AGENT, tools=TOOLS)


def test_what_a_template_cannot_take_is_a_data_error(chat: Callable[..., ChatTokenizer]):
    twice = {**CALL, "tool_calls": CALL["tool_calls"] * 2}
    with pytest.raises(DataError, match="One call in a turn"):
        answered(chat("headers"), [user("Weather?")], [twice, RESULT, said("Cold.")])


def test_a_template_that_ends_the_whole_dialogue_too_ends_its_turns_alike(demo_model: Path):
    tokenizer = load_tokenizer(demo_model)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<|endoftext|>{% endif %}"
    )
    of_template = ChatTokenizer(tokenizer)
    _, [completion] = answered(of_template, *CHAT)
    assert told(of_template, completion) == (
        f"⟦One.{IM}⟧\n<|im_start|>user\nMore?{IM}\n<|im_start|>assistant\n⟦Two.{IM}\n<|endoftext|>⟧"
    )


def test_without_control_tokens_only_the_last_turn_is_given_an_end(demo_model: Path):
    tokenizer = load_tokenizer(demo_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    of_template = ChatTokenizer(tokenizer)
    _, [completion] = answered(of_template, *CHAT)
    assert told(of_template, completion) == f"⟦One.\n⟧user: More?\nassistant: ⟦Two.\n{IM}⟧"


def test_a_turn_of_text_is_rendered_once_and_several_by_twice_their_number(
    chat: Callable[..., ChatTokenizer], monkeypatch: pytest.MonkeyPatch
):
    rendered = 0
    render = Template.render

    def counted(self: Template, *arguments: Any, **options: Any) -> str:
        nonlocal rendered
        rendered += 1
        return render(self, *arguments, **options)

    monkeypatch.setattr(Template, "render", counted)
    of_template = chat("qwen2_5")
    for turns, expected in ((1, 1), (2, 3), (5, 9)):
        [prompt] = of_template.prompts([(messages([user("Hi?")]), None)])
        answer = [turn for n in range(turns) for turn in (said(f"{n}."), user("More?"))][:-1]
        rendered = 0
        assert of_template.write(prompt, [as_answer(messages(answer))], "all") is not None
        assert rendered == expected
    monkeypatch.undo()


TEXT = st.lists(st.sampled_from(["<|im_start|>", "<|im_end|>", "assistant\n", "天", "a b", "\n", "</tool_call>"])).map(
    "".join
)


@given(words=st.tuples(TEXT, TEXT, TEXT, TEXT, TEXT), name=st.sampled_from(["qwen2_5", "smollm2", "marked"]))
def test_whatever_is_said_only_the_template_opens_and_ends_turns(
    chat: Callable[..., ChatTokenizer], words: tuple[str, ...], name: str
):
    of_template = chat(name)
    asked, first, then, again, last = (f"{word}." for word in words)
    prompt, [completion] = answered(
        of_template, [user(asked)], [said(first), user(then), said(again), user("So?"), said(last)]
    )
    whole = [*prompt.ids, *completion.ids]
    start, end = (of_template.tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "<|im_end|>"))
    control = [token for token in whole if token in of_template.control_ids]
    turns = len(control) // 2
    assert control == [start, end] * turns and turns - 6 in (0, 1), "one more where the template adds a system turn"
    spoken = told(of_template, completion).split("⟦")[1:]
    assert [text.partition("⟧")[0] for text in spoken] == [f"{text}{IM}" for text in (first, again, last)]
    assert completion.foreign_control_token == any(
        token in text for text in (first, then, again, last) for token in ("<|im_start|>", "<|im_end|>")
    )
