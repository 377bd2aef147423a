"""Preparation: nothing leaks between train and test, every dropped row is counted, the key follows the content."""

from __future__ import annotations

import gzip
import json
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from align.cli.data import FORMAT_NAMES
from align.data import prepare as prepare_module
from align.data.examples import Conversation, Message
from align.data.likeness import opening_key, row_key
from align.data.prepare import PreparedData, canonical_row, prepare, read_prepared, source_key, write_prepared
from align.data.split import held_out
from align.errors import AlignError
from align.recipe.settings import DataSettings, Format


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pairs(start: int, stop: int, answer: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": f"question {number}", "completion": f"{answer} {number}"} for number in range(start, stop)]


def prepared(folder: Path, seed: int = 0, **values: Any) -> PreparedData:
    return prepare("rows", {"rows": DataSettings(**values)}, folder=folder, seed=seed)


def hold_out(rows: list[Any], fraction: float, seed: int) -> tuple[list[Any], list[Any]]:
    """(train, test)."""
    keys = np.array([np.frombuffer(opening_key(row), dtype="V16")[0] for row in rows])
    held = held_out(keys, fraction, seed)
    return [row for row, out in zip(rows, held) if not out], [row for row, out in zip(rows, held) if out]


def openings(examples: Sequence[Any]) -> set[bytes]:
    return {opening_key(example) for example in examples}


# Bad rows ------------------------------------------------------------------------------------------------------------


def test_all_bad_rows_are_counted_and_the_first_twenty_named_with_their_lines(tmp_path: Path) -> None:
    rows = pairs(0, 100)
    for number in range(10, 40):
        del rows[number]["completion"]
    rows[50]["completion"] = None
    write_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(AlignError) as error:
        prepared(tmp_path, path="rows.jsonl")
    lines = error.value.message.splitlines()
    assert lines[0] == "rows.jsonl:11: no 'completion' (the row has: prompt)"
    assert [line.partition(" ")[0] for line in lines[:20]] == [f"rows.jsonl:{n}:" for n in range(11, 31)]
    assert lines[20:] == ["and 11 more bad rows"]
    assert error.value.hint.startswith("31 bad of 100 rows; nothing was written.")


def test_broken_lines_and_bad_rows_are_named_together(tmp_path: Path) -> None:
    good = json.dumps(pairs(0, 1)[0]).encode()
    (tmp_path / "rows.jsonl").write_bytes(good + b"\n{]\n" + good + b'\n{"prompt": "a"}\n' + good + b"\n\xff\n")
    with pytest.raises(AlignError) as error:
        prepared(tmp_path, path="rows.jsonl")
    assert [line.partition(": ")[0] for line in error.value.message.splitlines()] == [
        "rows.jsonl:2", "rows.jsonl:4", "rows.jsonl:6",
    ]  # fmt: skip


def test_a_file_of_broken_lines_only_is_refused_with_them(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b"{]\n{]\n")
    with pytest.raises(AlignError, match=r"rows.jsonl:1: broken JSON"):
        prepared(tmp_path, path="rows.jsonl")


def test_nulls_and_missing_fields_of_a_table_never_become_text(tmp_path: Path) -> None:
    import datasets

    rows = [*pairs(0, 12), {"prompt": "a", "completion": None}, {"prompt": "b"}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    with pytest.raises(AlignError, match=r"rows.parquet: row 13: no 'completion'\D*row 14"):
        prepared(tmp_path, path="rows.parquet")


def test_control_characters_of_a_row_do_not_reach_the_error_as_they_are(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [{"messages": [{"role": "\x1b]0;x\x07", "content": "a"}]}])
    with pytest.raises(AlignError) as error:
        prepared(tmp_path, path="rows.jsonl")
    assert "\\x1b]0;x\\x07" in str(error.value)
    assert "\x1b" not in str(error.value)


def test_transcripts_may_hold_a_few_unusable_rows_which_are_counted_and_no_more(tmp_path: Path) -> None:
    def rows(bad: int) -> list[dict[str, str]]:
        texts = [f"\n\nHuman: q{n}\n\nAssistant: " for n in range(100)]
        return [{"chosen": t + ("" if n < bad else "a"), "rejected": t + "b"} for n, t in enumerate(texts)]

    write_rows(tmp_path / "few.jsonl", rows(5))
    write_rows(tmp_path / "many.jsonl", rows(6))
    report = prepared(tmp_path, path="few.jsonl").report
    assert (report.rows_read, report.unusable, report.train_rows + report.test_rows) == (100, 5, 95)
    assert "few.jsonl:1: 'chosen': turn 2 (Assistant) is empty" in report.warnings[0]
    with pytest.raises(AlignError, match=r"many\.jsonl:1"):
        prepared(tmp_path, path="many.jsonl")


# Dropped rows --------------------------------------------------------------------------------------------------------


def test_duplicates_and_shared_prompts_are_counted(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*pairs(0, 20), *pairs(3, 5), *pairs(7, 8, "no")])
    report = prepared(tmp_path, path="rows.jsonl").report
    assert (report.duplicates, report.shared_prompts, report.train_rows + report.test_rows) == (2, 1, 21)
    kept = prepared(tmp_path, path="rows.jsonl", deduplicate=False).report
    assert (kept.duplicates, kept.shared_prompts, kept.train_rows + kept.test_rows) == (0, 3, 23)


def test_equal_pairs_are_dropped_with_a_warning_and_refused_when_there_is_nothing_else(tmp_path: Path) -> None:
    pair = {"prompt": "a", "chosen": "same", "rejected": "same"}
    write_rows(tmp_path / "some.jsonl", [pair, *({**pair, "prompt": f"{n}", "rejected": "other"} for n in range(20))])
    report = prepared(tmp_path, path="some.jsonl").report
    assert report.equal_pairs == 1
    assert any(warning.startswith("1 pairs with equal answers were dropped") for warning in report.warnings)
    write_rows(tmp_path / "all.jsonl", [pair, {**pair, "prompt": "b"}])
    with pytest.raises(AlignError, match=r"data 'rows': no rows are left \(2 equal pairs\)"):
        prepared(tmp_path, path="all.jsonl")


def test_rows_that_ask_what_another_data_set_or_file_asks_are_dropped(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", pairs(0, 30))
    write_rows(tmp_path / "exam.jsonl", [{"prompt": "Question 3?"}, {"prompt": "question 4"}])
    write_rows(tmp_path / "other.jsonl", [{"question": "question 5", "answer": "x"}])
    data = {
        "rows": DataSettings(path="rows.jsonl", decontaminate=["exam", "other.jsonl"]),
        "exam": DataSettings(path="exam.jsonl"),
    }
    result = prepare("rows", data, folder=tmp_path, seed=0)
    assert result.report.contaminated == 3
    assert result.report.train_rows + result.report.test_rows == 27


def test_names_that_decontaminate_does_not_know_are_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", pairs(0, 30))
    for other, words in (
        ("rows", "names the data set itself"),
        ("exams", "Did you mean 'exam'"),
        ("x.json", "no file"),
    ):
        data = {
            n: DataSettings(path="rows.jsonl", decontaminate=[other] if n == "rows" else []) for n in ("rows", "exam")
        }
        with pytest.raises(AlignError) as error:
            prepare("rows", data, folder=tmp_path, seed=0)
        assert words in str(error.value)


def test_masking_near_duplicates_shuffle_and_limit_work_together(tmp_path: Path) -> None:
    text = "one two three four five six seven eight nine ten {} eleven"
    rows = [{"text": text.format(f"a{n}@b.com")} for n in range(5)] + [{"text": f"{n} " * 20} for n in range(30)]
    write_rows(tmp_path / "rows.jsonl", rows)
    report = prepared(tmp_path, path="rows.jsonl", mask_personal_data=True).report
    assert (report.masked, report.duplicates) == (5, 4)
    near = prepared(tmp_path, path="rows.jsonl", near_duplicates=0.3).report
    assert (near.masked, near.duplicates, near.near_duplicates) == (0, 0, 4)
    result = prepared(tmp_path, path="rows.jsonl", shuffle=True, limit=12)
    assert len(result.train) + len(result.test) == 12
    assert result.report.unused == 23
    first = prepared(tmp_path, path="rows.jsonl", limit=12, test_fraction=0.0)
    assert [example.row() for example in first.train] == rows[:12]
    assert first.report.rows_read == 12


# Split ---------------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 15), min_size=10, max_size=60),
    st.sampled_from([0.001, 0.1, 0.5, 0.999]),
    st.integers(-5, 5),
)
def test_a_question_never_stands_on_both_sides_and_neither_side_is_empty(
    questions: list[int], fraction: float, seed: int
) -> None:
    rows = [
        Conversation((Message("user", f"Q {question}"), Message("assistant", f"{number}")))
        for number, question in enumerate(questions)
    ]
    train, test = hold_out(rows, fraction, seed)
    assert not openings(train) & openings(test)
    assert sorted(map(row_key, train + test)) == sorted(map(row_key, rows))
    assert train
    assert test or len(set(questions)) == 1
    assert hold_out(rows[::-1], fraction, seed)[1] == test[::-1]


def test_the_share_is_about_right_the_seed_matters_and_new_rows_move_no_old_ones() -> None:
    rows = [Conversation((Message("user", f"q{n}"), Message("assistant", "a"))) for n in range(4000)]
    _, test = hold_out(rows, 0.1, 0)
    assert 340 < len(test) < 460
    assert hold_out(rows, 0.1, 0)[1] == test
    assert 10 < len(openings(test) & openings(hold_out(rows, 0.1, 1)[1])) < 80
    assert openings(hold_out(rows[:2000], 0.1, 0)[1]) < openings(test)
    assert hold_out(rows, 0.0, 0) == (rows, [])
    assert hold_out(rows, 1.0, 0) == ([], rows)


def test_data_sets_of_one_recipe_hold_out_the_same_questions(shared: Path) -> None:
    data = {
        "instructions": DataSettings(path="instruct/instructions.jsonl"),
        "pairs": DataSettings(path="preference/tone.jsonl"),
    }
    sides = {name: prepare(name, data, folder=shared / "data", seed=3) for name in data}
    assert not openings(sides["instructions"].train) & openings(sides["pairs"].test)
    assert not openings(sides["pairs"].train) & openings(sides["instructions"].test)


def test_a_file_of_held_out_rows_is_used_whole_and_train_gives_way_to_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", pairs(0, 30))
    write_rows(tmp_path / "test.jsonl", [*pairs(5, 8), *pairs(100, 105), {"prompt": "QUESTION 9?", "completion": "x"}])
    result = prepared(tmp_path, path="rows.jsonl", test="test.jsonl")
    assert (len(result.train), len(result.test), result.report.test_overlap) == (26, 9, 4)
    assert not openings(result.train) & openings(result.test)
    assert "4 training rows ask what held-out rows ask" in " ".join(result.report.warnings)
    with pytest.raises(AlignError, match="both `test:` and `test_fraction:`"):
        prepared(tmp_path, path="rows.jsonl", test="test.jsonl", test_fraction=0.2)
    write_rows(tmp_path / "text.jsonl", [{"text": "a"}])
    with pytest.raises(AlignError, match="rows of several kinds: conversation, text"):
        prepared(tmp_path, path="rows.jsonl", test="text.jsonl")


def test_a_file_too_small_to_hold_anything_out_says_so(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", pairs(0, 3))
    for seed in range(20):
        result = prepared(tmp_path, seed, path="rows.jsonl")
        assert len(result.train) >= 2
        assert bool(result.test) != any("no rows are held out" in warning for warning in result.report.warnings)


# Mixtures ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    write_rows(tmp_path / "a.jsonl", pairs(0, 200, "a"))
    write_rows(tmp_path / "b.jsonl", pairs(150, 250, "b"))  # shares 50 questions with a
    write_rows(tmp_path / "c.jsonl", [{"text": "plain"}] * 20)
    return tmp_path


def mixed(folder: Path, seed: int = 0, weights: tuple[float, float] = (1.0, 1.0), **values: Any) -> PreparedData:
    return prepare("mixed", mix_data(weights, **values), folder=folder, seed=seed)


def mix_data(weights: tuple[float, float] = (1.0, 1.0), **values: Any) -> dict[str, DataSettings]:
    mix = [{"data": name, "weight": weight} for name, weight in zip("ab", weights)]
    return {
        "a": DataSettings(path="a.jsonl"),
        "b": DataSettings(path="b.jsonl", test_fraction=0.3),
        "mixed": DataSettings(mix=mix, **values),
    }


def source_of_answer(example: Any) -> str:
    return example.messages[-1].content[0]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (3.0, 1.0), (1.0, 4.0), (0.5, 0.5)])
