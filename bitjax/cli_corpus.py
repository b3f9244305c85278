"""`bitjax corpus`: build, look at, and train a tokenizer on, files of text."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from bitjax.config import TOKENIZER_VOCAB_SIZE, CorpusConfig
from bitjax.tokenizer import BYTES, Tokenizer


def add_corpus_commands(parser: argparse.ArgumentParser) -> None:
    """The sub-commands of `bitjax corpus`; each sets `run`."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    defaults = CorpusConfig()

    def command(name: str, run: object, summary: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=summary, description=f"{summary.capitalize()}.")
        added.set_defaults(run=run)
        return added

    def input_arguments(added: argparse.ArgumentParser) -> None:
        added.add_argument(
            "input", type=Path, nargs="+",
            help=".txt or .jsonl, also .gz, .xz or .zst; .parquet; .arrow; or a folder of them, "
            "such as a Hugging Face dataset",
        )  # fmt: skip
        added.add_argument("-o", "--output", type=Path, required=True, metavar="PATH")
        added.add_argument(
            "--field", default=defaults.text_field, help="that holds the text (default: text)"
        )
        added.add_argument(
            "--separator", default=defaults.separator, metavar="TEXT",
            help=r"between documents of a text, \n standing for a new line (default: the file is "
            "one document)",
        )  # fmt: skip
        added.add_argument("--overwrite", action="store_true", help="replace PATH if it exists")

    build = command("build", _build, "turn text into a corpus: token files with an index")
    input_arguments(build)
    build.add_argument(
        "--tokenizer", default=BYTES.name, metavar="NAME",
        help="bytes, a tokenizer.json, or a model (default: bytes)",
    )  # fmt: skip
    kinds = build.add_mutually_exclusive_group()
    kinds.add_argument(
        "--chat", dest="kind", action="store_const", const="chat", default=defaults.kind,
        help='conversations in .jsonl, {"messages": [{"role", "content"}, ...]} or {"prompt", '
        '"completion"}, of which the answers are learned',
    )  # fmt: skip
    kinds.add_argument(
        "--pairs", dest="kind", action="store_const", const="pairs",
        help='preferences in .jsonl, {"prompt", "chosen", "rejected"}, texts or messages',
    )  # fmt: skip
    build.add_argument(
        "--template", type=Path, metavar="FILE",
        help="with --chat or --pairs: a chat template in Jinja (default: the tokenizer's own)",
    )  # fmt: skip
    build.add_argument(
        "--valid-fraction", type=float, default=defaults.valid_fraction, metavar="F",
        help=f"of documents held out, chosen by hash (default: {defaults.valid_fraction})",
    )  # fmt: skip
    build.add_argument("--salt", default=defaults.salt, help="of that hash")
    build.add_argument(
        "--shard-tokens", type=int, default=defaults.shard_tokens, metavar="N",
        help=f"tokens of a file (default: {defaults.shard_tokens})",
    )  # fmt: skip
    build.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N",
        help="processes (default: the cores)",
    )  # fmt: skip
    tokenizer = command("tokenizer", _tokenizer, "train a byte-level BPE tokenizer on text")
    input_arguments(tokenizer)
    tokenizer.add_argument(
        "--vocab-size", type=int, default=TOKENIZER_VOCAB_SIZE, metavar="V",
        help=f"most tokens it may have (default: {TOKENIZER_VOCAB_SIZE})",
    )  # fmt: skip
    inspect = command("inspect", _inspect, "check a corpus, checksums included, and show it")
    inspect.add_argument("corpus", type=Path)


def _config(arguments: argparse.Namespace, **more: Any) -> CorpusConfig:
    return CorpusConfig(
        text_field=arguments.field, separator=unescaped(arguments.separator), **more
    )


def unescaped(separator: str) -> str:
    r"""A separator as the command line has it, with \n and \t for a new line and a tab."""
    return separator.replace("\\n", "\n").replace("\\t", "\t")


def _build(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.chat.examples import build_chat_corpus
    from bitjax.corpus import build_corpus

    config = _config(
        arguments, valid_fraction=arguments.valid_fraction, salt=arguments.salt,
        shard_tokens=arguments.shard_tokens, kind=arguments.kind,
    )  # fmt: skip
    if config.kind == "text" and arguments.template is not None:
        raise ValueError("--template is for --chat and --pairs; neither is given")
    tokenizer, template = find_tokenizer(arguments.tokenizer), None
    if arguments.template is not None:
        template = arguments.template.read_text(encoding="utf-8")
    with terminal.byte_progress(arguments.output.name) as on_bytes:
        rest = arguments.workers, arguments.overwrite, on_bytes
        if config.kind == "text":
            build_corpus(arguments.input, arguments.output, tokenizer, config, *rest)
        else:
            build_chat_corpus(arguments.input, arguments.output, tokenizer, config, template, *rest)
    _show(arguments.output, check=False)


def find_tokenizer(name: str) -> Tokenizer:
    """Bytes, that of a tokenizer.json, or that of a model.

    Raises:
        ValueError: none there, or one that cannot be read.
    """
    if name == BYTES.name:
        return BYTES
    from bitjax.interop.tokenizers import read_huggingface_tokenizer

    path = Path(name)
    if path.is_dir() or path.name == "tokenizer.json":
        found = read_huggingface_tokenizer(path if path.is_dir() else path.parent)
        if found is not None:
            return found
    if path.suffix == ".json":
        import tempfile

        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
        with tempfile.TemporaryDirectory() as folder:  # the reader's own name for such a file
            (Path(folder) / "tokenizer.json").write_bytes(raw)
            found = read_huggingface_tokenizer(Path(folder))
        assert found is not None
        return found
    from bitjax.api import load

    return load(name).tokenizer


def _tokenizer(arguments: argparse.Namespace) -> None:
    from bitjax import terminal
    from bitjax.corpus.sources import find_files, read_documents
    from bitjax.corpus.tokenizer_training import train_tokenizer

    if arguments.output.exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.output} exists; choose another name or give --overwrite")
    config, files = _config(arguments), find_files(arguments.input)
    texts = (document.text for path in files for document in read_documents(path, config))
    made = train_tokenizer(texts, arguments.vocab_size)
    partial = arguments.output.with_name(arguments.output.name + ".partial")
    partial.write_text(made.json, encoding="utf-8")
    partial.replace(arguments.output)
    terminal.console.print(f"{arguments.output}: {made.vocab_size} tokens", soft_wrap=True)


def _inspect(arguments: argparse.Namespace) -> None:
    _show(arguments.corpus, check=True)


def _show(folder: Path, check: bool) -> None:
    from bitjax import terminal
    from bitjax.corpus import Corpus

    corpus = Corpus(folder, check)
    rows = []
    for name, about in corpus.index["parts"].items():
        rate = f"{about['bytes'] / about['tokens']:.3f}" if about["tokens"] else "-"
        rows.append((
            name, f"{about['documents']:,}", f"{about['tokens']:,}",
            terminal.size(about["bytes"]), rate, len(about["shards"]),
        ))  # fmt: skip
    columns = ("part", "documents", "tokens", "text", "bytes per token", "files")
    terminal.table(columns, rows, str(folder))
    kind = f"{corpus.tokenizer.name}, {corpus.tokenizer.vocab_size} tokens"
    learned = "" if corpus.train.kind == "text" else ", of which answers alone are learned"
    terminal.console.print(
        f"kind: {corpus.train.kind}{learned}\n"
        f"tokenizer: {kind}; {corpus.index['empty']} empty documents left out\n"
        f"identity: {corpus.identity}{'; every checksum is right' if check else ''}",
        soft_wrap=True,
    )
