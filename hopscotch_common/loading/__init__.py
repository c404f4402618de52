"""From `--model` to a checked, loaded model and its tokenizer."""
