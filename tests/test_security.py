"""What must not happen whatever a model, a data file, a template or the environment holds: code run, secrets kept, files open to all."""

from __future__ import annotations

import ast
import os
import pickle
import re
import shutil
import signal
import stat
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import align
from align.chat import guard, rendering
from align.chat.rendering import Renderer
from align.chat.templates import prepare_tokenizer
from align.cli.main import keep_others_out, main
from align.data.examples import Message
from align.errors import AlignError, Interrupted
from align.models.folders import load_tokenizer
from align.models.loading import load_policy
from align.models.source import source_of
from align.progress import Progress
from align.registry import Registry
from align.state import mark_complete, step_of
from align.stopping import signals_handled
from align.trainer import train
from tests.registry_fill import add_checkpoint, add_data
from tests.test_trainer import StopsAfter, task

PACKAGE = Path(align.__file__).parent
AROUND = Path(__file__).parent / "bad_inputs" / "around"
TURNS = (Message("user", "question"), Message("assistant", "answer"))


# Code ------------------------------------------------------------------------------------------------------------------

FORBIDDEN_MODULES = {"pickle", "marshal", "shelve", "dill", "joblib", "tarfile", "zipfile", "telnetlib", "ftplib"}
TO_ITS_OWN_WORKERS = {
    "processes.py",
    "worker.py",
}  # of align/launch: objects between one run's processes, read by no other
FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "shutil.unpack_archive", "torch.load", "yaml.load",
    "yaml.unsafe_load", "yaml.full_load", "jinja2.Environment", "Environment", "numpy.load", "np.load",
    "subprocess.getoutput", "subprocess.getstatusoutput", "pandas.read_pickle", "pd.read_pickle", "runpy.run_path",
}  # fmt: skip


@cache
def syntax_trees() -> list[tuple[Path, ast.Module]]:
    return [(file, ast.parse(file.read_text(encoding="utf-8"))) for file in sorted(PACKAGE.rglob("*.py"))]


def test_no_module_of_ours_unpickles_unpacks_evaluates_or_starts_a_shell() -> None:
    found = []
    for file, tree in syntax_trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [name.name for name in node.names]
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{name}" for name in names]
                forbidden = [name for name in names if name.partition(".")[0] in FORBIDDEN_MODULES]
                found += [f"{file.name}: {name}" for name in forbidden]
                found += [f"{file.name}: {name}" for name in names if name in FORBIDDEN_CALLS]
            if isinstance(node, ast.Call):
                name = ast.unparse(node.func)
                shell = any(word.arg == "shell" for word in node.keywords)
                unsafe = any(
                    word.arg == "weights_only" and ast.unparse(word.value) == "False" for word in node.keywords
                )
                found += [f"{file.name}:{node.lineno}: {name}"] * (name in FORBIDDEN_CALLS or shell or unsafe)
    pickling = {f"{file}: pickle" for file in TO_ITS_OWN_WORKERS}
    assert [one for one in found if one not in pickling] == []


SERVERS = {  # modules that others could connect to, and the names of calls that let them
    "http.server", "socketserver", "xmlrpc", "wsgiref", "flask", "fastapi", "starlette", "uvicorn", "hypercorn", "gunicorn",
    "aiohttp", "tornado", "bottle", "django", "gradio", "streamlit", "dash", "grpc", "zmq", "multiprocessing.managers",
}  # fmt: skip
LISTENING = {"listen", "create_server", "start_server", "start_unix_server", "create_unix_server", "serve_forever"}


def test_no_module_of_ours_is_a_server() -> None:
    """The report is a file, and what is asked is asked of others."""
    found, seen = [], set()
    for file, tree in syntax_trees():
        for node in ast.walk(tree):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [name.name for name in node.names]
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name.name}" for name in node.names]
            seen.update(names)
            found += [f"{file.name}: {name}" for name in names if any(f"{name}.".startswith(f"{s}.") for s in SERVERS)]
            if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in LISTENING:
                found.append(f"{file.name}:{node.lineno}: {ast.unparse(node.func)}")
    assert "socket" in seen, "of what asks servers, so names are found"
    assert found == []


