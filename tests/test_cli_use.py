"""generate, chat, score and eval: what they print, and what they say to wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from align.cli.use import chat_command, eval_command, generate_command, score_command
from align.errors import AlignError
from align.registry.references import printable
from align.registry.store import Registry
from align.use.references import resolve

PAIRS = [
    {"prompt": "Who has the key?", "chosen": "The master of the harbour has it.", "rejected": "no"},
    {"prompt": "hello", "chosen": "hello, world!", "rejected": "The heron came to the pier at dawn"},
]
ANSWERS = [
    {"prompt": "Who has the key?", "completion": "The master."},
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello, world!"}]},
]


@pytest.fixture(scope="session")
def tiny_reward(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(2)
    folder = tmp_path_factory.mktemp("tiny-reward")
    model = AutoModelForSequenceClassification.from_pretrained(tiny_llama, num_labels=1)
    model.config.pad_token_id = 0
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def harbour(tiny_llama) -> str:
    """A registered checkpoint with its chat template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.chat.templates import prepare_tokenizer, template_sha256

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    prepare_tokenizer(tokenizer, None)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.resize_token_embeddings(len(tokenizer))
    run = Registry.open().begin_run(
        recipe="harbour", stage="sft", kind="sft", key="k", settings={}, inputs={}, seed=0
    )  # fmt: skip
    with run:
        model.save_pretrained(run.artifact)
        tokenizer.save_pretrained(run.artifact)
        run.finish_checkpoint(
            name="harbour/sft", kind="model", parents=[], data=[], metrics={}, versions={},
            template_sha256=template_sha256(tokenizer),
        )  # fmt: skip
    return "harbour/sft"


WRITTEN = "\x1b]0;x\x07\x9b31mred"


def rows_file(folder: Path, rows: list[dict], name: str = "rows.jsonl") -> str:
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / name)


def invoke(command, *arguments, text: str | None = None):
    result = CliRunner().invoke(command, [str(argument) for argument in arguments], input=text)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def document(command, *arguments, text: str | None = None):
    """The one JSON document that the command printed."""
    result = invoke(command, *arguments, "--json", text=text)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# generate ------------------------------------------------------------------------------------------------------------


def test_generate_answers_prompts_and_files_alike(tiny_llama, tmp_path):
    asked = document(
        generate_command, tiny_llama, "--prompt", "hello", "--prompt", "Who has the key?", "--max-new-tokens", 8
    )
    data = rows_file(tmp_path, [{"prompt": "hello"}, {"prompt": "Who has the key?"}])
    assert document(generate_command, tiny_llama, "--data", data, "--max-new-tokens", 8)["replies"] == asked["replies"]
    assert [reply["prompt"] for reply in asked["replies"]] == ["hello", "Who has the key?"]
    assert all(reply["tokens"] <= 8 for reply in asked["replies"])
    with_system = document(
        generate_command, tiny_llama, "--prompt", "hello", "--system", "maybe yes maybe no", "--max-new-tokens", 8
    )
    assert with_system["replies"][0]["text"] != asked["replies"][0]["text"]


BAD_BYTE = "\udcff"  # as Python takes the byte ff of a command line


@pytest.mark.parametrize("option", ["--prompt", "--system", "--stop"])
def test_options_that_are_not_utf8_are_refused_before_a_model_is_opened(tmp_path, option):
    (tmp_path / "no-model").mkdir()
    with pytest.raises(AlignError, match=f"{option}: not UTF-8 text") as refusal:
        invoke(generate_command, tmp_path / "no-model", "--prompt", "hello", option, BAD_BYTE)
    assert refusal.value.exit_code == 2


def test_utf8_options_are_read_where_the_system_s_encoding_is_ascii(tiny_llama):
    """There Python takes each byte of a letter beyond ASCII for a stand-in."""
    taken = "Gr\u00fc\u00dfe".encode().decode("ascii", "surrogateescape")
    replies = document(generate_command, tiny_llama, "--prompt", taken, "--max-new-tokens", 2)["replies"]
    assert replies[0]["prompt"] == "Gr\u00fc\u00dfe"


