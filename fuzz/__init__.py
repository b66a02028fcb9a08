"""Fuzzing: what reads bytes that others may have written, given anything.

`target.py` says what a target is, `targets_*.py` has them all, `mutate.py` makes the inputs, `corpora/` keeps what to
begin from and every input that once broke something. `python -m fuzz` (`make fuzz`) runs them guided by coverage, with
atheris; the ordinary tests run each of them over its corpus and some hundreds of changes to it, without.
"""
