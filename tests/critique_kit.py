"""Small constitutional runs for the tests: a constitution, scripted writers, a model that ends its answers, recipes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from align.constitution import Constitution, ConstitutionFile
from align.critique.critics import Critic, TextCritic
from align.critique.work import Workbench
from align.critique.writers import EndpointWriter
from align.critique.writing import Written
from align.data.examples import Message, Messages, Prompt
from align.origins import Workshop
from align.progress import Progress
from align.recipe.critique_settings import CritiqueWork
from align.recipe.file import load_recipe
from align.registry import Registry
from align.run import run_recipe

PRINCIPLES = ("calm", "plain", "brief")
CONSTITUTION = """
principles:
  - {id: calm, title: Keeps calm, critique: "calm?", revision: calmer, preference: which is calm, weight: 2}
  - {id: plain, title: Is plain, critique: "plain?", revision: plainer, preference: which is plain}
  - {id: brief, title: Is brief, critique: "brief?", revision: briefer, preference: which is brief}
forms:
  critique: "{prompt}|{answer}|{request}"
  revision: "{prompt}|{answer}|{critique}|{request}"
  preference: "{prompt}|A:{first}|B:{second}|{question}"
leaks: ["critique:"]
"""
JUDGE = """
principles:
  - {id: calm, title: Keeps calm, weight: 1, forbid: ["a"]}
  - {id: plain, title: Is plain, weight: 1, forbid: ["b"]}
  - {id: brief, title: Is brief, weight: 1, forbid: ["c"]}
"""
RECIPE = """
name: port
model: {model}
data:
  asked: {{path: asked.jsonl, format: prompts, test_fraction: 0.25}}
  talk: {{path: talk.jsonl, test_fraction: 0.0}}
  pairs: {{path: pairs.jsonl, test_fraction: 0.0}}
stages:
"""
CRITIQUE = "{kind: critique, prompts: asked, constitution: rules.yaml, samples: 3, max_new_tokens: 8}"
LOOP = (
    "{kind: constitution, prompts: asked, constitution: rules.yaml, max_new_tokens: 8, check_revisions: false, rounds: 2,"
    " train: {kind: sft, learning_rate: 1.0e-3}}"
)


def said(text: str) -> tuple[Message, ...]:
    """One turn of a user."""
    return (Message("user", text),)


def questions(count: int) -> list[Prompt]:
    """Prompts q0, q1, ..."""
    return [Prompt(said(f"q{number}")) for number in range(count)]


def constitution(**changes: Any) -> Constitution:
    """Principles calm (twice as often), plain and brief, with short forms; changes: of the file's keys."""
    from align.recipe.yaml_text import parse_yaml

    root = parse_yaml(CONSTITUTION, "rules")
    assert root is not None
    return Constitution(ConstitutionFile.model_validate({**root.plain(), **changes}))


@dataclass
class Scripted:
    """A writer that looks its replies up in `replies`, by the text of the last turn or from it; None: too long.

    chance: probability of the first option. cut: replies that end at the limit. asked: all requests so far.
    """

    replies: Callable[[str], str | None] | Mapping[str, str | None] = field(default_factory=dict)
    chance: Callable[[str], float | None] = lambda _: 0.9
    cut: tuple[str, ...] = ()
    asked: list[str] = field(default_factory=list)

    def write(
        self, requests: Sequence[Messages], max_new_tokens: int, *, temperature: float = 0.0, seed: int = 0
    ) -> list[Written | None]:
        """The replies of the script."""
        texts = [request[-1].content for request in requests]
        self.asked += texts
        found = [self.replies(text) if callable(self.replies) else self.replies[text] for text in texts]
        return [None if reply is None else Written(reply, reply not in self.cut) for reply in found]

    def choose(self, requests: Sequence[Messages], options: tuple[str, str]) -> list[float | None]:
        """The chances of the script."""
        texts = [request[-1].content for request in requests]
        self.asked += texts
        return [self.chance(text) for text in texts]


