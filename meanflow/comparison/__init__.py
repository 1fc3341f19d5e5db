"""Several methods trained with one budget of computation: `meanflow compare`.

methods.py: which, and how long each of them trains. cost.py: what a training step costs. runs.py: training and figures.
table.py and figure.py: compare.md and compare.png.
"""
