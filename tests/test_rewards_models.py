"""Rewards of a model: `align score`'s own numbers, whatever the policy's tokenizer, the batch or the padding."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from align.chat.templates import prepare_tokenizer, stop_token_ids
from align.cli.use import score_command
from align.data.examples import Message, Prompt
from align.errors import AlignError
from align.judge import Judge, JudgeRules
from align.models.folders import load_tokenizer
from align.models.loading import load_reward
from align.models.saving import save_checkpoint
from align.models.source import source_of
from align.recipe.ppo_settings import JudgeReward, ModelReward
from align.rewards.model import RewardModel, context_encoder, said
from align.rewards.response import Response
from align.rewards.total import Rewards, build_rewards

ASKED = (Message("user", "Who has the key?"),)
LONG = "The heron came to the pier at dawn. " * 9  # about 200 tokens
TEXTS = [
    "The master of the harbour has it.",
    "",
    "no",
    LONG,
    " two  spaces\n",
    "a </s> b <|user|> c",
    "größe 漢 🦉",
    "no",
]


def saved_reward(policy: Path, folder: Path, seed: int = 2) -> Path:
    """A reward model with a trained-looking head, as its folder."""
    tokenizer = load_tokenizer(source_of(policy))
    prepare_tokenizer(tokenizer, None)
    save_checkpoint(
        load_reward(source_of(policy), trainable=True, tokenizer=tokenizer, seed=seed), tokenizer, folder
    )  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def own_tokenizer_reward(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_reward(tiny_llama, tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="session")
def other_tokenizer_reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 (absolute positions) whose tokenizer has other ids, pad == eos, and a template with a trimmed answer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPT2Config, GPT2ForSequenceClassification, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        ["harbour master pier heron dawn the key"] * 9,
        trainers.BpeTrainer(
            vocab_size=280, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(3)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=256, vocab_size=len(tokenizer), num_labels=1, pad_token_id=1,
        eos_token_id=1, bos_token_id=1,
    )  # fmt: skip
    model = GPT2ForSequenceClassification(config)
    model.score.weight.data.normal_(std=0.5)
    folder = tmp_path_factory.mktemp("other-reward")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["own_tokenizer_reward", "other_tokenizer_reward"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def summed(folder: Path, weight: float = 1.0) -> Rewards:
    term = ModelReward.model_validate({"kind": "model", "from": "harbour/reward", "weight": weight})
    return build_rewards([term], models={"harbour/reward": RewardModel.open(source_of(folder))}, judges={})


def responses(texts: Sequence[str]) -> list[Response]:
    return [Response(ASKED, text, len(text), True) for text in texts]


def test_a_reward_inside_ppo_is_that_of_align_score_to_the_bit(folder: Path) -> None:
    lines = "".join(json.dumps({"prompt": ASKED[0].content, "completion": text or "."}) + "\n" for text in TEXTS)
    result = CliRunner().invoke(score_command, [str(folder), "--json"], input=lines)
    assert result.exit_code == 0, result.output
    outside = [row["reward"] for row in json.loads(result.stdout)["rows"]]
    inside = summed(folder).score(responses([text or "." for text in TEXTS]))
    assert inside.totals == outside
    assert inside.parts == {"harbour/reward": outside}
    assert torch.tensor(outside).std() > 0.01


def test_a_reward_is_that_of_its_text_alone_whatever_stands_beside_it(folder: Path) -> None:
    rewards = summed(folder)
    alone = [rewards.score(responses([text])).totals[0] for text in TEXTS]
    assert rewards.score(responses(TEXTS)).totals == pytest.approx(alone, abs=1e-5)
    order = [5, 2, 0, 7, 3, 1, 6, 4]
    shuffled = rewards.score(responses([TEXTS[i] for i in order] * 3)).totals
    assert shuffled == pytest.approx([alone[i] for i in order] * 3, abs=1e-5)


def test_a_response_is_read_as_the_assistants_turn_with_its_stop_token(folder: Path) -> None:
    model = RewardModel.open(source_of(folder))
    tokenizer = load_tokenizer(source_of(folder))
    prepare_tokenizer(tokenizer, None)
    stop = stop_token_ids(tokenizer)[0]
    asked = model.encoder.prompt(ASKED)
    for text in TEXTS:
        ids = model.encoder.reply(ASKED, said(text)).ids
        assert ids[: len(asked)] == asked
        assert ids[len(asked) :].count(stop) == 1  # pad == eos, or a text that spells it, makes no second one
        assert ids[-1] == stop
        row = torch.tensor([ids])
        with torch.no_grad():
            plain = model.model.transformer(row) if hasattr(model.model, "transformer") else model.model.model(row)
            expected = model.model.score(plain.last_hidden_state[0, -1])
        assert summed(folder).score(responses([text])).totals == pytest.approx([float(expected)], abs=1e-5)


def test_an_empty_response_has_a_reward_of_its_own(folder: Path) -> None:
    nothing, something = summed(folder).score(responses(["", "The master."])).totals
    assert abs(nothing - something) > 1e-3


def test_a_negative_weight_makes_a_reward_a_cost(folder: Path) -> None:
    once, cost = summed(folder).score(responses(TEXTS)), summed(folder, -2.0).score(responses(TEXTS))
    assert cost.totals == [-2 * reward for reward in once.totals]
    assert cost.parts == once.parts


def test_scoring_leaves_a_model_in_training_as_it_was(own_tokenizer_reward: Path) -> None:
    tokenizer = load_tokenizer(source_of(own_tokenizer_reward))
    prepare_tokenizer(tokenizer, None)
    model: Any = load_reward(source_of(own_tokenizer_reward), trainable=True, tokenizer=tokenizer)
    reward = RewardModel(model.train(), context_encoder(model, tokenizer))
    kept = RewardModel.open(source_of(own_tokenizer_reward))
    assert reward.score([(ASKED, said("no"))]) == pytest.approx(kept.score([(ASKED, said("no"))]), abs=1e-6)
    assert model.training


def test_a_response_beyond_the_reward_models_context_is_refused_with_their_number(folder: Path) -> None:
    rewards = summed(folder)
    with pytest.raises(AlignError, match=r"reward 'harbour/reward': reply 2 has \d+ tokens .* is 256, and 1 more are"):
        rewards.score(responses(["no", LONG * 4, "no", LONG * 5]))
    with pytest.raises(AlignError, match="Lower max_length or max_new_tokens"):
        rewards.score(responses([LONG * 4]))


def test_a_prompt_that_leaves_no_room_for_a_response_is_refused_before_the_first_round(folder: Path) -> None:
    rewards = summed(folder)
    rewards.check([Prompt(ASKED)] * 2)
    with pytest.raises(AlignError, match=r"reward 'harbour/reward': an empty reply to prompt 2 has .* is 256\n"):
        rewards.check([Prompt(ASKED), Prompt((Message("user", LONG * 5),))])
    model = rewards.parts[0].reward.model
    model.check([ASKED], 100)
    with pytest.raises(AlignError, match="a reply of 250 tokens to prompt 1 has"):
        model.check([ASKED], 250)


def test_a_reward_model_that_gives_nan_is_refused(own_tokenizer_reward: Path) -> None:
    rewards = summed(own_tokenizer_reward)
    rewards.parts[0].reward.model.model.score.weight.data.fill_(float("nan"))
    with pytest.raises(AlignError, match=r"'harbour/reward': the model gives rewards that are not .* 1: nan"):
        rewards.score(responses(TEXTS))


def test_models_and_rules_are_added_up_under_their_own_names(folder: Path) -> None:
    model = RewardModel.open(source_of(folder))
    terms = [ModelReward.model_validate({"kind": "model", "from": name}) for name in ("r", "judge", "r")]
    rewards = build_rewards(
        [*terms, JudgeReward(kind="judge", weight=0.5)],
        models={"r": model, "judge": model},
        judges={None: Judge(JudgeRules())},
    )
    scored = rewards.score(responses(TEXTS))
    assert list(scored.parts) == ["r", "judge", "r-2", "judge-2"]
    assert scored.parts["r"] == scored.parts["judge"] == scored.parts["r-2"]
    assert scored.parts["judge-2"] == [1, 0, 1, 1, 1, 1, 1, 1]
    assert scored.totals == [3 * x + 0.5 * y for x, y in zip(scored.parts["r"], scored.parts["judge-2"], strict=True)]


def test_a_language_model_is_no_reward(tiny_llama: Path) -> None:
    with pytest.raises(AlignError, match="no trained reward head"):
        RewardModel.open(source_of(tiny_llama))
