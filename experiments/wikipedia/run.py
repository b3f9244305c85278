"""A ternary model and its full-precision twin of Wikipedia's text, from the file to the tables.

    python experiments/wikipedia/run.py --enwik8 enwik8.xz --wikitext test.txt --blimp BLiMP.zip \
        --out /tmp/wikipedia [--set train.products=integer]

Makes the corpus, chooses each arm's learning rate by short runs, trains configs/wikipedia.py and
configs/wikipedia_float.py, and scores enwik8's test part, WikiText-2 and BLiMP. What is done is
kept in `--out`, so that an interrupted run goes on by the same command. Rewrites `results.json`,
`loss.png` and the tables in `README.md` beside this file.

Data, none of it in the repository:
  enwik8      the first 10^8 bytes of Wikipedia of 2006, http://mattmahoney.net/dc/enwik8.zip, plain
              or .xz; GFDL and CC BY-SA 3.0. The first 90 MB are trained on, the last 5 MB the test.
  wikitext    WikiText-2's test text with <unk>, as pytorch/examples has it
              (word_language_model/data/wikitext-2/test.txt); CC BY-SA 3.0.
  blimp       BLiMP.zip of github.com/alexwarstadt/blimp; CC BY 4.0.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from bitjax.allocator import reuse_freed_memory
from bitjax.api import load
from bitjax.evaluate.multiple_choice import Mean, groups, metrics, score_task
from bitjax.evaluate.multiple_choice import Settings as TaskSettings
from bitjax.evaluate.requests import RequestScorer
from bitjax.evaluate.tasks import read_task
from bitjax.evaluation_text import TextSettings, score_path
from bitjax.plots import plot_losses
from bitjax.train import read_metrics

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
ARMS = {"ternary": "wikipedia.py", "float": "wikipedia_float.py"}
RATES = (1.5e-3, 3e-3, 6e-3, 1.2e-2)
SWEEP_STEPS = 200
TRAINED, TESTED = 90_000_000, 5_000_000  # bytes, as enwik8 is usually cut
PAGE = "  <page>\n"  # begins one
SEPARATED = ("--separator", PAGE.replace("\n", r"\n"))


def bitjax(*arguments: object) -> None:
    """Run one of the commands."""
    subprocess.run([sys.executable, "-P", "-m", "bitjax.cli", *map(str, arguments)], check=True)


def make_corpus(enwik8: Path, out: Path) -> None:
    """`out/corpus` of the pages of the first part, `out/test.txt`."""
    if not (out / "test.txt").exists():
        raw = enwik8.read_bytes()
        if enwik8.suffix == ".xz":
            raw = lzma.decompress(raw)
        if len(raw) != 10**8:
            raise SystemExit(f"{enwik8} holds {len(raw):,} bytes; enwik8 has 100,000,000")
        pages = raw[:TRAINED].rpartition(PAGE.encode())[0]  # the last one may be cut
        (out / "text.txt").write_bytes(pages)
        (out / "test.txt").write_bytes(raw[-TESTED:].decode(errors="ignore").encode())
    tokenizer, text = out / "tokenizer.json", out / "text.txt"
    if not tokenizer.exists():
        bitjax("corpus", "tokenizer", text, "-o", tokenizer, *SEPARATED, "--vocab-size", 4096)
    if not (out / "corpus").exists():
        bitjax("corpus", "build", text, "-o", out / "corpus", "--tokenizer", tokenizer, *SEPARATED)


def train(arm: str, run: Path, rate: float, settings: list[str], steps: int | None = None) -> None:
    """Train an arm, or go on with it; a finished run is left alone."""
    changed = [f"data.text={run.parent.parent / 'corpus'}", f"optimizer.learning_rate={rate}"]
    if arm == "ternary":  # two stages, the second at two thirds of the rate
        changed += [f"optimizer.stage_two_learning_rate={rate * 2 / 3}", *settings]
    else:
        changed += [s for s in settings if not s.startswith("train.products=")]
    if steps is not None:
        changed += [f"train.steps={steps}", f"train.eval_every={steps}"]
    bitjax("train", CONFIGS / ARMS[arm], "--out", run,
           *(part for setting in changed for part in ("--set", setting)))  # fmt: skip


def held_out_loss(run: Path) -> float:
    """The last validation loss of a run, nats per token."""
    return [r["valid_loss"] for r in read_metrics(run) if "valid_loss" in r][-1]


def sweep(arm: str, out: Path, settings: list[str]) -> dict[float, float]:
    """Learning rates and the held-out losses that short runs reach with them."""
    found = {}
    for rate in RATES:
        run = out / "sweep" / f"{arm}-{rate:g}"
        train(arm, run, rate, settings, SWEEP_STEPS)
        found[rate] = held_out_loss(run)
    return found


def evaluate(
    run: Path, texts: dict[str, Path], blimp: Path, window: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Scores of the texts and of BLiMP, with standard errors.

    Args:
        run: a run's directory, or a model file.
        texts: by name.
        blimp: the archive.
        window: predictions in a window, which do not overlap; None: the context, half of it new.
        limit: items of each of BLiMP's 67 parts; None: all 1,000.
    """
    model = load(run)
    scores: dict[str, Any] = {}
    for name, path in texts.items():
        score, _ = score_path(model, TextSettings(str(path), window, window))
        scores[name] = {
            "bits_per_byte": score.bits_per_byte, "error": score.bits_per_byte_error,
            "tokens": score.tokens, "bytes": path.stat().st_size,
            "words": len(path.read_text().split()) + path.read_text().count("\n"),
        }  # fmt: skip
    task = read_task(blimp)
    answers = score_task(RequestScorer(model), model.tokenizer, task, TaskSettings(), limit)
    for group, members in groups(answers).items():
        mean = Mean.of(metrics(members)["acc"])
        scores[f"BLiMP {group}".strip()] = {
            "accuracy": mean.value,
            "error": mean.error,
            "items": mean.items,
        }
    return scores