def test_code_of_a_model_is_only_trusted_where_a_recipe_names_it() -> None:
    """Every `trust_remote_code=` passes on what the recipe says; none says yes by itself."""
    said = [
        ast.unparse(word.value)
        for _, tree in syntax_trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        for word in node.keywords
        if word.arg == "trust_remote_code"
    ]
    assert len(said) > 5
    assert [value for value in said if re.fullmatch(r"([a-z]+\.)*trust_remote_code", value) is None] == []


class Payload:
    """Leaves a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_the_payload_of_these_tests_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "ran")))  # noqa: S301  # ours
    assert (tmp_path / "ran").is_dir()


def test_pickles_beside_the_weights_are_never_opened(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    for name in (
        "pytorch_model.bin",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "vhead.bin",
    ):
        (folder / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    load_policy(source_of(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_pickle_in_a_saved_state_is_not_run_by_whoever_resumes(tiny_llama: Path, tmp_path: Path, name: str) -> None:
    with signals_handled(), pytest.raises(Interrupted):
        train(task(tiny_llama, tmp_path / "state"), StopsAfter(2, signal.SIGTERM))
    (state,) = (tmp_path / "state").glob("checkpoint-*")
    assert (state / name).is_file()
    (state / name).write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    mark_complete(tmp_path / "state", step_of(state))  # who can change the state can mend its hashes too
    with pytest.raises(Exception, match=r"(?i)weights.only|unpickl|unsupported"):
        train(task(tiny_llama, tmp_path / "state"), Progress())
    assert not (tmp_path / "ran").exists()


# Templates -------------------------------------------------------------------------------------------------------------

GOOD = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
ESCAPES = [
    "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ joiner.__init__.__globals__.os.environ }}",
    "{{ lipsum.__globals__ }}",
    "{{ self.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "{{ '{m.__class__}'.format_map({'m': messages}) }}",
    "{{ messages|attr('__class__') }}",
    "{{ ['__cl', 'ass__']|join|list and messages['__cl' ~ 'ass__'] }}",
    "{% set x = messages.append(messages[0]) %}",
    "{% set x = messages[0].update({'content': 'other'}) %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
    "{% extends '/etc/passwd' %}",
    "{{ range(999999999)|list }}",
    "{{ 1 // 0 }}",
    "{{ messages[0]['role'] + 1 }}",
    "{% macro a(n) %}{{ a(n) }}{% endmacro %}{{ a(1) }}",
    "{{ 'a'.encode('nonsense') }}",
    "{{ {}.popitem() }}",
]


@pytest.mark.parametrize("escape", ESCAPES)
def test_no_template_reaches_out_of_its_sandbox(escape: str, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either it is refused in words, or it renders as if the attempt were not there."""
    monkeypatch.setattr(rendering, "guard", str)  # has tests of its own: it takes a process for each
    monkeypatch.setenv("SECRET", "hunter2")
    tokenizer = load_tokenizer(source_of(tiny_llama))
    text, refusal = "", None
    try:
        prepare_tokenizer(tokenizer, escape + GOOD)
        text = Renderer(tokenizer).conversation(TURNS).text
    except AlignError as error:
        refusal = error
    assert refusal is not None or text.replace("</s>", "").endswith("<|user|>question<|assistant|>answer")
    assert refusal is None or refusal.hint
    text += str(refusal)
    assert "hunter2" not in text
    assert "root:" not in text
    assert "subprocess" not in text


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "bomb",
    [
        "{% for a in range(90000) %}{% for b in range(90000) %}{% for c in range(90000) %}{% endfor %}{% endfor %}{% endfor %}",
        "{{ 'a' * 100000000000 }}",
        "{{ ['a' * 100000] * 100000000 }}",
        "{% for i in range(90000) %}" + "x" * 100 + "{% endfor %}",
        "{{ (9 ** 9 ** 9) }}",
        "{% macro a(n) %}{{ a(n) }}{{ a(n) }}{% endmacro %}{{ a(1) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'x'|center(9999999999) }}",
        "{{ lipsum(n=100000) }}",
    ],
)
def test_every_bomb_ends_within_the_limits(bomb: str) -> None:
    """Refused for its cost, or it fails to render, which whoever renders it next says."""
    refusal = ""
    try:
        guard.guard(bomb + GOOD)
    except AlignError as error:
        refusal = error.message
    assert not refusal or "takes too much" in refusal


