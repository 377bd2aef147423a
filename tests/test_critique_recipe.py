"""Recipes with critique and constitution stages: what is refused, where it points, and what an override can change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.checks import check_recipe
from align.errors import AlignError
from align.recipe.critique_settings import CheckpointCritic, CritiqueSettings, EndpointCritic, JudgeCritic, SelfCritic
from align.recipe.file import resolved
from align.recipe.graph import recipe_warnings, stages_of_kind, topological_order
from align.recipe.loop_settings import ConstitutionSettings
from align.recipe.settings import Recipe
from tests.critique_kit import CRITIQUE, LOOP, Port, brisk_llama, port_in

SFT = "{kind: sft, data: talk}"
DPO_LOOP = LOOP.replace("kind: sft", "kind: dpo")
PPO_LOOP = LOOP.replace("kind: sft, learning_rate: 1.0e-3", "kind: ppo, max_new_tokens: 8")


def port_of(folder: Path, **stages: str) -> Port:
    return port_in(folder, "nowhere", stages, "evaluation: {rows: 4}\n")


def refused(port: Port, *overrides: str) -> str:
    """The whole refusal of the recipe, hint included, without the folder."""
    with pytest.raises(AlignError) as refusal:
        port.workshop(*overrides)
    assert refusal.value.exit_code == 2
    return str(refusal.value).replace(f"{port.folder}/", "")


def line_of(port: Port, stage: str) -> str:
    """port.yaml:LINE of a stage, all of which stand on one line."""
    lines = port.recipe.read_text().splitlines()
    return f"port.yaml:{1 + next(n for n, line in enumerate(lines) if line.startswith(f'  {stage}:'))}: "


def changed(stage: str, **keys: str) -> str:
    """A stage with keys put before its own; a later key of the same name is left out."""
    new = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return stage.replace("{", f"{{{new}, ", 1)


# Outputs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        ("{kind: sft, data: x.sfd}", "'x.sfd': stage 'x' makes no such data set. Did you mean 'x.sft'?"),
        ("{kind: sft, data: y.sft}", "no data set 'y.sft' in this recipe."),
        ("{kind: sft, data: x.preferences}", "stage 'z' (sft) cannot train on 'x.preferences': its rows are prefer"),
        ("{kind: dpo, data: x.sft}", "stage 'z' (dpo) cannot train on 'x.sft': its rows are conversations"),
        ("{kind: reward, data: x.sft}", "stage 'z' (reward) cannot train on 'x.sft'"),
        ("{kind: pretrain, data: x.sft}", "stage 'z' (pretrain) cannot train on 'x.sft'"),
        ("{kind: dpo, data: x.preferences, loss: ipo}", "loss 'ipo' cannot use the soft labels that stage 'x'"),
        ("{kind: ppo, prompts: x.sft, reward: {kind: regex, pattern: a}}", "'x.sft'"),
        ("{kind: sft, from: x, data: talk}", "cannot start from 'x', which makes data sets, not a model"),
        ("{kind: merge, from: x}", "cannot start from 'x', which makes data sets"),
        (CRITIQUE.replace("prompts: asked", "prompts: x.sft"), "cannot take its prompts from 'x.sft'"),
        (LOOP.replace("prompts: asked", "prompts: x.sft"), "cannot take its prompts from 'x.sft'"),
        (changed(LOOP, mix="[{data: x.preferences}]"), "stage 'z' (sft) cannot train on 'x.preferences'"),
        (changed(DPO_LOOP, mix="[{data: x.sft}]"), "stage 'z' (dpo) cannot train on 'x.sft'"),
        (changed(DPO_LOOP, samples="2").replace("kind: dpo", "kind: dpo, loss: hinge"), "loss 'hinge' cannot use the soft"),
        (changed(LOOP, mix="[{data: gone}]"), "no data set 'gone'"),
        (changed(CRITIQUE, critic="{kind: checkpoint, from: r}"), "its critic 'r' writes no text: it is of kind reward"),
        (changed(CRITIQUE, critic="{kind: checkpoint, from: x}"), "its critic 'x' writes no text"),
        (changed(CRITIQUE, critic="judge"), "its critic is a judge without a file, and `evaluation:` has no judge"),
        (changed(LOOP, critic="judge"), "its critic is a judge without a file, and `evaluation:` has no judge"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_at_its_line(tmp_path: Path, stage: str, message: str) -> None:
    port = port_of(tmp_path, x=CRITIQUE, r="{kind: reward, data: pairs}", z=stage)
    text = refused(port)
    assert text.startswith(line_of(port, "z"))
    assert message in text


@pytest.mark.parametrize(
    ("stage", "message"),
    [
        (CRITIQUE.replace("samples: 3", "samples: 1"), "one answer cannot be compared"),
        (CRITIQUE.replace("samples: 3", "revisions: 0"), "nothing would be made"),
        (changed(CRITIQUE, revisions="0", keep_faultless="true"), "keep_faultless has no effect"),
        (CRITIQUE.replace("constitution: rules.yaml, ", ""), "no 'constitution'"),
        (changed(CRITIQUE, most_confident="0.5"), "it must be a number, above 0.5 and at most 1"),
        (changed(CRITIQUE, critic="jugde"), "Did you mean 'judge'?"),
        (changed(CRITIQUE, critic="endpoint"), "'url'"),
        (changed(CRITIQUE, critic="{kind: endpoint, url: 'http://x/v1', model: m, key: abc}"), "unknown key 'key'"),
        (changed(CRITIQUE, critic="{kind: endpoint, url: 'http://me:pw@x/v1', model: m}"), "without password"),
        (changed(CRITIQUE, critic="{kind: endpoint, url: 'http://x/v1', model: m, key_env: 'a b'}"), "name of an env"),
        (LOOP.replace("kind: sft, ", ""), "no 'kind'"),
        (LOOP.replace("kind: sft, ", "kind: reward, "), "reward"),
        (LOOP.replace("kind: sft, ", "kind: sft, data: talk, "), "'data' has no place in train"),
        (DPO_LOOP.replace("kind: dpo, ", "kind: dpo, from: b, "), "'from' has no place in train"),
        (DPO_LOOP.replace("learning_rate", "learnig_rate"), "Did you mean 'learning_rate'?"),
        (LOOP.replace("1.0e-3", "fast"), "it must be a number"),
        (changed(PPO_LOOP, mix="[{data: talk}]"), "mix has no effect with ppo"),
        (changed(LOOP, reward="{}"), "no round trains a reward model of its own"),
        (changed(LOOP, revisions="0", samples="2"), "revisions is 0"),
        (changed(PPO_LOOP, reward="{data: pairs}"), "'data' has no place in reward"),
    ],
)  # fmt: skip
def test_wrong_settings_are_refused_at_their_line(tmp_path: Path, stage: str, message: str) -> None:
    port = port_of(tmp_path, b=SFT, z=stage)
    text = refused(port)
    assert text.startswith(line_of(port, "z"))
    assert message in text


def test_a_setting_of_train_is_refused_at_its_own_line(tmp_path: Path) -> None:
    port = port_of(tmp_path, z=CRITIQUE)
    text = port.recipe.read_text().replace("  z: " + CRITIQUE, "  z:\n    " + LOOP[1:-1].replace(", ", "\n    "))
    loop = text.replace(
        "train: {kind: sft\n    learning_rate: 1.0e-3}", "train:\n      kind: ppo\n      value: adapter"
    )
    port.recipe.write_text(loop)
    line = 1 + loop.splitlines().index("      value: adapter")
    assert refused(port).startswith(f"port.yaml:{line}: stage 'z' trains all weights of its policy")


def test_a_cycle_through_data_is_told_with_its_keys(tmp_path: Path) -> None:
    port = port_of(tmp_path, x=changed(CRITIQUE, **{"from": "z"}), z="{kind: sft, data: x.sft}")
    assert "a cycle in `data:` and `from:`: x -> z -> x" in refused(port)
    critic = changed(CRITIQUE, critic="{kind: checkpoint, from: z}")
    assert "a cycle in `critic:` and `data:`: x -> z -> x" in refused(port_of(tmp_path, x=critic, z="{kind: sft, data: x.sft}"))  # fmt: skip
    mixed = port_of(tmp_path, x=changed(CRITIQUE, **{"from": "z"}), z="{kind: sft, data: all}")
    mixed.recipe.write_text(mixed.recipe.read_text().replace("data:\n", "data:\n  all: {mix: [{data: x.sft}]}\n", 1))
    assert "a cycle in `data:` and `from:`: x -> z -> x" in refused(mixed)


def test_revisions_zero_makes_no_sft_rows(tmp_path: Path) -> None:
    text = refused(port_of(tmp_path, x=changed(CRITIQUE, revisions="0"), z="{kind: sft, data: x.sft}"))
    assert "'x.sft' would be empty: stage 'x' has revisions: 0." in text


def test_a_mixture_may_hold_an_output_and_comes_after_its_maker(tmp_path: Path) -> None:
    port = port_of(tmp_path, z="{kind: sft, data: all}", x=CRITIQUE)
    port.recipe.write_text(
        port.recipe.read_text().replace("data:\n", "data:\n  all: {mix: [{data: x.sft}, {data: talk}]}\n", 1)
    )
    recipe = port.workshop().recipe
    assert topological_order(recipe) == ["x", "z"]
    assert not [warning for warning in recipe_warnings(recipe) if "'talk'" in warning]


# Overrides, records --------------------------------------------------------------------------------------------------


def loop_of(port: Port, *overrides: str) -> ConstitutionSettings:
    stage = port.workshop(*overrides).written.stages["z"]
    assert isinstance(stage, ConstitutionSettings)
    return stage


def test_an_override_reaches_critic_and_train(tmp_path: Path) -> None:
    port = port_of(tmp_path, z=LOOP, x=CRITIQUE)
    assert loop_of(port, "stages.z.train.epochs=3").train.epochs == 3
    assert loop_of(port, "stages.z.train={kind: dpo, loss: sigmoid}").train.kind == "dpo"
    assert loop_of(port, "stages.z.critic={kind: judge, file: judge.yaml}").critic == JudgeCritic(
        kind="judge", file="judge.yaml"
    )
    assert isinstance(loop_of(port).critic, SelfCritic)
    assert loop_of(port, "stages.z.mix=[{data: talk, weight: 2}]").mix[0].weight == 2
    served = "stages.x.critic={kind: endpoint, url: http://x/v1/, model: m}"
    stage = port.workshop(served, "stages.x.critic.concurrency=2").stage("x")
    assert isinstance(stage, CritiqueSettings)
    assert isinstance(stage.critic, EndpointCritic)
    assert (stage.critic.url, stage.critic.concurrency) == ("http://x/v1", 2)
    assert "Did you mean 'epochs'?" in refused(port, "stages.z.train.epoch=3")
    judged = port_of(tmp_path / "b", x=changed(CRITIQUE, critic="judge")).workshop("stages.x.critic.file=judge.yaml")
    assert judged.stage("x").critic == JudgeCritic(kind="judge", file="judge.yaml")  # type: ignore[union-attr]


@pytest.mark.parametrize("train", [LOOP, DPO_LOOP, PPO_LOOP, changed(LOOP, mix="[{data: talk}]", seed="3")])
@pytest.mark.parametrize("critic", ["self", "{kind: judge, file: judge.yaml}", "{kind: checkpoint, from: b}",
                                    "{kind: endpoint, url: 'http://x/v1', model: m}"])  # fmt: skip
def test_the_resolved_recipe_is_read_back_as_the_same(tmp_path: Path, train: str, critic: str) -> None:
    written = port_of(tmp_path, b=SFT, z=changed(train, critic=critic), x=changed(CRITIQUE, critic=critic)).workshop()
    again = Recipe.model_validate(resolved(written.written))
    assert resolved(again) == resolved(written.written)
    assert list(again.stages) == ["b", "z", "x"]
    assert isinstance(again.stages["x"], CritiqueSettings)
    assert isinstance(again.stages["x"].critic, CheckpointCritic) == ("checkpoint" in critic)


def test_stages_are_found_by_their_kind(tmp_path: Path) -> None:
    recipe = port_of(tmp_path, z=LOOP, x=CRITIQUE).workshop().recipe
    assert stages_of_kind(recipe, "constitution") == ["z"]
    assert stages_of_kind(recipe, "critique") == ["z.1.critique", "z.2.critique", "x"]


# What only the files can tell ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brisk(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brisk_llama(tiny_tokenizer, tmp_path_factory.mktemp("brisk"))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (", revision: plainer", "", "rules.yaml:4: principle 'plain' has no 'revision'."),
        ("}", ", weight: 0.0}", "rules.yaml:2: every principle has a weight of 0, so none would ever be drawn."),
        ("id: plain", "id: calm", "rules.yaml:4: principle 'calm' stands there twice."),
    ],
)
@pytest.mark.parametrize("stage", [CRITIQUE, LOOP])
def test_a_mistake_in_the_constitution_reaches_align_check_with_its_line(
    brisk: Path, tmp_path: Path, stage: str, old: str, new: str, message: str
) -> None:
    port = port_in(tmp_path, brisk, {"x": stage})
    rules = tmp_path / "rules.yaml"
    lines = rules.read_text().replace(", weight: 2", "").splitlines()
    lines = [line.replace(old, new) if line.startswith("  - {") else line for line in lines]
    rules.write_text("\n".join(lines) + "\n")
    with pytest.raises(AlignError) as refusal:
        check_recipe(port.workshop())
    assert refusal.value.exit_code == 2
    assert message in str(refusal.value)


def test_align_check_ends_with_exit_code_2_and_no_traceback(brisk: Path, tmp_path: Path) -> None:
    port = port_in(tmp_path, brisk, {"x": CRITIQUE})
    (tmp_path / "rules.yaml").write_text("principles: []\n")
    start = "import sys; from align.cli.main import main; sys.argv = ['align', *sys.argv[1:]]; main()"
    command = [sys.executable, "-c", start, "check", str(port.recipe)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent.parent)
    assert found.returncode == 2
    assert "rules.yaml:1: 'principles' is empty" in found.stderr
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constitution": "ruls.yaml"}, "ruls.yaml"),
        ({"critic": "{kind: judge, file: gone.yaml}"}, "gone.yaml"),
        ({"critic": "{kind: judge, file: strict.yaml}"}, "has no rule for principle 'plain'"),
        ({"critic": "{kind: checkpoint, from: nobody}"}, "its critic 'nobody'"),
        ({"max_new_tokens": "600"}, "max_new_tokens"),
    ],
)
@pytest.mark.parametrize("stage", [CRITIQUE, LOOP])
def test_what_a_stage_names_has_to_be_there_and_fit(
    brisk: Path, tmp_path: Path, stage: str, changes: dict[str, str], message: str
) -> None:
    port = port_in(tmp_path, brisk, {"x": stage})
    (tmp_path / "strict.yaml").write_text('principles: [{id: calm, weight: 1, forbid: ["a"]}]\n')
    overrides = [f"stages.x.{key}={value}" for key, value in changes.items()]
    with pytest.raises(AlignError, match=message):
        check_recipe(port.workshop(*overrides))
    with pytest.raises(AlignError, match=message):
        port.run(*overrides)
    assert port.workshop().registry.all_runs() == []
