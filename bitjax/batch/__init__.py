"""Files of prompts to files of results."""

from bitjax.batch.job import Batch, Progress, run_batch
from bitjax.batch.lines import Source

__all__ = ["Batch", "Progress", "Source", "run_batch"]
