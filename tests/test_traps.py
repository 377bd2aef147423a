"""Ways in which such tools go silently wrong, as far as no other test file holds them."""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn

import align
from align.chat.encoded import Encoded, EncodedPair
from align.chat.encoder import Encoder
from align.chat.templates import check_template, prepare_tokenizer, template_sha256
from align.cli.main import main
from align.data.examples import Conversation, Message
from align.errors import StageFailed
from align.memory import Budget
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.logps import trained_logps
from align.models.source import source_of
from align.objective import Objective
from align.origins import Workshop
from align.plan import plan
from align.ppo.collection import Collector
from align.ppo.statistics import round_numbers
from align.progress import Progress
from align.recipe.file import load_recipe
from align.recipe.settings import DpoSettings, IpoLoss, KtoLoss, OrpoLoss, SigmoidLoss
from align.registry import Registry
from align.run import run_recipe
from align.stages.objectives import ComparedPair, PreferenceLoss, RatedLoss, RatedRow
from align.steps import measure
from align.trainer import Task, train
from tests.ppo_kit import settings as ppo_settings
from tests.test_run import bench_in

AROUND = Path(__file__).parent / "bad_inputs" / "around"


# Rows ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Runs the command line in a folder with a model and data; what it said."""
    folder = Path(shutil.copytree(AROUND, tmp_path / 'work it\'s "here"'))
    shutil.copytree(tiny_llama, folder / "model")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGN_HOME", str(folder / "home"))
    monkeypatch.setenv("ALIGN_ALLOCATOR", "system")

    def run(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["align", *words])
        main()
        said = capfd.readouterr()
        return f"{said.out}{said.err}"

    return run


