"""`align generate`, `chat`, `score` and `eval`: a checkpoint at work. CHECKPOINT is a name of the registry or a folder.

Results go to stdout, progress and remarks to stderr; text that a model wrote is shown without its control characters.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from align.data.examples import Example, Messages
    from align.models.source import Source
    from align.progress import Progress
    from align.rollout.generation import Sampling
    from align.use.opened import Policy

Command = Callable[..., Any]
SURROGATE = re.compile("[\ud800-\udfff]")  # Python's stand-in for a byte that is no character here
SAMPLING_NAMES = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
system_option = click.option("--system", metavar="TEXT", help="A system turn before every prompt.")


def sampling_options(*, temperature: float) -> Callable[[Command], Command]:
    """The options that make a Sampling, with this default temperature."""
    options = (
        click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Longest answer in tokens."),
        click.option(
            "--temperature", type=float, default=temperature, show_default=True, help="0: the likeliest token (greedy)."
        ),
        click.option("--top-k", type=int, default=0, help="Sample from the K likeliest tokens only; 0: all."),
        click.option(
            "--top-p", type=float, default=1.0, help="Sample from the likeliest tokens that reach this share."
        ),
        click.option("--seed", type=int, default=0, show_default=True, help="Same seed, same answers."),
    )

    def add(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return add


beams_option = click.option("--beams", type=int, default=1, help="Beam search with this many beams.")
stop_option = click.option("--stop", multiple=True, metavar="TEXT", help="End the answer before TEXT; repeatable.")


@click.command("generate")
@click.argument("checkpoint")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="What to answer; repeatable.")
@click.option("--data", metavar="FILE", help="Answer the prompt of every row of FILE.")
@system_option
@sampling_options(temperature=0.0)
@beams_option
@stop_option
@json_option
def generate_command(
    checkpoint: str, prompts: tuple[str, ...], data: str | None, system: str | None, as_json: bool, **sampling: Any
) -> None:
    """Print CHECKPOINT's answers to prompts.

    Example: align generate harbour/sft --prompt "Who keeps the key?"
    """
    from align.rollout.generation import Sampling

    if bool(prompts) == bool(data):
        raise click.UsageError("give --prompt TEXT or --data FILE")
    stops = tuple(_utf8(stop, "--stop") for stop in sampling.pop("stop"))
    settings = Sampling(**sampling, stop=stops)
    asked = _asked(prompts, data, system)
    replies = _policy(checkpoint).answer(asked, settings, _progress())
    if as_json:
        rows = [
            {"prompt": prompt[-1].content, "text": reply.text, "tokens": len(reply.ids), "finished": reply.finished}
            for prompt, reply in zip(asked, replies, strict=True)
        ]
        _print_json({"checkpoint": checkpoint, "replies": rows})
        return
    for prompt, reply in zip(asked, replies, strict=True):
        if len(asked) > 1:
            click.secho(f"> {_printable(prompt[-1].content)}", bold=True)
        click.echo(_printable(reply.text))


@click.command("chat")
@click.argument("checkpoint")
@system_option
@sampling_options(temperature=0.7)
def chat_command(checkpoint: str, system: str | None, **sampling: Any) -> None:
    """Talk with CHECKPOINT. /reset forgets the conversation, /quit (or the end of input) leaves."""
    from align.rollout.generation import Sampling

    settings = Sampling(**sampling)
    start = turns = _turns(system)
    policy = _policy(checkpoint)
    click.echo("/reset forgets the conversation, /quit leaves", err=True)
    while (text := _typed()) != "/quit":
        if text == "/reset":
            turns = start
            click.echo("(forgotten)", err=True)
        elif text.startswith("/"):
            click.echo(f"no command {text.split()[0]!r}; there are /reset and /quit", err=True)
        elif text:
            turns = _exchange(policy, (*turns, *_turns(None, text)), settings)


@click.command("score")
@click.argument("checkpoint")
@click.option("--data", metavar="FILE", help="Rows to score; default: JSON lines on standard input.")
@json_option
def score_command(checkpoint: str, data: str | None, as_json: bool) -> None:
    """Print the reward that the reward model CHECKPOINT gives to each reply: the numbers that training uses.

    A row has a prompt and a reply (as text or messages), or a prompt with chosen and rejected.

    Example: echo '{"prompt": "Hello", "completion": "Good day."}' | align score harbour/reward
    """
    from align.models.rewards import require_reward
    from align.use.references import resolve
    from align.use.rows import read_file, read_text

    require_reward(source := resolve(checkpoint))
    examples = read_file(data) if data else read_text(_standard_input(), "standard input")
    rows = _scored(source, examples)
    if as_json:
        _print_json({"checkpoint": checkpoint, "rows": rows})
        return
    for row in rows:
        click.echo("\t".join(f"{value:.6f}" for value in row.values()))


@click.command("eval")
@click.argument("checkpoint")
@click.option("--data", metavar="NAME_OR_FILE", help="A data set of the registry (its held-out rows), or a file.")
@click.option("--metrics", metavar="NAME,...", help="What to measure; default: all that the rows allow.")
@click.option("--rows", type=click.IntRange(min=1), help="Only the first rows, this many.")
@click.option("--against", metavar="CHECKPOINT", help="Win rate against this one, by --reward.")
@click.option("--reward", metavar="CHECKPOINT", help="The reward model that says which answer is better.")
@click.option("--judge", metavar="FILE", help="A judge file (YAML rules) that marks answers.")
@click.option("--harness", metavar="TASK,...", help="Tasks of lm-evaluation-harness instead of --data.")
@sampling_options(temperature=0.0)
@json_option
def eval_command(
    checkpoint: str, data: str | None, rows: int | None, harness: str | None, as_json: bool, **options: Any
) -> None:
    """Measure CHECKPOINT on rows that it was not trained on; every number comes with its 95% interval.

    Text and conversations: perplexity; conversations also exact_match, f1, bleu and rouge of its answers (and
    numeric_match, if asked); pairs: preference accuracy, for a reward model all about its ranking; any prompts: judge
    and win_rate.

    Example: align eval harbour/sft --data held-out.jsonl --metrics perplexity,f1
    """
    from align.use.references import resolve

    if (data is None) == (harness is None):
        raise click.UsageError("give --data NAME_OR_FILE or --harness TASK")
    if (options["against"] is None) != (options["reward"] is None):
        raise click.UsageError("--against and --reward belong together")
    source = resolve(checkpoint)
    if harness is not None:
        from align.evaluation.harness import harness_results

        _print_json(harness_results(source, harness.split(","), limit=rows))
        return
    examples = _held_out(str(data), rows)
    numbers = _measured(source, examples, options)
    if as_json:
        _print_json({"checkpoint": checkpoint, "data": data, "rows": len(examples), "metrics": numbers})
    else:
        print_numbers(numbers)


def _measured(source: Source, examples: Sequence[Example], options: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics as the registry keeps them; all that can be refused is refused before a model is loaded."""
    from align.evaluation.benchmark import Benchmark, Opponent, chosen_metrics, reward_benchmark
    from align.evaluation.numbers import as_metrics
    from align.judge import Judge
    from align.rewards.model import RewardModel
    from align.rollout.generation import Sampling
    from align.use.opened import Policy
    from align.use.references import resolve

    if source.is_reward:
        for name in ("metrics", "judge", "against"):
            if options[name]:
                raise click.UsageError(f"--{name} is for models that write text; this one gives rewards")
        return as_metrics(reward_benchmark(source, examples, _progress()))
    sampling = Sampling(**{name: options[name] for name in SAMPLING_NAMES})
    asked = options["metrics"].split(",") if options["metrics"] else []
    judge = Judge.load(Path(options["judge"])) if options["judge"] else None
    names = chosen_metrics(examples[0].kind, asked, judged=judge is not None, opposed=options["against"] is not None)
    opponent = None
    if options["against"]:
        rival, reward = resolve(options["against"]), resolve(options["reward"])
        opponent = Opponent(Policy.open(rival), RewardModel.open(reward))
    benchmark = Benchmark(Policy.open(source), examples, sampling, _progress(), judge, opponent)
    return as_metrics(benchmark.numbers(names))


