"""`align check` goes without torch, says the same as with it, and lets whoever needs torch have it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align.checks import runs_foreign_code
from align.recipe.file import load_recipe

ROOT = Path(__file__).parents[1]
SHORT = [
    f"--set=data.{name}.limit=40" for name in ("instructions", "critiques", "skills", "preferences", "helpful")
]  # fmt: skip
PROGRAM = """
import sys
if {before}: import torch
from align.cli.main import main
try: main()
finally: print([name for name in ('torch', 'peft') if name in sys.modules], file=sys.stderr)
"""


def check(recipe: Path, *arguments: str, torch_first: bool, home: Path) -> tuple[list[dict[str, Any]], str]:
    """What the command finds, and which heavy modules it imported, in a process of its own."""
    command = [sys.executable, "-c", PROGRAM.format(before=torch_first), "check", str(recipe), "--json", *arguments]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "ALIGN_HOME": str(home)}
    )
    return json.loads(ran.stdout), ran.stderr.splitlines()[-1]


def test_a_check_of_all_kinds_of_stages_imports_no_torch_and_finds_what_it_finds_with_it(tmp_path: Path) -> None:
    quickstart = ROOT / "recipes" / "quickstart.yaml"
    light, imported = check(quickstart, *SHORT, torch_first=False, home=tmp_path)
    assert imported == "[]"
    heavy, imported = check(quickstart, *SHORT, torch_first=True, home=tmp_path)
    assert "torch" in imported
    assert light == heavy
    assert {stage for data in light for stage in data["stages"]} >= {"sft", "adapter", "reward", "aligned", "policy"}


@pytest.mark.parametrize(
    ("setting", "foreign"),
    [
        ("seed=0", False),
        ("trust_remote_code=true", True),
        ("stages.policy.reward=[{kind: function, name: 'mine:score'}]", True),
        ("stages.policy.watch=[{kind: function, name: 'mine:score'}]", True),
    ],
)
def test_where_code_that_is_not_ours_runs_torch_is_left_in(setting: str, foreign: bool) -> None:
    recipe = load_recipe(ROOT / "recipes" / "quickstart.yaml", [setting, "stages.policy.allow_code=true"])
    assert runs_foreign_code(recipe) == foreign


def test_torch_can_be_imported_where_transformers_goes_without() -> None:
    code = (
        "from align.torchless import keep_torch_out; keep_torch_out(); import transformers, torch;"
        "from transformers import AutoTokenizer; assert torch.ones(2).sum() == 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