def test_rows_that_are_dropped_for_their_length_are_counted_before_training(command: Callable[..., str]) -> None:
    """Nine of twelve rows whose prompts leave no room for an answer."""
    rows = [{"prompt": f"{n} " + "long " * 30, "completion": "ok"} for n in range(9)]
    rows += [{"prompt": f"{n}?", "completion": "ok"} for n in range(3)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = "data.talk={path: rows.jsonl, test_fraction: 0}"
    said = command("check", "recipe.yaml", "--set", data, "--set", "stages.sft.max_length=32", "--json")
    talk = next(one for one in json.loads(said) if one["name"] == "talk")
    assert talk["stages"]["sft"]["dropped"] == 9
    assert "9 rows dropped for length" in command(
        "check", "recipe.yaml", "--set", data, "--set", "stages.sft.max_length=32"
    )


def test_the_first_trained_token_stands_right_behind_the_prompt(tiny_llama: Path) -> None:
    """A prompt's length is that of its ids, and the answer is tokenised apart from it."""
    tokenizer = load_tokenizer(source_of(tiny_llama))
    prepare_tokenizer(tokenizer)
    encoder = Encoder(tokenizer, max_length=200)
    ask, answer = Message("user", "hello "), Message("assistant", "world")
    row, prompt = encoder.conversation(Conversation((ask, answer))), encoder.prompt((ask,))
    assert row is not None
    assert len(prompt) > 2
    assert row.ids[: len(prompt)] == prompt
    assert row.trained.index(True) == len(prompt)


def test_training_ids_are_those_that_the_saved_tokenizer_makes(tiny_llama: Path, tmp_path: Path) -> None:
    """What was trained on is what plain transformers renders from the saved folder, in another process as well."""
    from transformers import AutoTokenizer

    tokenizer = load_tokenizer(source_of(tiny_llama))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    prepare_tokenizer(tokenizer)
    check_template(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    turns = [{"role": "user", "content": "Who has the key?"}, {"role": "assistant", "content": "The master."}]
    row = Encoder(tokenizer, max_length=200).conversation(
        Conversation(tuple(Message(turn["role"], turn["content"]) for turn in turns))
    )
    saved = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert row is not None
    assert template_sha256(saved) == template_sha256(tokenizer)
    assert saved.apply_chat_template(turns, tokenize=True)["input_ids"] == row.ids


# Losses ----------------------------------------------------------------------------------------------------------------


def pairs() -> list[ComparedPair]:
    """Pairs of unequal lengths whose reference is what a model of no opinion would say."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for number in range(9):
        prompt = torch.randint(3, 280, (3 + number,), generator=generator).tolist()
        sides = [torch.randint(3, 280, (2 + (number * k) % 7,), generator=generator).tolist() for k in (1, 3)]
        chosen, rejected = (Encoded(prompt + side, [False] * len(prompt) + [True] * len(side)) for side in sides)
        made.append(ComparedPair(EncodedPair(chosen, rejected, len(prompt), None, None), -9.0, -8.0))
    return made


def rated() -> list[RatedRow]:
    """The replies of those pairs, each with its neighbour's; the baseline of each alone would be another one."""
    return [
        RatedRow(one.pair.chosen, number % 2 == 0, -9.0, one.pair.rejected, -20.0 - 4.0 * number)
        for number, one in enumerate(pairs())
    ]


@pytest.mark.parametrize(
    "loss",
    [SigmoidLoss(), IpoLoss(kind="ipo"), OrpoLoss(kind="orpo"), KtoLoss(kind="kto")],
    ids=["sigmoid", "ipo", "orpo", "kto"],
)
def test_a_step_of_pairs_is_the_same_however_it_is_cut(tiny_llama: Path, tmp_path: Path, loss: object) -> None:
    """Nine pairs (for KTO, rated replies) at once, and nine times one; the loss of the last step and the weights."""
    found: list[tuple[float, torch.Tensor]] = []
    for budget in (4096, 1):
        model = load_policy(source_of(tiny_llama), trainable=True, precision="float32")
        settings = DpoSettings.model_validate({
            "kind": "dpo", "data": "x", "learning_rate": 1e-3, "epochs": 2, "batch_size": 9, "batch_tokens": budget,
            "precision": "float32", "log_steps": 1,
        })  # fmt: skip
        objective: Objective = PreferenceLoss(loss, beta=0.1)  # type: ignore[arg-type]
        rows: Sequence[Any] = pairs()
        if isinstance(loss, KtoLoss):
            objective, rows = RatedLoss(loss, beta=0.1, budget=Budget.of(settings)), rated()
        train(Task(model, objective, rows, [], settings, 0, tmp_path / str(budget)), Progress())
        weights = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        numbers = measure(model, objective, rows, settings)
        assert numbers.get("kl", 1.0) > 0.1, "a baseline of 0 is the same however it is cut"
        found.append((numbers["loss"], weights))
    (whole, weights), (cut, others) = found
    assert cut == pytest.approx(whole, rel=2e-5)
    start = torch.cat([weight.detach().flatten() for weight in load_policy(source_of(tiny_llama)).parameters()])
    assert (weights - others).norm() / (weights - start).norm() < 1e-2


def test_two_passes_over_a_model_with_dropout_agree_to_the_bit(tiny_gpt2: Path) -> None:
    """Log-probabilities of policy and reference are those of the model without its dropout, while it trains too."""
    model: nn.Module = load_policy(source_of(tiny_gpt2), trainable=True, precision="float32").train()
    rows = [Encoded([5, 6, 7, 8, 9], [False, False, True, True, True])]
    with torch.no_grad():
        first, second = (trained_logps(model, rows).sums() for _ in range(2))
        model.eval()
        assert torch.equal(trained_logps(model, rows).sums(), first)
    assert torch.equal(first, second)


def test_a_response_that_was_cut_loses_the_penalty_once_and_one_that_ended_loses_nothing() -> None:
    collector = SimpleNamespace(settings=ppo_settings(missing_stop_penalty=0.75))
    replies = [SimpleNamespace(finished=True), SimpleNamespace(finished=False)]
    shaped = Collector._shaped(collector, torch.tensor([1.0, 1.0]), replies)  # type: ignore[arg-type]
    assert shaped.tolist() == [1.0, 0.25]


def test_no_number_of_a_round_depends_on_its_padding() -> None:
    """Rewards, KL, entropy, lengths and the rest, with three columns of filler behind the responses and without."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    tables = {
        name: torch.randn(2, 4, generator=generator)
        for name in ("old", "reference", "values", "returns", "h", "engine")
    }
    responses = [[5, 6, 7, 2], [8, 2]]
    replies = [SimpleNamespace(finished=True), SimpleNamespace(finished=False)]

    def numbers(filler: float | None) -> dict[str, float]:
        wide = {
            name: table if filler is None else nn.functional.pad(table, (0, 3), value=filler * number)
            for number, (name, table) in enumerate(tables.items(), 1)
        }
        found = SimpleNamespace(
            old_logps=wide["old"], reference_logps=wide["reference"], values=wide["values"], returns=wide["returns"],
            responses=responses,
        )  # fmt: skip
        seen = mask if filler is None else nn.functional.pad(mask, (0, 3))
        return round_numbers(found, seen, wide["h"], wide["engine"], replies, [1.0, 0.5])  # type: ignore[arg-type]

    assert numbers(99.0) == pytest.approx(numbers(None), abs=1e-6)
    assert numbers(None)["length"] == 2.5


class Hungry(PreferenceLoss):
    """Asks for more memory than there is, in the fourth of its calls."""

    calls = 0

    def __call__(self, model: nn.Module, rows: Sequence[ComparedPair]) -> tuple[torch.Tensor, dict[str, float]]:
        self.calls += 1
        if self.calls == 4:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB")
        return super().__call__(model, rows)


def test_running_out_of_memory_says_what_to_lower_and_changes_no_batch(tiny_llama: Path, tmp_path: Path) -> None:
    """Nothing is tried again in secret with another batch."""
    model = load_policy(source_of(tiny_llama), trainable=True, precision="float32")
    settings = DpoSettings.model_validate(
        {"kind": "dpo", "data": "x", "batch_size": 3, "epochs": 2, "precision": "float32"}
    )
    objective = Hungry(SigmoidLoss(), beta=0.1)
    with pytest.raises(StageFailed) as failure:
        train(Task(model, objective, pairs(), [], settings, 0, tmp_path), Progress())
    assert "20.0 GiB were asked for" in failure.value.message
    assert "batch_tokens" in failure.value.hint
    assert objective.calls == 4


# Identity --------------------------------------------------------------------------------------------------------------


def keys_of(workshop: Workshop) -> dict[str, str]:
    return {stage.name: stage.action for stage in plan(workshop, stages=["sft"])}


def test_another_template_or_tokenizer_is_another_stage(tiny_llama: Path, tmp_path: Path) -> None:
    """What was tokenised otherwise is never reused, though data, recipe and weights are the same."""
    model = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    bench = bench_in(tmp_path, model)
    few, template = ("stages.sft.max_steps=1", "template=chat.jinja"), tmp_path / "chat.jinja"
    own = (Path(align.__file__).parent / "chat" / "template.jinja").read_text(encoding="utf-8")
    other = own.replace("<call>", "<tool>")
    assert other != own
    template.write_text(own, encoding="utf-8")
    run_recipe(bench.workshop(*few), Progress(), stages=["sft"])
    assert keys_of(bench.workshop(*few)) == {"sft": "reuse"}
    template.write_text(other, encoding="utf-8")
    assert keys_of(bench.workshop(*few)) == {"sft": "run"}
    template.write_text(own, encoding="utf-8")
    assert keys_of(bench.workshop(*few)) == {"sft": "reuse"}
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "clean_up_tokenization_spaces": True}))
    assert keys_of(bench.workshop(*few)) == {"sft": "run"}


# The package -----------------------------------------------------------------------------------------------------------


def test_libraries_below_a_version_that_runs_code_from_weights_cannot_be_installed() -> None:
    """CVE-2025-32434 and CVE-2026-24747 (torch below 2.10), CVE-2026-1839 (transformers below 5)."""
    project = tomllib.loads((Path(align.__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lowest = dict(one.split(">=") for one in project["dependencies"])
    numbers = {name: tuple(map(int, lowest[name].split("."))) for name in ("torch", "transformers", "jinja2")}
    assert numbers["torch"] >= (2, 10)
    assert numbers["transformers"] >= (5, 0)
    assert numbers["jinja2"] >= (3, 1, 6)


def names_in(node: ast.AST) -> list[str]:
    """What a node calls or imports."""
    if isinstance(node, ast.ImportFrom):
        return [name.name for name in node.names]
    return [ast.unparse(node.func)] if isinstance(node, ast.Call) else []


def test_nothing_is_exported_as_a_table_in_which_a_cell_could_be_a_formula() -> None:
    """No command writes CSV; if one ever does, its cells have to be quoted."""
    named = {
        name.rpartition(".")[2]
        for file in Path(align.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        for name in names_in(node)
    }
    assert "reader" in named, "csv.reader is, so names are found"
    assert not {"writer", "DictWriter", "to_csv", "write_csv"} & named


def test_paths_with_spaces_and_quotes_are_only_paths(command: Callable[..., str]) -> None:
    """The folder of the recipe has both, and so has its name; nothing goes through a shell."""
    odd = Path("my recipe $(touch PWNED); 'x'.yaml")
    shutil.copy("recipe.yaml", odd)
    assert "The recipe can run." in command("check", str(odd))
    assert not Path("PWNED").exists()
    assert load_recipe(odd).name == "good"
    assert not Registry.open(create=False).all_runs()


def test_every_test_that_the_table_of_traps_names_exists() -> None:
    """docs/traps.md names them without their prefixes: file::name, ::name of the file before it, file::* for all."""
    here = Path(__file__).parent
    rows = (here.parent / "docs" / "traps.md").read_text(encoding="utf-8").splitlines()
    cells = [row.split("|")[3] for row in rows if row.startswith("| ")]
    assert len(cells) > 70
    named, missing = 0, []
    for cell in cells:
        file = ""
        for stem, name in re.findall(r"(\w*)::(\w+|\*)", cell):
            file, named = stem or file, named + 1
            source = here / f"test_{file}.py"
            text = source.read_text(encoding="utf-8") if source.is_file() else ""
            if f"def test_{'' if name == '*' else name + '('}" not in text:
                missing.append(f"{file}::{name}")
    assert named > 100
    assert missing == []