def _scored(source: Source, examples: Sequence[Example]) -> list[dict[str, float]]:
    """For each row {"reward"}, or {"chosen", "rejected", "margin"} for a pair."""
    from align.data.examples import Conversation, Preference, Rated, prompt_of
    from align.errors import AlignError
    from align.rewards.model import RewardModel

    replies: list[tuple[Messages, Messages]] = []
    for number, example in enumerate(examples, 1):
        if isinstance(example, Preference):
            replies += [(example.prompt, example.chosen), (example.prompt, example.rejected)]
        elif isinstance(example, Rated):
            replies.append((example.prompt, example.completion))
        elif isinstance(example, Conversation):
            replies.append((prompt_of(example), example.messages[-1:]))
        else:
            raise AlignError(f"row {number} has no reply to score", "A row needs prompt and completion, or messages.")
    rewards = iter(RewardModel.open(source).score(replies, _progress()))
    rows = []
    for example in examples:
        if isinstance(example, Preference):
            chosen, rejected = next(rewards), next(rewards)
            rows.append({"chosen": chosen, "rejected": rejected, "margin": chosen - rejected})
        else:
            rows.append({"reward": next(rewards)})
    return rows


# Chat ----------------------------------------------------------------------------------------------------------------


def _exchange(policy: Policy, turns: Messages, sampling: Sampling) -> Messages:
    """Answer the last turn, shown as it is written; the conversation with the answer, or without its last turn."""
    from align.data.examples import Message
    from align.errors import AlignError

    ids: list[int] = []
    shown = ""

    def show(_: int, token: int) -> None:
        nonlocal shown
        ids.append(token)
        text = policy.tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # half of a character
            click.echo(_printable(text[len(shown) :]), nl=False)
            shown = text

    try:
        reply = policy.answer([turns], sampling, on_token=show)[0]
    except AlignError as error:
        click.echo(f"{error}\n(or /reset)", err=True)
        return turns[:-1]
    click.echo(_printable(reply.text[len(shown) :]))
    return (*turns, Message("assistant", reply.text))