def test_typed_text_that_is_not_utf8_is_refused(tiny_llama, tiny_reward):
    for command, folder in ((chat_command, tiny_llama), (score_command, tiny_reward)):
        with pytest.raises(AlignError, match="input: not UTF-8 text"):
            invoke(command, folder, text=b'{"prompt": "hello \xff", "completion": "a"}\n')
    with pytest.raises(AlignError, match="--system: not UTF-8 text"):
        invoke(chat_command, tiny_llama, "--system", BAD_BYTE)


def test_a_line_that_the_terminal_s_encoding_refuses_is_no_traceback(tiny_llama, monkeypatch):
    monkeypatch.setattr("click.testing._NamedTextIOWrapper.isatty", lambda _self: True, raising=False)

    def typed(_: str) -> str:
        return b"hello \xff".decode("utf-8")

    monkeypatch.setattr("builtins.input", typed)
    with pytest.raises(AlignError, match="the chat's input: not UTF-8 text"):
        invoke(chat_command, tiny_llama)


def test_the_seed_decides_the_sample(tiny_llama):
    def sampled(seed):
        options = ("--prompt", "hello", "--temperature", 1, "--top-k", 50, "--top-p", 0.9, "--max-new-tokens", 12)
        return document(generate_command, tiny_llama, *options, "--seed", seed)["replies"]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_control_characters_of_an_answer_do_not_reach_the_terminal(tiny_llama, monkeypatch):
    from align.rollout.generation import Reply
    from align.use.opened import Policy

    monkeypatch.setattr(Policy, "answer", lambda _, asked, *__: [Reply([5], WRITTEN, True, [0.0])] * len(asked))
    printed = invoke(generate_command, tiny_llama, "--prompt", "a\x1b[2J", "--prompt", "b").stdout
    assert not set(printed) & set("\x1b\x07\x9b")
    assert "red" in printed
    raw = invoke(generate_command, tiny_llama, "--prompt", "a", "--json").stdout
    assert not set(raw) & set("\x1b\x07\x9b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--data", "missing.jsonl"), "there is no file 'missing.jsonl'"),
        (("--prompt", "x", "--top-k", 5), "no effect at temperature 0"),
        (("--prompt", "x", "--max-new-tokens", 0), "max_new_tokens is 0"),
        (("--prompt", "word " * 300), "the model's context of 256"),
    ],
)
def test_generate_refuses_what_it_cannot_do(tiny_llama, arguments, message):
    with pytest.raises(AlignError, match=message):
        invoke(generate_command, tiny_llama, *arguments)


def test_generate_needs_a_prompt_or_a_file_not_both(tiny_llama):
    assert invoke(generate_command, tiny_llama).exit_code == 2
    assert invoke(generate_command, tiny_llama, "--prompt", "x", "--data", "y").exit_code == 2


def test_a_row_without_a_prompt_is_named(tiny_llama, tmp_path):
    with pytest.raises(AlignError, match="row 1 has no prompt"):
        invoke(generate_command, tiny_llama, "--data", rows_file(tmp_path, [{"text": "Only text."}]))
    with pytest.raises(AlignError, match=r"rows\.jsonl:2"):
        invoke(generate_command, tiny_llama, "--data", rows_file(tmp_path, [{"prompt": "a"}, {"note": "b"}]))


def test_a_reward_model_writes_nothing(tiny_reward):
    with pytest.raises(AlignError, match="it writes no text"):
        invoke(generate_command, tiny_reward, "--prompt", "x")


# chat ----------------------------------------------------------------------------------------------------------------


def test_chat_remembers_until_reset_and_says_what_generate_says(tiny_llama):
    def talk(text):
        return invoke(chat_command, tiny_llama, "--temperature", 0, "--max-new-tokens", 6, text=text).stdout

    once = talk("hello\n")
    alone = document(generate_command, tiny_llama, "--prompt", "hello", "--max-new-tokens", 6)["replies"][0]["text"]
    assert once == printable(alone) + "\n"
    assert talk("hello\n/reset\nhello\n/quit\nhello\n") == once * 2
    assert talk("hello\nhello\n") != once * 2, "the second turn sees the first"