def test_a_mixture_is_the_largest_in_the_proportion_that_needs_no_row_twice(
    parts: Path, weights: tuple[float, float]
) -> None:
    result = mixed(parts, weights=weights)
    counts = Counter(map(source_of_answer, result.train))
    assert abs(counts["a"] - counts["b"] * weights[0] / weights[1]) <= max(1, weights[0] / weights[1])
    assert len({row_key(example) for example in result.train}) == len(result.train)
    assert result.report.parts == dict(counts)
    report = result.report
    dropped = report.test_overlap + report.duplicates
    assert report.rows_read == report.train_rows + report.test_rows + report.unused + dropped


def test_every_part_of_a_mixture_keeps_its_held_out_rows_held_out(parts: Path) -> None:
    for seed in range(5):
        result = mixed(parts, seed)
        alone = {n: prepare(n, mix_data(), folder=parts, seed=seed) for n in "ab"}
        for part in alone.values():
            assert not openings(part.test) & openings(result.train)
            assert {row_key(e) for e in part.test} <= {row_key(e) for e in result.test}
        assert result.report.test_overlap > 0


def test_a_mixture_is_shuffled_by_the_seed_and_limited(parts: Path) -> None:
    one, again, other = mixed(parts, limit=30), mixed(parts, limit=30), mixed(parts, 1, limit=30)
    assert one.train == again.train
    assert one.train != other.train
    assert len(one.train) == 30
    assert 5 < Counter(map(source_of_answer, one.train))["a"] < 25


