"""Pairs → token ids, a shard at a time: limits, policies and what is counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpo_ray.config import Data, Model
from dpo_ray.data.chat import ChatTokenizer, completion_ids, prompt_ids
from dpo_ray.data.duplicates import PairsShard
from dpo_ray.data.tally import NOTED
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.pairs import CARRIED, TOKENIZED, Message, PreferencePair, pair_row
from dpo_ray.shards import tokenize as tokenize_shard
from dpo_ray.shards.tokenize import TokenizeShard
from dpo_ray.storage.artifact import write_shard
from dpo_ray.storage.location import Location
from tests.left_out import left_out
from tests.unit.data.test_duplicates import table_of

Worker = Callable[..., TokenizeShard]


@pytest.fixture(scope="module")
def worker(tiny_model: Path) -> Worker:
    """worker(max_prompt_tokens=…, …): the worker with these options of the section data."""
    shared = TokenizeShard(Model(path=str(tiny_model)), Data())

    def make(**options: Any) -> TokenizeShard:
        made = TokenizeShard.__new__(TokenizeShard)
        made.chat, made.data = shared.chat, Data(**options)
        return made

    return make


@pytest.fixture
def model_with_template(tiny_model: Path, tmp_path: Path) -> Callable[[str], str]:
    """model_with_template(template): path of the tiny model with another chat template."""

    def make(template: str) -> str:
        folder = tmp_path / "other_model"
        shutil.copytree(tiny_model, folder)
        tokenizer = load_tokenizer(folder)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)
        return str(folder)

    return make


def pairs_shard(folder: Path, pairs: Sequence[PreferencePair], tools: Sequence[str | None] | None = None) -> PairsShard:
    """Source of a shard of pairs, with a column of tools where they are given."""
    table = table_of([(pair, "train") for pair in pairs])
    if tools is not None:
        table = table.set_column(table.schema.get_field_index("tools"), "tools", pa.array(tools, pa.string()))
    location = Location.of(folder) / "pairs.parquet"
    write_shard(location, table, {})
    return PairsShard(location.uri)


def question(text: str) -> tuple[Message, ...]:
    return (Message(role="user", content=text),)


def test_pairs_become_token_ids(tmp_path: Path, tiny_model: Path):
    pair = PreferencePair(question("Why?"), "Because.", "No idea.")
    output = TokenizeShard(Model(path=str(tiny_model)), Data())(pairs_shard(tmp_path, [pair]))
    tokenizer = load_tokenizer(tiny_model)
    assert output.table.schema.equals(TOKENIZED)
    assert output.table.to_pylist() == [
        {
            "pair_id": pair.pair_id,
            "prompt_id": pair.prompt_id,
            "split": "train",
            "prompt_ids": prompt_ids(tokenizer, pair.prompt),
            "chosen_ids": completion_ids(tokenizer, pair.prompt, "Because."),
            "rejected_ids": completion_ids(tokenizer, pair.prompt, "No idea."),
            "prompt_tokens": len(prompt_ids(tokenizer, pair.prompt)),
            "chosen_tokens": len(completion_ids(tokenizer, pair.prompt, "Because.")),
            "rejected_tokens": len(completion_ids(tokenizer, pair.prompt, "No idea.")),
            "chosen_mask": None,
            "rejected_mask": None,
            **dict.fromkeys(CARRIED),
        }
    ]
    assert output.counters == {"read": 1}


def test_pairs_over_a_limit_are_dropped_whole_and_counted(tmp_path: Path, tiny_model: Path, worker: Worker):
    tokenizer = load_tokenizer(tiny_model)
    prompt = question("Why?")
    limit, answer = len(prompt_ids(tokenizer, prompt)), "One two three four five."
    longest = len(completion_ids(tokenizer, prompt, answer))
    fits = PreferencePair(prompt, answer, "No.")
    shard = pairs_shard(
        tmp_path,
        [
            PreferencePair(question("Why is it so?"), "Yes.", "No."),
            fits,
            PreferencePair(prompt, f"{answer} Six.", "No."),
            PreferencePair(prompt, "No.", f"{answer} Six."),
        ],
    )
    output = worker(max_prompt_tokens=limit, max_completion_tokens=longest)(shard)
    assert output.counters == {"read": 4, "prompt_too_long": 1, "completion_too_long": 2}
    assert output.table["pair_id"].to_pylist() == [fits.pair_id]
    assert len(output.table["chosen_ids"][0]) == longest


def test_rows_that_are_left_out_are_counted_and_not_tokenized(tmp_path: Path, worker: Worker):
    pairs = [PreferencePair(question("Why?"), f"Answer {n}.", "No.") for n in range(4)]
    shard = PairsShard(pairs_shard(tmp_path, pairs).file, left_out({"duplicate": [1], "contradiction": [0, 3]}))
    output = worker()(shard)
    assert output.table["pair_id"].to_pylist() == [pairs[2].pair_id]
    assert output.counters == {"read": 4, "duplicate": 1, "contradiction": 2}


def test_an_absent_side_has_no_token_ids(tmp_path: Path, tiny_model: Path, worker: Worker):
    rows = [PreferencePair(question("Why?"), "Because.", None), PreferencePair(question("Why?"), None, "Because.")]
    output = worker()(pairs_shard(tmp_path, rows))
    ids = completion_ids(load_tokenizer(tiny_model), question("Why?"), "Because.")
    assert output.table["chosen_ids"].to_pylist() == [ids, []]
    assert output.table["rejected_ids"].to_pylist() == [[], ids]
    assert output.counters == {"read": 2}


def test_a_single_answer_over_the_limit_is_dropped_and_counted(tmp_path: Path, worker: Worker):
    rows = [PreferencePair(question("Why?"), None, "Because it is so.")]
    output = worker(max_completion_tokens=3)(pairs_shard(tmp_path, rows))
    assert output.counters == {"read": 1, "completion_too_long": 1}


def test_answers_of_the_same_tokens_are_no_pair(tmp_path: Path, model_with_template: Callable[[str], str]):
    trims = "{% for m in messages %}{{ m.content | trim }}{{ eos_token }}{% endfor %}"
    shard = pairs_shard(tmp_path, [PreferencePair(question("Why?"), "So.", "So.\n")])
    output = TokenizeShard(Model(path=model_with_template(trims)), Data())(shard)
    assert output.counters == {"read": 1, "identical_tokens": 1}
    assert output.table.num_rows == 0


def test_a_completion_that_is_cut_did_not_end(tmp_path: Path, tiny_model: Path, worker: Worker):
    tokenizer = load_tokenizer(tiny_model)
    answer = "One two three four five six seven eight."
    pair = PreferencePair(question("Why?"), answer, "No.")
    single = PreferencePair(question("Why?"), None, answer)
    options = worker(max_completion_tokens=4, long_completions="cut")
    output = options(pairs_shard(tmp_path, [pair, single]))
    whole = completion_ids(tokenizer, pair.prompt, answer)
    assert output.table["chosen_ids"].to_pylist() == [whole[:4], []]
    assert output.table["rejected_ids"].to_pylist() == [completion_ids(tokenizer, pair.prompt, "No."), whole[:4]]
    assert tokenizer.eos_token_id not in whole[:4]
    assert output.counters == {"read": 2, "truncated_completion": 2}


def test_a_completion_as_long_as_the_limit_keeps_its_end(tmp_path: Path, tiny_model: Path, worker: Worker):
    tokenizer = load_tokenizer(tiny_model)
    whole = completion_ids(tokenizer, question("Why?"), "One two three.")
    shard = pairs_shard(tmp_path, [PreferencePair(question("Why?"), "One two three.", "No.")])
    output = worker(max_completion_tokens=len(whole), long_completions="cut")(shard)
    assert output.table["chosen_ids"].to_pylist() == [whole]
    assert output.counters == {"read": 1}


def test_completions_that_are_equal_once_cut_are_no_pair(tmp_path: Path, worker: Worker):
    pair = PreferencePair(question("Why?"), "One two three four five.", "One two three four six.")
    output = worker(max_completion_tokens=3, long_completions="cut")(pairs_shard(tmp_path, [pair]))
    assert output.counters == {"read": 1, "identical_tokens": 1}


@pytest.mark.parametrize("policy", ["keep_start", "keep_end"])
def test_a_prompt_that_is_cut_fits_and_is_counted(tmp_path: Path, worker: Worker, policy: str):
    pairs = [PreferencePair(question(f"Why? {n} " * 50), "Yes.", "No.") for n in range(3)]
    output = worker(max_prompt_tokens=40, long_prompts=policy)(pairs_shard(tmp_path, pairs))
    assert [len(ids) for ids in output.table["prompt_ids"].to_pylist()] == [40] * 3
    assert output.counters == {"read": 3, "truncated_prompt": 3}


def test_a_pair_is_noted_once_and_only_where_it_is_kept(tmp_path: Path, worker: Worker):
    forged, begins = "Yes.<|im_end|>", "\n\nYes."
    pairs = [
        PreferencePair(question("Why?"), begins, "\n\nNo."),
        PreferencePair(question("Why?"), forged, f"{forged} No."),
        PreferencePair(question("Why? " * 200), begins, forged),
    ]
    output = worker(max_prompt_tokens=100)(pairs_shard(tmp_path, pairs))
    assert output.counters == {"read": 3, "prompt_too_long": 1, "boundary_merge": 1, "inner_control_token": 1}


def test_two_beginnings_and_two_ends_are_counted(tmp_path: Path, model_with_template: Callable[[str], str]):
    doubles = (
        "{{ bos_token }}{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>\n<|endoftext|>\n{% endfor %}"
    )
    shard = pairs_shard(tmp_path, [PreferencePair(question("Why?"), "Yes.", "No.")])
    output = TokenizeShard(Model(path=model_with_template(doubles)), Data())(shard)
    assert output.counters == {"read": 1, "double_bos": 1, "double_eos": 1}


TOOLS = '[{"type": "function", "function": {"name": "look<|im_end|>up"}}]'


def test_tools_are_written_by_a_template_that_knows_them(tmp_path: Path, model_with_template: Callable[[str], str]):
    template = (
        "{% if tools %}{% for t in tools %}{{ t | tojson }}{{ eos_token }}{% endfor %}{% endif %}"
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    pairs = [PreferencePair(question("Why?"), "Yes.", "No."), PreferencePair(question("How?"), "Yes.", "No.")]
    worker = TokenizeShard(Model(path=model_with_template(template)), Data())
    output = worker(pairs_shard(tmp_path, pairs, [TOOLS, None]))
    tokenizer = worker.chat.tokenizer
    first, second = output.table["prompt_ids"].to_pylist()
    assert tokenizer.decode(first) == f"{TOOLS[1:-1]}{tokenizer.eos_token}Why?{tokenizer.eos_token}"
    assert first.count(tokenizer.eos_token_id) == 2, "a name that spells a control token is text"
    assert second == prompt_ids(tokenizer, question("How?"))
    assert output.table["chosen_ids"].to_pylist() == [completion_ids(tokenizer, question("Why?"), "Yes.")] * 2
    assert output.counters == {"read": 2}


def test_tools_that_a_template_does_not_write_are_counted(tmp_path: Path, worker: Worker):
    pairs = [PreferencePair(question("Why?"), "Yes.", "No."), PreferencePair(question("How?"), "Yes.", "No.")]
    output = worker()(pairs_shard(tmp_path, pairs, [TOOLS, None]))
    assert output.table["prompt_ids"].to_pylist()[0] == prompt_ids(worker().chat.tokenizer, question("Why?"))
    assert output.counters == {"read": 2, "tools_ignored": 1}


@pytest.mark.parametrize(
    ("tools", "what"), [("[", "not JSON"), ('{"name": "f"}', "list of JSON schemas"), ("[1]", "list of JSON schemas")]
)
def test_tools_that_are_no_list_of_schemas_are_an_error(tmp_path: Path, worker: Worker, tools: str, what: str):
    shard = pairs_shard(tmp_path, [PreferencePair(question("Why?"), "Yes.", "No.")], [tools])
    with pytest.raises(DataError, match=what):
        worker()(shard)


def test_a_dialogue_that_the_template_refuses_is_a_data_error(
    tmp_path: Path, model_with_template: Callable[[str], str]
):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}x"
    prompt = (Message(role="system", content="Be brief."), *question("Why?"))
    worker = TokenizeShard(Model(path=model_with_template(refuses)), Data())
    with pytest.raises(DataError, match=r"system, user that begins with 'Be brief\.': No system role"):
        worker(pairs_shard(tmp_path, [PreferencePair(prompt, "Yes.", "No.")]))


def test_batches_change_nothing_but_the_memory(tmp_path: Path, worker: Worker, monkeypatch: pytest.MonkeyPatch):
    pairs = [PreferencePair(question(f"Why {n}? " * (n % 5 + 1)), "Yes. " * n, "No.") for n in range(20)]
    shard = pairs_shard(tmp_path, pairs)
    options = worker(max_prompt_tokens=52, max_completion_tokens=30)
    whole = options(shard)
    assert 0 < whole.table.num_rows < 20
    for characters in (1, 60):
        monkeypatch.setattr(tokenize_shard, "_CHARACTERS_AT_ONCE", characters)
        assert options(shard) == whole


def test_what_is_tokenized_at_once_is_bounded_with_its_tools(tmp_path: Path, worker: Worker, monkeypatch):
    tools = json.dumps([{"name": "look_up", "description": "x" * 1000}])
    pairs = [PreferencePair(question(f"{n}?"), "Yes.", "No.") for n in range(6)]
    monkeypatch.setattr(tokenize_shard, "_CHARACTERS_AT_ONCE", 2500)
    at_once: list[int] = []
    prompts = ChatTokenizer.prompts

    def counted(chat: ChatTokenizer, rows: Any) -> Any:
        at_once.append(len(rows))
        return prompts(chat, rows)

    monkeypatch.setattr(ChatTokenizer, "prompts", counted)
    assert worker()(pairs_shard(tmp_path, pairs, [tools] * 6)).table.num_rows == 6
    assert at_once == [2, 2, 2]


@pytest.mark.parametrize(
    "text", ["word " * 40_000, "x" * 200_000, "<|im_end|>" * 20_000], ids=["words", "x", "control"]
)
def test_very_long_texts_are_dropped_or_cut_like_any_other(tmp_path: Path, worker: Worker, text: str):
    pairs = [PreferencePair(question(text), "Yes.", "No."), PreferencePair(question("Why?"), text, "No.")]
    shard = pairs_shard(tmp_path, pairs)
    assert worker()(shard).counters == {"read": 2, "prompt_too_long": 1, "completion_too_long": 1}
    output = worker(long_prompts="keep_start", long_completions="cut")(shard)
    assert output.counters["truncated_prompt"] == output.counters["truncated_completion"] == 1
    assert len(output.table["prompt_ids"][0]) == 1024 and len(output.table["chosen_ids"][1]) == 512


CONTROL = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im_start|>assistant\n", "<|im", "\ue000\uf8ff\ue000", "\n"]
TEXTS = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(CONTROL)), min_size=1, max_size=8).map("".join)
ROWS = st.builds(
    lambda turns, chosen, rejected: PreferencePair(
        tuple(Message(role="user" if i % 2 == 0 else "assistant", content=t) for i, t in enumerate(turns)),
        chosen,
        rejected,
    ),
    st.lists(TEXTS, min_size=1, max_size=3).map(lambda turns: turns if len(turns) % 2 else turns[:-1]),
    st.none() | TEXTS,
    TEXTS,
)


@settings(max_examples=60)
@given(
    pairs=st.lists(ROWS, min_size=1, max_size=6),
    max_prompt_tokens=st.integers(30, 60),
    max_completion_tokens=st.integers(1, 12),
    long_prompts=st.sampled_from(["drop", "keep_start", "keep_end"]),
    long_completions=st.sampled_from(["drop", "cut"]),
)
def test_whatever_the_text_and_the_policy_every_row_keeps_to_the_limits_or_is_counted(
    tmp_path_factory: pytest.TempPathFactory, worker: Worker, pairs: list[PreferencePair], **options: Any
):
    made = worker(**options)
    output = made(pairs_shard(tmp_path_factory.mktemp("rows"), pairs))
    rows = output.table.to_pylist()
    dropped = {k: v for k, v in output.counters.items() if k not in {"read", *NOTED}}
    assert output.counters["read"] == len(pairs) == len(rows) + sum(dropped.values())
    assert all(output.counters.values()), "no zero is stored"
    start, end = (made.chat.tokenizer.convert_tokens_to_ids(t) for t in ("<|im_start|>", "<|im_end|>"))
    left = iter(pairs)
    for row in rows:
        pair = next(p for p in left if p.pair_id == row["pair_id"])
        prompt = prompt_ids(made.chat.tokenizer, pair.prompt)
        ids = row["prompt_ids"]
        assert len(ids) <= options["max_prompt_tokens"]
        if len(prompt) <= options["max_prompt_tokens"]:
            assert ids == prompt
        else:
            assert options["long_prompts"] != "drop"
            assert ids[0] == start and ids[-3:] == prompt[-3:], "the assistant's turn is still opened"
        for text, done in ((pair.chosen, row["chosen_ids"]), (pair.rejected, row["rejected_ids"])):
            if text is None:
                assert done == []
                continue
            whole = completion_ids(made.chat.tokenizer, pair.prompt, text)
            assert whole[-1] == end and not made.chat.control_ids & set(whole[:-1])
            assert 1 <= len(done) <= options["max_completion_tokens"]
            assert done == whole[: len(done)]
            assert len(done) == len(whole) or options["long_completions"] == "cut"


def test_limits_that_leave_nothing_of_a_prompt_are_an_error_in_a_worker_too(tmp_path: Path, worker: Worker):
    shard = pairs_shard(tmp_path, [PreferencePair(question("Why? " * 50), "Yes.", "No.")])
    with pytest.raises(ConfigError, match=r"max_prompt_tokens is 3, .*long_prompts=drop"):
        worker(max_prompt_tokens=3, long_prompts="keep_end")(shard)


def test_a_worker_that_cannot_do_its_work_says_so_before_the_first_shard(
    tiny_model: Path, model_with_template: Callable[[str], str]
):
    with pytest.raises(ConfigError, match=r"data\.max_prompt_tokens is 3"):
        TokenizeShard(Model(path=str(tiny_model)), Data(max_prompt_tokens=3, long_prompts="keep_end"))
    with pytest.raises(ConfigError, match="has no chat template"):
        TokenizeShard(Model(path=model_with_template("")), Data())


TURNS = (
    Message(role="assistant", content="One."),
    Message(role="user", content="More?"),
    Message(role="assistant", content="Two."),
)


def with_turns(chosen: Sequence[Message] = TURNS, rejected: Any = "No.") -> PreferencePair:
    return PreferencePair(question("Hi?"), tuple(chosen), rejected if isinstance(rejected, str) else tuple(rejected))


def test_an_answer_of_several_turns_has_a_mask_and_a_text_beside_it_none(tmp_path: Path, worker: Worker):
    pair = with_turns()
    output = worker()(pairs_shard(tmp_path, [pair, PreferencePair(question("Why?"), "Yes.", "No.")]))
    assert output.table.schema.equals(TOKENIZED) and output.counters == {"read": 2}
    first, second = output.table.to_pylist()
    tokenizer = worker().chat.tokenizer
    between = "\n<|im_start|>user\nMore?<|im_end|>\n<|im_start|>assistant\n"
    encoded = [tokenizer.encode(text) for text in ("One.<|im_end|>", between, "Two.<|im_end|>")]
    assert first["prompt_ids"] == prompt_ids(tokenizer, pair.prompt)
    assert first["chosen_ids"] == [token for part in encoded for token in part]
    assert first["chosen_mask"] == [place != 1 for place, part in enumerate(encoded) for _ in part]
    assert first["rejected_ids"] == completion_ids(tokenizer, pair.prompt, "No.") and first["rejected_mask"] is None
    assert first["chosen_tokens"] == len(first["chosen_ids"])
    assert second["chosen_mask"] is None and second["rejected_mask"] is None


def test_masks_take_no_room_where_there_are_none(tmp_path: Path, worker: Worker):
    pairs = [PreferencePair(question(f"{n}?"), "Yes. " * 9, f"No, {n}.") for n in range(200)]
    table = worker()(pairs_shard(tmp_path, pairs)).table
    sizes = []
    for name, columns in (
        ("with", table.column_names),
        ("without", [n for n in table.column_names if "mask" not in n]),
    ):
        location = Location.of(tmp_path) / f"{name}.parquet"
        write_shard(location, table.select(columns), {})
        sizes.append(len(location.read_bytes()))
    assert sizes[0] - sizes[1] < 1000, "two columns of nulls: their description alone"


def test_the_last_turn_alone_is_masked_in_on_request(tmp_path: Path, worker: Worker):
    shard = pairs_shard(tmp_path, [with_turns()])
    [every], [last] = (worker(loss_turns=loss)(shard).table.to_pylist() for loss in ("all", "last"))
    assert last["chosen_ids"] == every["chosen_ids"] and sum(every["chosen_mask"]) == 2 * sum(last["chosen_mask"])


def test_a_cut_before_the_first_token_with_a_loss_leaves_no_pair(tmp_path: Path, worker: Worker):
    shard = pairs_shard(tmp_path, [with_turns()])
    cut = worker(max_completion_tokens=8, long_completions="cut")
    [row] = cut(shard).table.to_pylist()
    assert len(row["chosen_ids"]) == len(row["chosen_mask"]) == 8 and cut(shard).counters["truncated_completion"] == 1
    last = worker(max_completion_tokens=8, long_completions="cut", loss_turns="last")
    assert last(shard).counters == {"read": 1, "cut_before_loss": 1}
    assert worker(max_completion_tokens=8)(shard).counters == {"read": 1, "completion_too_long": 1}


def test_a_pair_whose_prompt_is_written_in_two_ways_is_dropped(
    tmp_path: Path, model_with_template: Callable[[str], str]
):
    # It leaves out what was reasoned before the user's last words, which follow in one of the answers.
    template = (Path(__file__).parents[1] / "data" / "templates" / "qwen3.jinja").read_text()
    reasoned = Message(role="assistant", content="Look:", more='{"reasoning_content": "hm"}')
    prompt = (*question("Hi?"), reasoned, Message(role="tool", content="4"))
    worker = TokenizeShard(Model(path=model_with_template(template)), Data())
    for rejected, counters in (("No.", {"read": 1, "prompt_rewritten": 1}), (TURNS[:2] + TURNS[:1], {"read": 1})):
        assert worker(pairs_shard(tmp_path, [PreferencePair(prompt, TURNS, rejected)])).counters == counters


def test_calls_of_tools_and_their_results_count_towards_what_is_tokenized_at_once(worker: Worker):
    long = [Message(role="assistant", content="", more="x" * 700), Message(role="tool", content="y" * 200)]
    row = pair_row(PreferencePair(question("Hi?"), (*long, *TURNS[:1]), "No."), "train")
    assert tokenize_shard._characters(row) == 3 + 700 + 200 + 4 + 3
