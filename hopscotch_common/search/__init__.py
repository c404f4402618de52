"""Step 3: which attention block to skip next."""
