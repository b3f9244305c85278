"""Dialogues and preferences out of the packaged Shakespeare, for configs/sft.py and configs/dpo.py.

    plays.txt         the text itself, for tokenizer and base model
    dialogues.jsonl   a speech as the user's message, the next one as the answer
    pairs.jsonl       answers that say thou: chosen, with you in its place; rejected, as it stands
    template.jinja    a chat template whose turns end with the control token of our tokenizers

Command:   python experiments/tuning/dialogues.py FOLDER
"""

import importlib.resources
import itertools
import json
import re
import sys
from pathlib import Path

TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content | trim + '<|endoftext|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
MODERN = {"thou": "you", "thee": "you", "thy": "your", "thine": "yours", "hast": "have",
          "dost": "do", "art": "are", "hath": "has", "doth": "does", "ye": "you"}  # fmt: skip
THOU = re.compile(r"\b(?:thou|thee|thy|thine)\b", re.IGNORECASE)
WORD = re.compile(r"\b(?:" + "|".join(MODERN) + r")\b", re.IGNORECASE)
LONGEST = 400  # characters of a speech


def modern(text: str) -> str:
    """The text with you for thou."""

    def replaced(found: re.Match[str]) -> str:
        word = MODERN[found[0].lower()]
        return word.capitalize() if found[0][0].isupper() else word

    return WORD.sub(replaced, text)


def main(folder: Path) -> None:
    """Write the four files."""
    text = (importlib.resources.files("bitjax") / "data" / "tinyshakespeare.txt").read_text()
    speeches = [s.partition(":\n")[2].strip() for s in text.split("\n\n")]
    dialogues = [
        (before, after)
        for before, after in itertools.pairwise(speeches)
        if 0 < len(before) <= LONGEST and 0 < len(after) <= LONGEST
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plays.txt").write_text(text)
    (folder / "template.jinja").write_text(TEMPLATE)
    chats = [
        {"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]}
        for a, b in dialogues
    ]
    pairs = [
        {"prompt": a, "chosen": modern(b), "rejected": b} for a, b in dialogues if THOU.search(b)
    ]
    for name, lines in (("dialogues", chats), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    print(f"{folder}: {len(chats)} dialogues, {len(pairs)} pairs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
