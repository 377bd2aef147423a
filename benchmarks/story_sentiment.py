"""Does a reward learnt from real pairs make real stories happier, and do they stay stories?

    ALIGN_SHARED=FOLDER python benchmarks/story_sentiment.py --seeds 3 --out docs/ppo-stories.md

Makes data from real children's stories, runs benchmarks/story-sentiment.yaml (sft, two reward models, ppo) once for each
seed in registries of their own, lets sft and policy go on with the same held-out openings, and measures what they write
by the reward, by counted words that never made a pair, and by the model that only ever saw real stories. Needs the folder
with the real data (ALIGN_SHARED, default: `shared` beside the project). `--folder` keeps data and registries.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from story_data import LABEL_WORDS, MODEL, OTHER_WORDS, SHARED, happiness, write_data

from align.chat.templates import stop_token_ids
from align.data.examples import Message, Messages
from align.evaluation.intervals import Estimate, mean, paired_difference, ratio, transformed
from align.models.loading import load_policy
from align.models.source import source_of
from align.rewards.model import RewardModel, said
from align.rollout.generation import Reply, Sampling
from align.rollout.scoring import answer_logps, reply_row
from align.use.opened import Policy

RECIPE = Path(__file__).with_name("story-sentiment.yaml")
MAX_NEW_TOKENS = 128  # as in the recipe
SHOWN = 3  # openings on the page


# Runs ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """The checkpoints of one seed, by stage, as `align run --json` tells of them. seconds: processor time."""

    seed: int
    seconds: float
    checkpoints: dict[str, dict[str, Any]]

    def path(self, stage: str) -> str:
        """Folder of the stage's checkpoint."""
        return str(self.checkpoints[stage]["path"])

    def metric(self, stage: str, name: str) -> Any:
        """A number that the stage measured of itself."""
        found = self.checkpoints[stage]["metrics"][name]
        return found["value"] if isinstance(found, dict) else found


def run(seed: int, folder: Path) -> Chain:
    """The recipe in a registry of its own, on one thread."""
    recipe = folder / RECIPE.name
    recipe.write_text(RECIPE.read_text(encoding="utf-8"), encoding="utf-8")
    align = Path(sys.executable).with_name("align")
    settings = ["--set", f"model={MODEL.resolve()}", "--set", f"seed={seed}"]
    environment = os.environ | {"ALIGN_HOME": str(folder / f"seed-{seed}"), "OMP_NUM_THREADS": "1"}
    start = os.times()
    done = subprocess.run(
        [align, "run", recipe, "--json", *settings], check=True, stdout=subprocess.PIPE, env=environment
    )
    end = os.times()
    seconds = end.children_user + end.children_system - start.children_user - start.children_system
    chain = [entry["checkpoint"] for entry in json.loads(done.stdout)]
    return Chain(seed, seconds, {entry["stage"]: entry for entry in chain})


# Measuring -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Writing:
    """Continuations of the held-out openings by one writer, and what they are worth, row by row."""

    texts: list[str]
    likeliest: list[str]  # greedy ones of the first openings
    columns: dict[str, list[float]]  # reward, second, label words, other words, tokens, finished
    numbers: dict[str, Estimate]  # perplexities and KL


def measured(chain: Chain, openings: Sequence[str], real: Sequence[str]) -> dict[str, Writing]:
    """What really follows the openings, and what sft and policy write; sampled at temperature 1, by the chain's seed."""
    prompts: list[Messages] = [(Message("user", opening),) for opening in openings]
    parent, policy = (Policy.open(source_of(chain.path(stage))) for stage in ("sft", "policy"))
    sampling = Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=1.0, seed=chain.seed)
    stop = stop_token_ids(parent.tokenizer)[0]
    heads = [parent.encoder.prompt(prompt) for prompt in prompts]
    replies = []
    for prompt, head, text in zip(prompts, heads, real, strict=True):
        ids = parent.encoder.reply(prompt, said(text)).ids[len(head) :]
        replies.append(Reply(ids, text, True, []))
    judge = Measures(
        {stage: RewardModel.open(source_of(chain.path(stage))) for stage in ("reward", "second")},
        {"base": load_policy(source_of(MODEL)), "sft": parent.model, "policy": policy.model},
        prompts, heads, stop,
    )  # fmt: skip
    greedy = Sampling(max_new_tokens=MAX_NEW_TOKENS)
    written = {"real": judge.measure(replies)}
    for name, writer in (("sft", parent), ("policy", policy)):
        found = judge.measure(writer.answer(prompts, sampling), drift=writer is policy)
        shown = [reply.text for reply in writer.answer(prompts[:SHOWN], greedy)]
        written[name] = replace(found, likeliest=shown)
    return written


