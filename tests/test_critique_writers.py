"""Writers and critics: replies of a model here and of one behind a server, and chances from option log-probabilities."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from align.critique.critics import Case, Contest, JudgeCritic, TextCritic
from align.critique.endpoint import Endpoint
from align.critique.writers import EndpointWriter, LocalWriter, in_threads
from align.data.examples import Message
from align.errors import StageFailed
from align.judge import Judge
from align.models.source import source_of
from align.progress import Progress
from align.recipe.critique_settings import EndpointCritic
from align.stages.critique import open_writer
from tests.critique_kit import JUDGE, Scripted, brisk_llama, constitution, said
from tests.endpoint_server import NULL_CONTENT, EndpointServer, Fault

RULES = constitution()
REQUESTS = [said("is a or b"), said("b"), (*said("one"), Message("assistant", "two"), *said("three and more words"))]


@pytest.fixture(scope="module")
def writer(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> LocalWriter:
    folder = brisk_llama(tiny_tokenizer, tmp_path_factory.mktemp("brisk"), context=128)
    return open_writer(source_of(folder), Progress())[0]


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer() as server:
        yield server


def behind(server: EndpointServer, **changes: Any) -> EndpointWriter:
    settings = EndpointCritic(**{"kind": "endpoint", "url": server.url, "model": "tiny", **changes})
    return EndpointWriter(Endpoint.open(settings, pause=lambda _: None), settings.concurrency)


def option_logp(writer: LocalWriter, request: tuple[Message, ...], option: str, *, whole: bool) -> float:
    """Log-probability of an option as the reply, from a plain forward; whole: of all its tokens and the stop token."""
    tokenizer: Any = writer.tokenizer
    rows = [message.row() for message in request]
    prompt = tokenizer.apply_chat_template(rows, add_generation_prompt=True, return_dict=False)
    word = tokenizer.encode(option, add_special_tokens=False)
    reply = [*word, tokenizer.eos_token_id] if whole else word[:1]
    with torch.no_grad():
        logps = writer.model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0].log_softmax(-1)
    return sum(logps[len(prompt) - 1 + place, token].item() for place, token in enumerate(reply))


@pytest.mark.parametrize(("options", "whole"), [(("A", "B"), False), (("aa", "ab"), True), (("ab", "a"), True)])
def test_chances_are_those_of_a_plain_forward(writer: LocalWriter, options: tuple[str, str], whole: bool) -> None:
    found = writer.choose(REQUESTS, options)
    for request, chance in zip(REQUESTS, found, strict=True):
        first, second = (option_logp(writer, request, option, whole=whole) for option in options)
        assert chance == pytest.approx(1 / (1 + math.exp(second - first)), rel=1e-3)
    assert len(set(found)) == len(REQUESTS)


def test_options_in_the_other_order_have_the_other_chance(writer: LocalWriter) -> None:
    pairs = zip(writer.choose(REQUESTS, ("A", "B")), writer.choose(REQUESTS, ("B", "A")), strict=True)
    assert all(one is not None and two is not None and one + two == pytest.approx(1) for one, two in pairs)


def test_requests_longer_than_the_context_are_none_and_the_others_are_as_before(writer: LocalWriter) -> None:
    long = said("x " * 80)
    assert writer.choose([long, *REQUESTS], ("A", "B"))[1:] == pytest.approx(writer.choose(REQUESTS, ("A", "B")))
    assert writer.choose([long], ("A", "B")) == writer.write([long], 8) == [None]
    written = writer.write([REQUESTS[0], long, REQUESTS[1]], 8)
    assert [one is None for one in written] == [False, True, False]
    assert writer.write([], 8) == writer.choose([], ("A", "B")) == []


def test_a_reply_has_to_fit_beside_its_prompt(writer: LocalWriter) -> None:
    length = len(writer.encoder.prompt(REQUESTS[0]))
    assert [one is None for one in writer.write(REQUESTS[:1], 128 - length)] == [False]
    assert writer.write(REQUESTS[:1], 129 - length) == [None]


def test_sampled_replies_depend_on_the_seed_alone(writer: LocalWriter) -> None:
    requests = [said(f"say {word}") for word in "abcdefgh"]
    first, again, other = (writer.write(requests, 8, temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    assert writer.write(requests, 8, seed=1) == writer.write(requests, 8, seed=2)
    assert {one.finished for one in first if one} == {True, False} or len({one.text for one in first if one}) > 3


def test_replies_cut_at_the_limit_are_not_finished(writer: LocalWriter) -> None:
    requests = [said(f"say {word}") for word in "abcd"]
    for whole, cut in zip(writer.write(requests, 40), writer.write(requests, 1), strict=True):
        assert whole is not None
        assert cut is not None
        assert cut.text == whole.text[:1]
        assert cut.finished == (not whole.text)


# Behind a server -----------------------------------------------------------------------------------------------------


def test_replies_of_a_server_come_in_the_order_of_the_requests(server: EndpointServer) -> None:
    def reply(body: dict[str, Any]) -> str:
        text: str = body["messages"][-1]["content"]
        time.sleep(0.05 if text.endswith("0") else 0)
        return f" {text.upper()} \n"

    server.reply = reply
    found = behind(server, concurrency=4).write([said(f"q{number}") for number in range(6)], 8)
    assert [one.text for one in found if one] == [f"Q{number}" for number in range(6)]
    assert 1 < server.most_at_once <= 4


def test_half_characters_and_nul_of_a_server_do_not_reach_the_data(server: EndpointServer) -> None:
    server.reply = lambda _: "one\ud83dtwo\0 \ud83d\ude00"
    (found,) = behind(server).write([said("q")], 8)
    assert found is not None
    assert found.text == "one\ufffdtwo\ufffd \U0001f600"
    found.text.encode()


def test_a_reply_that_the_server_cut_is_not_finished(server: EndpointServer) -> None:
    body = NULL_CONTENT.body.replace("null", '"half of it"')
    server.faults.append(Fault(body=body))
    (found,) = behind(server).write([said("q")], 8)
    assert found is not None
    assert (found.text, found.finished) == ("half of it", False)


@pytest.mark.parametrize(
    ("listed", "chance"),
    [
        ([("A", -0.5), ("B", -1.5)], 1 / (1 + math.exp(-1.0))),
        ([("B", -0.1), (" A", -2.1)], 1 / (1 + math.exp(2.0))),
        ([("The", -0.1)], 0.5),
    ],
)
def test_a_servers_chances_come_from_its_log_probabilities(
    server: EndpointServer, listed: list[tuple[str, float]], chance: float
) -> None:
    server.top_logprobs = listed
    assert behind(server).choose([said("q")], ("A", "B")) == [pytest.approx(chance)]


# Many at once --------------------------------------------------------------------------------------------------------


def test_the_first_error_ends_work_that_has_not_begun() -> None:
    begun: list[int] = []

    def work(number: int) -> int:
        begun.append(number)
        if number == 1:
            raise StageFailed("down")
        time.sleep(0.02)
        return number

    with pytest.raises(StageFailed, match="down"):
        in_threads(work, range(200), 2, lambda: pytest.fail("ended for an error of its own"))
    assert len(begun) < 50


def test_a_second_ctrl_c_ends_what_is_under_way() -> None:
    woken, started = threading.Event(), time.monotonic()
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        in_threads(lambda _: woken.wait(9), [1, 2, 3], 2, woken.set)
    assert time.monotonic() - started < 5


# Critics -------------------------------------------------------------------------------------------------------------


def test_a_text_critic_asks_in_the_words_of_the_constitution() -> None:
    script = Scripted(lambda text: f"[{text}]")
    critic, case = TextCritic(script, RULES, 8), Case(said("q"), "a", RULES.principles[1], "bad")
    assert [one.text for one in critic.critiques([case]) if one] == ["[q|a|plain?]"]
    assert [one.text for one in critic.revisions([case]) if one] == ["[q|a|bad|plainer]"]
    contest = Contest(said("q"), "a", "b", RULES.principles[1])
    assert critic.choices([contest, contest.swapped()]) == [0.9, 0.9]
    assert script.asked[2:] == ["q|A:a|B:b|which is plain", "q|A:b|B:a|which is plain"]


def test_a_judge_finds_what_its_rules_say_and_chooses_exactly(tmp_path: Path) -> None:
    (tmp_path / "judge.yaml").write_text(JUDGE)  # calm: no a; plain: no b; brief: no c
    judge = JudgeCritic(Judge.load(tmp_path / "judge.yaml"), TextCritic(Scripted(lambda _: "x"), RULES, 8))
    calm = RULES.principles[0]
    told = judge.critiques([Case(said("q"), text, calm) for text in ("a", "b", "o")])
    assert [one.text for one in told if one] == ["It breaks this principle: Keeps calm.", "", ""]
    assert not RULES.finds_nothing("It breaks this principle: Keeps calm.")
    pairs = [("o", "a"), ("a", "o"), ("o", "b"), ("b", "o"), ("o", "u"), ("a", "ab"), ("b", "a")]
    found = judge.choices([Contest(said("q"), *pair, calm) for pair in pairs])
    assert found == [1.0, 0.0, 1.0, 0.0, 0.5, 0.5, 1.0]
    assert [one.text for one in judge.revisions([Case(said("q"), "a", calm, "bad")]) if one] == ["x"]
