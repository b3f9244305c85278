"""Text for a terminal: what controls it is shown, or left out."""

from bitjax.printable import printable, without_controls


def test_controls_are_shown_as_escapes():
    assert printable("a\x1b[2Jb\n\x07é") == "a\\x1b[2Jb\\n\\x07é"
    assert printable("a\nb\t", keep="\n") == "a\nb\\t"


def test_controls_of_a_models_text_are_left_out():
    assert without_controls("a\x1b[2J\x9b\x07\r\x08\x7f\tb\né") == "a[2J\tb\né"