def test_chat_goes_on_after_a_question_that_is_too_long(tiny_llama):
    result = invoke(
        chat_command, tiny_llama, "--max-new-tokens", 4, "--temperature", 0, text="word " * 300 + "\n/what\nhello\n"
    )
    assert "context of 256" in result.stderr
    assert "no command '/what'" in result.stderr
    assert (
        result.stdout
        == invoke(chat_command, tiny_llama, "--max-new-tokens", 4, "--temperature", 0, text="hello\n").stdout
    )


# score ---------------------------------------------------------------------------------------------------------------


def test_score_takes_replies_and_pairs_from_files_and_standard_input(tiny_reward, tmp_path):
    rows = document(score_command, tiny_reward, "--data", rows_file(tmp_path, ANSWERS[:1]))["rows"]
    assert rows == document(score_command, tiny_reward, text=json.dumps(ANSWERS[0]))["rows"]
    as_pair = {"prompt": "Who has the key?", "chosen": "The master.", "rejected": "hello"}
    (pair,) = document(score_command, tiny_reward, text=json.dumps(as_pair))["rows"]
    assert pair["chosen"] == pytest.approx(rows[0]["reward"], abs=1e-5)
    assert pair["margin"] == pytest.approx(pair["chosen"] - pair["rejected"])
    plain = invoke(score_command, tiny_reward, "--data", rows_file(tmp_path, PAIRS)).stdout
    assert [len(line.split("\t")) for line in plain.splitlines()] == [3, 3]


def test_messages_and_text_get_the_same_reward(tiny_reward):
    text = {"prompt": "hello", "completion": "hello, world!"}
    rewards = [document(score_command, tiny_reward, text=json.dumps(row))["rows"][0] for row in (text, ANSWERS[1])]
    assert rewards[0]["reward"] == pytest.approx(rewards[1]["reward"], abs=1e-6)


def test_score_refuses_a_model_whose_head_would_be_made_up(tiny_llama, tmp_path):
    with pytest.raises(AlignError, match="not a reward model"):
        invoke(score_command, tiny_llama, "--data", rows_file(tmp_path, PAIRS))


def test_score_refuses_rows_without_reply_and_replies_beyond_the_context(tiny_reward):
    with pytest.raises(AlignError, match="row 1 has no reply"):
        invoke(score_command, tiny_reward, text=json.dumps({"prompt": "x"}))
    with pytest.raises(AlignError, match="model's context is 256"):
        invoke(score_command, tiny_reward, text=json.dumps({"prompt": "x", "completion": "word " * 300}))
    with pytest.raises(AlignError, match="standard input"):
        invoke(score_command, tiny_reward, text='{"prompt": "x", ')


# eval ----------------------------------------------------------------------------------------------------------------


def test_eval_of_answers_gives_likelihood_and_text_metrics(tiny_llama, tmp_path):
    data = rows_file(tmp_path, ANSWERS[:1] * 3)
    found = document(eval_command, tiny_llama, "--data", data, "--max-new-tokens", 6)
    assert found["rows"] == 3
    assert set(found["metrics"]) == {
        "loss", "perplexity", "tokens", "exact_match", "f1", "bleu", "rouge1", "rouge2", "rougel",
    }  # fmt: skip
    assert set(found["metrics"]["loss"]) == {"value", "low", "high", "n"}
    only = document(eval_command, tiny_llama, "--data", data, "--metrics", "perplexity", "--rows", 2)
    assert only["rows"] == 2
    assert set(only["metrics"]) == {"loss", "perplexity", "tokens"}
    table = invoke(eval_command, tiny_llama, "--data", data, "--metrics", "perplexity").stdout
    assert [line.split()[0] for line in table.splitlines()] == ["loss", "perplexity", "tokens"]


def test_eval_of_pairs_ranks_by_likelihood_or_by_reward(tiny_llama, tiny_reward, tmp_path):
    data = rows_file(tmp_path, PAIRS)
    policy = document(eval_command, tiny_llama, "--data", data)["metrics"]
    assert policy["likelihood_accuracy"]["n"] == 2
    reward = document(eval_command, tiny_reward, "--data", data)["metrics"]
    margins = [row["margin"] for row in document(score_command, tiny_reward, "--data", data)["rows"]]
    assert reward["accuracy"]["value"] == sum(margin > 0 for margin in margins) / 2
    assert reward["margin"]["value"] == pytest.approx(sum(margins) / 2, abs=1e-5)
    assert "length_buckets" in invoke(eval_command, tiny_reward, "--data", data).stdout


