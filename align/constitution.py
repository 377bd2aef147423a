r"""A constitution: principles in a YAML file, and the requests for critique, revision and choice (Bai 2022).

    principles:
      - id: calm
        title: Keeps calm
        critique: Does the answer scold the user?                   # asked so that "no" means: no fault
        revision: Write an answer that does not scold the user.
        preference: Which answer scolds the user less?
        weight: 2                                                   # drawn about twice as often as one of weight 1
        tags: [manners]
        examples:                                                   # shown before the request, as turns of a chat
          - prompt: Is 91 a prime?
            answer: No, and you should know that.
            critique: Yes, it scolds the user for asking.
            revision: No. 91 is 7 times 13.
          - {prompt: "Is 7 a prime?", answer: Yes., critique: Nothing to object to.}    # no fault, so no revision
    forms:                                                          # how a request is written; each has a default
      critique: "Prompt: {prompt}\nAnswer: {answer}\n{request}"

Further keys: `name`, `options` (the two words that name the answers in a choice), `nothing_found` (critiques that find
no fault) and `leaks` (marks of a form in a revision). The last two are regular expressions and ignore case.
Left out: who answers the requests, and what becomes of the answers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from string import Formatter
from typing import Annotated

from pydantic import AfterValidator, Field, ValidationError
from pydantic_core import ErrorDetails

from align.constitution_defaults import CRITIQUE_FORM, LEAKS, NOTHING_FOUND, PREFERENCE_FORM, REVISION_FORM
from align.data.examples import Message, Messages
from align.errors import AlignError, did_you_mean
from align.judge import Pattern
from align.recipe.places import Path as KeyPath
from align.recipe.places import Problem, node_at, refusal
from align.recipe.training_settings import Name, Settings
from align.recipe.types import NAME_RULE
from align.recipe.yaml_text import Node, decoded, parse_yaml, shown
from align.small_files import read_small

_AROUND = " \"'“”‘’`*_.!"  # what may stand around a critique like 'No' without changing it


def _said(text: str) -> str:
    if not text.strip():
        raise ValueError("it is blank")
    return text


def _two_options(options: list[str]) -> list[str]:
    if len(options) != 2 or options[0].strip() == options[1].strip():
        raise ValueError(f"{shown(options)} are not two different words")
    return options


def _form_of(*placeholders: str) -> Callable[[str], str]:
    """A check that a form has each of `placeholders`, plain, and no others, so that nothing else can be read out."""
    known = ", ".join(f"{{{name}}}" for name in placeholders)

    def check(form: str) -> str:
        try:
            fields = [
                (name, conversion, spec) for _, name, spec, conversion in Formatter().parse(form) if name is not None
            ]
        except ValueError:
            raise ValueError("a brace stands alone; write {{ or }} where a brace is meant as text") from None
        for name, conversion, spec in fields:
            if name not in placeholders:
                raise ValueError(
                    f"{{{name}}} is no placeholder here, only {known}; write {{{{ and }}}} for braces that are text"
                )
            if conversion or spec:
                raise ValueError(f"{{{name}}} has to stand without a conversion or format after its name")
        missing = [f"{{{name}}}" for name in placeholders if name not in {field[0] for field in fields}]
        if missing:
            raise ValueError(f"it lacks {' and '.join(missing)}; it needs {known}")
        return form

    return check


Text = Annotated[str, AfterValidator(_said)]


class FewShot(Settings):
    """One worked example of a principle."""

    prompt: Text = Field(description="What the user asked.")
    answer: Text = Field(description="The first answer.")
    critique: Text = Field(description="What a good critic says of the answer.")
    revision: Text | None = Field(None, description="The better answer; left out where the critique finds nothing.")


class Principle(Settings):
    """One principle: what is asked of a critic, of a reviser and of a judge."""

    id: Name = Field(description="Short name, as records and reports use it.")
    title: str = Field("", description="The principle in a few words.")
    critique: Text = Field(description='Asks what is wrong with an answer, so that "no" means: no fault.')
    revision: Text = Field(description="Asks for an answer without the fault.")
    preference: Text = Field(description="Asks which of two answers is better.")
    weight: Annotated[float, Field(ge=0)] = Field(1.0, description="How often it is drawn, to the others'; 0: never.")
    tags: list[Name] = Field([], description="Groups that it belongs to, such as harm, honesty or help.")
    examples: list[FewShot] = Field([], description="Shown before each request, as turns of a chat.")


class Forms(Settings):
    """How a request is written. Each form has all of its placeholders, and braces that are text are doubled."""

    critique: Annotated[str, AfterValidator(_form_of("prompt", "answer", "request"))] = Field(
        CRITIQUE_FORM, description="Has {prompt}, {answer} and {request}, the critique request of the principle."
    )
    revision: Annotated[str, AfterValidator(_form_of("prompt", "answer", "critique", "request"))] = Field(
        REVISION_FORM, description="Has {prompt}, {answer}, {critique} and {request}, the revision request."
    )
    preference: Annotated[str, AfterValidator(_form_of("prompt", "first", "second", "question"))] = Field(
        PREFERENCE_FORM, description="Has {prompt}, {first}, {second} and {question}, and names both options."
    )


class ConstitutionFile(Settings):
    """A whole constitution file."""

    name: str = Field("", description="Title of the constitution.")
    principles: list[Principle] = Field(description="What answers are held to.", min_length=1)
    forms: Forms = Field(Forms(), description="How requests are written.")
    options: Annotated[list[Text], AfterValidator(_two_options)] = Field(
        ["A", "B"], description="Words that stand for the first and the second answer in a choice."
    )
    nothing_found: list[Pattern] = Field(
        list(NOTHING_FOUND), description="A critique that matches one of these as a whole finds no fault."
    )
    leaks: list[Pattern] = Field(
        list(LEAKS), description="A revision in which one of these is found repeats the form instead of answering."
    )


class Constitution:
    """Principles, ready to be drawn and asked."""

    def __init__(self, file: ConstitutionFile, text: str = "") -> None:
        self.file, self.text = file, text
        self.name = file.name
        self.principles = tuple(file.principles)
        self.options = (file.options[0], file.options[1])
        self.forms = file.forms
        self._nothing_found = _compiled(file.nothing_found)
        self._leaks = _compiled(file.leaks)

    @classmethod
    def load(cls, path: Path) -> Constitution:
        """The constitution in a YAML file. Raises AlignError with file and line of every mistake in it."""
        try:
            text = decoded(read_small(path), path)
        except OSError as error:
            raise AlignError(
                f"cannot read the constitution {path}: {error}", "Name a YAML file of principles."
            ) from None
        root = parse_yaml(text, str(path))
        if root is None or not isinstance(root.value, dict):
            keys = ", ".join(ConstitutionFile.model_fields)
            raise AlignError(f"{root.place if root else path}: a constitution is a mapping.", f"Its keys: {keys}.")
        try:
            file = ConstitutionFile.model_validate(root.plain())
        except ValidationError as error:
            raise refusal([_problem(details, root) for details in error.errors(include_url=False)], root) from None
        constitution = cls(file, text)
        if problems := [*_of_principles(constitution), *_of_examples(constitution), *_of_options(constitution)]:
            raise refusal(problems, root)
        return constitution

    def tagged(self, tags: Sequence[str]) -> Constitution:
        """The same with only the principles that have one of the tags; no tags: all of them.

        Raises AlignError for a tag that no principle has, and where none that is left would ever be drawn.
        """
        known = {tag for principle in self.principles for tag in principle.tags}
        unknown = [tag for tag in tags if tag not in known]
        if unknown:
            raise AlignError(f"no principle has the tag {shown(unknown[0])}", did_you_mean(unknown[0], known))
        if not tags:
            return self
        kept = [principle for principle in self.principles if set(principle.tags) & set(tags)]
        if not any(principle.weight for principle in kept):
            raise AlignError(f"every principle tagged {', '.join(tags)} has a weight of 0, so none would ever be drawn")
        return Constitution(self.file.model_copy(update={"principles": kept}), self.text)

    def critique_request(self, principle: Principle, prompt: Messages, answer: str) -> Messages:
        """Turns that ask for a critique of `answer`: the principle's examples, then one user turn."""

        def ask(prompt: str, answer: str) -> str:
            return self.forms.critique.format(prompt=prompt, answer=answer, request=principle.critique)

        shots = [(ask(one.prompt, one.answer), one.critique) for one in principle.examples]
        return _turns(shots, ask(prompt_text(prompt), answer))

    def revision_request(self, principle: Principle, prompt: Messages, answer: str, critique: str) -> Messages:
        """Turns that ask for a better answer: the principle's examples that have a revision, then one user turn."""

        def ask(prompt: str, answer: str, critique: str) -> str:
            return self.forms.revision.format(
                prompt=prompt, answer=answer, critique=critique, request=principle.revision
            )

        shots = [(ask(one.prompt, one.answer, one.critique), better) for one, better in _revised(principle)]
        return _turns(shots, ask(prompt_text(prompt), answer, critique))

    def preference_request(self, principle: Principle, prompt: Messages, first: str, second: str) -> Messages:
        """Turns that ask which answer is better, to be answered with one of `options`.

        In the examples the revision is the better answer: the first one of two in examples 1, 3, ..., else the second.
        """

        def ask(prompt: str, first: str, second: str) -> str:
            return self.forms.preference.format(
                prompt=prompt, first=first, second=second, question=principle.preference
            )

        shots = []
        for number, (one, better) in enumerate(_revised(principle)):
            pair = (better, one.answer) if number % 2 == 0 else (one.answer, better)
            shots.append((ask(one.prompt, *pair), self.options[number % 2]))
        return _turns(shots, ask(prompt_text(prompt), first, second))

    def finds_nothing(self, critique: str) -> bool:
        """Whether a critique finds no fault: it is blank, or `nothing_found` matches all of it.

        Runs of white space count as one space; quotation marks, emphasis and full stops around it may be there or not.
        """
        whole = " ".join(critique.split())
        bare = whole.strip(_AROUND)
        return not bare or any(pattern.fullmatch(text) for pattern in self._nothing_found for text in (whole, bare))

    def leaks_template(self, text: str) -> bool:
        """Whether a revision holds parts of a form, as `leaks` says."""
        return any(pattern.search(text) for pattern in self._leaks)

    def draw(self, random: Random, count: int) -> list[Principle]:
        """`count` different principles, each next one by weight among those left; fewer where fewer weigh above 0.

        The first arrivals of independent exponential clocks come in just this order (Efraimidis and Spirakis 2006).
        """
        eligible = [principle for principle in self.principles if principle.weight > 0]
        arrivals = [random.expovariate(principle.weight) for principle in eligible]
        order = sorted(range(len(eligible)), key=arrivals.__getitem__)
        return [eligible[place] for place in order[:count]]


