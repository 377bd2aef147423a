"""A ppo stage from its recipe to its record: rewards are edges and parents, part of the key, and checked before training.

The stage itself is played by one that hands its start on; everything around it is real.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from align.cli.commands import cli
from align.errors import AlignError, Interrupted
from align.estimate.place import LIBRARIES_BYTES, Place
from align.estimate.ppo import Roles, Scorer, ppo_phases
from align.estimate.rows import Rows
from align.estimate.shape import Shape
from align.estimate.speed import ppo_seconds
from align.estimate.training import Learner
from align.models.rewards import require_reward
from align.origins import Weights, Workshop
from align.plan import plan
from align.progress import Progress
from align.recipe.file import load_recipe
from align.recipe.settings import EvaluationSettings, PpoSettings
from align.recipe_files import module_spec
from align.registry import Registry
from align.resume import stopped_run
from align.run import run_recipe
from align.stages.stage import Inputs, Outcome

RECIPE = """
name: harbour
model: {model}
data:
  pairs: {{path: pairs.jsonl, test_fraction: 0.2}}
  prompts: {{path: prompts.jsonl, test_fraction: 0.2}}
stages:
  policy: {{kind: ppo, reward: reward, prompts: prompts, max_new_tokens: 8, rollouts: 8}}
  reward: {{kind: reward, data: pairs, max_steps: 1}}
