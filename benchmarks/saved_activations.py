"""What a decoder layer keeps for backward, in bytes a token.

    python benchmarks/saved_activations.py

Of a layer between others: what three layers save less what two save, with random weights.
"""

import argparse

import measuring
import torch
from transformers import LlamaConfig

from hopscotch_common import scales
from hopscotch_common.loading import hopscotch_classes, hopscotch_config
from hopscotch_common.recomputation import saved_bytes

SHAPES = {
    "Llama-3.1-8B": dict(
        hidden_size=4096, intermediate_size=14336, num_attention_heads=32, num_key_value_heads=8
    ),
    "SmolLM2-135M": dict(
        hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
    ),
}
TOKENS = 512


def bytes_saved(shape: dict, layers: int, dtype: torch.dtype, padded: bool) -> int:
    """Bytes that so many layers of a shape save for 512 tokens in two rows."""
    config = hopscotch_config(LlamaConfig(num_hidden_layers=layers, vocab_size=512, **shape))
    _, model_class = hopscotch_classes("llama")
    model = model_class._from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    scales.reset(model)
    ids = torch.arange(TOKENS).view(2, -1)
    mask = None
    if padded:
        mask = torch.ones_like(ids)
        mask[0, -10:] = 0
    return saved_bytes(model, lambda: model.model(ids, attention_mask=mask, use_cache=False))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    results = []
    for name, shape in SHAPES.items():
        for dtype in (torch.bfloat16, torch.float32):
            for padded in (False, True):
                two, three = (bytes_saved(shape, layers, dtype, padded) for layers in (2, 3))
                results.append(
                    {
                        "shape": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "rows": "padded" if padded else "of one length",
                        "bytes_per_token_and_layer": (three - two) // TOKENS,
                    }
                )
                print(results[-1])
    measuring.save("saved_activations", {"tokens": TOKENS, "results": results})


if __name__ == "__main__":
    main()
