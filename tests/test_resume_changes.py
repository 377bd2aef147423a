"""A stopped run is taken up only as what it was: each thing that decides its result, changed, is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from align.errors import AlignError, Interrupted
from align.resume import stopped_run
from align.stopping import signals_handled
from tests.critique_kit import Port, brisk_llama, port_in
from tests.resume_cases import STEPS
from tests.test_critique_stage import SignalAfter
from tests.test_run import SignalAt

TRAINED = f"{{kind: sft, data: talk, {STEPS}}}"
WRITTEN = "{kind: critique, prompts: asked, constitution: rules.yaml, critic: {kind: judge, file: judge.yaml}, samples: 0, max_new_tokens: 8}"
MORE = "evaluation: {prompts: asked, rows: 2, max_new_tokens: 4, judge: judge.yaml}\n"


def edited(name: str, old: str, new: str) -> Callable[[Port], None]:
    """Another text in one of the recipe's files."""

    def edit(port: Port) -> None:
        file = port.folder / name
        text = file.read_text()
        assert old in text
        file.write_text(text.replace(old, new))

    return edit


def other_weights(port: Port) -> None:
    file = port.folder / "model" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


def other_tokenizer(port: Port) -> None:
    file = port.folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_prefix_space": True}))


CHANGES: dict[str, tuple[str, Callable[[Port], None], str]] = {
    "rows": (TRAINED, edited("talk.jsonl", "m it is", "m it was"), "data.talk"),
    "prompts of the evaluation": (TRAINED, edited("asked.jsonl", "say a", "say z"), "data.asked"),
    "weights of the model": (TRAINED, other_weights, "parent"),
    "its tokenizer": (TRAINED, other_tokenizer, "parent"),
    "judge of the evaluation": (TRAINED, edited("judge.yaml", "weight: 1", "weight: 0.5"), "judge"),
    "prompts of a critic": (WRITTEN, edited("asked.jsonl", "say a", "say z"), "data.asked"),
    "constitution": (WRITTEN, edited("rules.yaml", "calmer", "calmest"), "constitution"),
    "judge that criticises": (WRITTEN, edited("judge.yaml", "weight: 1", "weight: 0.5"), "judge"),
}


def stopped(stage: str, folder: Path, tokenizer) -> Port:
    """A run that was stopped by a signal after its first steps or rows."""
    port = port_in(folder, folder / "model", {"x": stage}, MORE)
    brisk_llama(tokenizer, folder / "model")
    port.recipe.write_text(port.recipe.read_text().replace("test_fraction: 0.0", "test_fraction: 0.2"))
    with pytest.MonkeyPatch.context() as patch, signals_handled(), pytest.raises(Interrupted):  # noqa: PT012
        patch.setattr("align.critique.work.ROWS_AT_ONCE", 4)
        port.run(progress=SignalAt(2) if stage is TRAINED else SignalAfter(4))
    return port


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_refused_by_name_and_undone_it_goes_on(what: str, tmp_path: Path, tiny_tokenizer) -> None:
    stage, change, named = CHANGES[what]
    port = stopped(stage, tmp_path, tiny_tokenizer)
    registry = port.workshop().registry
    run = registry.all_runs()[0]
    assert stopped_run(registry, run.id)[1] == "x"
    kept = {path: path.read_bytes() for path in tmp_path.glob("*.*")} | {
        path: path.read_bytes() for path in (tmp_path / "model").iterdir()
    }
    change(port)
    with pytest.raises(AlignError, match=rf"cannot go on: changed: .*{named}") as refusal:
        stopped_run(registry, run.id)
    assert refusal.value.exit_code == 2
    assert "starts afresh" in refusal.value.hint
    for path, content in kept.items():
        path.write_bytes(content)
    assert stopped_run(registry, run.id)[1] == "x"


def test_a_recipe_that_was_changed_begins_a_run_of_its_own_and_leaves_the_stopped_one(
    tmp_path: Path, tiny_tokenizer
) -> None:
    port = stopped(TRAINED, tmp_path, tiny_tokenizer)
    assert port.run("stages.x.learning_rate=1.0e-4") == {"x": "run"}
    runs = port.workshop().registry.all_runs()
    assert [run.status for run in runs] == ["finished", "interrupted"]
    assert runs[1].settings["settings"]["learning_rate"] == 1e-3
    assert port.run() == {"x": "resume"}


def test_a_run_whose_saved_state_is_gone_is_refused(tmp_path: Path, tiny_tokenizer) -> None:
    import shutil

    port = stopped(TRAINED, tmp_path, tiny_tokenizer)
    registry = port.workshop().registry
    shutil.rmtree(registry.all_runs()[0].work)
    with pytest.raises(AlignError, match="its saved state is gone"):
        stopped_run(registry, registry.all_runs()[0].id)