def _typed() -> str:
    """The next line of the person, or /quit at the end of input."""
    line: str | bytes
    try:
        line = input("you> ") + "\n" if sys.stdin.isatty() else sys.stdin.buffer.readline()
    except EOFError:
        return "/quit"
    except UnicodeDecodeError as error:
        line = error.object
    return _utf8(line, "the chat's input").strip() if line else "/quit"


# Input and output ----------------------------------------------------------------------------------------------------


def _asked(prompts: Sequence[str], data: str | None, system: str | None) -> list[Messages]:
    from align.use.rows import prompts_of, read_file

    if data is None:
        return [_turns(system, _utf8(prompt, "--prompt")) for prompt in prompts]
    return [(*_turns(system), *prompt) for prompt in prompts_of(read_file(data), data)]


def _turns(system: str | None, prompt: str | None = None) -> Messages:
    from align.data.examples import Message

    before = (Message("system", _utf8(system, "--system")),) if system else ()
    return before if prompt is None else (*before, Message("user", prompt))


def _policy(checkpoint: str) -> Policy:
    from align.use.opened import Policy
    from align.use.references import resolve

    return Policy.open(resolve(checkpoint))


def _held_out(reference: str, rows: int | None) -> list[Example]:
    from align.use.rows import read_file_or_data_set

    return read_file_or_data_set(reference)[:rows]


def _standard_input() -> str:
    if sys.stdin.isatty():
        raise click.UsageError("give --data FILE, or rows as JSON lines on standard input")
    return _utf8(sys.stdin.buffer.read(), "standard input")


def _utf8(given: str | bytes, what: str) -> str:
    """Text that may hold bytes which the system's encoding could not read, as UTF-8. Raises AlignError when it is not that."""
    from align.errors import AlignError

    try:
        if isinstance(given, str) and not SURROGATE.search(given):
            return given
        return os.fsencode(given).decode("utf-8")
    except UnicodeError as error:
        raise AlignError(f"{what}: not UTF-8 text ({error})", "Convert it to UTF-8.") from error


def _progress() -> Progress:
    from align.console import ConsoleProgress

    return ConsoleProgress()


def print_numbers(numbers: Mapping[str, Any]) -> None:
    """Numbers with their intervals, and the rows of those that have some, as columns."""
    width = max(map(len, numbers), default=0)
    for name, number in numbers.items():
        if isinstance(number, dict):
            interval = f"[{number['low']:.4g}, {number['high']:.4g}]"
            click.echo(f"{name:<{width}}  {number['value']:>9.4g}  {interval:<20}  n={number['n']}")
        elif isinstance(number, list):
            for row in number:
                click.echo(f"{name:<{width}}  " + "  ".join(f"{key}={_short(value)}" for key, value in row.items()))
        else:
            click.echo(f"{name:<{width}}  {number:>9}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2))


def _printable(text: str) -> str:
    from align.registry.references import printable

    return printable(text)
