"""Evaluation of models through a scoring function."""

from bitjax.evaluate.perplexity import Scorer, TextScore, model_scorer, score_text, tokens_of

__all__ = ["Scorer", "TextScore", "model_scorer", "score_text", "tokens_of"]