def test_mixtures_that_make_no_sense_are_refused(parts: Path) -> None:
    def refused(words: str, **changes: DataSettings) -> None:
        with pytest.raises(AlignError) as error:
            prepare("mixed", mix_data() | changes, folder=parts, seed=0)
        assert words in str(error.value)

    refused("a mixture of itself: mixed -> mixed", mixed=DataSettings(mix=[{"data": "mixed"}]))
    refused("a mixture of itself: mixed -> a -> mixed", a=DataSettings(mix=[{"data": "mixed"}]))
    refused("there is no data set 'A'", mixed=DataSettings(mix=[{"data": "A"}]), b=DataSettings(path="x"))
    refused("part 'a' stands twice", mixed=DataSettings(mix=[{"data": "a"}, {"data": "a"}]))
    refused("rows of several kinds: conversation, text", b=DataSettings(path="c.jsonl"))
    refused("part 'b' has no training rows", b=DataSettings(path="b.jsonl", test_fraction=1.0))
    refused("`test_fraction:` has no effect on a mixture", mixed=DataSettings(mix=[{"data": "a"}], test_fraction=0.2))


def test_a_mixture_of_mixtures_works(parts: Path) -> None:
    data = mix_data() | {"all": DataSettings(mix=[{"data": "mixed"}])}
    assert len(prepare("all", data, folder=parts, seed=0).train) == len(
        prepare("mixed", data, folder=parts, seed=0).train
    )


