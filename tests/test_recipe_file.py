"""Recipes as a user writes them: what is read, what is refused, and that every refusal says where and what to do."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from align.errors import AlignError
from align.recipe.file import load_recipe, read_recipe, resolved

GOOD = """\
name: harbour
model: org/name
data:
  instructions: data/instructions.jsonl
  preferences: {path: data/pairs.jsonl.gz, format: hh, limit: 2000}
stages:
  sft:     {kind: sft, data: instructions, epochs: 2}
  adapter: {kind: sft, from: sft, data: instructions, quantize: nf4, adapter: {rank: 16}}
  reward:  {kind: reward, from: sft, data: preferences}
  aligned: {kind: dpo, from: adapter, data: preferences, beta: 0.1, loss: ipo}
"""


PPO = """\
name: harbour
model: org/name
data: {prompts: data/prompts.jsonl}
stages:
  policy: {kind: ppo, reward: other/reward, prompts: prompts}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("r.yaml")

    def write(text: str | bytes = GOOD) -> Path:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def message(path: Path, *overrides: str) -> str:
    with pytest.raises(AlignError) as caught:
        load_recipe(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_a_good_recipe_is_read_with_short_forms_and_defaults(recipe):
    found = load_recipe(recipe())
    assert found.data["instructions"].path == "data/instructions.jsonl"
    assert found.stages["aligned"].loss.kind == "ipo"
    assert found.stages["sft"].batch_size == 16


def test_json_is_a_recipe_too(recipe):
    found = resolved(load_recipe(recipe()))
    assert resolved(load_recipe(recipe(json.dumps(found)))) == found


def test_the_readme_example_of_an_error_is_what_is_said(recipe):
    text = message(recipe(GOOD.replace("beta", "bata")))
    assert text == "r.yaml:10: unknown key 'bata' in stage 'aligned'. Did you mean 'beta'?"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs: 2", "epochs: two", "r.yaml:7: 'epochs' of stage 'sft' is 'two'; it must be a number, above 0."),
        ("epochs: 2", "epochs: true", "r.yaml:7: 'epochs' of stage 'sft' is true; it must be a number"),
        ("epochs: 2", "epochs: .inf", "r.yaml:7: 'epochs' of stage 'sft' is .inf; it must be a number"),
        ("epochs: 2", "epochs: 1e999", "r.yaml:7: 'epochs' of stage 'sft' is 1e999; it must be a number"),
        ("epochs: 2", "epochs:", "r.yaml:7: 'epochs' of stage 'sft' is empty; it must be a number"),
        ("epochs: 2", "batch_size: 2.0", "'batch_size' of stage 'sft' is 2.0; it must be a whole number, at least 1."),
        ("epochs: 2", "schedule: cosin", "it must be one of cosine, linear, constant. Did you mean 'cosine'?"),
        ("epochs: 2", "gradient_checkpointing: yes", "is 'yes'; it must be true or false."),
        ("epochs: 2", "rank: 2", "r.yaml:7: unknown key 'rank' in stage 'sft'. It belongs in 'adapter'."),
        ("epochs: 2", "beta: 2", "unknown key 'beta' in stage 'sft'. It belongs in a stage of kind dpo."),
        ("epochs: 2", "from_: x", "unknown key 'from_' in stage 'sft'. Did you mean 'from'?"),
        ("data: instructions, epochs: 2", "epochs: 2", "r.yaml:7: stage 'sft' has no 'data'."),
        ("kind: dpo", "kind: dop", "r.yaml:10: unknown kind 'dop' of stage 'aligned'. Did you mean 'dpo'?"),
        ("kind: dpo, ", "", "r.yaml:10: stage 'aligned' has no 'kind'.\n  Known kinds: pretrain, sft,"),
        ("loss: ipo", "loss: ippo", "unknown kind 'ippo' of 'loss' of stage 'aligned'. Did you mean 'ipo'?"),
        ("loss: ipo", "loss: {kind: robust, label_smoothing: 2}", "'loss' of stage 'aligned' is 2; it must be a number, above 0"),
        ("rank: 16", "target: 7", "'target' of 'adapter' of stage 'adapter' is 7; it must be text or a list of text."),
        ("quantize: nf4, adapter: {rank: 16}", "quantize: nf4", "which freezes it, so it needs an 'adapter'"),
        ("name: harbour", "name: my harbour", "r.yaml:1: 'name' is 'my harbour'; it must be a name (letters"),
        ("name: harbour", "name: 7", "'name' is 7; it must be a name"),
        ("model: org/name", "model: m\nrevision: 123", "'revision' is 123; it must be text. In quotes it is: '123'."),
        ("  sft: ", "  s ft: ", "r.yaml:7: stage 's ft' needs another name: letters"),
        ("  instructions: data/", "  instructions: 7 #", "r.yaml:4: data set 'instructions' is 7; it must be a path or"),
        ("limit: 2000", "limt: 2000", "r.yaml:5: unknown key 'limt' in data set 'preferences'. Did you mean 'limit'?"),
        ("path: data/pairs.jsonl.gz, ", "", "r.yaml:5: data set 'preferences': give either 'path' or 'mix'."),
        ("name: harbour", "name: harbour\nenv: {LD_PRELOAD: x}", "r.yaml:2: unknown key 'env' in the recipe."),
        ("model: org/name", "model: m\nseed: -1", "'seed' is -1; it must be a whole number, at least 0"),
        ("model: org/name", "model: m\nlog_to: [tensorbord]", "part 1 of 'log_to' is 'tensorbord'; it must be one of tensorboard"),
        ("from: adapter, data", "from: adapter, adapter: {rank: 4}, data", "training goes on with the adapter it starts from"),
        ("beta: 0.1", "beta: 0.1, adapter: {dropout: 0.1}", "r.yaml:10: stage 'aligned': adapter.dropout must be 0"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_line(recipe, old, new, words):
    assert old in GOOD
    assert words in message(recipe(GOOD.replace(old, new, 1)))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("other/reward", "3", "'reward' of stage 'policy' is 3; it must be the name of a reward model, a mapping of settings or a list of these."),
        ("other/reward", "[a, 3]", "part 2 of 'reward' of stage 'policy' is 3; it must be the name of a reward model or a mapping"),
        ("other/reward", "[]", "r.yaml:5: 'reward' of stage 'policy' is empty; it needs at least one entry."),
        ("other/reward", "{kind: regexx}", "unknown kind 'regexx' of 'reward' of stage 'policy'. Did you mean 'regex'?"),
        ("other/reward", "[a, {kind: regexx}]", "unknown kind 'regexx' of part 2 of 'reward' of stage 'policy'. Did you mean"),
        ("other/reward", "{from: a}", "'reward' of stage 'policy' has no 'kind'.\n  Known kinds: model, judge, exact_match,"),
        ("other/reward", "{kind: model}", "'reward' of stage 'policy' has no 'from'."),
        ("other/reward", "{kind: judge, wieght: 1}", "unknown key 'wieght' in 'reward' of stage 'policy'. Did you mean 'weight'?"),
        ("other/reward", "{kind: judge, target_tokens: 1}", "It belongs in 'reward' of kind length."),
        ("other/reward", "{kind: judge, weight: 0}", "'weight' of 'reward' of stage 'policy': a weight of 0 leaves this reward"),
        ("other/reward", "{kind: regex, pattern: '('}", "'pattern' of 'reward' of stage 'policy': '(' is no regular expression"),
        ("other/reward", "{kind: length, target_tokens: x}", "'target_tokens' of 'reward' of stage 'policy' is 'x'; it must be a whole"),
        ("other/reward", "{kind: function, name: f}", "'name' of 'reward' of stage 'policy' is 'f'; it must be module:function."),
        ("other/reward", "{kind: function, name: 'm:f'}", "stage 'policy': a reward of kind function runs Python code; read it"),
        ("reward: other", "estimator: gea, reward: other", "unknown kind 'gea' of 'estimator' of stage 'policy'. Did you mean 'gae'?"),
        ("reward: other", "estimator: {kind: rloo, samples: 1}, reward: other", "'samples' of 'estimator' of stage 'policy' is 1; it must"),
        ("reward: other", "samples: 4, reward: other", "unknown key 'samples' in stage 'policy'. It belongs in a stage of kind critique or constitution or 'evaluation' or 'estimator'"),
        ("reward: other", "value: adaptr, reward: other", "one of auto, adapter, model, trunk or a mapping of settings. Did you mean 'adapter'?"),
        ("reward: other", "guards: {kl_limit: 0}, reward: other", "'kl_limit' of 'guards' of stage 'policy' is 0; it must be a number, above 0."),
        ("reward: other", "estimator: rloo, rollouts: 10, reward: other", "r.yaml:5: stage 'policy': rollouts is 10, no multiple of the 4 samples"),
        ("prompts: prompts", "prompts: prmpts", "r.yaml:5: no data set 'prmpts' in this recipe. Did you mean 'prompts'?"),
        (", prompts: prompts", "", "r.yaml:5: stage 'policy' has no 'prompts'."),
        ("ppo, reward: other/reward, prompts", "reward, reward: x, epochs: bad, data", "'epochs' of stage 'policy' is 'bad'; it must be"),
    ],
)  # fmt: skip
def test_each_mistake_of_a_ppo_stage_is_named_with_its_line(recipe, old, new, words):
    assert old in PPO
    assert words in message(recipe(PPO.replace(old, new, 1)))


