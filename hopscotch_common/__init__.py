"""Hopscotch: find attention blocks that a language model can skip, and train scales that make up for them."""
