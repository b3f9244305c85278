"""bitjax's models in EleutherAI's lm-evaluation-harness, as its model "bitjax".

    python -m bitjax.harness --model bitjax --model_args path=a.safetensors --tasks ...
    lm_eval.simple_evaluate(model=HarnessModel("a.safetensors"), tasks=[...])

The harness (0.4.13) knows its own models and those of modules that are imported, and looks for no
others; so its command line is started through this package, which is all that `python -m
bitjax.harness` does. In Python, importing this package registers the model.

How texts become tokens is the harness's: contexts and continuations are encoded together and cut,
what is too long loses its beginning, a text without a context follows the token of
`bitjax.evaluate.requests.beginning`. Rolling log-likelihoods score all tokens that the tokenizer
gives, one that begins every text included, as the harness has it for transformers;
`bitjax.evaluate.rolling` leaves that one out. Stop strings are found in text, not in tokens.
"""

from bitjax.harness.model import HarnessModel

__all__ = ["HarnessModel"]