def test_the_short_forms_of_a_ppo_stage(recipe):
    text = PPO.replace("other/reward", "[other/reward, {kind: judge, file: j.yaml}], watch: a-tag, estimator: rloo")
    stage = load_recipe(recipe(text)).stages["policy"]
    assert [(term.kind, term.weight) for term in stage.reward] == [("model", 1.0), ("judge", 1.0)]
    assert (stage.watch[0].from_, stage.estimator.kind, stage.data) == ("a-tag", "rloo", "prompts")
    again = recipe(json.dumps(resolved(load_recipe(recipe(text)))))
    assert load_recipe(again).stages["policy"] == stage.model_copy(update={"seed": 0})


@pytest.mark.parametrize(
    ("reward", "override", "found"),
    [
        ("a", "reward=b", [("b", 1.0)]),
        ("a", "reward=[b, c]", [("b", 1.0), ("c", 1.0)]),
        ("a", "reward.weight=2", [("a", 2.0)]),
        ("{kind: model, from: a}", "reward.weight=2", [("a", 2.0)]),
        ("[a, b]", "reward.1.weight=2", [("a", 1.0), ("b", 2.0)]),
        ("[a, b]", "reward.0=c", [("c", 1.0), ("b", 1.0)]),
    ],
)
def test_overrides_go_through_the_short_forms_of_rewards(recipe, reward, override, found):
    stage = load_recipe(recipe(PPO.replace("other/reward", reward)), [f"stages.policy.{override}"]).stages["policy"]
    assert [(term.from_, term.weight) for term in stage.reward] == found


