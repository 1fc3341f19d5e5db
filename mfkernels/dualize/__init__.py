from .op import dualize
from .report import Report

__all__ = ["Report", "dualize"]
