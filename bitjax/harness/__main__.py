"""The harness's own command line, with the model "bitjax" in it."""

from __future__ import annotations

import sys


def main() -> None:
    """Register, and hand over."""
    try:
        import lm_eval  # noqa: F401
    except ModuleNotFoundError:
        sys.exit("bitjax: lm-evaluation-harness is not installed: pip install 'bitjax[harness]'")
    from lm_eval.__main__ import cli_evaluate

    import bitjax.harness  # noqa: F401

    cli_evaluate()


if __name__ == "__main__":
    main()