def word_perplexity(score: dict[str, Any]) -> tuple[float, float]:
    """Perplexity per word, ends of lines being words, as WikiText's are given; standard error."""
    bits = score["bits_per_byte"] * score["bytes"] / score["words"]
    error = score["error"] * score["bytes"] / score["words"]
    return 2**bits, 2**bits * math.log(2) * error


def table(results: dict[str, Any]) -> str:
    """Scores of both arms as Markdown."""
    arms = [arm for arm in ARMS if "scores" in results.get(arm, {})]
    lines = ["| | " + " | ".join(arms) + " |", "|---" * (len(arms) + 1) + "|"]
    for name in results[arms[0]]["scores"]:
        found = [results[arm]["scores"][name] for arm in arms]
        if name.startswith("BLiMP"):
            cells = [f"{s['accuracy']:.3f} ± {s['error']:.3f}" for s in found]
        else:
            cells = [f"{s['bits_per_byte']:.4f} ± {s['error']:.4f}" for s in found]
            name += ", bits per byte"
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    words = [word_perplexity(results[arm]["scores"]["WikiText-2"]) for arm in arms]
    cells = [f"{value:,.0f} ± {error:,.0f}" for value, error in words]
    lines.insert(4, "| WikiText-2, perplexity per word | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def sweep_table(results: dict[str, Any]) -> str:
    """Held-out losses of the short runs."""
    lines = ["| arm | learning rate | nats per token |", "|---|---|---|"]
    for arm in ARMS:
        for rate, loss in results.get(arm, {}).get("sweep", {}).items():
            lines.append(f"| {arm} | {float(rate):g} | {loss:.4f} |")
    return "\n".join(lines)


def fill_in(parts: dict[str, str]) -> None:
    """Put texts between the marks of their names in `README.md`."""
    readme = HERE / "README.md"
    text = readme.read_text()
    for mark, made in parts.items():
        before, _, rest = text.partition(f"<!-- {mark} -->")
        end = f"<!-- end of {mark} -->"
        text = f"{before}<!-- {mark} -->\n{made}\n{end}{rest.partition(end)[2]}"
    readme.write_text(text)


def publish(results: dict[str, Any], out: Path) -> None:
    """Rewrite what lies beside this file."""
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    fill_in({"results": table(results), "sweep": sweep_table(results)})
    trained = [arm for arm in ARMS if "scores" in results.get(arm, {})]
    runs = {arm: read_metrics(out / "runs" / arm) for arm in trained}
    plot_losses(HERE / "loss.png", runs, "token")


def main() -> None:
    """From the file to the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("enwik8", "wikitext", "blimp", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="of both arms' configurations")
    arguments = parser.parse_args()
    reuse_freed_memory()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    make_corpus(arguments.enwik8, out)
    kept = out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    texts = {"enwik8, last 5 MB": out / "test.txt", "WikiText-2": arguments.wikitext}
    for arm in ARMS:
        found = results.setdefault(arm, {})
        if "sweep" not in found:
            found["sweep"] = sweep(arm, out, arguments.set)
            found["rate"] = min(found["sweep"], key=found["sweep"].__getitem__)
        kept.write_text(json.dumps(results, indent=1))
    for arm, found in results.items():
        run = out / "runs" / arm
        train(arm, run, float(found["rate"]), arguments.set)
        found["held_out"] = held_out_loss(run)
        if "scores" not in found:
            found["scores"] = evaluate(run, texts, arguments.blimp)
        kept.write_text(json.dumps(results, indent=1))
        publish(results, out)


if __name__ == "__main__":
    main()