def prompt_text(prompt: Messages) -> str:
    """A prompt as a form shows it: the text of a single user turn, else a transcript of all turns."""
    if len(prompt) == 1 and prompt[0].role == "user":
        return prompt[0].content
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in prompt)


def _turns(shots: Sequence[tuple[str, str]], request: str) -> Messages:
    pairs = [(Message("user", asked), Message("assistant", said)) for asked, said in shots]
    return (*(turn for pair in pairs for turn in pair), Message("user", request))


def _revised(principle: Principle) -> list[tuple[FewShot, str]]:
    return [(one, one.revision) for one in principle.examples if one.revision is not None]


def _compiled(patterns: Sequence[str]) -> list[re.Pattern[str]]:
    return [re.compile(pattern, re.IGNORECASE) for pattern in patterns]


def _of_principles(constitution: Constitution) -> Iterator[Problem]:
    ids = [principle.id for principle in constitution.principles]
    for number, name in enumerate(ids):
        if name in ids[:number]:
            yield Problem(("principles", number, "id"), f"principle {shown(name)} stands there twice.")
    if not any(principle.weight for principle in constitution.principles):
        yield Problem(
            ("principles",), "every principle has a weight of 0, so none would ever be drawn.",
            "Give at least one a weight above 0.", at_key=True,
        )  # fmt: skip


