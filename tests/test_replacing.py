"""Files that are whole or as they were."""

import pytest

from bitjax.replacing import replace_text, replacing


def test_text_takes_the_place(tmp_path):
    path = tmp_path / "a.json"
    for text in ("first", "zweiter größer"):
        replace_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_an_exception_leaves_what_was(tmp_path):
    path = tmp_path / "a"
    replace_text(path, "before")

    def write_half():
        with replacing(path) as file:
            file.write(b"half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        write_half()
    assert path.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
