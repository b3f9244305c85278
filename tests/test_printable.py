"""Text for a terminal: what controls it is shown, or left out."""

from bitjax.printable import html_table, printable, without_controls


def test_controls_are_shown_as_escapes():
    assert printable("a\x1b[2Jb\n\x07é") == "a\\x1b[2Jb\\n\\x07é"
    assert printable("a\nb\t", keep="\n") == "a\nb\\t"


def test_controls_of_a_models_text_are_left_out():
    assert without_controls("a\x1b[2J\x9b\x07\r\x08\x7f\tb\né") == "a[2J\tb\né"


def test_tables_of_notebooks_show_what_looks_like_markup():
    made = html_table(["a<b"], [["<script>"], [3]], "x & y")
    assert made == (
        "<table><caption>x &amp; y</caption><tr><th>a&lt;b</th></tr>"
        "<tr><td>&lt;script&gt;</td></tr><tr><td>3</td></tr></table>"
    )
