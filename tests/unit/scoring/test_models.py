"""Scores by models: a reward model beside plain transformers, and the implicit reward beside log-probs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_ray.config import ImplicitReward, Judge, Model, RewardModel
from dpo_ray.errors import ConfigError, DataError
from dpo_ray.model.folders import load_tokenizer
from dpo_ray.scoring import classifier as classifiers
from dpo_ray.scoring.classifier import TorchClassifier
from dpo_ray.scoring.implicit import ImplicitScorer
from dpo_ray.scoring.models import model_of, reference_of
from dpo_ray.scoring.reward_model import RewardModelScorer


def row(question: str, *answers: str) -> dict[str, Any]:
    prompt = [{"role": "user", "content": question}]
    completions = [{"text": text, "finished": True} for text in answers]
    return {"prompt_id": "00ff", "prompt": prompt, "tools": None, "completions": completions}


ROWS = [
    row("Why?", "Because it is so, and was so for long.", "No idea."),
    row("How?" * 30, "So."),
    row("Who?"),
    row("When?", "Now.", "Never, as far as I can see.", "Soon."),
]


@pytest.fixture(scope="module")
def classifier(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model on the tiny one's tokenizer."""
    return saved_classifier(tiny_model, tmp_path_factory.mktemp("classifier"), num_labels=1)


def saved_classifier(tiny_model: Path, folder: Path, **options: Any) -> Path:
    from transformers import AutoConfig, LlamaForSequenceClassification

    shutil.copytree(tiny_model, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors"))
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForSequenceClassification(AutoConfig.from_pretrained(tiny_model, **options)).save_pretrained(folder)
    return folder


def scorer_of(source: RewardModel) -> RewardModelScorer:
    return RewardModelScorer(source, TorchClassifier(source))


def plain(folder: Path, question: str, answer: str) -> list[float]:
    """The logits as transformers' documentation has it, one dialogue at a time."""
    from transformers import AutoModelForSequenceClassification

    dialogue = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    ids = load_tokenizer(folder).apply_chat_template(dialogue, return_tensors="pt", return_dict=True)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.inference_mode():
        logits: list[float] = model(**ids).logits[0].tolist()
    return logits


@pytest.mark.parametrize("batch_tokens", [1, 60, 4096])
def test_scores_are_those_of_plain_transformers_however_they_are_batched(
    classifier: Path, monkeypatch: pytest.MonkeyPatch, batch_tokens: int
):
    monkeypatch.setattr(classifiers, "_BATCH_TOKENS", batch_tokens)
    found = scorer_of(RewardModel(path=str(classifier))).score(ROWS)
    assert [len(of_row) for of_row in found] == [2, 1, 0, 3]
    for given, of_row in zip(ROWS, found, strict=True):
        for completion, one in zip(given["completions"], of_row, strict=True):
            [expected] = plain(classifier, given["prompt"][0]["content"], completion["text"])
            assert one.score == pytest.approx(expected, abs=1e-5)
            assert one.noted == ()


def test_without_padding_token_no_dialogue_is_padded(classifier: Path, monkeypatch: pytest.MonkeyPatch):
    source = RewardModel(path=str(classifier))
    model = TorchClassifier(source)
    scorer = RewardModelScorer(source, model)
    expected = [[one.score for one in of_row] for of_row in scorer.score(ROWS)]
    model._pad = model.model.config.pad_token_id = None
    assert [[one.score for one in of_row] for of_row in scorer.score(ROWS)] == [
        pytest.approx(of_row, abs=1e-5) for of_row in expected
    ]


def test_a_long_dialogue_loses_its_beginning_and_is_counted(classifier: Path):
    whole = scorer_of(RewardModel(path=str(classifier))).score(ROWS)
    cut = scorer_of(RewardModel(path=str(classifier), max_tokens=80)).score(ROWS)
    assert cut[1][0].noted == ("reward_cut",) and cut[1][0].score != whole[1][0].score
    assert [one.score for one in cut[0]] == pytest.approx([one.score for one in whole[0]], abs=1e-5)
    assert all(one.noted == () for one in cut[0])


def test_one_of_several_logits_is_the_score(tiny_model: Path, tmp_path: Path):
    folder = saved_classifier(tiny_model, tmp_path, num_labels=3)
    with pytest.raises(ConfigError, match="has 3 logits, and it is not said which"):
        scorer_of(RewardModel(path=str(folder)))
    with pytest.raises(ConfigError, match=r"has 3 logits, and `logit` is 3.*set it to 2 at most"):
        scorer_of(RewardModel(path=str(folder), logit=3))
    [[one]] = scorer_of(RewardModel(path=str(folder), logit=2)).score([row("Why?", "So.")])
    assert one.score == pytest.approx(plain(folder, "Why?", "So.")[2], abs=1e-5)


def test_a_model_without_a_head_for_scores_is_refused(tiny_model: Path):
    with pytest.raises(ConfigError, match=r"lacks score\.weight: it is no sequence classifier"):
        scorer_of(RewardModel(path=str(tiny_model)))


def test_a_logit_that_is_not_finite_is_refused(tiny_model: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    folder = saved_classifier(tiny_model, tmp_path, num_labels=1)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "score.weight": weights["score.weight"] * torch.nan}, folder / "model.safetensors")
    with pytest.raises(DataError, match="prompt 00ff a logit that is not finite"):
        scorer_of(RewardModel(path=str(folder))).score([row("Why?", "So.")])