# Keys and folders ----------------------------------------------------------------------------------------------------


def test_the_key_follows_the_bytes_and_not_the_time_or_the_name(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, pairs(0, 30))

    def key(path: str = "rows.jsonl", seed: int = 0, **values: Any) -> str:
        return source_key("rows", {"rows": DataSettings(path=path, **values)}, folder=tmp_path, seed=seed)

    before, times = key(), file.stat()
    (tmp_path / "copy.jsonl").write_bytes(file.read_bytes())
    assert key("copy.jsonl") == before
    file.write_bytes(file.read_bytes().replace(b"yes 7", b"no! 7"))  # as long as before
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (times.st_size, times.st_mtime_ns)
    keys = [before, key(), key(seed=1), key(limit=3), key(format="prompt_completion"), key(test="copy.jsonl")]
    keys.append(key(decontaminate=["copy.jsonl"]))
    assert len(set(keys)) == len(keys)


def test_the_key_follows_the_code_and_the_content_of_every_file_that_is_read(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = mix_data(decontaminate=["exam"]) | {"exam": DataSettings(path="c.jsonl")}

    def key() -> str:
        return source_key("mixed", data, folder=parts, seed=0)

    keys = [key()]
    for name in ("a.jsonl", "c.jsonl"):
        with (parts / name).open("a") as stream:
            stream.write("\n")
        keys.append(key())
    monkeypatch.setattr(prepare_module, "PREPARE_VERSION", -1)
    keys.append(key())
    assert len(set(keys)) == 4


def test_prepared_data_is_the_same_after_it_was_written_to_the_byte(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [*pairs(0, 30), {"prompt": "ä\u2028€", "completion": "😀\r\n\tx"}])
    result = prepared(tmp_path, path="rows.jsonl")
    write_prepared(result, tmp_path / "one")
    again = read_prepared(tmp_path / "one")
    assert again == result
    write_prepared(again, tmp_path / "two")
    for name in ("train.jsonl", "test.jsonl", "report.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    (tmp_path / "one" / "test.jsonl").unlink()
    with pytest.raises(AlignError, match=r"no prepared data: test\.jsonl missing"):
        read_prepared(tmp_path / "one")


def test_a_file_that_we_wrote_is_one_that_we_read(shared: Path, tmp_path: Path) -> None:
    for name in ("instruct/chats.jsonl", "preference/tone.jsonl", "eval/xstest_prompts.csv", "text/stories_more.jsonl"):
        one = prepare("rows", {"rows": DataSettings(path=name)}, folder=shared / "data", seed=0)
        write_prepared(one, tmp_path / "one")
        again = prepared(tmp_path / "one", path="train.jsonl", test_fraction=0.0)
        assert list(map(canonical_row, again.train)) == list(map(canonical_row, one.train))


def test_the_same_rows_come_out_of_every_kind_of_file(tmp_path: Path) -> None:
    import datasets

    rows = pairs(0, 40)
    write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    datasets.Dataset.from_list(rows).to_csv(tmp_path / "a.csv")
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    first, *others = [prepared(tmp_path, path=f"a.{kind}") for kind in ("jsonl", "json", "jsonl.gz", "csv", "parquet")]
    assert all(other == first for other in others)


def test_the_command_line_knows_the_formats_of_the_recipe() -> None:
    assert get_args(Format) == FORMAT_NAMES


def test_bad_rows_are_dropped_and_counted_where_the_recipe_says_so(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}?", "completion": "" if n == 3 else f"Answer {n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"x": DataSettings(path="rows.jsonl", bad_rows="drop")}
    prepared = prepare("x", settings, folder=tmp_path, seed=0)
    assert prepared.report.unusable == 1
    assert len(prepared.train) + len(prepared.test) == 11
    assert "rows.jsonl:4" in prepared.report.warnings[0]
    with pytest.raises(AlignError, match=r"rows\.jsonl:4.*"):
        prepare("x", {"x": DataSettings(path="rows.jsonl")}, folder=tmp_path, seed=0)
