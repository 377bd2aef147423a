"""Encoding: what is trained, that it is what generation sees, and what the length policy does."""

from __future__ import annotations

import copy
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from align.chat.encoded import Encoded, EncodedPair
from align.chat.encoder import Encoder
from align.chat.rendering import own_template
from align.chat.templates import check_template, prepare_tokenizer, stop_token_ids, template_sha256
from align.data.examples import Conversation, Document, Message, Messages, Preference, Rated
from align.errors import AlignError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% set first = '' %}"
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ (first if loop.first else '') + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant roles') }}{% endif %}{% endfor %}"
)
THINKING = (  # drops the reasoning of all but the last turn, as Qwen3 and DeepSeek do
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
PHI3 = (  # eos_token ends a whole conversation, another token each turn
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "gemma": GEMMA, "mistral": MISTRAL, "phi3": PHI3, "ours": None}
STOPS = {
    "chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>", "phi3": "<|end|>",
    "ours": "</s>",
}  # fmt: skip

QUESTION = Message("user", "Who has the key?")
ANSWER = Message("assistant", "The master of the harbour.")
MORE = Message("user", "And the figs?")
LAST = Message("assistant", "At the pier.")
CHAT: Messages = (QUESTION, ANSWER, MORE, LAST)


WORDS = "Who has the key ? The master of harbour . And figs At pier"


@pytest.fixture(autouse=True)
def trusted(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Templates of these tests are rendered without the child process that guards against foreign ones."""
    if "guarded" not in request.fixturenames:
        monkeypatch.setattr("align.chat.rendering.guard", lambda _: None)


@pytest.fixture
def guarded() -> None:
    """The guard stays on."""


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    """Byte-level BPE with our template."""
    return prepared(tiny_tokenizer)


def prepared(tokenizer: Any, template: str | None = None) -> Any:
    own = copy.deepcopy(tokenizer)
    prepare_tokenizer(own, template)
    return own


def fast(model: Any, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


CORPUS = ["▁Who▁has▁the▁key?", "▁The▁master▁of▁the▁harbour.▁At▁the▁pier."] * 9


@pytest.fixture(scope="session")
def metaspace_tokenizer() -> Any:
    """As Llama 2 and stories260K: a space is put before every text and behind every special token."""
    bpe = sentencepiece_like()
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return fast(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="session")
def metaspace_first_tokenizer() -> Any:
    """As Mistral and newer Llama 2: a space is put before a text, and nowhere inside it."""
    bpe = sentencepiece_like()
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return fast(bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece_like() -> Tokenizer:
    """BPE over words that begin with a metaspace; bytes stand in for characters that it does not know."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    bpe.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=420, special_tokens=["<unk>", "<s>", "</s>"]))
    state = json.loads(bpe.to_str())
    for byte in range(256):
        state["model"]["vocab"][f"<0x{byte:02X}>"] = len(state["model"]["vocab"])
    bpe = Tokenizer.from_str(json.dumps(state))
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return bpe


@pytest.fixture(scope="session")
def word_tokenizer() -> Any:
    """One token per word; all else is <unk>."""
    words = ["[UNK]", "[PAD]", "[BOS]", "[EOS]", *WORDS.split(" ")]
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return fast(model, unk_token="[UNK]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]")


FIXTURES = {
    "byte-level": "tiny_tokenizer", "metaspace": "metaspace_tokenizer", "word-level": "word_tokenizer",
    "metaspace-first": "metaspace_first_tokenizer",
}  # fmt: skip


@pytest.fixture(params=["byte-level", "metaspace", "metaspace-first", "word-level", "stories260K"])
def any_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Tokenizers of all kinds, without a template."""
    if request.param == "stories260K":
        return AutoTokenizer.from_pretrained(request.getfixturevalue("shared") / "models/stories260K")
    return request.getfixturevalue(FIXTURES[request.param])


def encoder(tokenizer: Any, max_length: int = 1000, **settings: Any) -> Encoder:
    return Encoder(tokenizer, max_length=max_length, **settings)


def encoded(tokenizer: Any, messages: Messages, **settings: Any) -> Encoded:
    row = encoder(tokenizer, **settings).conversation(Conversation(messages))
    assert row is not None
    return row


def spans(tokenizer: Any, row: Encoded) -> list[str]:
    """Decoded text of each run of trained tokens."""
    runs: list[list[int]] = []
    for before, now, token in zip([False, *row.trained], row.trained, row.ids, strict=False):
        if now and not before:
            runs.append([])
        if now:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


# What is trained -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_content_and_stop_token_of_each_assistant_turn_are_trained_and_nothing_else(
    name: str, tiny_tokenizer: Any
) -> None:
    tokenizer = prepared(tiny_tokenizer, TEMPLATES[name])
    row = encoded(tokenizer, CHAT)
    space = " " if name == "mistral" else ""  # its template puts one between [/INST] and the answer
    stop = STOPS[name]
    assert spans(tokenizer, row) == [space + ANSWER.content + stop, space + LAST.content + stop]
    assert row.ids[-1] == stop_token_ids(tokenizer)[0] == tokenizer.convert_tokens_to_ids(stop)


@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
def test_train_on_chooses_the_turns(train_on: str, tokenizer: Any) -> None:
    row = encoded(tokenizer, CHAT, train_on=train_on)
    every = "<s><|user|>Who has the key?<|assistant|>The master of the harbour.</s>"
    expected = {
        "assistant": ["The master of the harbour.</s>", "At the pier.</s>"],
        "last": ["At the pier.</s>"],
        "all": [every + "<|user|>And the figs?<|assistant|>At the pier.</s>"],
    }
    assert spans(tokenizer, row) == expected[train_on]


def test_system_and_tool_turns_and_tools_are_context(tokenizer: Any) -> None:
    calls = {"tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"at": "pier"}}}]}
    messages = (
        Message("system", "Be brief."),
        QUESTION,
        Message("assistant", "", calls),
        Message("tool", "figs"),
        LAST,
    )
    tools = ({"type": "function", "function": {"name": "look", "parameters": {}}},)
    row = encoder(tokenizer).conversation(Conversation(messages, tools))
    assert row is not None
    assert spans(tokenizer, row) == [
        '\n<call>{"name": "look", "arguments": {"at": "pier"}}</call></s>', "At the pier.</s>",
    ]  # fmt: skip
    assert tokenizer.decode(row.ids).startswith("<s><|system|>Be brief.\nTools, as JSON schemas:\n[{")
    assert "<|tool|>figs<|assistant|>" in tokenizer.decode(row.ids)


def test_labels_are_the_same_whatever_the_padding_token_is(tiny_tokenizer: Any) -> None:
    rows = []
    for pad in ("<pad>", "</s>"):
        tokenizer = prepared(tiny_tokenizer)
        tokenizer.pad_token = pad
        rows.append(encoded(tokenizer, CHAT))
    assert rows[0] == rows[1]
    trained = [token for token, flag in zip(rows[0].ids, rows[0].trained, strict=True) if flag]
    assert trained.count(tokenizer.eos_token_id) == 2


def test_a_turn_that_the_template_rewrites_later_is_not_trained_and_is_counted(tiny_tokenizer: Any) -> None:
    tokenizer = prepared(tiny_tokenizer, THINKING)
    thought = Message("assistant", "<think>who?</think>The master.")
    encode = encoder(tokenizer)
    row = encode.conversation(Conversation((QUESTION, thought, MORE, Message("assistant", "<think>figs</think>Six."))))
    assert row is not None
    assert spans(tokenizer, row) == ["<think>figs</think>Six.<|im_end|>"]
    assert encode.lengths.untrainable_turns == 1
    assert row.ids[: row.trained.index(True)] == encode.prompt((QUESTION, thought, MORE))
    plain = encoder(tokenizer)
    plain.conversation(Conversation(CHAT))
    assert plain.lengths.untrainable_turns == 0  # nothing to rewrite where there is no reasoning


def test_an_opening_by_the_assistant_is_context(tokenizer: Any) -> None:
    row = encoded(tokenizer, (Message("assistant", "Ahoy!"), QUESTION, ANSWER))
    assert spans(tokenizer, row) == [ANSWER.content + "</s>"]


@pytest.mark.parametrize("messages", [(QUESTION,), (ANSWER,), ()])
def test_a_conversation_with_nothing_to_train_is_refused(messages: Messages, tokenizer: Any) -> None:
    with pytest.raises(AlignError):
        encoder(tokenizer).conversation(Conversation(messages))


# Training is what generation sees ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_ids_of_training_are_those_of_generation(name: str, any_tokenizer: Any) -> None:
    tokenizer = prepared(any_tokenizer, TEMPLATES[name])
    encode = encoder(tokenizer)
    row = encode.reply(CHAT[:3], CHAT[3:])
    prompt = encode.prompt(CHAT[:3])
    assert row.ids[: len(prompt)] == prompt
    assert row.trained == [False] * len(prompt) + [True] * (len(row.ids) - len(prompt))
    first = encode.prompt(CHAT[:1])
    assert row.ids[: len(first)] == first  # the first turn's prompt, inside the longer conversation


def test_rows_are_what_the_saved_tokenizer_makes_of_them(any_tokenizer: Any, tmp_path: Path) -> None:
    prepared(any_tokenizer).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    theirs = [message.row() for message in CHAT]
    assert encoded(tokenizer, CHAT).ids == tokenizer.apply_chat_template(theirs)["input_ids"]
    prompt = tokenizer.apply_chat_template(theirs[:3], add_generation_prompt=True)["input_ids"]
    assert encoder(tokenizer).prompt(CHAT[:3]) == prompt


def test_a_saved_template_keeps_its_hash_and_is_known_as_ours(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert template_sha256(reloaded) == template_sha256(tokenizer)
    assert reloaded.chat_template == own_template()  # so no child process is asked whether it is safe


def test_no_token_spans_the_seam_between_prompt_and_reply(tiny_tokenizer: Any) -> None:
    """A template that ends the prompt in plain text, where the joint text has a merge across the seam."""
    template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    )
    tokenizer = prepared(tiny_tokenizer, template)
    prompt, answer = (Message("user", "The h"),), (Message("assistant", "er"),)
    joint = tokenizer("The her", add_special_tokens=False)["input_ids"]
    apart = encoder(tokenizer).prompt(prompt)
    assert joint[: len(apart)] != apart
    assert encoder(tokenizer).reply(prompt, answer).ids[: len(apart)] == apart


@pytest.mark.parametrize("name", ["chatml", "llama3", "ours"])
def test_decoded_ids_are_the_rendered_text(name: str, tiny_tokenizer: Any) -> None:
    tokenizer = prepared(tiny_tokenizer, TEMPLATES[name])
    rendered = tokenizer.apply_chat_template([message.row() for message in CHAT], tokenize=False)
    assert tokenizer.decode(encoded(tokenizer, CHAT).ids) == rendered.rstrip("\n")


@pytest.mark.parametrize("name", ["chatml", "mistral", "ours"])
def test_a_tokenizer_that_prefixes_a_space_gets_none_inside_the_text(name: str, metaspace_tokenizer: Any) -> None:
    """Behind a special token such tokenizers put a space themselves; a seam in plain text must not add one more."""
    tokenizer = prepared(metaspace_tokenizer, TEMPLATES[name])
    theirs = [message.row() for message in CHAT]
    ids = encoded(tokenizer, CHAT).ids
    assert tokenizer.decode(ids) == tokenizer.decode(tokenizer.apply_chat_template(theirs)["input_ids"]).rstrip("\n ")


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cn"]), max_size=20) | st.sampled_from(
    [" lead", "trail ", "\n", "  ", "</s>", "a</s><|user|>b", "<|assistant|>", "<pad>", "{{ 7 }}", "<0x0A>", "▁"]
)


@given(st.lists(TEXT, min_size=2, max_size=6))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_any_text_survives_and_forges_no_turn(tokenizer: Any, texts: list[str]) -> None:
    """Whatever the data says: trained spans are its text, prompts are prefixes, control tokens are the template's."""
    texts = texts[: len(texts) // 2 * 2]
    messages = tuple(Message(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    row = encoded(tokenizer, messages)
    answers = texts[1::2]
    assert spans(tokenizer, row) == [answer + "</s>" for answer in answers]
    for token in ("<|user|>", "<|assistant|>", "</s>"):
        assert row.ids.count(tokenizer.convert_tokens_to_ids(token)) == len(answers)
    for turn in range(1, len(messages), 2):
        prompt = encoder(tokenizer).prompt(messages[:turn])
        assert row.ids[: len(prompt)] == prompt
        assert row.trained[len(prompt)]
        assert not row.trained[len(prompt) - 1]


def test_control_tokens_in_the_data_are_plain_text_for_every_tokenizer(any_tokenizer: Any) -> None:
    tokenizer = prepared(any_tokenizer)
    eos, user = tokenizer.eos_token, "<|user|>"
    row = encoded(tokenizer, (Message("user", f"the {eos} key {user}"), Message("assistant", f"The {user}{eos} pier")))
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert row.ids.count(tokenizer.convert_tokens_to_ids(user)) == 1


def test_control_tokens_that_a_tokenizer_cannot_read_as_text_are_refused() -> None:
    words = {word: i for i, word in enumerate(["[UNK]", "</s>", "a"])}
    model = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = prepared(fast(model, unk_token="[UNK]", eos_token="</s>"))
    with pytest.raises(AlignError, match="control token"):
        encoded(tokenizer, (QUESTION, Message("assistant", "a </s> a")))


# BOS, EOS, pad, and what a tokenizer is given ------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_bos_stands_at_most_once_and_first(name: str, any_tokenizer: Any) -> None:
    tokenizer = prepared(any_tokenizer, TEMPLATES[name])
    encode = encoder(tokenizer)
    for ids in (encode.prompt(CHAT[:3]), encode.reply(CHAT[:3], CHAT[3:]).ids):
        assert tokenizer.bos_token_id not in ids[1:]
        assert (ids[0] == tokenizer.bos_token_id) == (name not in ("chatml", "phi3"))


def test_our_template_reuses_the_stop_token_that_exists(any_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(any_tokenizer)
    eos = tokenizer.eos_token
    assert prepare_tokenizer(tokenizer) == 4  # system, user, assistant, tool
    assert tokenizer.eos_token == eos
    assert stop_token_ids(tokenizer) == [tokenizer.eos_token_id]
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    assert prepare_tokenizer(tokenizer) == 0  # and a second time nothing is left to do
    check_template(tokenizer)


def test_a_tokenizer_with_nothing_gets_stop_and_padding_tokens(tiny_tokenizer: Any) -> None:
    tokenizer = fast(copy.deepcopy(tiny_tokenizer.backend_tokenizer))
    prepare_tokenizer(tokenizer)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|end|>", "<pad>")
    check_template(tokenizer)
    assert spans(tokenizer, encoded(tokenizer, CHAT))[0] == ANSWER.content + "<|end|>"


def test_one_token_for_bos_eos_and_padding_as_in_gpt2_is_made_apart(tiny_tokenizer: Any) -> None:
    backend = copy.deepcopy(tiny_tokenizer.backend_tokenizer)
    tokenizer = fast(backend, bos_token="</s>", eos_token="</s>", pad_token="</s>")
    prepare_tokenizer(tokenizer)
    row = encoded(tokenizer, CHAT)
    assert row.ids.count(tokenizer.eos_token_id) == 2  # the stops only: no BOS that would read as a stop
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    check_template(tokenizer)


def test_a_given_template_gets_its_marks_as_tokens_and_decides_the_stop_token(tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    assert prepare_tokenizer(tokenizer, CHATML) == 2
    assert tokenizer.eos_token == "<|im_end|>"
    phi3 = copy.deepcopy(tiny_tokenizer)
    prepare_tokenizer(phi3, PHI3)
    assert phi3.eos_token == "</s>"  # the template writes eos_token at the end of a conversation as well
    assert [phi3.convert_ids_to_tokens(i) for i in stop_token_ids(phi3)] == ["<|end|>", "</s>"]


def test_the_hash_is_that_of_the_template_text(tiny_tokenizer: Any) -> None:
    tokenizer = prepared(tiny_tokenizer, CHATML)
    assert template_sha256(tokenizer) == hashlib.sha256(CHATML.encode()).hexdigest()
    tokenizer.chat_template = CHATML + " "
    assert template_sha256(tokenizer) != hashlib.sha256(CHATML.encode()).hexdigest()


# Templates that must be refused --------------------------------------------------------------------------------------

BROKEN = {
    "misspelt name": (CHATML.replace("+ m.content +", "}}{{ m.contnet }}{{"), "assistant's text"),
    "loses the user": (CHATML.replace("m.content +", "(m.content if m.role == 'assistant' else '') +"), "user's text 0"),
    "users first": (CHATML.replace("in messages %}", "in messages | sort(attribute='role', reverse=true) %}"), "out of order"),
    "says it twice": (CHATML.replace("m.content +", "m.content + m.content +"), "2 times"),
    "no stop token": (CHATML.replace("<|im_end|>", ""), "never learn to stop"),
    "two stop tokens": (CHATML.replace("<|im_end|>", "<|im_end|><|im_end|>"), "must end with one"),
    "two BOS": ("{{ bos_token }}" + LLAMA3, "more than once"),
    "asks otherwise": (CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>bot\n' }}"), "asks for the last"),
    "raises": ("{{ raise_exception('not today') }}", "not today"),
    "syntax": ("{% for %}", "is no Jinja, at its line 1"),
    "sandbox": (CHATML + "{{ ''.__class__.__mro__ }}{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe|undefined"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_cannot_be_trained_on_is_refused(name: str, tiny_tokenizer: Any) -> None:
    template, message = BROKEN[name]
    with pytest.raises(AlignError, match=message):
        check_template(prepared(tiny_tokenizer, template))


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_usual_templates_pass(name: str, any_tokenizer: Any) -> None:
    check_template(prepared(any_tokenizer, TEMPLATES[name]))


def test_a_role_that_the_template_does_not_know_is_named(tiny_tokenizer: Any) -> None:
    tokenizer = prepared(tiny_tokenizer, MISTRAL)
    with pytest.raises(AlignError, match="system, user, assistant: only user and assistant roles"):
        encoded(tokenizer, (Message("system", "x"), QUESTION, ANSWER))


NESTED = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"  # 10^10 turns


@pytest.mark.usefixtures("guarded")
@pytest.mark.parametrize(
    "bomb",
    [
        pytest.param("{{ ('a' * 2000000000)[:1] }}", id="memory"),
        pytest.param("{{ 'a' * 90000000 }}", id="output", marks=pytest.mark.slow),
        pytest.param(NESTED, id="time", marks=pytest.mark.slow),
    ],
)
def test_a_template_that_costs_too_much_is_refused(bomb: str, tiny_tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    with pytest.raises(AlignError, match="takes too much"):
        prepare_tokenizer(tokenizer, CHATML + bomb)


@pytest.mark.usefixtures("guarded")
def test_a_foreign_template_that_behaves_passes_the_guard(tiny_tokenizer: Any) -> None:
    check_template(prepared(tiny_tokenizer, CHATML))


# TRL's templates and masks as the oracle -----------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen2_5", "llama3", "gemma", "cohere", "lfm2"])
def test_trl_marks_the_same_tokens_in_its_training_templates(family: str, tiny_tokenizer: Any) -> None:
    import trl

    folder = Path(trl.__file__).parent / "chat_templates"
    tokenizer = prepared(tiny_tokenizer, (folder / f"{family}_training.jinja").read_text())
    theirs = tokenizer.apply_chat_template([m.row() for m in CHAT], return_assistant_tokens_mask=True)
    row = encoded(tokenizer, CHAT)
    ids, mask = theirs["input_ids"], [bool(flag) for flag in theirs["assistant_masks"]]
    assert ids[: len(row.ids)] == row.ids
    stripped = [t for t, flag in zip(ids, mask, strict=True) if flag]
    ours = [t for t, flag in zip(row.ids, row.trained, strict=True) if flag]
    assert [t for t in stripped if t not in _newline(tokenizer)] == [t for t in ours if t not in _newline(tokenizer)]


def _newline(tokenizer: Any) -> list[int]:
    return list(tokenizer("\n", add_special_tokens=False)["input_ids"])  # some of TRL's spans take the line end in


# Lengths -------------------------------------------------------------------------------------------------------------


def test_long_rows_are_dropped_and_counted(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 40)
    long, short = Message("assistant", "figs " * 40), Message("assistant", "Yes.")
    rows = [encode.conversation(Conversation((QUESTION, answer))) for answer in [long] * 9 + [short] * 3]
    assert [row is None for row in rows] == [True] * 9 + [False] * 3
    report = encode.lengths.as_dict()
    assert (report["rows"], report["dropped"], report["cut"]) == (12, 9, 0)
    kept = rows[-1]
    assert kept is not None
    assert (report["tokens"], report["longest"], report["p50"]) == (3 * len(kept.ids), len(kept.ids), len(kept.ids))
    assert report["trained_tokens"] == 3 * sum(kept.trained)


def test_a_cut_answer_is_counted_as_having_lost_its_stop_token(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 40, too_long="cut")
    row = encode.conversation(Conversation((QUESTION, Message("assistant", "figs " * 40))))
    assert row is not None
    assert len(row.ids) == 40
    assert tokenizer.eos_token_id not in row.ids
    assert (encode.lengths.cut, encode.lengths.cut_without_stop) == (1, 1)


def test_a_cut_between_turns_keeps_the_stop_tokens_before_it(tokenizer: Any) -> None:
    whole = encoded(tokenizer, CHAT)
    first_stop = whole.ids.index(tokenizer.eos_token_id)
    encode = encoder(tokenizer, first_stop + 2, too_long="cut")
    row = encode.conversation(Conversation(CHAT))
    assert row is not None
    assert spans(tokenizer, row) == [ANSWER.content + "</s>"]
    assert (encode.lengths.cut, encode.lengths.cut_without_stop) == (1, 0)


def test_a_cut_that_leaves_no_answer_drops_the_row(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 10, too_long="cut")
    assert encode.conversation(Conversation((Message("user", "figs " * 40), ANSWER))) is None
    assert (encode.lengths.without_answer, encode.lengths.cut) == (1, 0)
    assert encode.lengths.lengths == []


def test_error_names_row_length_and_limit(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 30, too_long="error")
    encode.conversation(Conversation((Message("user", "Hi"), Message("assistant", "Yes."))))
    with pytest.raises(AlignError, match=r"row 2 has \d+ tokens, and max_length is 30"):
        encode.conversation(Conversation((QUESTION, Message("assistant", "figs " * 40))))


def test_a_prompt_is_cut_from_the_left_but_keeps_bos_and_the_answer(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 60, cut_prompt=True)
    row = encode.conversation(Conversation((Message("user", "figs " * 100 + "Who?"), ANSWER)))
    assert row is not None
    assert len(row.ids) == 60
    assert row.ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(row.ids).endswith("figs Who?<|assistant|>The master of the harbour.</s>")
    assert spans(tokenizer, row) == [ANSWER.content + "</s>"]
    assert (encode.lengths.cut_prompts, encode.lengths.cut, encode.lengths.dropped) == (1, 0, 0)


def test_an_answer_that_is_too_long_alone_falls_under_the_policy_after_the_prompt_is_cut(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 30, cut_prompt=True)
    assert encode.conversation(Conversation((QUESTION, Message("assistant", "figs " * 40)))) is None
    assert (encode.lengths.dropped, encode.lengths.cut_prompts) == (1, 0)


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=5),
    st.integers(2, 60), st.sampled_from(["drop", "cut"]), st.booleans(),
)  # fmt: skip
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
def test_every_row_is_kept_within_the_limit_or_counted(
    tokenizer: Any, sizes: list[tuple[int, int]], max_length: int, too_long: Any, cut_prompt: bool
) -> None:
    encode = encoder(tokenizer, max_length, too_long=too_long, cut_prompt=cut_prompt)
    kept = 0
    for question, answer in sizes:
        both = encode.preference(pair("x" * answer, "y" * question, "z" * question))
        if both is not None:
            kept += 1
            for row in (both.chosen, both.rejected):
                assert len(row.ids) == len(row.trained) <= max_length
                assert row.labels > 0
                assert row.ids[0] == tokenizer.bos_token_id
                assert row.trained.index(True) == both.prompt_length
    report = encode.lengths
    assert report.rows == len(sizes) == kept + report.dropped + report.without_answer + report.equal_pairs
    assert max(report.cut, report.cut_prompts) <= kept


def test_max_length_must_leave_room_for_one_label(tokenizer: Any) -> None:
    with pytest.raises(AlignError, match="max_length is 1"):
        encoder(tokenizer, 1)


# Pairs and rated replies ---------------------------------------------------------------------------------------------


def pair(chosen: str, rejected: str, prompt: str = "Who?") -> Preference:
    return Preference(
        (Message("user", prompt),), (Message("assistant", chosen),), (Message("assistant", rejected),), 0.5, 0.9
    )


def test_a_pair_shares_its_prompt_and_carries_margin_and_probability(tokenizer: Any) -> None:
    encode = encoder(tokenizer)
    both = encode.preference(pair("The master.", "No."))
    assert isinstance(both, EncodedPair)
    prompt = encode.prompt((Message("user", "Who?"),))
    assert both.chosen.ids[: both.prompt_length] == both.rejected.ids[: both.prompt_length] == prompt
    assert spans(tokenizer, both.chosen) + spans(tokenizer, both.rejected) == ["The master.</s>", "No.</s>"]
    assert (both.margin, both.probability) == (0.5, 0.9)
    assert encode.lengths.lengths == [len(both.chosen.ids), len(both.rejected.ids)]


def test_pairs_that_nothing_tells_apart_are_dropped_and_counted(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 40, too_long="cut")
    assert encode.preference(pair("Yes.", "Yes.")) is None
    assert encode.preference(pair("figs " * 40 + "yes", "figs " * 40 + "no")) is None
    assert encode.lengths.equal_pairs == 2


def test_pairs_without_an_answer_after_cutting_are_dropped_and_counted(tokenizer: Any) -> None:
    encode = encoder(tokenizer, 12, too_long="cut")
    assert encode.preference(pair("Yes.", "No.", "figs " * 40)) is None
    assert encode.lengths.without_answer == 1


def test_a_pair_is_dropped_once_and_its_prompt_cut_alike(tokenizer: Any) -> None:
    dropping = encoder(tokenizer, 30)
    assert dropping.preference(pair("figs " * 40, "No.")) is None
    assert dropping.lengths.dropped == 1
    cutting = encoder(tokenizer, 40, cut_prompt=True)
    both = cutting.preference(pair("The master of the harbour.", "No.", "figs " * 60))
    assert both is not None
    assert both.chosen.ids[: both.prompt_length] == both.rejected.ids[: both.prompt_length]
    assert spans(tokenizer, both.rejected) == ["No.</s>"]
    assert max(len(both.chosen.ids), len(both.rejected.ids)) == 40


def test_a_rated_reply_is_encoded_like_a_reply(tokenizer: Any) -> None:
    encode = encoder(tokenizer)
    assert encode.rated(Rated((QUESTION,), (ANSWER,), desirable=False)) == encode.reply((QUESTION,), (ANSWER,))


# Documents -----------------------------------------------------------------------------------------------------------


def test_a_document_is_bos_text_eos_and_all_of_it_is_trained(any_tokenizer: Any) -> None:
    tokenizer = prepared(any_tokenizer)
    (row,) = encoder(tokenizer).documents(Document("The master"))
    text = tokenizer("The master", add_special_tokens=False)["input_ids"]
    assert row.ids == [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
    assert all(row.trained)


@given(st.integers(0, 120), st.integers(2, 40))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
def test_each_token_of_a_long_document_is_a_label_exactly_once(tokenizer: Any, words: int, max_length: int) -> None:
    encode = encoder(tokenizer, max_length)
    rows = encode.documents(Document("ab" * words))
    (whole,) = encoder(tokenizer, 10_000).documents(Document("ab" * words))
    assert [token for row in rows for token in row.ids[1:]] == whole.ids[1:]
    assert all(2 <= len(row.ids) <= max_length for row in rows)
    assert encode.lengths.as_dict()["trained_tokens"] == len(whole.ids) - 1


def test_control_tokens_in_a_document_are_text(tokenizer: Any) -> None:
    (row,) = encoder(tokenizer).documents(Document("one</s><s>two"))
    assert row.ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(row.ids) == "<s>one</s><s>two</s>"


# Speed ---------------------------------------------------------------------------------------------------------------


def test_a_thousand_rows_take_about_a_second(tokenizer: Any) -> None:
    rows = [Conversation((Message("user", f"{i} {QUESTION.content}"), ANSWER)) for i in range(1000)]
    encode = encoder(tokenizer)
    start = time.process_time()
    for row in rows:
        encode.conversation(row)
    assert time.process_time() - start < 3  # 0.4 on a quiet machine


# Work ----------------------------------------------------------------------------------------------------------------


def test_a_row_is_rendered_twice_and_a_pair_three_times(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as it is and once as it is asked for; both answers of a pair are asked for by one prompt."""
    rendered: list[int] = []
    render = type(tokenizer).apply_chat_template
    monkeypatch.setattr(type(tokenizer), "apply_chat_template", lambda *a, **k: rendered.append(1) or render(*a, **k))
    for row, times in (
        (lambda own: own.conversation(Conversation((QUESTION, ANSWER))), 2),
        (lambda own: own.preference(Preference((QUESTION,), (ANSWER,), (LAST,))), 3),
        (lambda own: own.preference(Preference((QUESTION, ANSWER, MORE), (ANSWER,), (LAST,))), 3 + 2),
        (lambda own: own.prompt((QUESTION, ANSWER, MORE)), 1 + 2),
    ):
        own = encoder(tokenizer)
        own.prompt((MORE,))  # the template is tried first
        rendered.clear()
        row(own)
        assert len(rendered) == times


def test_what_is_kept_of_one_row_never_stands_in_another(tokenizer: Any) -> None:
    """Rows that share beginnings, tools or nothing, in all orders, encode as each does alone."""
    tools = ({"type": "function", "function": {"name": "find", "parameters": {}}},)
    rows = [
        Conversation(CHAT), Conversation(CHAT[:2]), Conversation(CHAT[2:]), Conversation(CHAT[:2], tools),
        Conversation((QUESTION, LAST)), Conversation((Message("user", QUESTION.content), ANSWER)),
    ]  # fmt: skip
    alone = [encoder(tokenizer).conversation(row) for row in rows]
    shared = encoder(tokenizer)
    for first in range(len(rows)):
        for second in range(len(rows)):
            assert [shared.conversation(rows[place]) for place in (first, second)] == [alone[first], alone[second]]
