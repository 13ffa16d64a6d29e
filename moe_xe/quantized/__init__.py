"""Quantised weights as values of torch's: codes, scales, and what they mean."""
from .weight import QuantizedWeight

__all__ = ["QuantizedWeight"]
