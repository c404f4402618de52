"""Step 1: prompts, the two engines that answer them, and batched decoding."""