evaluation: {{rows: 4, max_new_tokens: 4}}
"""
NAMES = ["Heron", "Gull", "Tern", "Swan", "Crane", "Ibis", "Plover", "Dunlin", "Avocet", "Curlew", "Egret", "Stork"]
MAIN = "from align.cli.main import main; main()"
JUDGE = "principles: [{id: brief, max_words: 5}]\n"


@dataclass
class Bench:
    """A recipe with its data in a folder, the registry it works in, and what the stand-in for the stage was given."""

    folder: Path
    inputs: list[Inputs] = field(default_factory=list)
    stop: bool = False

    def workshop(self, *overrides: str) -> Workshop:
        registry = Registry.open(self.folder / "home")
        return Workshop(load_recipe(self.folder / "chain.yaml", overrides), self.folder, registry)

    def run(self, *overrides: str, **named: Any) -> dict[str, tuple[str, str]]:
        done = run_recipe(self.workshop(*overrides), Progress(), **named)
        return {entry.planned.name: (entry.planned.action, entry.checkpoint.id) for entry in done}

    def plans(self, *overrides: str) -> dict[str, tuple[str, str]]:
        return {stage.name: (stage.action, stage.why) for stage in plan(self.workshop(*overrides))}

    def check(self, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> str:
        """What `align check` says; it must be a refusal that leaves nothing behind."""
        monkeypatch.setenv("ALIGN_HOME", str(self.folder / "home-of-check"))
        sets = [part for override in overrides for part in ("--set", override)]
        result = CliRunner().invoke(cli, ["check", str(self.folder / "chain.yaml"), *sets])
        assert isinstance(result.exception, AlignError), result.output
        assert result.exception.exit_code == 2
        left = self.folder / "home-of-check"  # may hold the hashes of models that were read
        assert {path.name for path in left.glob("*")} <= {"cache"}
        return str(result.exception)


@pytest.fixture
def bench(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    bench = Bench(tmp_path)

    def run(settings: PpoSettings, inputs: Inputs, folder: Path, _: Progress) -> Outcome:
        bench.inputs.append(inputs)
        if bench.stop:
            raise Interrupted(15, "stopped")
        shutil.copytree(inputs.parent.path, folder, dirs_exist_ok=True)
        (folder / "note.txt").write_text(f"{settings.kl_coefficient} {[one.id for one in inputs.rewards.values()]}")
        return Outcome(kind="model", template_sha256="ab" * 32)

    stand_in = ModuleType("stand_in_for_ppo")
    stand_in.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "stand_in_for_ppo", stand_in)
    monkeypatch.setitem(sys.modules["align.run"].STAGES, "ppo", "stand_in_for_ppo")
    write_rows(
        tmp_path / "pairs.jsonl", [{"prompt": f"Is {n} in?", "chosen": "Yes.", "rejected": "Go!"} for n in NAMES]
    )
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": f"Who is {n}?", "expected": n} for n in NAMES])
    (tmp_path / "judge.yaml").write_text(JUDGE)
    (tmp_path / "chain.yaml").write_text(RECIPE.format(model=tiny_llama))
    return bench


@pytest.fixture(scope="session")
def reward_folder(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model that no run of ours made."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("foreign-reward")
    AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


# What a stage gets and what is recorded ------------------------------------------------------------------------------


def test_the_reward_model_is_made_first_given_to_the_stage_and_a_parent_of_the_policy(bench: Bench) -> None:
    done = bench.run()
    assert list(done) == ["reward", "policy"]
    (inputs,) = bench.inputs
    assert inputs.rewards["reward"].id == done["reward"][1]
    require_reward(inputs.rewards["reward"].source)
    registry = bench.workshop().registry
    policy, reward = registry.checkpoint("harbour/policy"), registry.checkpoint("harbour/reward")
    start = bench.workshop().model.id
    assert policy.parents == (start, reward.id)
    assert registry.run(policy.run).inputs["rewards"] == {"reward": reward.id}
    lineage = registry.lineage("harbour/policy")
    assert {edge.parent for edge in lineage.parents(policy.id) if edge.rows is None} == {start, reward.id}
    assert [use.name for use in policy.data] == ["prompts"]


def test_the_reward_model_of_a_policy_is_kept_by_gc_and_cannot_be_removed(bench: Bench) -> None:
    bench.run()
    bench.run("stages.reward.learning_rate=1e-3", stages=["reward"])
    registry = bench.workshop().registry
    first = registry.checkpoint("harbour/policy").parents[1]
    assert registry.checkpoint("harbour/reward").id != first
    assert registry.gc() == []
    with pytest.raises(AlignError, match="is the parent of harbour/policy"):
        registry.remove(f"harbour/reward@{first[:12]}")


def test_a_watched_model_is_given_to_the_stage_and_is_no_parent(bench: Bench, reward_folder: Path) -> None:
    bench.run(f"stages.policy.watch={reward_folder}")
    assert set(bench.inputs[0].rewards) == {"reward", str(reward_folder)}
    policy = bench.workshop().registry.checkpoint("harbour/policy")
    assert policy.parents == (bench.inputs[0].parent_id, bench.inputs[0].rewards["reward"].id)


def test_a_reward_model_from_outside_has_its_name_in_the_lineage(bench: Bench, reward_folder: Path) -> None:
    bench.run(f"stages.policy.reward={reward_folder}", stages=["policy"])
    lineage = bench.workshop().registry.lineage("harbour/policy")
    assert str(reward_folder) in {node.name for node in lineage.nodes.values() if node.kind == "outside"}


def test_judges_are_given_by_the_file_as_written(bench: Bench) -> None:
    judged = ("evaluation.judge=judge.yaml", "stages.policy.watch=[{kind: judge}, {kind: judge, file: ./judge.yaml}]")
    bench.run(*judged)
    assert set(bench.inputs[0].judges) == {None, "./judge.yaml"}
    assert bench.inputs[0].judges[None] is bench.inputs[0].judge


# What is reused and what runs again ----------------------------------------------------------------------------------


def test_nothing_changed_nothing_runs_and_another_reward_model_runs_the_policy_again(bench: Bench) -> None:
    assert bench.plans()["policy"] == ("run", "is scored by reward, which will be new")
    bench.run()
    assert {action for action, _ in bench.plans().values()} == {"reuse"}
    assert bench.plans("stages.policy.kl_coefficient=0.1")["policy"] == (
        "run", "changed: settings.kl_coefficient 0.05 -> 0.1",
    )  # fmt: skip
    assert bench.plans("stages.reward.learning_rate=1e-3")["policy"] == (
        "run",
        "is scored by reward, which will be new",
    )
    bench.run("stages.reward.learning_rate=1e-3", stages=["reward"])
    assert bench.plans("stages.reward.learning_rate=1e-3")["policy"] == ("run", "changed: rewards.reward")


def test_an_edited_judge_of_a_reward_runs_the_policy_again(bench: Bench) -> None:
    judged = "stages.policy.reward=[reward, {kind: judge, file: judge.yaml}]"
    bench.run(judged)
    (bench.folder / "judge.yaml").write_text(JUDGE.replace("5", "6"))
    assert bench.plans(judged)["policy"] == ("run", "changed: judges.judge.yaml")


def test_an_edited_function_runs_the_policy_again_and_is_not_run_by_a_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bench.folder)
    monkeypatch.syspath_prepend(str(bench.folder))
    module = bench.folder / "short_answers.py"
    module.write_text("def f(prompts, responses, expected):\n    return [-len(text) for text in responses]\n")
    coded = (
        "stages.policy.reward=[reward, {kind: function, name: 'short_answers:f'}]",
        "stages.policy.allow_code=true",
    )
    bench.run(*coded)
    assert bench.plans(*coded)["policy"][0] == "reuse"
    module.write_text(module.read_text() + "\nraise SystemExit('a plan runs no code')\n")
    assert bench.plans(*coded)["policy"] == ("run", "changed: functions.short_answers:f")
    monkeypatch.delitem(sys.modules, "short_answers")


def test_a_module_is_found_without_running_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "judges_of_mine"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "short.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    spec = module_spec("judges_of_mine.short")
    assert spec is not None
    assert spec.origin == str(package / "short.py")
    assert module_spec("judges_of_mine.long") is None
    assert module_spec("no_such_module.x") is None


def test_other_stages_keep_their_keys(bench: Bench) -> None:
    workshop = bench.workshop()
    keys = set(workshop.ingredients("reward", Weights(workshop.model)))
    assert keys == {"settings", "seed", "parent", "data", "template", "judge", "evaluation", "versions"}
    assert set(workshop.ingredients("policy", Weights(workshop.model))) - keys == {"rewards", "judges", "functions"}


# Resuming ------------------------------------------------------------------------------------------------------------


def stopped(bench: Bench, *overrides: str) -> str:
    bench.stop = True
    with pytest.raises(Interrupted):
        bench.run(*overrides)
    bench.stop = False
    return bench.workshop().registry.all_runs()[0].id


def test_a_stopped_run_goes_on_with_its_reward_model(bench: Bench) -> None:
    run = stopped(bench)
    workshop, stage = stopped_run(bench.workshop().registry, run)
    done = run_recipe(workshop, Progress(), [stage])
    assert [entry.planned.action for entry in done] == ["reuse", "resume"]
    assert [inputs.rewards for inputs in bench.inputs[:1]] == [inputs.rewards for inputs in bench.inputs[1:]]


def test_a_reward_model_that_changed_is_refused_by_resume(bench: Bench, reward_folder: Path) -> None:
    shutil.copytree(reward_folder, bench.folder / "mine")
    run = stopped(bench, "stages.policy.reward=mine")
    config = bench.folder / "mine" / "config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(AlignError, match=r"cannot go on: changed: rewards\.mine"):
        stopped_run(bench.workshop().registry, run)


def test_a_reward_stage_that_would_be_made_anew_is_refused_by_resume(bench: Bench) -> None:
    run = stopped(bench)
    pairs = bench.folder / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("Yes.", "Yes!"))
    with pytest.raises(AlignError, match=r"stage 'reward', which it needs, is not what it was \(changed: data.pairs\)"):
        stopped_run(bench.workshop().registry, run)


def test_an_edited_reward_checkpoint_is_refused_by_run_and_resume(bench: Bench) -> None:
    run = stopped(bench)
    registry = bench.workshop().registry
    file = registry.checkpoint("harbour/reward").path / "config.json"
    file.chmod(0o644)
    file.write_text(file.read_text() + " ")
    with pytest.raises(AlignError, match=r"harbour/reward .* was changed behind the registry's back: config.json"):
        stopped_run(registry, run)
    with pytest.raises(AlignError, match=r"harbour/reward .* was changed behind the registry's back: config.json"):
        bench.run()


# What is refused before anything is trained --------------------------------------------------------------------------

LONG = "word " * 300


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["stages.policy.reward={model}"], "is a language model, not a reward model"),
        (["stages.policy.reward=rewrd"], "'rewrd': no checkpoint 'rewrd'\n  Did you mean 'reward'?"),
        (["stages.policy.reward=policy"], "a cycle in `reward:`: policy -> policy"),
        (["stages.policy.prompts=pairs"], "(ppo) needs prompts; the rows of 'pairs' have answers, which would never be"),
        (["stages.policy.prompts=pears"], "no data set 'pears' in this recipe. Did you mean 'pairs'?"),
        (["data.prompts.path=empty.jsonl"], "empty.jsonl: there are no rows in it"),
        (["data.prompts.test_fraction=1.0"], "data set 'prompts' has no training rows"),
        (["stages.policy.max_new_tokens=300"], "max_new_tokens is 300 and the model's context is 256"),
        (["stages.policy.max_length=8"], "max_new_tokens is 8 and max_length is 8"),
        (["stages.policy.max_new_tokens=250"], "stage 'policy': data set 'prompts': none of the 11 prompts leaves room for a response of max_new_tokens: 250"),
        (
            ["data.prompts={path: long.jsonl, test_fraction: 0}", "stages.policy.too_long=error"],
            "stage 'policy': data set 'prompts': prompt 1 has ",
        ),
        (["stages.policy.reward={kind: judge, file: jugde.yaml}"], "Did you mean 'judge.yaml'?"),
        (["stages.policy.reward={kind: judge}"], "kind judge names no file, and `evaluation:` has no judge"),
        (["stages.policy.reward={kind: numeric_match}"], "stage 'policy': reward 'numeric_match': prompt 1 "),
        (["stages.policy.reward={kind: function, name: 'nowhere:f'}"], "then set `allow_code: true`"),
        (
            ["stages.policy.reward={kind: function, name: 'nowhere:f'}", "stages.policy.allow_code=true"],
            "stage 'policy': reward 'function nowhere:f': there is no module 'nowhere'",
        ),
        (["stages.policy.engine=vllm"], "stage 'policy': vllm is not installed"),
        (["stages.policy.guards.kl_limit=0"], "'kl_limit' of 'guards' of stage 'policy' is 0; it must be a number, above"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_by_check_and_leaves_nothing(
    bench: Bench, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    (bench.folder / "empty.jsonl").write_text("")
    write_rows(bench.folder / "long.jsonl", [{"prompt": LONG}, *({"prompt": f"Who is {n}?"} for n in NAMES)])
    filled = [override.replace("{model}", str(tiny_llama)) for override in overrides]
    assert words in bench.check(monkeypatch, *filled)


def test_what_check_refuses_run_refuses_before_the_first_stage_trains(bench: Bench, tiny_llama: Path) -> None:
    for override in ("max_new_tokens=300", "prompts=pairs", f"reward={tiny_llama}", "watch={kind: numeric_match}"):
        with pytest.raises(AlignError) as refusal:
            bench.run(f"stages.policy.{override}")
        assert refusal.value.exit_code == 2
    assert bench.workshop().registry.all_runs() == []


def test_a_good_recipe_is_checked_with_the_lengths_of_its_prompts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGN_HOME", str(bench.folder / "home-of-check"))
    write_rows(bench.folder / "prompts.jsonl", [{"prompt": LONG}, *({"prompt": f"Who is {n}?"} for n in NAMES)])
    command = [str(bench.folder / "chain.yaml"), "--json", "--set", "data.prompts.test_fraction=0.0"]
    result = CliRunner().invoke(cli, ["check", *command], catch_exceptions=False)
    assert result.exit_code == 0
    document = json.loads(result.stdout)
    lengths = next(entry for entry in document if entry["name"] == "prompts")["stages"]["policy"]
    assert (lengths["rows"], lengths["dropped"], lengths["cut_prompts"]) == (13, 1, 0)
    assert 0 < lengths["p50"] <= lengths["longest"] <= 248
    cut = CliRunner().invoke(cli, ["check", *command, "--set", "stages.policy.cut_prompt=true"])
    lengths = next(entry for entry in json.loads(cut.stdout) if entry["name"] == "prompts")["stages"]["policy"]
    assert (lengths["dropped"], lengths["cut_prompts"], lengths["longest"]) == (0, 1, 248)


def test_the_command_line_refuses_without_a_traceback(bench: Bench) -> None:
    command = [sys.executable, "-c", MAIN, "check", "chain.yaml", "--set", "stages.policy.max_new_tokens=300"]
    ended = subprocess.run(command, cwd=bench.folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert "max_new_tokens is 300 and the model's context is 256" in ended.stderr
    assert "Traceback" not in ended.stderr


# Data ----------------------------------------------------------------------------------------------------------------


def test_prompts_of_any_format_serve_once_it_is_said(bench: Bench) -> None:
    bench.run("stages.policy.prompts=pairs", "data.pairs.format=prompts", "stages.policy.reward={kind: regex, pattern: y}",
              stages=["policy"])  # fmt: skip
    (inputs,) = bench.inputs
    assert inputs.data.kind == "prompt"
    assert len(inputs.data.train) + len(inputs.data.test) == len(NAMES)


def test_gsm8k_can_be_named_as_it_is(bench: Bench, shared: Path) -> None:
    shutil.copy(shared / "data" / "eval" / "gsm8k_300.jsonl", bench.folder / "gsm8k.jsonl")
    gsm8k = "data.prompts={path: gsm8k.jsonl, format: prompts, columns: {question: prompt, answer: expected}}"
    bench.run(gsm8k, "stages.policy.reward={kind: numeric_match}", stages=["policy"])
    (inputs,) = bench.inputs
    rows = [*inputs.data.train, *inputs.data.test]
    assert len(rows) == 300
    assert all("####" in row.expected["answer"] for row in rows)


# Plan ----------------------------------------------------------------------------------------------------------------

LLAMA_1B = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 128256, "tie_word_embeddings": True,
}  # fmt: skip


SHAPE = Shape.of(LLAMA_1B)
ALONE = Place(gpu=False, has_bfloat16=True, memory_bytes=None)


def policy_settings(**changes: Any) -> PpoSettings:
    return PpoSettings.model_validate({"kind": "ppo", "prompts": "p", "reward": "r", "batch_tokens": 64, **changes})


def memory(scorers: tuple[Scorer, ...] = (), *, starts_adapted: bool = False, **changes: Any) -> float:
    assert SHAPE is not None
    settings = policy_settings(**changes)
    roles = Roles(Learner(settings, SHAPE, ALONE, half=True), settings, scorers, starts_adapted)
    rows = Rows(100, prompt=50.0, longest_prompt=50.0)
    return max(ppo_phases(roles, rows, EvaluationSettings(), ALONE).values())


def test_each_role_that_is_shared_lowers_the_estimate() -> None:
    adapter = {"adapter": {"rank": 16}}
    assert SHAPE is not None
    weights = SHAPE.parameters
    full = memory()
    assert full - memory(value="trunk") > 16 * weights  # its own value model: weights, gradients, two moments
    assert memory(value="trunk") - LIBRARIES_BYTES > 16 * weights + 4 * weights  # and a reference, in float32
    assert memory(estimator="rloo") == memory(value="trunk")
    shared = memory(**adapter)
    assert LIBRARIES_BYTES + 2 * weights < shared < LIBRARIES_BYTES + 6 * weights  # one base for all roles
    assert memory(**adapter, starts_adapted=True) > shared > memory(**adapter, quantize="nf4")
    assert memory((Scorer(SHAPE, 2.0 * weights),), **adapter) - shared == 2 * weights
    assert memory(**adapter, rollouts=4096) > shared, "the cache of a round can be the peak"
    for start in ({"dora": True}, {"init": "pissa"}):  # their reference is a copy of how they start
        assert memory(adapter={"rank": 16, **start}) == memory(**adapter, starts_adapted=True)


def test_time_grows_with_rounds_epochs_and_scorers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("align.estimate.speed.matrix_speed", lambda: 1e12)
    assert SHAPE is not None

    def seconds(scorers: tuple[Scorer, ...] = (), rows: int = 640, **changes: Any) -> float:
        return ppo_seconds(policy_settings(**changes), SHAPE, Rows(rows, prompt=64.0), scorers)

    assert seconds() == pytest.approx(2 * seconds(rows=320))
    assert seconds(rounds=20) == pytest.approx(2 * seconds())
    assert seconds(max_steps=80) == pytest.approx(seconds() / 2)  # ten rounds of 16 steps
    assert seconds(estimator="rloo") > 2 * seconds()  # four responses to each prompt, and no value model
    assert seconds((Scorer(SHAPE, 0.0),)) > seconds()
    assert seconds(round_epochs=8) > 1.5 * seconds()


def test_a_plan_predicts_memory_and_time_of_a_policy_and_imports_no_torch(bench: Bench) -> None:
    code = (
        "import sys; from align.cli.main import main\n"
        "try: main()\n"
        "finally: print('torch' in sys.modules, file=sys.stderr)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, "plan", "chain.yaml", "--json"],
        cwd=bench.folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.stderr.split() == ["False"]
    policy = next(stage for stage in json.loads(ended.stdout) if stage["name"] == "policy")
    assert policy["why"] == "is scored by reward, which will be new"
    assert policy["peak_memory_bytes"] > LIBRARIES_BYTES