def test_a_model_wins_half_against_itself(tiny_llama, tiny_reward, tmp_path):
    data = rows_file(tmp_path, [{"prompt": "hello"}, {"prompt": "Who has the key?"}])
    options = ("--against", tiny_llama, "--reward", tiny_reward, "--max-new-tokens", 5)
    assert document(eval_command, tiny_llama, "--data", data, *options)["metrics"]["win_rate"]["value"] == 0.5


def test_a_judge_marks_the_answers(tiny_llama, tmp_path):
    judge = tmp_path / "judge.yaml"
    judge.write_text("answer: {compare: contains}\n")
    rows = [{"prompt": "hello", "expected": {"answer": "no such words"}}]
    found = document(
        eval_command, tiny_llama, "--data", rows_file(tmp_path, rows), "--judge", judge, "--max-new-tokens", 5
    )
    assert found["metrics"]["judge.correct"]["value"] == 0


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        (ANSWERS, ("--metrics", "perplexty"), "no metric 'perplexty'"),
        (PAIRS, ("--metrics", "f1"), "f1 cannot be measured on preference rows"),
        ([{"text": "Only text."}], ("--metrics", "bleu"), "bleu cannot be measured on text rows"),
        ([{"prompt": "x"}], (), "prompt rows say nothing about right answers"),
        ([{"prompt": "x"}], ("--metrics", "judge"), "needs more than rows"),
        (ANSWERS, ("--harness", "mmlu"), "give --data"),
        (ANSWERS, ("--against", "x"), "belong together"),
    ],
)
def test_eval_refuses_before_a_model_is_loaded(tiny_llama, tmp_path, monkeypatch, rows, arguments, message):
    monkeypatch.setattr("align.use.opened.load_policy", lambda *_, **__: pytest.fail("a model was loaded"))
    data = rows_file(tmp_path, rows[:1])
    if "give" in message or "belong" in message:
        result = invoke(eval_command, tiny_llama, "--data", data, *arguments)
        assert result.exit_code == 2
        assert message in result.output
    else:
        with pytest.raises(AlignError, match=message):
            invoke(eval_command, tiny_llama, "--data", data, *arguments)


