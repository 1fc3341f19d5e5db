"""Check every op on this machine against plain PyTorch: `python -m mfkernels.check`.

Each op, on each backend that this machine has, in each dtype: value, tangent and every gradient against float64. An
error may be at most twice that of the same formula in plain PyTorch, in the same dtype on the same device, plus a noise
floor. Exit code 0: every check passed; 1: some failed; 2: wrong arguments.
"""