@pytest.fixture(scope="module")
def tuned(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with other weights."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tuned")
    shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        for weight in model.parameters():
            weight *= 1.1
    model.save_pretrained(folder)
    return folder


def summed_logprobs(folder: Path, question: str, answer: str, end: str = "<|im_end|>") -> tuple[float, int]:
    """Of the answer and its end, by plain transformers; and of how many tokens."""
    from transformers import AutoModelForCausalLM

    tokenizer = load_tokenizer(folder)
    asked = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
    completion = tokenizer(f"{answer}{end}", add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + completion])
    with torch.inference_mode():
        logprobs = AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0].log_softmax(-1)
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    return sum(float(logprobs[p, t]) for p, t in zip(places, completion, strict=True)), len(completion)


@pytest.mark.parametrize("per_token", [False, True])
def test_the_implicit_reward_is_beta_times_the_log_ratio(tiny_model: Path, tuned: Path, per_token: bool):
    source = ImplicitReward(policy=str(tuned), beta=0.5, per_token=per_token)
    found = ImplicitScorer(source, reference_of(source, Model(path=str(tiny_model)))).score(ROWS)
    assert [len(of_row) for of_row in found] == [2, 1, 0, 3]
    for given, of_row in zip(ROWS, found, strict=True):
        for completion, one in zip(given["completions"], of_row, strict=True):
            of_both = [
                summed_logprobs(folder, given["prompt"][0]["content"], completion["text"])
                for folder in (tuned, tiny_model)
            ]
            policy, reference = (total / (count if per_token else 1) for total, count in of_both)
            assert one.score == pytest.approx(0.5 * (policy - reference), abs=1e-4)
            assert one.parts == pytest.approx({"policy": policy, "reference": reference}, abs=1e-4)


def test_of_an_answer_that_was_cut_the_end_of_the_turn_does_not_count(tiny_model: Path, tuned: Path):
    given = row("Why?", "Because it", "So.")
    given["completions"][0]["finished"] = False
    source = ImplicitReward(policy=str(tuned))
    [found] = ImplicitScorer(source, reference_of(source, Model(path=str(tiny_model)))).score([given])
    for one, (answer, end) in zip(found, (("Because it", ""), ("So.", "<|im_end|>")), strict=True):
        policy, reference = (summed_logprobs(folder, "Why?", answer, end)[0] for folder in (tuned, tiny_model))
        assert one.parts == pytest.approx({"policy": policy, "reference": reference}, abs=1e-4)


def test_a_reference_of_its_own_takes_nothing_of_the_trained_model():
    trained = Model(path="base", trust_remote_code=True, chat_template="t.jinja", template_arguments={"think": False})
    source = ImplicitReward(policy="tuned", reference="other", reference_revision="x", dtype="bfloat16")
    assert reference_of(source, trained) == Model(path="other", revision="x", dtype="bfloat16")
    assert reference_of(source.model_copy(update={"trust_remote_code": True}), trained).trust_remote_code
    assert reference_of(ImplicitReward(policy="tuned"), trained) == trained


def test_a_policy_that_is_its_reference_has_no_reward(tiny_model: Path):
    source = ImplicitReward(policy=str(tiny_model))
    [[one]] = ImplicitScorer(source, reference_of(source, Model(path=str(tiny_model)))).score([row("Why?", "So.")])
    assert one.score == 0.0


def test_a_tokenizer_that_was_saved_again_is_the_same(tiny_model: Path, tmp_path: Path):
    saved = shutil.copytree(tiny_model, tmp_path / "saved")
    config = json.loads((saved / "tokenizer_config.json").read_text())
    (saved / "tokenizer_config.json").write_text(json.dumps({**config, "local_files_only": True}))
    source = ImplicitReward(policy=str(saved))
    [[one]] = ImplicitScorer(source, reference_of(source, Model(path=str(tiny_model)))).score([row("Why?", "So.")])
    assert one.score == 0.0


def test_two_models_of_other_tokenizers_are_refused(tiny_model: Path, tmp_path: Path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    template = (other / "chat_template.jinja").read_text()
    (other / "chat_template.jinja").write_text(template.replace("You are", "You were") + " ")
    source = ImplicitReward(policy=str(other))
    with pytest.raises(ConfigError, match="other tokenizers or chat templates"):
        ImplicitScorer(source, Model(path=str(tiny_model)))


def test_a_source_names_its_model_as_the_configuration_would():
    assert model_of(RewardModel(path="r", revision="v", dtype="bfloat16")) == Model(
        path="r", revision="v", dtype="bfloat16"
    )
    assert model_of(Judge(model="j", trust_remote_code=True)) == Model(
        path="j", dtype="bfloat16", trust_remote_code=True
    )
    policy = Model(path="p", revision="v", dtype="bfloat16")
    assert reference_of(ImplicitReward(policy="q"), policy) == Model(path="p", revision="v", dtype="float32")
    assert reference_of(ImplicitReward(policy="q", reference="r"), policy) == Model(path="r", dtype="float32")