@pytest.mark.slow
@pytest.mark.parametrize(
    ("bomb", "why"),
    [
        ("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", "more than 2 seconds or 512 MiB"),
        ("{% set x = messages[0].content * 90000000 %}", "more than 2 seconds or 512 MiB"),
        ("{% for i in range(90000) %}" + "x" * 100 + "{% endfor %}", "more than 1,000,000 characters of output"),
        (" " * 1_000_001, "1,000,001 characters long"),
    ],
    ids=["time", "memory", "output", "size"],
)  # fmt: skip
def test_each_limit_is_the_one_that_stops_what_it_is_for(bomb: str, why: str) -> None:
    with pytest.raises(AlignError, match=why):
        guard.guard(bomb)


# Secrets and files -----------------------------------------------------------------------------------------------------

SECRETS = {
    "HF_TOKEN": "hf_SecretOfTheHub123", "OPENAI_API_KEY": "sk-SecretOfTheCritic123", "WANDB_API_KEY": "SecretOfTheLogger123",
    "AWS_SECRET_ACCESS_KEY": "SecretOfTheCloud123", "MY_PASSWORD": "SecretOfMine123",
}  # fmt: skip


@pytest.fixture
def work(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe that can run and a registry of its own."""
    folder = Path(shutil.copytree(AROUND, tmp_path / "work"))
    shutil.copytree(tiny_llama, folder / "model")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("ALIGN_HOME", str(folder / "home"))
    monkeypatch.setenv("ALIGN_ALLOCATOR", "system")
    return folder


def ran(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["align", *words])
    main()


def test_secrets_of_the_environment_are_kept_nowhere_and_no_file_is_open_to_all(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """After a whole run in a shell with umask 0: its registry, logs, states, report and words."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    before = os.umask(0)
    try:
        ran(monkeypatch, "run", "recipe.yaml", "--stage", "sft")
        ran(monkeypatch, "runs", "list", "--json")
        ran(monkeypatch, "doctor")
    finally:
        os.umask(before)
    said = capfd.readouterr()
    files = [path for path in (work / "home").rglob("*") if path.is_file()]
    assert len(files) > 10
    kept = b"".join(path.read_bytes() for path in files) + f"{said.out}{said.err}".encode()
    assert b"good/sft" in kept
    assert [name for name, value in SECRETS.items() if value.encode() in kept] == []
    assert open_to_all(work / "home") == []


def open_to_all(folder: Path) -> list[str]:
    return [str(path) for path in (folder, *folder.rglob("*")) if path.lstat().st_mode & stat.S_IWOTH]


def test_a_registry_filled_under_umask_0_is_not_open_to_all(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        keep_others_out()
        registry = Registry.open(tmp_path / "home")
        add_data(registry)
        add_checkpoint(registry)
    finally:
        os.umask(before)
    assert open_to_all(tmp_path / "home") == []


def test_the_users_own_umask_is_only_made_stricter() -> None:
    before = os.umask(0o077)
    try:
        keep_others_out()
        assert os.umask(0) == 0o077
        keep_others_out()
        assert os.umask(0) == stat.S_IWOTH
    finally:
        os.umask(before)


def test_loading_damaged_weights_is_refused_with_the_file(tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "model"))
    torch.save({"w": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(AlignError, match=r"model\.safetensors: cannot be opened"):
        source_of(folder)