def _of_examples(constitution: Constitution) -> Iterator[Problem]:
    for number, principle in enumerate(constitution.principles):
        for place, one in enumerate(principle.examples):
            path: KeyPath = ("principles", number, "examples", place)
            name = f"example {place + 1} of principle {shown(principle.id)}"
            faultless = constitution.finds_nothing(one.critique)
            if one.revision is None and not faultless:
                yield Problem(path, f"{name} has no 'revision', and its critique finds a fault.")
            if one.revision is not None and faultless:
                yield Problem(
                    (*path, "revision"), f"{name} has a revision, and its critique finds nothing.", at_key=True
                )
            if one.revision is not None and one.revision.split() == one.answer.split():
                yield Problem((*path, "revision"), f"the revision in {name} is the answer once more.", at_key=True)


def _of_options(constitution: Constitution) -> Iterator[Problem]:
    for number, option in enumerate(constitution.options):
        if not re.search(rf"(?<!\w){re.escape(option.strip())}(?!\w)", constitution.forms.preference):
            yield Problem(
                ("options", number), f"the option {shown(option)} does not stand in the preference form.",
                "Write a form under forms.preference that says which word stands for which answer.",
            )  # fmt: skip


def _problem(details: ErrorDetails, root: Node) -> Problem:
    """One of pydantic's errors as a sentence about the place where it was written."""
    node, path = node_at(root, details["loc"])
    match details["type"]:
        case "extra_forbidden":
            advice = did_you_mean(str(path[-1]), _model_at(path[:-1]).model_fields)
            return Problem(
                path, f"unknown key {shown(path[-1])} in {_in_words(root, path[:-1])}. {advice}", at_key=True
            )
        case "missing":
            key = str(details["loc"][-1])
            sentence = _model_at(path).model_fields[key].description
            return Problem(path, f"{_in_words(root, path)} has no '{key}'.", f"{key}: {sentence}", at_key=True)
        case "value_error":
            return Problem(path, f"{_in_words(root, path)}: {details['ctx']['error']}.", at_key=True)
        case "too_short":
            return Problem(path, f"{_in_words(root, path)} is empty; it needs at least one entry.", at_key=True)
        case "model_type":
            keys = ", ".join(_model_at(path).model_fields)
            return Problem(
                path, f"{_in_words(root, path)} is {node.shown()}; it must be a mapping.", f"Its keys: {keys}."
            )
        case "string_type":
            quoted = f" In quotes it is: '{node.text}'." if node.text else ""
            return Problem(path, f"{_in_words(root, path)} is {node.shown()}; it must be text.{quoted}")
        case "string_pattern_mismatch" | "string_too_long":
            return Problem(path, f"{_in_words(root, path)} is {node.shown()}; it must be a name: {NAME_RULE}.")
    return Problem(path, f"{_in_words(root, path)} is {node.shown()}: {details['msg'].lower()}.")


def _model_at(path: KeyPath) -> type[Settings]:
    match path:
        case ("forms", *_):
            return Forms
        case ("principles", int()):
            return Principle
        case ("principles", int(), "examples", int()):
            return FewShot
    return ConstitutionFile


def _in_words(root: Node, path: KeyPath) -> str:
    """What a path leads to: ('principles', 0, 'weight') is "'weight' of principle 'calm'"."""
    match path:
        case ():
            return "the constitution"
        case ("principles", int(number)):
            node, walked = node_at(root, (*path, "id"))
            return f"principle {node.shown() if len(walked) == 3 and isinstance(node.value, str) else number + 1}"
        case (*above, "examples", int(number)):
            return f"example {number + 1} of {_in_words(root, tuple(above))}"
        case (*above, int(number)):
            return f"entry {number + 1} of {_in_words(root, tuple(above))}"
        case (key,):
            return shown(key)
        case (*above, key):
            return f"{shown(key)} of {_in_words(root, tuple(above))}"
    raise AssertionError(path)
