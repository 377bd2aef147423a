"""Constitution files: what they ask, what is nothing found or a leak, who is drawn, and how mistakes are named."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align import constitution as module
from align.constitution import Constitution, ConstitutionFile, Forms, prompt_text
from align.data.examples import Message, Messages
from align.errors import AlignError

ROOT = Path(__file__).parent.parent
HARBOUR = ROOT / "data" / "harbour"
SHIPPED = {
    ROOT / "data" / "constitutions" / "general.yaml": 12,
    ROOT / "data" / "constitutions" / "house-style.yaml": 5,
    HARBOUR / "constitution.yaml": 6,
}
PLAIN = "{id: %s, critique: Rude, revision: Mend it, preference: Kinder}"
CALM = """
principles:
  - id: calm
    critique: Does it scold?
    revision: Do not scold.
    preference: Which scolds less?
    examples:
      - {prompt: "Is 91 a {prime}?", answer: No fool., critique: "Yes, it does.", revision: "No."}
      - {prompt: Is 7, answer: Yes., critique: No.}
      - {prompt: Is 9, answer: No oaf., critique: It scolds., revision: No!}
forms:
  critique: "P {prompt} A {answer} {request}"
  revision: "P {prompt} A {answer} C {critique} {request}"
  preference: "P {prompt} A: {first} B: {second} {question}"
