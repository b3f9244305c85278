"""Other engines' formats: checkpoints in, checkpoints out, and their tokenizers."""