def test_overrides_go_through_the_short_forms_of_estimator_and_value(recipe):
    text = PPO.replace("other/reward", "a, estimator: rloo")
    assert load_recipe(recipe(text), ["stages.policy.estimator.samples=8"]).stages["policy"].samples == 8
    text = PPO.replace("other/reward", "a, value: trunk")
    value = load_recipe(recipe(text), ["stages.policy.value.coefficient=0.5"]).stages["policy"].value
    assert (value.kind, value.coefficient) == ("trunk", 0.5)


def test_all_mistakes_are_told_at_once_in_the_order_of_the_file(recipe):
    text = message(recipe(GOOD.replace("beta", "bata").replace("epochs: 2", "epochs: x").replace("2000", "0")))
    lines = [int(line.split(":")[1]) for line in text.splitlines() if "r.yaml:" in line]
    assert lines == [5, 7, 10]
    assert text.endswith("3 problems in all.")


def test_a_flood_of_mistakes_is_cut(recipe):
    text = message(recipe("name: a\nmodel: m\nstages:\n" + "".join(f"  s{i}: {{kind: sft}}\n" for i in range(100))))
    assert len(text.splitlines()) == 22
    assert "and 80 more" in text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "r.yaml is empty."),
        ("# nothing\n", "r.yaml is empty."),
        ("- a\n", "r.yaml:1: a recipe is a mapping"),
        ("hello", "r.yaml:1: a recipe is a mapping"),
        ("{}", "r.yaml:1: the recipe has no 'name'."),
        (b"name: a\nmodel: caf\xe9\n", "r.yaml:2: byte 0xe9 at offset 18 is not UTF-8."),
        ("name: a\n".encode("utf-16"), "is not UTF-8"),
        ("name: a\nmodel: m\nstages: {}\n", "r.yaml:3: 'stages' is {}; it must be a mapping"),
        ("name: a\nmodel: m\nstages: {a: sft}\n", "r.yaml:3: stage 'a' is 'sft'; it must be a mapping of settings."),
    ],
)
def test_files_that_are_no_recipe_are_refused(recipe, content, words):
    assert words in message(recipe(content))


