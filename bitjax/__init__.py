"""bitjax: train, study and run 1.58-bit (ternary) language models in JAX.

`import bitjax` is light: nothing here needs the compiled extension, and the submodules that need
JAX are imported by whoever uses them.
"""

__version__ = "0.1.0"
