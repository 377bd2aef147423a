"""The client of an OpenAI-compatible server, against a real server on loopback that misbehaves."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.critique.endpoint import Endpoint
from align.critique.endpoint_answers import NoLogprobs, Nonsense, first_choice, first_token_logps, option_values, parsed
from align.critique.endpoint_limits import Pace
from align.critique.endpoint_wire import Reply
from align.data.examples import Message
from align.errors import AlignError, StageFailed
from align.recipe.critique_settings import EndpointCritic
from tests.endpoint_server import CUT, EMPTY_CHOICES, NO_CHOICES, NO_JSON, NULL_CONTENT, EndpointServer, Fault

ASK = (Message("user", "Is it kind? Answer A or B."),)
SECRET = "sk-proj-4Zq81LwvNc0TtYx7RbHd"


@pytest.fixture
def server() -> Iterator[EndpointServer]:
    with EndpointServer() as server:
        yield server


def settings_of(url: str, **changes: Any) -> EndpointCritic:
    return EndpointCritic(**{"kind": "endpoint", "url": url, "model": "tiny", "timeout_seconds": 5.0, **changes})


def opened(server: EndpointServer, pauses: list[float] | None = None, **changes: Any) -> Endpoint:
    """An endpoint that notes its pauses and does not wait."""
    return Endpoint.open(settings_of(server.url, **changes), pause=(pauses if pauses is not None else []).append)


def failure_of(call: Callable[[], object]) -> AlignError:
    with pytest.raises(AlignError) as caught:
        call()
    return caught.value


def test_a_request_holds_what_was_asked_and_the_answer_comes_back(server: EndpointServer) -> None:
    server.reply = lambda body: body["messages"][-1]["content"].upper()
    with opened(server) as endpoint:
        assert endpoint.reply(ASK, max_tokens=7, temperature=0.5, seed=3)[0] == "IS IT KIND? ANSWER A OR B."
    body = server.chats[0].body
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("tiny", 7, 0.5, 3)
    assert body["messages"] == [{"role": "user", "content": ASK[0].content}]
    assert "authorization" not in server.chats[0].headers


def test_half_characters_in_a_prompt_are_sent_and_are_no_crash(server: EndpointServer) -> None:
    with opened(server) as endpoint:
        assert endpoint.reply((Message("user", "a \ud83d b"),), max_tokens=2)[0] == "fine"
    assert server.chats[0].body["messages"][0]["content"] == "a \ud83d b"


def test_tokens_are_counted_by_the_server_or_else_estimated(server: EndpointServer) -> None:
    with opened(server) as endpoint:
        endpoint.reply(ASK, max_tokens=7)
        assert endpoint.used_tokens == 10
        server.total_tokens = None
        server.reply = lambda _: "x" * 40
        endpoint.reply(ASK, max_tokens=7)
    assert endpoint.used_tokens == 10 + (len(ASK[0].content) // 4 + 1) + (40 // 4 + 1)


@pytest.mark.parametrize(
    "fault",
    [*map(Fault, (408, 409, 429, 500, 502, 503)), CUT, NO_JSON, NO_CHOICES, EMPTY_CHOICES, NULL_CONTENT],
    ids=["408", "409", "429", "500", "502", "503", "cut", "no json", "no choices", "empty choices", "null content"],
)
def test_what_fails_for_a_moment_is_tried_again_until_it_works(server: EndpointServer, fault: Fault) -> None:
    server.faults.extend([fault] * 3)
    pauses: list[float] = []
    with opened(server, pauses) as endpoint:
        assert endpoint.reply(ASK, max_tokens=4)[0] == "fine"
    assert len(server.chats) == endpoint.requests == 4
    assert [1 <= pauses[0] <= 2, 2 <= pauses[1] <= 3, 4 <= pauses[2] <= 5] == [True] * 3  # doubled, with jitter


@pytest.mark.parametrize("fault", [Fault(503), CUT, NULL_CONTENT])
@pytest.mark.parametrize("retries", [0, 2])
def test_after_the_last_try_the_stage_fails_and_says_where_and_how_often(
    server: EndpointServer, fault: Fault, retries: int
) -> None:
    server.faults.extend([fault] * 9)
    with opened(server, retries=retries) as endpoint:
        error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
    assert isinstance(error, StageFailed)
    assert len(server.chats) == retries + 1
    assert server.url in str(error)
    assert f"in {retries + 1} tr" in str(error)
    assert "Finished rows are kept" in error.hint
    assert {503: "out of order", 200: "no whole answer"}.get(fault.status, "") in str(error) or "without text" in str(
        error
    )


@pytest.mark.parametrize(("status", "advice"), [(429, "requests_per_minute"), (500, "server's log")])
def test_the_hint_fits_what_went_wrong(server: EndpointServer, status: int, advice: str) -> None:
    server.faults.append(Fault(status))
    with opened(server, retries=0) as endpoint:
        assert advice in failure_of(lambda: endpoint.reply(ASK, max_tokens=4)).hint


def test_retry_after_is_honoured_in_seconds_and_as_a_date(server: EndpointServer) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=40), usegmt=True)
    server.faults.extend([Fault(429, headers={"Retry-After": "17"}), Fault(503, headers={"Retry-After": date})])
    pauses: list[float] = []
    with opened(server, pauses) as endpoint:
        assert endpoint.reply(ASK, max_tokens=4)[0] == "fine"
    assert pauses[0] == 17
    assert 30 < pauses[1] <= 40


def test_a_server_that_wants_hours_of_rest_is_given_up_at_once(server: EndpointServer) -> None:
    server.faults.append(Fault(429, headers={"Retry-After": "7200"}))
    pauses: list[float] = []
    with opened(server, pauses) as endpoint:
        assert "7200 seconds" in failure_of(lambda: endpoint.reply(ASK, max_tokens=4)).hint
    assert pauses == []


@pytest.mark.parametrize(
    "value", ["", "soon", "-3", "nan", "inf", "Tue, 99 Foo", "9" * 400, "Mon, 01 Jan 2001 00:00:00 GMT"]
)
def test_a_retry_after_that_says_nothing_asks_for_no_pause(value: str) -> None:
    assert Reply(429, {"retry-after": value}, "").pause == 0


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 413, 422])
def test_a_refusal_is_the_users_to_mend_and_is_not_tried_again(server: EndpointServer, status: int) -> None:
    server.faults.append(Fault(status))
    pauses: list[float] = []
    with opened(server, pauses) as endpoint:
        error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
    assert error.exit_code == 2
    assert len(server.chats) == 1
    assert pauses == []
    assert server.url in error.message
    assert "'tiny'" in error.message
    assert str(status) in error.message
    assert error.hint


def test_the_words_of_the_server_are_shown_short_and_without_control_characters(server: EndpointServer) -> None:
    server.faults.append(Fault(400, '{"error": {"message": "context length is 2048\\u001b[31m\\n' + "!" * 9000 + '"}}'))
    with opened(server) as endpoint:
        error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
    assert "context length is 2048" in error.message
    assert "\x1b" not in error.message
    assert len(error.message) < 500


def test_a_slow_server_is_given_up_after_the_timeout_and_asked_again(server: EndpointServer) -> None:
    server.delay_seconds = 0.6
    with opened(server, timeout_seconds=0.2, retries=1) as endpoint:
        error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
    assert "no whole answer within 0.2 seconds" in error.message
    assert len(server.chats) == 2
    assert endpoint.used_tokens == 2 * (len(ASK[0].content) // 4 + 1)  # both prompts were read, as far as we know


def test_an_answer_that_drips_does_not_outlast_the_timeout(server: EndpointServer) -> None:
    server.faults.append(Fault(body=CUT.body * 4, drip_seconds=0.05))
    started = time.monotonic()
    with opened(server, timeout_seconds=0.3, retries=0) as endpoint:
        assert "no whole answer within" in failure_of(lambda: endpoint.reply(ASK, max_tokens=4)).message
    assert time.monotonic() - started < 2


def test_no_connection_is_tried_again_and_costs_no_tokens() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with Endpoint.open(settings_of(url, retries=3, token_budget=100), pause=lambda _: None) as endpoint:
        error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
    assert isinstance(error, StageFailed)
    assert "no connection" in error.message
    assert "4 tries" in error.message
    assert (endpoint.requests, endpoint.used_tokens) == (4, 0)


def test_no_more_requests_are_under_way_than_concurrency_says(server: EndpointServer) -> None:
    server.delay_seconds = 0.05
    with opened(server, concurrency=3) as endpoint, ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(lambda _: endpoint.reply(ASK, max_tokens=4)[0], range(18)))
    assert answers == ["fine"] * 18
    assert 1 < server.most_at_once <= 3


def test_one_request_at_a_time_can_still_look_up_the_names_of_models(server: EndpointServer) -> None:
    with opened(server, concurrency=1, model="tinny") as endpoint:
        error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
    assert "Did you mean 'tiny'?" in error.hint


def test_places_are_evenly_spaced_and_none_is_saved_up(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter([100.0, 100.0, 101.5, 150.0, 150.0])
    monkeypatch.setattr("align.critique.endpoint_limits.time", SimpleNamespace(monotonic=lambda: next(moments)))
    pace = Pace(30)
    assert [pace.delay() for _ in range(5)] == [0, 2, 2.5, 0, 2]


def test_requests_of_many_threads_keep_to_the_pace(server: EndpointServer) -> None:
    started = time.monotonic()
    endpoint = Endpoint.open(settings_of(server.url, requests_per_minute=1200))  # 0.05 s
    with endpoint, ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda _: endpoint.reply(ASK, max_tokens=4), range(6)))
    assert max(seen.at for seen in server.chats) - started >= 0.05 * 5


def test_tries_keep_to_the_pace_too(server: EndpointServer) -> None:
    server.faults.extend([Fault(500)] * 2)
    pauses: list[float] = []
    with opened(server, pauses, requests_per_minute=1) as endpoint:
        endpoint.reply(ASK, max_tokens=4)
    assert [pause > 50 for pause in pauses] == [False, True, False, True]  # growing, pace, growing, pace


def test_the_token_budget_holds_across_threads(server: EndpointServer) -> None:
    server.delay_seconds = 0.01
    server.total_tokens = 11  # 7 of the prompt and 4 of the answer, as much as was promised
    errors: list[AlignError] = []
    with opened(server, token_budget=60, concurrency=4) as endpoint:

        def ask_on() -> None:
            try:
                while True:
                    endpoint.reply(ASK, max_tokens=4)
            except StageFailed as error:
                errors.append(error)

        threads = [threading.Thread(target=ask_on) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert len(server.chats) == 5
    assert endpoint.used_tokens == 55
    assert len(errors) == 2
    assert "55 of 60 tokens" in errors[0].message
    assert "larger token_budget" in errors[0].hint


def test_a_request_waits_for_what_others_leave_of_the_budget(server: EndpointServer) -> None:
    server.delay_seconds = 0.1
    server.total_tokens = 10
    with opened(server, token_budget=130, concurrency=4) as endpoint, ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(lambda _: endpoint.reply(ASK, max_tokens=100)[0], range(3)))  # 107 promised each
    assert answers == ["fine"] * 3
    assert server.most_at_once == 1


def test_the_key_is_sent_and_found_nowhere_else(
    server: EndpointServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("httpcore2"), "level", logging.NOTSET)  # put back after the test
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CRITIC_KEY", SECRET + "\n")
    echo = '{"error": {"message": "you sent Bearer ' + SECRET + " or " + SECRET[4:20] + '..."}}'
    with opened(server, key_env="CRITIC_KEY", retries=1) as endpoint:
        server.key = SECRET
        assert endpoint.reply(ASK, max_tokens=4)[0] == "fine"
        said = [repr(endpoint), str(endpoint), repr(endpoint.settings), repr(vars(endpoint))]
        for status in (302, 400, 401, 403, 404, 422, 429, 500):
            server.faults.extend([Fault(status, echo, {"Location": f"/?k={SECRET}", "Retry-After": SECRET})] * 2)
            error = failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
            said += [str(error), repr(error), "".join(traceback.format_exception(error))]
            assert ("you sent Bearer [key]" in error.message) == (status != 401)
            server.faults.clear()
        server.faults.extend([Fault(body='{"error": {"message": "' + SECRET + '"}}')] * 2)
        said.append(str(failure_of(lambda: endpoint.reply(ASK, max_tokens=4))))
        server.key = "another"
        for call in (endpoint.check, lambda: endpoint.option_logps(ASK, "AB")):
            said.append(str(failure_of(call)))
            assert "CRITIC_KEY" in said[-1]
    whole = "\n".join(said)
    for text in (whole, "\n".join(record.getMessage() for record in caplog.records)):
        assert not any(SECRET[i : i + 8] in text for i in range(len(SECRET) - 7))


def test_a_key_quoted_across_the_cut_of_a_long_message_is_hidden(
    server: EndpointServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CRITIC_KEY", SECRET)
    with opened(server, key_env="CRITIC_KEY") as endpoint:
        for before in (290, 3990):
            server.faults.append(Fault(400, '{"detail": "' + "." * before + SECRET + '"}'))
            assert SECRET[:8] not in str(failure_of(lambda: endpoint.reply(ASK, max_tokens=4)))


def test_a_missing_key_is_named(server: EndpointServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CRITIC_KEY", raising=False)
    assert "CRITIC_KEY" in failure_of(lambda: opened(server, key_env="CRITIC_KEY")).message
    monkeypatch.setenv("CRITIC_KEY", "  ")
    assert "CRITIC_KEY" in failure_of(lambda: opened(server, key_env="CRITIC_KEY")).message


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schlüssel"])
def test_a_key_that_no_header_can_hold_is_refused_without_showing_it(
    server: EndpointServer, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("CRITIC_KEY", key)
    error = failure_of(lambda: opened(server, key_env="CRITIC_KEY"))
    assert "CRITIC_KEY" in str(error)
    assert key not in str(error)


def test_a_server_that_wants_a_key_leads_to_key_env(server: EndpointServer) -> None:
    server.key = SECRET
    with opened(server) as endpoint:
        assert "key_env" in failure_of(endpoint.check).hint


def test_a_redirect_is_not_followed(server: EndpointServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CRITIC_KEY", SECRET)
    with EndpointServer() as other, opened(server, key_env="CRITIC_KEY") as endpoint:
        server.faults.append(Fault(307, headers={"Location": f"{other.url}/chat/completions"}))
        assert other.url in failure_of(lambda: endpoint.reply(ASK, max_tokens=4)).hint
        assert other.seen == []


def test_proxies_of_the_environment_are_for_other_machines_only(
    server: EndpointServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with EndpointServer() as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
        with opened(server) as endpoint:
            assert endpoint.reply(ASK, max_tokens=4)[0] == "fine"
        assert proxy.seen == []
        with Endpoint.open(settings_of("http://critic.invalid/v1", retries=0), pause=lambda _: None) as endpoint:
            failure_of(lambda: endpoint.reply(ASK, max_tokens=4))
        assert proxy.seen[0].path == "http://critic.invalid/v1/chat/completions"
        monkeypatch.setenv("HTTP_PROXY", "gopher://nowhere")
        assert "HTTP_PROXY" in failure_of(lambda: Endpoint.open(settings_of("http://critic.invalid/v1"))).message


def test_an_address_that_cannot_be_read_is_refused() -> None:
    assert "is no address" in failure_of(lambda: Endpoint.open(settings_of("http://host:port/v1"))).message


def test_tokens_of_one_option_are_added_up(server: EndpointServer) -> None:
    server.top_logprobs = [(" A", math.log(0.3)), ("B", math.log(0.4)), ("A", math.log(0.2)), ("▁A", math.log(0.05))]
    with opened(server) as endpoint:
        values = endpoint.option_logps(ASK, ("A", "B"))
    assert values == pytest.approx((math.log(0.55), math.log(0.4)))
    assert endpoint.undecided == 0
    body = server.chats[0].body
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 20, 1.0)


def test_an_option_that_is_not_listed_is_finite_and_behind_all_that_are(server: EndpointServer) -> None:
    server.top_logprobs = [("A", math.log(0.5)), ("C", math.log(0.01)), ("The", math.log(0.4))]
    with opened(server) as endpoint:
        assert endpoint.option_logps(ASK, ("A", "B")) == pytest.approx((math.log(0.5), math.log(0.01) - 1))
        server.top_logprobs = [("A", math.log(0.99))]  # what is left bounds it, where the list is short
        assert endpoint.option_logps(ASK, ("B", "A")) == pytest.approx((math.log(0.01) - 1, math.log(0.99)))
    assert endpoint.undecided == 0


@pytest.mark.parametrize("listed", [[("The", -0.1), ("I", -3.0)], []], ids=["other words", "turn ended at once"])
def test_a_model_that_answers_with_no_option_is_counted_as_undecided(
    server: EndpointServer, listed: list[tuple[str, float]]
) -> None:
    server.top_logprobs = listed
    with opened(server) as endpoint:
        first, second = endpoint.option_logps(ASK, ("A", "B"))
        endpoint.option_logps(ASK, ("A", "B"))
    assert first == second
    assert math.isfinite(first)
    assert endpoint.undecided == 2


def test_a_server_without_log_probabilities_is_named_with_a_way_out(server: EndpointServer) -> None:
    server.top_logprobs = None
    with opened(server) as endpoint:
        silent = failure_of(lambda: endpoint.option_logps(ASK, ("A", "B")))
        server.faults.append(Fault(400, '{"error": {"message": "logprobs is not supported with this model"}}'))
        refused = failure_of(lambda: endpoint.option_logps(ASK, ("A", "B")))
    for error in (silent, refused):
        assert error.exit_code == 2
        assert "check_revisions: false" in error.hint
    assert len(server.chats) == 2


@pytest.mark.parametrize(
    "entries",
    [None, [], "A", [{"token": "A"}], [{"token": 3, "logprob": -1}], [{"token": "A", "logprob": "-1"}], [None]],
)
def test_lists_without_numbers_are_no_log_probabilities(entries: Any) -> None:
    with pytest.raises(NoLogprobs):
        first_token_logps({"logprobs": {"content": [{"token": "A", "logprob": 0, "top_logprobs": entries}]}})


@given(st.lists(st.tuples(st.sampled_from(["A", " A", "B", "x"]), st.floats(-200, 0)), max_size=20))
def test_values_of_options_are_always_finite(listed: list[tuple[str, float]]) -> None:
    values, decided = option_values(listed, ("A", "B"))
    assert all(math.isfinite(value) for value in values)
    assert decided == any(token.strip() in "AB" for token, _ in listed)


@given(st.recursive(st.none() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(
    st.sampled_from(["choices", "message", "content", "logprobs"]), inner)))  # fmt: skip
def test_any_json_is_an_answer_or_nonsense(value: Any) -> None:
    with suppress(Nonsense, NoLogprobs):
        first_token_logps(first_choice(value if isinstance(value, dict) else {}))


def test_text_that_is_no_json_object_is_empty() -> None:
    assert [parsed(text) for text in ("", "[1]", "{", "[" * 100_000, '{"a": 1}')] == [{}, {}, {}, {}, {"a": 1}]


def test_check_is_one_request_where_all_is_well(server: EndpointServer) -> None:
    with opened(server) as endpoint:
        endpoint.check()
    assert [(seen.method, seen.path) for seen in server.seen] == [("GET", "/v1/models")]


@pytest.mark.parametrize("listing", [Fault(404), Fault(405), Fault(501), NO_JSON, Fault(body='{"data": []}')])
def test_check_accepts_a_server_without_a_list_of_models(server: EndpointServer, listing: Fault) -> None:
    server.models_fault = listing
    with opened(server, model="any") as endpoint:
        endpoint.check()
    assert server.chats == []


def test_check_refuses_a_name_that_the_server_does_not_know(server: EndpointServer) -> None:
    with opened(server, model="tinny") as endpoint:
        error = failure_of(endpoint.check)
    assert error.exit_code == 2
    assert "'tinny'" in error.message
    assert "Did you mean 'tiny'?" in error.hint


def test_check_accepts_a_name_that_is_not_listed_and_still_known(server: EndpointServer) -> None:
    server.open_models = True
    with opened(server, model="/models/critic") as endpoint:
        endpoint.check()
    assert server.chats[0].body["max_tokens"] == 1


def test_check_says_at_once_that_a_server_is_down() -> None:
    pauses: list[float] = []
    with Endpoint.open(settings_of("http://127.0.0.1:1/v1"), pause=pauses.append) as endpoint:
        error = failure_of(endpoint.check)
    assert isinstance(error, StageFailed)
    assert "http://127.0.0.1:1/v1" in error.message
    assert "in 1 try" in error.message
    assert pauses == []


@pytest.mark.parametrize("status", [429, 500, 503])
def test_check_is_patient_with_a_server_that_is_busy(server: EndpointServer, status: int) -> None:
    server.models_fault = Fault(status)
    with opened(server, retries=2) as endpoint:
        assert isinstance(failure_of(endpoint.check), StageFailed)
    assert len(server.seen) == 3


def test_ctrl_c_ends_a_pause_at_once(server: EndpointServer) -> None:
    server.faults.append(Fault(503, headers={"Retry-After": "30"}))
    started = time.monotonic()
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    with Endpoint.open(settings_of(server.url)) as endpoint:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            endpoint.reply(ASK, max_tokens=4)
    assert 0.2 < time.monotonic() - started < 5
    assert len(server.chats) == 1


@pytest.mark.parametrize("waits_for", ["the next try", "an answer", "its turn"])
def test_closing_wakes_threads_that_wait(server: EndpointServer, waits_for: str) -> None:
    if waits_for == "the next try":
        server.faults.extend([Fault(503, headers={"Retry-After": "30"})] * 2)
    server.delay_seconds = 5 if waits_for == "an answer" else 0
    pace = 1 if waits_for == "its turn" else None
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        with Endpoint.open(settings_of(server.url, timeout_seconds=20, requests_per_minute=pace)) as endpoint:
            waiting = [pool.submit(endpoint.reply, ASK, max_tokens=4) for _ in range(2)]
            while len(server.chats) < (1 if pace else 2):
                time.sleep(0.01)
            time.sleep(0.1)
        assert sum(isinstance(future.exception(), StageFailed) for future in waiting) == (1 if pace else 2)
    assert time.monotonic() - started < 4
