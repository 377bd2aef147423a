"""The critique stage with a critic behind a real server: rows finish one by one, and a failure loses none of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from align.critique.rows import RowFile
from align.errors import AlignError, StageFailed
from align.plan import plan
from tests.critique_kit import CRITIQUE, Port, brisk_llama, mending, port_in
from tests.endpoint_server import EndpointServer, Fault

BUDGET = "stages.x.critic.token_budget"


@pytest.fixture(scope="module")
def brisk(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return brisk_llama(tiny_tokenizer, tmp_path_factory.mktemp("brisk"))


def content(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"])


def chances(body: dict[str, Any]) -> list[tuple[str, float]]:
    """Sure of the revision, in either order, and undecided between two answers."""
    first = content(body).partition("|B:")[0]
    return [("A", -0.1), ("B", -3.0)] if " better " in first else [("A", -3.0), ("B", -0.1)]


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer() as server:
        server.reply = lambda body: mending(content(body)) if "|" in content(body) else "Hello"
        server.top_logprobs = chances
        yield server


def served(folder: Path, brisk: Path, server: EndpointServer, **more: Any) -> Port:
    """A stage whose critic is behind the server."""
    keys = {"kind": "endpoint", "url": server.url, "model": "tiny", "retries": 0, "concurrency": 3, **more}
    critic = ", ".join(f"{key}: {value}" for key, value in keys.items())
    return port_in(folder, brisk, {"x": CRITIQUE.replace("{", f"{{critic: {{{critic}}}, ").replace("samples: 3, ", "")})


def fails_after(server: EndpointServer, answers: int, fault: Fault) -> None:
    """Answers so many critiques and revisions, and then nothing but the fault."""
    mend, left = server.reply, [answers]

    def reply(body: dict[str, Any]) -> str:
        left[0] -= "|" in content(body)
        if left[0] == 0:
            server.faults.extend([fault] * 1000)
        return mend(body)

    server.reply = reply


def prompts_asked(server: EndpointServer) -> set[str]:
    return {content(seen.body).split("|")[0] for seen in server.chats if "|" in content(seen.body)}


def finished(port: Port) -> dict[int, str]:
    """Prompts of the rows that a stopped run has on file."""
    (file,) = (port.folder / "home" / "runs").glob("*/state/rows.jsonl")
    return {index: row.prompt[-1].content for index, row in RowFile(file).rows.items()}


def made(port: Port) -> tuple[str, str]:
    registry = port.workshop().registry
    return registry.data("port/x.sft").id, registry.data("port/x.preferences").id


@pytest.mark.parametrize(
    ("fault", "kind", "code"), [(Fault(500), StageFailed, 1), (Fault(401), AlignError, 2), (Fault(429), StageFailed, 1)]
)
def test_a_failure_in_the_middle_keeps_finished_rows_and_the_same_command_makes_the_others(
    brisk: Path, tmp_path: Path, server: EndpointServer, fault: Fault, kind: type[AlignError], code: int
) -> None:
    port, whole = served(tmp_path / "a", brisk, server), served(tmp_path / "b", brisk, server, concurrency=1)
    whole.run()
    fails_after(server, 16, fault)
    with pytest.raises(kind) as failure:
        port.run()
    assert failure.value.exit_code == code
    assert server.url in failure.value.message
    kept = finished(port)
    assert 0 < len(kept) < 9
    server.faults.clear()
    server.seen.clear()
    server.reply = lambda body: mending(content(body)) if "|" in content(body) else "Hello"
    assert port.run() == {"x": "resume"}
    assert not prompts_asked(server) & set(kept.values())
    assert len(prompts_asked(server)) > 0
    assert made(port) == made(whole)


def test_a_budget_that_is_used_up_keeps_the_rows_and_a_larger_one_goes_on(
    brisk: Path, tmp_path: Path, server: EndpointServer
) -> None:
    port = served(tmp_path, brisk, server)
    with pytest.raises(StageFailed, match="token_budget is used up") as failure:
        port.run(f"{BUDGET}=300")
    assert failure.value.exit_code == 1
    assert 0 < len(finished(port)) < 10
    assert port.run(f"{BUDGET}=100000") == {"x": "resume"}


def test_how_the_server_is_asked_is_no_part_of_what_is_made(
    brisk: Path, tmp_path: Path, server: EndpointServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-key-of-someone")
    port = served(tmp_path, brisk, server)
    port.run()
    for change in (
        "concurrency=1", "retries=3", "timeout_seconds=9.0", "token_budget=5", "requests_per_minute=60", "key_env=SOME_KEY"
    ):  # fmt: skip
        assert [stage.action for stage in plan(port.workshop(f"stages.x.critic.{change}"))] == ["reuse"], change
    for change in ("model=other", "url=http://localhost:1/v1"):
        assert [stage.action for stage in plan(port.workshop(f"stages.x.critic.{change}"))] == ["run"], change


def test_the_key_stands_nowhere_in_the_registry(
    brisk: Path, tmp_path: Path, server: EndpointServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOME_KEY", "secret-key-of-someone")
    server.key = "secret-key-of-someone"
    served(tmp_path, brisk, server, key_env="SOME_KEY").run()
    files = [file for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert len(files) > 5
    assert not [file for file in files if b"secret-key-of-someone" in file.read_bytes()]


def test_a_server_that_is_down_is_told_before_anything_is_made(
    brisk: Path, tmp_path: Path, server: EndpointServer
) -> None:
    port = served(tmp_path, brisk, server, url="http://127.0.0.1:9/v1")
    with pytest.raises(StageFailed, match=r"127\.0\.0\.1:9"):
        port.run()
    assert port.workshop().registry.all_runs() == []


def test_a_server_without_log_probabilities_is_refused_where_they_are_needed(
    brisk: Path, tmp_path: Path, server: EndpointServer
) -> None:
    server.top_logprobs = None
    port = served(tmp_path, brisk, server)
    with pytest.raises(AlignError, match="gives no log-probabilities") as refusal:
        port.run()
    assert refusal.value.exit_code == 2
    assert port.run("stages.x.check_revisions=false") == {"x": "run"}


def test_what_is_made_already_asks_no_server(brisk: Path, tmp_path: Path, server: EndpointServer) -> None:
    port = served(tmp_path, brisk, server)
    port.run()
    server.seen.clear()
    assert port.run() == {"x": "reuse"}
    assert server.seen == []