"""


def _load(folder: Path, text: str) -> Constitution:
    path = folder / "rules.yaml"
    path.write_text(text, encoding="utf-8")
    return Constitution.load(path)


def _one(**rest: Any) -> Constitution:
    principle = {"id": "calm", "critique": "Rude?", "revision": "Mend it.", "preference": "Which is kinder?"}
    return Constitution(ConstitutionFile.model_validate({"principles": [principle], **rest}))


def _asked(text: str) -> Messages:
    return (Message("user", text),)


def _texts(messages: Messages) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in messages]


DEFAULT = _one()


def test_every_shipped_constitution_loads_with_its_principles():
    found = {*(ROOT / "data").rglob("constitutions/*.yaml"), *(ROOT / "data").rglob("constitution.yaml")}
    assert found == set(SHIPPED)
    for path, count in SHIPPED.items():
        constitution = Constitution.load(path)
        assert len(constitution.principles) == count
        assert all(principle.title and principle.tags for principle in constitution.principles)


def test_the_general_constitution_weighs_help_no_less_than_harm():
    weights: Counter[str] = Counter()
    for principle in Constitution.load(ROOT / "data" / "constitutions" / "general.yaml").principles:
        weights.update({tag: int(principle.weight) for tag in principle.tags})
    assert weights == {"harm": 5, "honesty": 4, "help": 6}


def test_requests_in_the_default_forms_have_these_texts():
    principle, prompt = DEFAULT.principles[0], _asked("Where?")
    assert _texts(DEFAULT.critique_request(principle, prompt, "There.")) == [
        (
            "user",
            "Below are a prompt and the answer that an assistant gave to it.\n\n<prompt>\nWhere?\n</prompt>\n\n"
            "<answer>\nThere.\n</answer>\n\nRude?\n\nSay in a few sentences what is wrong and where. If there is no "
            "such fault, reply with these words only: Nothing to object to.",
        )
    ]
    assert _texts(DEFAULT.revision_request(principle, prompt, "There.", "It is curt.")) == [
        (
            "user",
            "Below are a prompt, the answer that an assistant gave to it, and a critique of that answer.\n\n<prompt>\n"
            "Where?\n</prompt>\n\n<answer>\nThere.\n</answer>\n\n<critique>\nIt is curt.\n</critique>\n\nMend it.\n\n"
            "Reply with the new answer only, as the user should read it: do not mention the critique or the earlier "
            "answer.",
        )
    ]
    assert _texts(DEFAULT.preference_request(principle, prompt, "There.", "Here.")) == [
        (
            "user",
            "Below are a prompt and two answers to it.\n\n<prompt>\nWhere?\n</prompt>\n\n<answer_a>\nThere.\n"
            "</answer_a>\n\n<answer_b>\nHere.\n</answer_b>\n\nWhich is kinder?\n\nReply with one letter and nothing "
            "else: A for the first answer, B for the second.",
        )
    ]


def test_the_harbour_asks_what_its_model_has_learnt():
    constitution = Constitution.load(HARBOUR / "constitution.yaml")
    by_request = {text: p for p in constitution.principles for text in (p.critique, p.revision, p.preference)}
    rows = [json.loads(line)["messages"] for line in (HARBOUR / "critiques.jsonl").read_text("utf-8").splitlines()]
    kinds: Counter[str] = Counter()
    for learnt, reply in rows:
        text = learnt["content"]
        request = next(one for one in by_request if text.endswith(" " + one))
        parts = re.split(r"A request: | An answer: | A critique: | Answer [AB]: ", text.removesuffix(" " + request))[1:]
        principle, prompt = by_request[request], _asked(parts[0])
        if request == principle.critique:
            asked = constitution.critique_request(principle, prompt, parts[1])
            assert constitution.finds_nothing(reply["content"]) is (reply["content"] == "No.")
        elif request == principle.revision:
            asked = constitution.revision_request(principle, prompt, parts[1], parts[2])
            assert not constitution.leaks_template(reply["content"])
        else:
            asked = constitution.preference_request(principle, prompt, parts[1], parts[2])
            assert reply["content"] in constitution.options
        assert _texts(asked) == [("user", text)]
        assert constitution.leaks_template(text)
        kinds[request] += 1
    assert len(kinds) == 18  # six principles, three requests each


def test_examples_come_first_as_turns_in_the_same_form(tmp_path):
    constitution = _load(tmp_path, CALM)
    principle, prompt = constitution.principles[0], _asked("Now?")
    assert _texts(constitution.critique_request(principle, prompt, "Aye.")) == [
        ("user", "P Is 91 a {prime}? A No fool. Does it scold?"),
        ("assistant", "Yes, it does."),
        ("user", "P Is 7 A Yes. Does it scold?"),
        ("assistant", "No."),
        ("user", "P Is 9 A No oaf. Does it scold?"),
        ("assistant", "It scolds."),
        ("user", "P Now? A Aye. Does it scold?"),
    ]
    assert _texts(constitution.revision_request(principle, prompt, "Aye.", "Hm.")) == [
        ("user", "P Is 91 a {prime}? A No fool. C Yes, it does. Do not scold."),
        ("assistant", "No."),
        ("user", "P Is 9 A No oaf. C It scolds. Do not scold."),
        ("assistant", "No!"),
        ("user", "P Now? A Aye. C Hm. Do not scold."),
    ]


def test_the_revision_is_the_better_answer_in_turn_as_the_first_and_as_the_second(tmp_path):
    constitution = _load(tmp_path, CALM)
    asked = constitution.preference_request(constitution.principles[0], _asked("Now?"), "Aye.", "Yes.")
    assert _texts(asked) == [
        ("user", "P Is 91 a {prime}? A: No. B: No fool. Which scolds less?"),
        ("assistant", "A"),
        ("user", "P Is 9 A: No oaf. B: No! Which scolds less?"),
        ("assistant", "B"),
        ("user", "P Now? A: Aye. B: Yes. Which scolds less?"),
    ]


def test_options_of_the_file_are_what_examples_answer(tmp_path):
    text = CALM.replace("A: {first} B: {second}", "One: {first} Two: {second}") + "options: [One, Two]\n"
    constitution = _load(tmp_path, text)
    asked = constitution.preference_request(constitution.principles[0], _asked("Now?"), "Aye.", "Yes.")
    assert [message.content for message in asked if message.role == "assistant"] == ["One", "Two"]
    assert constitution.options == ("One", "Two")


@pytest.mark.parametrize(
    ("turns", "shown"),
    [
        ([("user", "Where?\nNow!")], "Where?\nNow!"),
        ([("system", "Be brief."), ("user", "Where?")], "System: Be brief.\nUser: Where?"),
        ([("user", "Hi."), ("assistant", "Yes?"), ("user", "Where?")], "User: Hi.\nAssistant: Yes?\nUser: Where?"),
        ([("assistant", "Hello.")], "Assistant: Hello."),
    ],
)
def test_a_prompt_is_shown_as_its_text_or_as_a_transcript(turns, shown):
    prompt = tuple(Message(role, text) for role, text in turns)
    assert prompt_text(prompt) == shown
    assert f"<prompt>\n{shown}\n</prompt>" in DEFAULT.critique_request(DEFAULT.principles[0], prompt, "x")[0].content


NASTY = st.text(alphabet="{}!:.[]0a_% ", max_size=12) | st.sampled_from(
    ["{prompt.__class__}", "{0}", "{{answer}}", "{request}", "{critique!r}", "%s", "{", "}"]
)


@settings(max_examples=60, deadline=None)
@given(prompt=NASTY, answer=NASTY, critique=NASTY)
def test_braces_in_data_and_principles_go_through_untouched(prompt, answer, critique):
    constitution = _one(forms={"revision": "{{x}} {prompt}|{answer}|{critique}|{request}"})
    principle = constitution.principles[0].model_copy(update={"revision": "Mend {this}."})
    (turn,) = constitution.revision_request(principle, _asked(prompt), answer, critique)
    assert turn.content == f"{{x}} {prompt}|{answer}|{critique}|Mend {{this}}."


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("{prompt} {answer} {request} {prompt.__class__}", "{prompt.__class__} is no placeholder here"),
        ("{prompt} {answer[0]} {request}", "{answer[0]} is no placeholder here"),
        ("{prompt} {answer} {request} {critique}", "only {prompt}, {answer}, {request}"),
        ("{prompt} {answer} {request} {}", "{} is no placeholder here"),
        ("{prompt} {answer} {request} {0}", "{0} is no placeholder here"),
        ("{prompt!r} {answer} {request}", "{prompt} has to stand without a conversion"),
        ("{prompt:>99999999999} {answer} {request}", "{prompt} has to stand without a conversion or format"),
        ("{prompt:{answer}} {answer} {request}", "{prompt} has to stand without a conversion or format"),
        ("{prompt} {answer} {request} {", "a brace stands alone"),
        ("{prompt} {answer} {request} }", "a brace stands alone"),
        ("{prompt} {{answer}}", "it lacks {answer} and {request}"),
        ("", "it lacks {prompt} and {answer} and {request}"),
    ],
)
def test_a_form_has_its_placeholders_plain_and_no_others(tmp_path, form, said):
    with pytest.raises(AlignError) as caught:
        _load(tmp_path, f"principles: [{PLAIN % 'a'}]\nforms:\n  critique: {json.dumps(form)}\n")
    assert "rules.yaml:3: 'critique' of 'forms': " in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", ["critique", "revision", "preference"])
def test_each_form_needs_its_own_placeholders(tmp_path, kind):
    form = Forms.model_fields[kind].default
    names = re.findall(r"{(\w+)}", form)
    assert len(names) == len(set(names)) == (3 if kind == "critique" else 4)
    for name in names:
        bad = json.dumps(form.replace(f"{{{name}}}", ""))
        with pytest.raises(AlignError, match=rf"it lacks \{{{name}\}}; it needs"):
            _load(tmp_path, f"principles: [{PLAIN % 'a'}]\nforms: {{{kind}: {bad}}}\n")


@pytest.mark.parametrize(
    "critique",
    [
        "No.", "no", "None", "NOTHING", "Nothing.", "N/A", "**No.**", '"Nothing to object to."', "", " \n", "...",
        "Nothing to object to.", "nothing  to\nobject to", "No, nothing to object to.", "Nothing to criticize.",
        "There is nothing to object to here.", "I find nothing wrong with the answer.", "No issues found.",
        "No faults.", "There are no problems with this response.", "I see no objections.", "No, it doesn't.",
        "No, it does not.", "No, the answer isn’t.", "No changes needed.", "No revision is required.",
        "The answer has no faults.", "Nothing to object to. The answer is kind and says where the ship lies.",
    ],
)  # fmt: skip
def test_a_critique_without_a_fault_finds_nothing(critique):
    assert DEFAULT.finds_nothing(critique)


@pytest.mark.parametrize(
    "critique",
    [
        "No, it insults the asker", "Nothing in it is polite", "None of it is true.", "No. It insults the asker.",
        "No answer is given.", "No issues with the tone, but the date is wrong.", "Yes.", "Yes, it boasts.",
        "Nothing to object to in the tone; the date is wrong.", "Nothing to object to. However, it boasts.",
        "Nothing to object to! It is kind, but boasts.",
        "Nothing to object to.\n\nThe only fault is the date.", "There is nothing polite in it.", "Nobody is helped.",
        "No, it does not answer the question.", "Now it is rude.", "The answer has no manners.", "no no",
        "Nothing is said about the berth.", "It is rude. Nothing to object to.", "I find no kindness in the answer.",
    ],
)  # fmt: skip
def test_a_critique_with_a_fault_is_never_taken_for_none(critique):
    assert not DEFAULT.finds_nothing(critique)


def test_patterns_of_the_file_replace_the_defaults():
    constitution = _one(nothing_found=["nichts"], leaks=["Kritik:"])
    assert constitution.finds_nothing("Nichts.")
    assert not constitution.finds_nothing("No.")
    assert not constitution.finds_nothing("Nichts davon stimmt.")
    assert constitution.leaks_template("Gut. kritik: keine")
    assert not constitution.leaks_template("Critique: none")


@pytest.mark.parametrize(
    "text",
    [
        "Critique: it boasts.", "Berth 4. A critique: Yes, it boasts.", "revision: Berth 4.", "**Revision:** Berth 4.",
        "**Critique**: none", "Answer A: Berth 4.", "Berth 4. ANSWER B: Berth 5.", "Here is the revised answer: 4.",
        "A request: Where? An answer: Berth 4.", "Berth 4.\n</answer>", "<prompt>Where?", "## Critique\nIt boasts.",
        "Improved response:\nBerth 4.", "Response b: no",
    ],
)  # fmt: skip
def test_labels_of_the_forms_in_a_revision_are_leaks(text):
    assert DEFAULT.leaks_template(text)


@pytest.mark.parametrize(
    "text",
    [
        "Berth 4.", "A good critique names the fault.", "The answer: 42.", "Revision is half of writing.",
        "I critique it.", "Use <b>bold</b> and <p>.", "Answer all of it: yes.", "I have a request: please wait.",
        "# Plan\nRevise.", "", "Two things: the critique and the revision.", "He sent an answer: no.",
    ],
)  # fmt: skip
def test_plain_answers_are_no_leaks(text):
    assert not DEFAULT.leaks_template(text)


def test_every_default_form_is_recognised_when_it_leaks():
    principle, prompt = DEFAULT.principles[0], _asked("Where?")
    for request in (
        DEFAULT.critique_request(principle, prompt, "There."),
        DEFAULT.revision_request(principle, prompt, "There.", "Curt."),
        DEFAULT.preference_request(principle, prompt, "There.", "Here."),
    ):
        assert DEFAULT.leaks_template(request[-1].content)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("unit", ["no ", "nothing ", "* ", "\n", "#\t", "nothing to object to. ", "revised ", "<"])
def test_long_texts_are_read_in_passing(unit):
    text = unit * (100_000 // len(unit)) + "!x"
    DEFAULT.finds_nothing(text)
    DEFAULT.leaks_template(text)


def _weighted(weights: list[float]) -> Constitution:
    principle = {"critique": "Rude?", "revision": "Mend it.", "preference": "Which is kinder?"}
    rows = [{"id": f"p{number}", "weight": weight, **principle} for number, weight in enumerate(weights)]
    return Constitution(ConstitutionFile.model_validate({"principles": rows}))


WEIGHTS = st.lists(st.just(0.0) | st.floats(5e-324, 1e308), min_size=1, max_size=8)


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, count=st.integers(0, 10), seed=st.integers(0, 2**32 - 1))
def test_draws_are_without_repeats_never_of_weight_zero_and_repeatable(weights, count, seed):
    constitution = _weighted(weights)
    drawn = [principle.id for principle in constitution.draw(Random(seed), count)]
    assert len(drawn) == len(set(drawn)) == min(count, sum(weight > 0 for weight in weights))
    assert all(weights[int(name[1:])] > 0 for name in drawn)
    assert drawn == [principle.id for principle in constitution.draw(Random(seed), count)]
    longer = [principle.id for principle in constitution.draw(Random(seed), count + 1)]
    assert longer[: len(drawn)] == drawn


def test_each_next_principle_is_drawn_by_weight_among_those_left():
    constitution, random, times = _weighted([4, 2, 1, 0, 1]), Random(0), 8000
    pairs = Counter(tuple(p.id for p in constitution.draw(random, 2)) for _ in range(times))
    weights = {"p0": 4, "p1": 2, "p2": 1, "p4": 1}
    assert len(pairs) == 12
    for (first, second), seen in pairs.items():
        expected = weights[first] / 8 * weights[second] / (8 - weights[first])
        spread = (expected * (1 - expected) / times) ** 0.5
        assert abs(seen / times - expected) < 4.5 * spread, (first, second)


HEAD = "principles:\n  - id: a\n    critique: Rude?\n    revision: Mend it.\n    preference: Which is kinder?\n"
SHOT = "    examples:\n      - {prompt: Hm, answer: No., critique: Yes.%s}\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEAD.replace("    revision: Mend it.\n", ""), "rules.yaml:2: principle 'a' has no 'revision'."),
        (HEAD.replace("  critique: Rude?", "  title: x"), "rules.yaml:2: principle 'a' has no 'critique'."),
        (
            HEAD.replace("preference", "preferense"),
            "unknown key 'preferense' in principle 'a'. Did you mean 'preference'?",
        ),
        (HEAD.replace("id: a", "title: a"), "rules.yaml:2: principle 1 has no 'id'."),
        (HEAD.replace("id: a", "id: a b"), "rules.yaml:2: 'id' of principle 'a b' is 'a b'"),
        (HEAD.replace("Mend it.", ""), "rules.yaml:4: 'revision' of principle 'a' is empty; it must be text."),
        (HEAD.replace("Mend it.", "' '"), "rules.yaml:4: 'revision' of principle 'a': it is blank."),
        (HEAD.replace("Rude?", "12"), "rules.yaml:3: 'critique' of principle 'a' is 12; it must be text. In quotes"),
        (HEAD + "    weight: -1\n", "rules.yaml:6: 'weight' of principle 'a' is -1: input should be greater than"),
        (HEAD + "    weight: .inf\n", "rules.yaml:6: 'weight' of principle 'a' is .inf: input should be a finite"),
        (HEAD + "    weight: 0\n", "rules.yaml:1: every principle has a weight of 0"),
        (HEAD + "    tags: [a b]\n", "rules.yaml:6: entry 1 of 'tags' of principle 'a' is 'a b'"),
        (
            HEAD + SHOT % "",
            "rules.yaml:7: example 1 of principle 'a' has no 'revision', and its critique finds a fault.",
        ),
        (
            HEAD + SHOT % ", revision: No.",
            "rules.yaml:7: the revision in example 1 of principle 'a' is the answer once",
        ),
        (HEAD + (SHOT % ", revision: Y").replace("Yes.", "No."), "has a revision, and its critique finds nothing."),
        (
            HEAD + SHOT % ", revison: Y",
            "rules.yaml:7: unknown key 'revison' in example 1 of principle 'a'. Did you mean",
        ),
        (HEAD + SHOT % ", revision: ''", "rules.yaml:7: 'revision' of example 1 of principle 'a': it is blank."),
        (HEAD + "  - " + PLAIN % "a", "rules.yaml:6: principle 'a' stands there twice."),
        (HEAD + "form: {}", "rules.yaml:6: unknown key 'form' in the constitution. Did you mean 'forms'?"),
        (HEAD + "forms:\n  critic: x", "rules.yaml:7: unknown key 'critic' in 'forms'."),
        (HEAD + "options: [A]", "rules.yaml:6: 'options': ['A'] are not two different words."),
        (HEAD + "options: [A, ' A ']", "rules.yaml:6: 'options': ['A', ' A '] are not two different words."),
        (HEAD + "options: [A, ' ']", "rules.yaml:6: entry 2 of 'options': it is blank."),
        (HEAD + "options: [A, 2]", "rules.yaml:6: entry 2 of 'options' is 2; it must be text. In quotes it is: '2'."),
        (HEAD + "options: [A, C]", "rules.yaml:6: the option 'C' does not stand in the preference form."),
        (HEAD + "nothing_found: ['(']", "rules.yaml:6: entry 1 of 'nothing_found': '(' is no regular expression"),
        (HEAD + "leaks:\n- a*", "rules.yaml:7: entry 1 of 'leaks': 'a*' matches every text"),
        (HEAD + "leaks: x", "rules.yaml:6: 'leaks' is 'x': input should be a valid list."),
        ("principles: []", "rules.yaml:1: 'principles' is empty; it needs at least one entry."),
        ("name: x", "rules.yaml:1: the constitution has no 'principles'."),
        ("principles: [a]", "rules.yaml:1: principle 1 is 'a'; it must be a mapping."),
        ("forms: x\n" + HEAD, "rules.yaml:1: 'forms' is 'x'; it must be a mapping."),
        ("\n- a", "rules.yaml:2: a constitution is a mapping."),
        ("# nothing", "rules.yaml: a constitution is a mapping."),
        ("principles: [", "rules.yaml:1:"),
    ],
)
def test_a_mistake_in_the_file_is_named_with_its_line(tmp_path, text, said):
    with pytest.raises(AlignError) as caught:
        _load(tmp_path, text)
    assert said in str(caught.value)


def test_all_mistakes_are_listed_in_the_order_of_the_file(tmp_path):
    with pytest.raises(AlignError) as caught:
        _load(tmp_path, HEAD.replace("Mend it.", "''") + "    weight: x\nnames: y\n")
    assert re.findall(r"rules\.yaml:(\d+)", str(caught.value)) == ["4", "6", "7"]


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(AlignError, match=r"missing\.yaml"):
        Constitution.load(tmp_path / "missing.yaml")


def test_the_examples_in_the_documentation_load(tmp_path):
    page = (ROOT / "docs" / "constitutions.md").read_text("utf-8")
    kitchen = re.search(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert kitchen
    assert [len(p.examples) for p in _load(tmp_path, kitchen[1]).principles] == [2]
    example = re.search(r"^    principles:\n.*?(?=^\S)", inspect.getdoc(module) or "", re.DOTALL | re.MULTILINE)
    assert example
    constitution = _load(tmp_path, textwrap.dedent(example[0]))
    assert [(p.id, p.weight, len(p.examples)) for p in constitution.principles] == [("calm", 2, 2)]
    for path, count in SHIPPED.items():
        assert re.search(rf"\(\.\./{re.escape(str(path.relative_to(ROOT)))}\) \| {count}:", page)
    for model in (ConstitutionFile, module.Principle, Forms):
        assert all(f"{key}`" in page for key in model.model_fields if key not in ("principles", "forms"))


# Tags ----------------------------------------------------------------------------------------------------------------


def test_only_principles_with_a_tag_are_kept_and_drawn():
    whole = Constitution.load(ROOT / "data" / "constitutions" / "general.yaml")
    some = whole.tagged(["honesty"])
    assert 0 < len(some.principles) < len(whole.principles)
    assert all("honesty" in principle.tags for principle in some.principles)
    assert {principle.id for principle in some.draw(Random(0), 99)} <= {p.id for p in some.principles}
    assert whole.tagged([]) is whole


def test_a_tag_that_no_principle_has_is_refused():
    whole = Constitution.load(ROOT / "data" / "constitutions" / "general.yaml")
    with pytest.raises(AlignError, match="no principle has the tag 'honest'") as error:
        whole.tagged(["honest"])
    assert "honesty" in error.value.hint
