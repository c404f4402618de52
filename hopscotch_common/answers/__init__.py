"""Step 1: prompts, the engines that answer them, and their options. Step 2: what is trained on."""

from dataclasses import dataclass

BACKENDS = ("auto", "vllm", "transformers")
DATA_FILE, DATA_REPORT = "data.jsonl", "data_report.json"  # what step 2 writes into its folder


@dataclass(frozen=True)
class EngineOptions:
    """How answers are generated; the fields are the flags of generate_model_gt_data.py."""

    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "auto"
    tensor_parallel_size: int | None = None
    max_tokens_per_batch: int = 32768