def test_a_byte_order_mark_is_no_mistake(recipe):
    assert load_recipe(recipe(b"\xef\xbb\xbf" + GOOD.encode())).name == "harbour"


def test_a_missing_file_brings_the_nearest_name(recipe):
    recipe()
    assert message(Path("rr.yaml")) == "rr.yaml: no such file.\n  Did you mean 'r.yaml'?"
    assert "Did you mean 'r.yaml'?" in message(Path("r.yml"))
    assert "align init" in message(Path("nowhere/x.yaml"))


def test_a_folder_is_no_recipe(tmp_path):
    assert "is a directory" in message(tmp_path)


# Overrides


def test_overrides_reach_every_depth(recipe):
    found = load_recipe(
        recipe(),
        ["stages.sft.epochs=3", "data.instructions.limit=5", "stages.aligned.loss.kind=hinge", "evaluation.rows=7",
         "stages.reward.adapter.rank=4", "stages.reward.learning_rate=1e-3", "log_to=[wandb]",
         "stages.new={kind: sft, data: instructions}"],
    )  # fmt: skip
    assert found.stages["sft"].epochs == 3
    assert (found.data["instructions"].path, found.data["instructions"].limit) == ("data/instructions.jsonl", 5)
    assert found.stages["aligned"].loss.kind == "hinge"
    assert (found.stages["reward"].adapter.rank, found.stages["reward"].learning_rate) == (4, 1e-3)
    assert (found.evaluation.rows, found.log_to, found.stages["new"].kind) == (7, ["wandb"], "sft")


def test_an_override_of_a_part_of_a_list_changes_that_part_only(recipe):
    mixed = GOOD.replace("stages:", "  all: {mix: [{data: instructions}, {data: preferences}]}\nstages:")
    found = load_recipe(recipe(mixed), ["data.all.mix.1.weight=2"])
    assert [part.weight for part in found.data["all"].mix] == [1.0, 2.0]


