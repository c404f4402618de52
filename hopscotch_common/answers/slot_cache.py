"""What batched decoding adds to transformers: a preallocated KV cache, and attention without copies.

Stock decoding of a batch copies all keys and values in every layer and step, twice: to append a
column, and to repeat each for the query heads that share it. On 2 CPU cores that took longer than
the model itself.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED_SDPA = "hopscotch_grouped_sdpa"


def grouped_sdpa(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention kernel for transformers: sdpa that copies no keys or values when decoding.

    Stock sdpa with a mask repeats each key and value for every query head that shares it. For a
    single query token those heads can be rows of one query instead, and nothing is repeated.

    query: [rows, heads, queries, dim]; key, value: [rows, kv_heads, columns, dim]; attention_mask:
    [rows, 1, queries, columns] or None. Returns ([rows, queries, heads, dim], None).
    """
    rows, heads, queries, dim = query.shape
    if queries != 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    grouped = query.reshape(rows, key.shape[1], -1, dim)
    output = scaled_dot_product_attention(grouped, key, value, attn_mask=attention_mask, scale=scaling)
    return output.reshape(rows, 1, heads, dim), None


AttentionInterface.register(GROUPED_SDPA, grouped_sdpa)
AttentionMaskInterface.register(GROUPED_SDPA, sdpa_mask)


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values, [slots, kv_heads, capacity, dim]; writes at column `clock`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, clock: int):
        super().__init__()
        self.keys, self.values, self.clock = keys, values, clock
        self.is_initialized = True

    @classmethod
    def like(cls, layer, slots: int, capacity: int, clock: int) -> "SlotLayer":
        """An empty one, with the heads, sizes, dtype and device of another cache layer."""
        keys, values = layer.keys, layer.values
        return cls(
            keys.new_zeros(slots, keys.shape[1], capacity, keys.shape[3]),
            values.new_zeros(slots, values.shape[1], capacity, values.shape[3]),
            clock,
        )

    def lazy_initialization(self, key_states, value_states):
        pass

    def update(self, key_states, value_states, *args, **kwargs):
        end = self.clock + key_states.shape[2]
        self.keys[:, :, self.clock : end] = key_states
        self.values[:, :, self.clock : end] = value_states
        self.clock = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.clock + query_length, 0

    def get_seq_length(self) -> int:
        return self.clock

    def get_max_length(self) -> int:
        return -1
