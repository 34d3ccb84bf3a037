"""Regularization for PyTorch Lightning, added to a ``Trainer`` as callbacks."""

__version__ = "0.1.0"
