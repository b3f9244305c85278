"""Build the corpus and do the study's runs, or what is left of them.

    python experiments/scaling/run.py --articles articles.txt.xz --jobs 2

`articles.txt.xz`: articles of Wikipedia, an empty line between two (README.md says where from).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bitjax.cli import main as bitjax

HERE = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--articles", type=Path, required=True)
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--out", type=Path, default=HERE, help="of the tables (default: here)")
    arguments = parser.parse_args()
    corpus = arguments.out / "corpus" / "wikipedia"
    if not corpus.exists():
        build = ["corpus", "build", str(arguments.articles), "-o", str(corpus)]
        if code := bitjax([*build, "--separator", "\\n\\n"]):
            return code
    run = ["scale", "run", str(HERE / "plan.json"), "--data", str(corpus)]
    return bitjax([*run, "-o", str(arguments.out), "--jobs", arguments.jobs])


if __name__ == "__main__":
    sys.exit(main())
