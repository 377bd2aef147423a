"""The constitutional stage on real prompts, with a critic behind HTTP: what the documents claim, held to it."""

from __future__ import annotations

import importlib.util
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import ModuleType

import pytest
import torch

from align.critique.endpoint import Endpoint
from align.critique.writers import EndpointWriter
from align.data.examples import Message
from align.errors import AlignError
from align.models.source import source_of
from align.progress import Progress
from align.recipe.critique_settings import EndpointCritic
from align.stages.critique import open_writer

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OPTIONS = ("A", "B")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look up their types
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def endpoint(tiny_llama: Path) -> Iterator[Endpoint]:
    served = script("served_model")
    served.Handler.served = served.Served(tiny_llama, "tiny")
    with ThreadingHTTPServer(("127.0.0.1", 0), served.Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        with Endpoint.open(EndpointCritic(kind="endpoint", url=url, model="tiny", retries=0)) as opened:
            yield opened
        server.shutdown()


def test_a_served_model_writes_and_chooses_as_the_same_model_does_here(endpoint: Endpoint, tiny_llama: Path) -> None:
    requests = [(Message("user", f"Which of {number} figs? A or B."),) for number in range(4)]
    here, _ = open_writer(source_of(tiny_llama), Progress())
    there = EndpointWriter(endpoint, threads=2)
    endpoint.check()
    assert there.write(requests, 12) == here.write(requests, 12)
    listed = endpoint.option_logps(requests[0], OPTIONS)
    assert all(logp < 0 for logp in listed)


def test_a_request_longer_than_the_servers_context_is_none_and_the_others_are_answered(endpoint: Endpoint) -> None:
    short, long = (Message("user", "Which?"),), (Message("user", "Which? " * 300),)
    writer = EndpointWriter(endpoint, threads=2)
    written = writer.write([short, long], 8)
    assert written[0] is not None
    assert written[1] is None
    assert [chance is None for chance in writer.choose([long, short], OPTIONS)] == [True, False]


def test_a_refusal_for_another_reason_is_still_an_error(endpoint: Endpoint) -> None:
    wrong = EndpointCritic(kind="endpoint", url=endpoint.settings.url, model="tinny", retries=0)
    with Endpoint.open(wrong) as opened, pytest.raises(AlignError, match="does not exist"):
        EndpointWriter(opened, threads=1).write([(Message("user", "Which?"),)], 8)


def test_an_option_of_two_tokens_is_not_taken_for_all_that_begin_with_its_first(shared: Path) -> None:
    """In this vocabulary ' B' is one token, and ' A' is a space and an A."""
    writer, _ = open_writer(source_of(shared / "models" / "stories260K"), Progress())
    request = (Message("user", "Which is better? A: the red boat. B: the blue boat."),)
    sums = []
    for word in OPTIONS:
        row = writer.encoder.reply(request, (Message("assistant", word),))
        first = row.trained.index(True)
        with torch.no_grad():
            logps = writer.model(input_ids=torch.tensor([row.ids])).logits[0, first - 1 : -1].log_softmax(-1)
        sums.append(logps.gather(1, torch.tensor(row.ids[first:])[:, None]).sum())
    assert writer.choose([request], OPTIONS) == [pytest.approx(float((sums[0] - sums[1]).sigmoid()), rel=1e-3)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.usefixtures("shared")
def test_the_stage_survives_its_server_and_its_data_train_the_next_stages(tmp_path: Path) -> None:
    benchmark = script("critique_real")
    found = benchmark.run(tmp_path)
    assert found.exit_code == 1
    assert "Finished rows are kept" in found.complaint
    assert found.kept >= benchmark.KILLED_AT
    assert found.unchanged
    assert [row["index"] for row in found.rows] != []
    assert len({row["index"] for row in found.rows}) == len(found.rows) > found.kept
    told = found.stages["revised"]["data"]["sft"]["info"]["stage"]["counts"]
    assert told["revised"] + sum(told["apart"].values()) == told["prompts"] == len(found.rows)
    assert told["apart"]["too_long"] > 0
    assert told["revised"] > 0
    chances = [one["probability"] for row in found.rows for one in row["comparisons"] if one["probability"]]
    assert chances
    assert all(0.05 <= chance <= 0.95 for chance in chances)
    for stage, kind in (("told", "model"), ("aligned", "model"), ("reward", "reward")):
        assert found.stages[stage]["checkpoint"]["kind"] == kind
    for metrics in found.judged.values():
        assert 0 <= metrics["accuracy"]["low"] < metrics["accuracy"]["high"] <= 1
        assert metrics["too_long"] > 0
    benchmark.page(found)