@dataclass(frozen=True)
class Measures:
    """What all writers are measured with. heads: token ids of the prompts."""

    rewards: dict[str, RewardModel]
    models: dict[str, Any]
    prompts: Sequence[Messages]
    heads: Sequence[list[int]]
    stop: int

    def measure(self, replies: Sequence[Reply], *, drift: bool = False) -> Writing:
        """All numbers; drift: also the KL of the policy, which wrote these, to sft."""
        texts = [reply.text for reply in replies]
        said_to = [(prompt, said(text)) for prompt, text in zip(self.prompts, texts, strict=True)]
        columns = {name: model.score(said_to) for name, model in self.rewards.items()}
        columns["label"] = [float(happiness(text, LABEL_WORDS)) for text in texts]
        columns["other"] = [float(happiness(text, OTHER_WORDS)) for text in texts]
        columns["tokens"] = [float(len(reply.ids) - (self.stop in reply.ids)) for reply in replies]
        columns["finished"] = [float(reply.finished) for reply in replies]
        ids = [reply.ids for reply in replies]
        whole = [reply_row(head, reply) for head, reply in zip(self.heads, ids, strict=True)]
        text_only = [  # the base never saw a stop token
            reply_row(head, [token for token in reply if token != self.stop])
            for head, reply in zip(self.heads, ids, strict=True)
        ]
        logps = {"base": answer_logps(self.models["base"], text_only), "sft": answer_logps(self.models["sft"], whole)}
        numbers = {
            name: transformed(ratio((-found.sums).tolist(), found.tokens.tolist()), math.exp)
            for name, found in logps.items()
        }
        if drift:
            numbers["kl"] = mean((answer_logps(self.models["policy"], whole).sums - logps["sft"].sums).tolist())
        return Writing(texts, [], columns, numbers)


def distinct(texts: Sequence[str]) -> float:
    """Share of distinct runs of three words among all of all texts (Li 2016)."""
    words = [text.split() for text in texts]
    grams = [tuple(row[start : start + 3]) for row in words for start in range(len(row) - 2)]
    return len(set(grams)) / len(grams)


# The page ------------------------------------------------------------------------------------------------------------

INTRODUCTION = """# Happier stories: ppo on real text

A pretrained Llama of 260,032 weights (stories260K, MIT), which writes children's stories, learns by `align ppo` to write
happier ones. Nothing here is made up but the lexicon: all texts are TinyStories (CDLA-Sharing-1.0).

- **sft**: {sft} stories, opening (one or two sentences) and what follows it (64 to 112 tokens); the model goes on with a
  story as it always did, and learns to stop. Its held-out perplexity falls from {before:.2f} to {after:.2f}.
- **reward**: {pairs} pairs of real passages of like length (within 2 tokens) of two stories; chosen is the one with at
  least 2 more happy words, net of unhappy ones, by {label} *label words* (benchmarks/story_data.py). The
  opening is that of the chosen passage's story in half of the pairs and of the rejected one's in the other half.
- **second**: the same from {watched} pairs of other stories; it watches, and nothing trains on it.
- **policy**: ppo from sft, {prompts} openings, reward: `reward`, its KL to sft charged. Of two runs with seed 0 (price of a
  nat 0.05 and 0.15, 24 and 30 rounds) the second was kept, by these same openings: less KL, lower perplexity under the base.
- **Measured** on {held_out} openings that no stage trains on, continued by sft and by policy, one sample each at temperature 1.
  *Other words* are {other} happy and unhappy words that decided no pair. The base's perplexity says how much a text is like
  the stories that it was trained on; the real continuations are there as the yardstick.

Made by `python benchmarks/story_sentiment.py --seeds {seeds} --out docs/ppo-stories.md`, one processor core, float32.
Before → after is sft → policy:

"""
ROWS = {  # name of a column or a number -> words for it, decimals
    "reward": ("reward", 2),
    "second": ("second reward model, only watched", 2),
    "label": ("label words, happy less unhappy, per story", 2),
    "other": ("other words, happy less unhappy, per story", 2),
    "base": ("perplexity under the base", 2),
    "sft": ("perplexity under sft", 2),
    "distinct": ("distinct runs of three words", 3),
    "tokens": ("tokens", 1),
    "finished": ("ended by itself", 2),
}
CHANGES = ("reward", "second", "label", "other")