def mending(text: str) -> str:
    """A critic that always finds fault, and whose revision says which request it answers; as a policy it answers 'a0'."""
    parts = text.split("|")
    return {1: f"a{text}", 3: f"bad {parts[-1]}", 4: f"{parts[0]} better {parts[-1]}"}[len(parts)]


def work(**changes: Any) -> CritiqueWork:
    """One revision of each answer, checked; changes: of the settings."""
    return CritiqueWork.model_validate({"constitution": "rules.yaml", "max_new_tokens": 8, **changes})


def workbench(
    settings: CritiqueWork,
    policy: Any,
    critic: Critic | None = None,
    *,
    rules: Constitution | None = None,
    seed: int = 0,
    endpoint: EndpointWriter | None = None,
) -> Workbench:
    """A workbench; without a critic the policy is its own, or the endpoint is."""
    rules = rules or constitution()
    asked = critic or TextCritic(endpoint or policy, rules, settings.max_new_tokens)
    return Workbench(settings, policy, asked, rules, seed, endpoint, Progress())


# A model that ends its answers ---------------------------------------------------------------------------------------


def brisk_llama(tokenizer: Any, folder: Path, *, context: int = 512, seed: int = 0) -> Path:
    """Folder of a random 2-layer Llama that writes a few small letters and then stops."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
        vocab_size=len(tokenizer), max_position_embeddings=context, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    letters = [number for word, number in tokenizer.get_vocab().items() if len(word) == 1 and word in "abcdefgh"]
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_(std=0.1)
        embedding[:, :2] = torch.tensor(
            [1.0, 0.0]
        )  # a first state that is always large makes a bias of the head's first
        embedding[letters, 1] = 1.0  # column; the second one acts after letters only
        head.normal_(std=0.7)
        head[:, 0] = -4.5
        head[letters, 0] = 0.0
        head[2, :2] = torch.tensor([-3.0, 3.3])
        for layer in model.model.layers:  # what stands before counts
            layer.self_attn.v_proj.weight *= 3
            layer.self_attn.o_proj.weight *= 3
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# Recipes -------------------------------------------------------------------------------------------------------------


@dataclass
class Port:
    """A recipe with its files in a folder, and the registry it works in."""

    folder: Path
    recipe: Path

    def workshop(self, *overrides: str) -> Workshop:
        """The recipe with its registry."""
        return Workshop(load_recipe(self.recipe, overrides), self.folder, Registry.open(self.folder / "home"))

    def run(self, *overrides: str, progress: Progress | None = None, **named: Any) -> dict[str, str]:
        """Runs stages, all by default; what was done for each."""
        done = run_recipe(self.workshop(*overrides), progress or Progress(), **named)
        return {entry.planned.name: entry.planned.action for entry in done}


def port_in(folder: Path, model: Path | str, stages: Mapping[str, str], more: str = "") -> Port:
    """A recipe `port` of 12 prompts, 8 conversations and 8 pairs; stages: each as YAML; more: the rest of the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    rows(folder / "asked.jsonl", ({"prompt": f"say {word}"} for word in "abcdefghijkl"))
    rows(folder / "talk.jsonl", ({"prompt": f"tell {word}", "completion": f"{word} it is"} for word in "mnopqrst"))
    rows(folder / "pairs.jsonl", ({"prompt": f"is {w}", "chosen": f"{w} yes", "rejected": "no"} for w in "mnopqrst"))
    (folder / "rules.yaml").write_text(CONSTITUTION)
    (folder / "judge.yaml").write_text(JUDGE)
    text = RECIPE.format(model=model) + "".join(f"  {name}: {stage}\n" for name, stage in stages.items())
    (folder / "port.yaml").write_text(text + more)
    return Port(folder, folder / "port.yaml")


def rows(file: Path, found: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines."""
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
