"""Checkpoints in the formats that other tools load: `python -m hopscotch_common.export`."""