def test_a_missing_harness_says_how_to_install_it(tiny_llama, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(AlignError, match="not installed") as caught:
        invoke(eval_command, tiny_llama, "--harness", "mmlu")
    assert "align[harness]" in caught.value.hint


def test_held_out_rows_of_a_registered_data_set_are_measured(tiny_llama, tmp_path):
    from align.data.prepare import prepare, write_prepared
    from align.recipe.settings import DataSettings

    file = rows_file(tmp_path, [{"prompt": f"hello {n}", "completion": f"yes {n}"} for n in range(20)])
    prepared = prepare("asked", {"asked": DataSettings(path=file, test_fraction=0.3)}, folder=tmp_path, seed=0)
    registry = Registry.open()
    write_prepared(prepared, registry.home / "aside")
    registry.add_data("harbour/asked", "key", registry.home / "aside", prepared.report.as_dict())
    found = document(eval_command, tiny_llama, "--data", "harbour/asked", "--metrics", "perplexity")
    assert found["rows"] == len(prepared.test)
    with pytest.raises(AlignError, match="harbour/askd"):
        invoke(eval_command, tiny_llama, "--data", "harbour/askd")


# Names of checkpoints ------------------------------------------------------------------------------------------------


def test_a_registered_checkpoint_is_used_by_name_tag_and_id(harbour):
    registry = Registry.open()
    record = registry.checkpoint(harbour)
    registry.tag(harbour, "best")
    for reference in (harbour, f"{harbour}@{record.id[:6]}", "best", record.id[:12], str(record.path)):
        assert Path(resolve(reference).path) == record.path.resolve()
    reply = document(generate_command, harbour, "--prompt", "hello", "--max-new-tokens", 3)["replies"][0]
    assert reply["tokens"] <= 3


@pytest.mark.usefixtures("harbour")
def test_an_unknown_checkpoint_is_answered_with_the_nearest_name():
    with pytest.raises(AlignError, match="harbour/sfd") as caught:
        resolve("harbour/sfd")
    assert "Did you mean 'harbour/sft'" in caught.value.hint
    with pytest.raises(AlignError, match="no such folder"):
        resolve("./nowhere")


def test_asking_for_a_checkpoint_makes_no_registry(align_home):
    with pytest.raises(AlignError):
        resolve("harbour/sft")
    assert not align_home.exists()


def test_a_checkpoint_changed_behind_the_registry_is_refused_by_its_name_and_by_its_path(harbour, tmp_path):
    record = Registry.open().checkpoint(harbour)
    file = record.path / "config.json"
    file.chmod(0o644)
    record.path.chmod(0o755)
    file.write_text(file.read_text().replace("256", "512"))
    (tmp_path / "link").symlink_to(record.path)
    for reference in (harbour, str(record.path), f"{record.path}/.", str(tmp_path / "link")):
        with pytest.raises(AlignError, match=r"harbour/sft.*config\.json"):
            resolve(reference)


def test_a_checkpoint_is_known_by_its_path_where_the_checkpoints_lie_on_another_disk(harbour, align_home, tmp_path):
    (align_home / "checkpoints").rename(tmp_path / "disk")
    (align_home / "checkpoints").symlink_to(tmp_path / "disk")
    record = Registry.open().checkpoint(harbour)
    (record.path / "added").touch()
    with pytest.raises(AlignError, match="added was added"):
        resolve(str(record.path))


def test_a_folder_outside_the_registry_is_used_whatever_became_of_that(harbour, tiny_llama, align_home, tmp_path):
    record = Registry.open().checkpoint(harbour)
    shutil.copytree(record.path, tmp_path / "copy")
    for file in align_home.glob("registry.db-*"):
        file.unlink()
    (align_home / "registry.db").write_bytes(b"not a database, not at all" * 100)
    for folder in (tiny_llama, tmp_path / "copy"):
        assert resolve(str(folder)).path == str(folder.resolve())
    with pytest.raises(AlignError, match=r"registry\.db is damaged"):
        resolve(str(record.path))


def test_another_chat_template_than_the_recorded_one_is_refused(harbour, monkeypatch):
    monkeypatch.setattr("align.chat.templates.template_sha256", lambda _: "0" * 64)
    for reference in (harbour, str(Registry.open().checkpoint(harbour).path)):
        with pytest.raises(AlignError, match="its chat template"):
            resolve(reference)


def test_an_adapter_is_refused_when_its_registered_base_changed(harbour, tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = Registry.open().checkpoint(harbour).path
    run = Registry.open().begin_run(recipe="harbour", stage="a", kind="sft", key="a", settings={}, inputs={}, seed=0)
    with run:
        adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", r=2))
        adapted.save_pretrained(run.artifact)
        AutoTokenizer.from_pretrained(base).save_pretrained(run.artifact)
        run.finish_checkpoint(name="harbour/a", kind="adapter", parents=[], data=[], metrics={}, versions={})
    asked = ("--prompt", "hello", "--max-new-tokens", 6)
    replies = document(generate_command, "harbour/a", *asked)["replies"]
    assert replies == document(generate_command, harbour, *asked)["replies"], "a fresh adapter changes nothing"
    weights = base / "model.safetensors"
    copy = tmp_path / "copy"
    shutil.copy(weights, copy)
    base.chmod(0o755)
    weights.unlink()
    copy.write_bytes(copy.read_bytes()[:-1] + b"\x01")
    shutil.copy(copy, weights)
    with pytest.raises(AlignError, match=r"harbour/sft.*model\.safetensors"):
        resolve("harbour/a")


def test_importing_the_commands_loads_no_torch():
    code = (
        "import sys, align.cli.use; assert not {'torch', 'transformers', 'sqlalchemy', 'evaluate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
