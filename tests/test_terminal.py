import io

import pytest
from rich.console import Console

from bitjax import terminal
from bitjax.printable import printable
from bitjax.train import Report


def report(step, valid=None):
    return Report(
        step=step, steps=40, loss=2.5, learning_rate=1e-3, gradient_norm=1.0,
        tokens_per_second=12345.6, seconds_left=75.0, valid_loss=valid,
    )  # fmt: skip


@pytest.fixture
def screen(monkeypatch):
    def make(is_terminal):
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120)
        monkeypatch.setattr(terminal, "console", console)
        return console.file

    return make


def test_live_bar_shows_step_loss_rate_and_eta(screen):
    out = screen(True)
    with terminal.training_progress("ternary") as update:
        update(report(10))
        update(report(40, valid=2.25))
    text = out.getvalue()
    assert "step 40/40  loss 2.500  valid 2.250  12,346 tok/s  ETA 1:15" in text


def test_plain_lines_when_not_a_terminal(screen):
    out = screen(False)
    with terminal.training_progress("ternary") as update:
        for step in range(1, 41):
            update(report(step))
    lines = out.getvalue().splitlines()
    assert len(lines) == 21  # the first report, then one for every twentieth
    assert lines[-1] == "ternary  step 40/40  loss 2.500  12,346 tok/s  ETA 1:15"


def test_a_table_is_folded_for_a_screen_only(screen, monkeypatch):
    name = "long [bold]name" * 10  # 150 characters, on a screen of 120
    for is_terminal, columns, folded in ((True, "", True), (False, "", False), (False, "90", True)):
        monkeypatch.setenv("COLUMNS", columns)
        if not columns:
            monkeypatch.delenv("COLUMNS")
        out = screen(is_terminal)
        terminal.table(("name",), [(name,)])
        assert (name not in out.getvalue()) == folded
        assert "long" in out.getvalue()


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (364_965, "365.0 kB"), (2.5e9, "2.5 GB")],
)
def test_size(count, shown):
    assert terminal.size(count) == shown


def test_names_in_files_do_not_reach_the_terminal_as_commands(capsys):
    terminal.table(("tensor",), [("[/bold]:smile:\x1b[2J\r\u202e",)])
    out = capsys.readouterr().out
    assert r"[/bold]:smile:\x1b[2J\r\u202e" in out
    assert printable("\u00e4 b\nc\t\x7f\ud800") == r"ä b\nc\t\x7f\ud800"
    assert printable("a\nb\t", keep="\n") == "a\nb\\t"