def number(writing: Writing, name: str) -> float:
    """One cell of the table."""
    if name in writing.columns:
        return mean(writing.columns[name]).value
    return distinct(writing.texts) if name == "distinct" else writing.numbers[name].value


def page(chains: Sequence[Chain], writings: Sequence[dict[str, Writing]], folder: Path) -> str:
    """The whole document."""
    lines = [
        introduction(chains, folder) + "| held out | real | " + " | ".join(f"seed {c.seed}" for c in chains) + " |"
    ]
    lines.append("|---" * (len(chains) + 2) + "|")
    for name, (words, digits) in ROWS.items():
        cells = [
            f"{number(found['sft'], name):.{digits}f} → {number(found['policy'], name):.{digits}f}"
            for found in writings
        ]
        lines.append(row(words, f"{number(writings[0]['real'], name):.{digits}f}", *cells))
    for name in CHANGES:
        changes = [paired_difference(found["sft"].columns[name], found["policy"].columns[name]) for found in writings]
        lines.append(row(f"change: {ROWS[name][0]}", "", *(interval(change) for change in changes)))
    lines.append(row("KL to sft, nats per story", "", *(interval(found["policy"].numbers["kl"]) for found in writings)))
    for stage in ("reward", "second"):
        pairs_right = (f"{chain.metric(stage, 'after.accuracy'):.1%}" for chain in chains)
        lines.append(row(f"`{stage}`: held-out pairs ranked right", "", *pairs_right))
    lines.append(row("processor time of the chain", "", *(f"{chain.seconds:.0f} s" for chain in chains)))
    return "\n".join([*lines, "", *samples(writings[0], folder)]) + "\n"


def introduction(chains: Sequence[Chain], folder: Path) -> str:
    """What was done, with the counts."""
    rows = {path.stem: len(read(path)) for path in folder.glob("*.jsonl")}
    return INTRODUCTION.format(
        before=chains[0].metric("sft", "before.perplexity"), after=chains[0].metric("sft", "after.perplexity"),
        pairs=rows["pairs"], watched=rows["watch-pairs"], held_out=rows["real"], sft=rows["sft"], prompts=rows["prompts"],
        label=len(" ".join(LABEL_WORDS).split()), other=len(" ".join(OTHER_WORDS).split()), seeds=len(chains),
    )  # fmt: skip


def samples(writing: dict[str, Writing], folder: Path) -> list[str]:
    """The first openings with what was written to them."""
    lines = ["## The first held-out openings, seed 0", ""]
    lines += ["Sampled as measured above; greedy takes the likeliest token each time, which ppo never did.", ""]
    for place, opening in enumerate(read(folder / "real.jsonl")[:SHOWN]):
        lines += [f"**{opening['prompt']}**", ""]
        for name in ("sft", "policy"):
            lines.append(f"- {name}, sampled: {plain(writing[name].texts[place])}")
            lines.append(f"- {name}, greedy: {plain(writing[name].likeliest[place])}")
        lines.append("")
    return lines[:-1]


def row(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


def interval(estimate: Estimate) -> str:
    """Value and 95% interval."""
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def plain(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_<>|\[\]])", r"\\\1", " ".join(text.split()))


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help="where data and registries are kept; what is there is used again")
    options = parser.parse_args()
    if not SHARED.is_dir():
        sys.exit(f"no real data at {SHARED}: set ALIGN_SHARED")
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        write_data(folder)
        chains = [run(seed, folder) for seed in range(options.seeds)]
        real = read(folder / "real.jsonl")
        openings, texts = [line["prompt"] for line in real], [line["completion"] for line in real]
        text = page(chains, [measured(chain, openings, texts) for chain in chains], folder)
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    sys.stdout.write(text)


if __name__ == "__main__":
    main()
