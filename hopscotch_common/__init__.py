"""Hopscotch: find attention blocks that a language model can skip, and train scales that make up for them."""

__version__ = "0.1.0"
