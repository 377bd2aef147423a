"""Content hashes depend on content and names, and on nothing else."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from align.registry.hashing import Manifest, folder_manifest, sha256_file, sha256_json


def folder_with(place: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return place


def test_the_hash_of_a_file_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    assert sha256_file(tmp_path / "f") == hashlib.sha256(b"abc").hexdigest()


def test_the_order_of_keys_does_not_matter_and_their_values_do() -> None:
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json({"b": [2], "a": 1})
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
    assert sha256_json({"a": 1}) != sha256_json({"a": "1"})


@given(st.text())
def test_any_text_has_a_hash_even_half_a_surrogate_pair(text: str) -> None:
    assert len(sha256_json([text, "\ud800"])) == 64


def test_equal_folders_have_one_id_wherever_and_whenever_they_were_written(tmp_path: Path) -> None:
    one = folder_with(tmp_path / "one", {"b": "2", "a/c": "1"})
    two = folder_with(tmp_path / "two", {"a/c": "1", "b": "2"})
    os.utime(two / "b", (0, 0))
    assert folder_manifest(one).id == folder_manifest(two).id


@pytest.mark.parametrize(
    "other", [{"b": "1", "a/c": "2"}, {"b": "2", "a/d": "1"}, {"b": "2"}, {"b": "2", "a/c": "1", "d": ""}, {"b": "2", "a": "1"}]
)  # fmt: skip
def test_swapped_renamed_missing_and_added_files_change_the_id(tmp_path: Path, other: dict[str, str]) -> None:
    one = folder_with(tmp_path / "one", {"b": "2", "a/c": "1"})
    assert folder_manifest(one).id != folder_manifest(folder_with(tmp_path / "two", other)).id


def test_a_manifest_survives_the_registry(tmp_path: Path) -> None:
    manifest = folder_manifest(folder_with(tmp_path, {"b\n ü": "2", "a/c": "1"}))
    assert Manifest.from_json(manifest.as_json()) == manifest
    assert manifest.size == 2


def test_a_link_counts_as_its_file_and_a_broken_one_is_refused(tmp_path: Path) -> None:
    plain = folder_with(tmp_path / "plain", {"a": "1"})
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a").symlink_to(plain / "a")
    assert folder_manifest(tmp_path / "linked").id == folder_manifest(plain).id
    (tmp_path / "linked" / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="gone is no plain file"):
        folder_manifest(tmp_path / "linked")