def test_a_later_override_wins(recipe):
    assert load_recipe(recipe(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("stages.sft.epoch=3", "unknown key 'epoch' in stage 'sft'. Did you mean 'epochs'?"),
        ("stages.sfx.epochs=3", "no stage 'sfx' in the recipe. Did you mean 'sft'?"),
        ("data.instrctions.limit=3", "no data set 'instrctions' in the recipe. Did you mean 'instructions'?"),
        ("evalution.rows=3", "no key 'evalution' in the recipe. Did you mean 'evaluation'?"),
        ("stages.sft.epochs=three", "'epochs' of stage 'sft' is 'three'; it must be a number"),
        ("stages.sft.epochs=010", "starts with 0"),
        ("stages.sft.epochs=[1", "not valid YAML"),
        ("stages.sft.epochs=", "'epochs' of stage 'sft' is empty"),
        ("stages.sft.epochs.x=3", "'epochs' of stage 'sft' is 2, which has no keys."),
        ("name.x=2", "'name' is 'harbour', which has no keys."),
        ("data.preferences.mix.3.weight=2", "in 'mix' of data set 'preferences'"),
        ("nope", "an override is a path and a value"),
        ("a..b=1", "an override is a path and a value"),
        ("=1", "an override is a path and a value"),
        ("x=!!python/name:os.system ''", "tag"),
    ],
)
def test_a_wrong_override_is_named_as_it_was_typed(recipe, override, words):
    text = message(recipe(), override)
    assert text.startswith(f"--set {override}: ")
    assert words in text


def test_an_override_and_the_file_are_told_apart(recipe):
    text = message(recipe(GOOD.replace("epochs: 2", "epochs: x")), "stages.aligned.beta=-1")
    assert "--set stages.aligned.beta=-1: 'beta'" in text
    assert "r.yaml:7: 'epochs'" in text


# What is used


def test_places_are_kept(recipe):
    file = read_recipe(recipe(), ["stages.sft.data=instructions"])
    assert file.place("stages", "aligned", "data") == "r.yaml:10"
    assert file.place("stages", "sft", "data") == "--set stages.sft.data=instructions"
    assert file.place("stages", "aligned", "warmup") == "r.yaml:10"
    assert file.folder == Path()


def test_left_out_learning_rates_are_filled_in_and_adapters_get_ten_times_as_much(recipe):
    stages = load_recipe(recipe()).stages
    rates = {name: stage.learning_rate for name, stage in stages.items()}
    assert rates == {"sft": 2e-5, "adapter": 2e-4, "reward": 2e-5, "aligned": 1e-5}


def test_the_resolved_recipe_is_plain_json_with_nothing_left_to_guess(recipe):
    found = resolved(load_recipe(recipe(), ["seed=5"]))
    assert json.loads(json.dumps(found)) == found
    adapter = found["stages"]["adapter"]
    assert (adapter["seed"], adapter["adapter"]["alpha"], adapter["from"]) == (5, 32.0, "sft")


def test_reading_a_recipe_imports_no_torch(recipe):
    import subprocess
    import sys

    code = f"import sys; from pathlib import Path; from align.recipe.file import load_recipe; load_recipe(Path({str(recipe())!r}));"
    code += "assert not {'torch', 'transformers', 'sqlalchemy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


PATHS = [
    "stages",
    "stages.sft",
    "stages.sft.kind",
    "stages.sft.from",
    "stages.aligned.loss",
    "stages.aligned.loss.kind",
    "stages.adapter.adapter",
    "stages.adapter.adapter.rank",
    "stages.adapter.adapter.target.0",
    "data",
    "data.preferences",
    "data.preferences.mix.0",
    "data.preferences.columns.a",
    "data.instructions.decontaminate",
    "name",
    "model",
    "evaluation",
    "evaluation.prompts",
    "log_to.0",
    "seed",
]
VALUES = [
    "3",
    "-1",
    "1e-5",
    "true",
    "null",
    "[]",
    "{}",
    "[1,2]",
    "{a:1}",
    "'x'",
    "x",
    "sft",
    "dpo",
    "adapter",
    "ipo",
    "2.0",
    "~",
    "*a",
    "&a",
    "!!x",
    "[{data:preferences}]",
]


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(PATHS), st.sampled_from(VALUES)), max_size=3))
def test_whatever_is_set_is_read_or_refused(recipe, pairs):
    with contextlib.suppress(AlignError):
        resolved(load_recipe(recipe(), [f"{path}={value}" for path, value in pairs]))
