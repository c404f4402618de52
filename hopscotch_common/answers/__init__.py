"""Step 1: prompts, the engines that answer them, and what they are told."""

from dataclasses import dataclass

BACKENDS = ("auto", "vllm", "transformers")


@dataclass(frozen=True)
class EngineOptions:
    """How answers are generated; the fields are the flags of generate_model_gt_data.py."""

    backend: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    attn_implementation: str = "auto"
    tensor_parallel_size: int | None = None
    max_tokens_per_batch: int = 32768
    seed: int = 42
