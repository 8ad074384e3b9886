"""Puts arriero onto a machine that is reached, keeps its agent running there, and takes it away again.

`Machines` (machines.py) is what others use.  What runs there comes from `look.sh` (any POSIX shell, finds
a Python) and `there_child.py` (that Python's standard library alone).
"""
