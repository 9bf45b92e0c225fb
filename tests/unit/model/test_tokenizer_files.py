"""What the files of a tokenizer tell without transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dpo_ray.config import Model
from dpo_ray.errors import ConfigError
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.model.resolve import ModelFolder
from dpo_ray.model.tokenizer_files import has_template, read_template, tokenizer_hash


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_model, folder)
    return folder


def change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes a key away."""
    found = {**json.loads(file.read_text()), **values}
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def test_the_hash_is_the_content_of_the_tokenizer_wherever_it_lies(demo_model: Path, copy: Path, tmp_path: Path):
    # The tiny model's tokenizer is the demo model's, saved again; weights and their configuration are others.
    expected = tokenizer_hash(demo_model)
    assert tokenizer_hash(copy) == expected
    load_tokenizer(copy).save_pretrained(tmp_path / "again")
    shutil.copy(copy / "config.json", tmp_path / "again")
    assert tokenizer_hash(tmp_path / "again") == expected
    change(copy / "config.json", hidden_size=32)
    (copy / "model.safetensors").write_bytes(b"others")
    (copy / "README.md").write_text("A card.")
    assert tokenizer_hash(copy) == expected


def test_another_template_vocabulary_special_token_or_class_is_another_hash(copy: Path):
    hashes = [tokenizer_hash(copy)]
    template = copy / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    hashes.append(tokenizer_hash(copy))
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    hashes.append(tokenizer_hash(copy))
    change(copy / "tokenizer_config.json", eos_token="<|endoftext|>")
    hashes.append(tokenizer_hash(copy))
    change(copy / "tokenizer.json", added_tokens=[])
    hashes.append(tokenizer_hash(copy))
    (copy / "vocab.json").write_text("{}")
    hashes.append(tokenizer_hash(copy))
    change(copy / "config.json", model_type="mistral")
    hashes.append(tokenizer_hash(copy))
    assert len(set(hashes)) == len(hashes)


def test_what_a_version_of_the_library_makes_of_other_files_is_its_own(copy: Path, monkeypatch: pytest.MonkeyPatch):
    from dpo_ray.model import tokenizer_files

    def with_version(number: str) -> str:
        monkeypatch.setattr(tokenizer_files, "version", lambda _: number)
        return tokenizer_hash(copy)

    assert with_version("1") == with_version("2")
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    assert with_version("1") != with_version("2")


def test_a_template_is_found_where_transformers_looks_for_it(copy: Path):
    template = copy / "chat_template.jinja"
    text = template.read_text()
    assert has_template(copy)
    template.write_text("")
    assert not has_template(copy) and not load_tokenizer(copy).chat_template
    template.unlink()
    assert not has_template(copy) and not load_tokenizer(copy).chat_template
    change(copy / "tokenizer_config.json", chat_template=text)
    assert has_template(copy) and load_tokenizer(copy).chat_template == text
    change(copy / "tokenizer_config.json", chat_template=None)
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tool_use.jinja").write_text(text)
    assert has_template(copy) and load_tokenizer(copy).chat_template == {"tool_use": text}


def test_where_code_makes_the_tokenizer_only_the_loaded_one_tells(copy: Path):
    (copy / "chat_template.jinja").unlink()
    change(copy / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    assert has_template(copy)


def test_a_folder_without_tokenizer_is_a_configuration_error(copy: Path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    with pytest.raises(ConfigError, match=r"no tokenizer in .*copy.*save_pretrained"):
        has_template(copy)


def test_a_damaged_file_is_named(copy: Path):
    (copy / "tokenizer_config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json is not valid JSON"):
        has_template(copy)


TEMPLATE = "{% for m in messages %}{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% endfor %}"


def named(copy: Path, text: str, **more: Any) -> ModelFolder:
    """The model in a folder with a chat template of its own file."""
    file = copy.parent / "own.jinja"
    file.write_text(text)
    return ModelFolder.of(Model(path=str(copy), chat_template=str(file), **more))


def test_a_template_named_by_its_file_stands_in_place_of_the_models_own(copy: Path):
    folder = named(copy, TEMPLATE)
    assert folder.tokenizer().chat_template == TEMPLATE
    assert ModelFolder.of(Model(path=str(copy))).tokenizer().chat_template != TEMPLATE


def test_the_text_of_a_named_template_is_part_of_what_the_tokenizer_is_and_its_place_is_not(copy: Path, tmp_path: Path):
    plain = ModelFolder.of(Model(path=str(copy))).tokenizer_hash()
    first = named(copy, TEMPLATE).tokenizer_hash()
    elsewhere = tmp_path / "elsewhere.jinja"
    elsewhere.write_text(TEMPLATE)
    assert ModelFolder.of(Model(path=str(copy), chat_template=str(elsewhere))).tokenizer_hash() == first
    other = named(copy, TEMPLATE.replace("eos", "bos")).tokenizer_hash()
    with_arguments = named(copy, TEMPLATE, template_arguments={"date": "today"}).tokenizer_hash()
    assert len({plain, first, other, with_arguments}) == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, r"cannot be read as text .*submit --ship"),
        (b"\xff", r"cannot be read as text"),
        (b"{% for m in messages %}", r"is no Jinja template: line 1: Unexpected end of template"),
        (b"a\n{{ m. }}", r"is no Jinja template: line 2"),
        (b" \n", r"is empty"),
    ],
)
def test_a_file_that_is_no_template_is_a_configuration_error(tmp_path: Path, text: bytes | None, why: str):
    file = tmp_path / "own.jinja"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises(ConfigError, match=rf"model\.chat_template is .*own\.jinja.*{why}"):
        read_template(str(file))
