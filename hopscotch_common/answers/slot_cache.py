"""What batched decoding adds to transformers: a preallocated cache, and attention without copies.

Stock decoding of a batch copies all keys and values in every layer and step, twice: to append a
column, and to repeat each for the query heads that share it. On 2 CPU cores that took longer than
the model itself.
"""

from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hopscotch_common.modeling_hopscotch import RECURRENT_TYPES, attention_types

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


# moved(tensor, column_axis): the rows that stay in a new tensor with room for others, and with another
# number of columns along column_axis, if that is not None.
Move = Callable[[torch.Tensor, int | None], torch.Tensor]


def empty_cache(config) -> Cache:
    """A cache to prefill: it keeps all columns, sliding window or not, and the states of recurrent layers."""
    return Cache(
        layers=[
            LinearAttentionLayer() if kind in RECURRENT_TYPES else DynamicLayer()
            for kind in attention_types(config.get_text_config(decoder=True))
        ]
    )


def slot_layer(layer, slots: int, capacity: int, clock: int) -> "SlotLayer | SlotStates":
    """An empty layer with slots, of the kind, sizes, dtype and device of a cache layer after a prefill."""
    if isinstance(layer, LinearAttentionLayer):
        return SlotStates(layer, slots)
    return SlotLayer.like(layer, slots, capacity, clock)


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

    def fill(self, slots: list[int], layer, end: int) -> None:
        """Take over what a prefill left in another layer, up to the column `end`."""
        start = end - layer.keys.shape[2]
        self.keys[slots, :, start:end] = layer.keys
        self.values[slots, :, start:end] = layer.values

    def move(self, moved: Move, clock: int) -> None:
        self.keys, self.values = moved(self.keys, 2), moved(self.values, 2)
        self.clock = clock


class SlotStates(LinearAttentionLayer):
    """One recurrent layer's states, [slots, ...] each. Every step replaces those of all slots.

    A row's states hold nothing of other rows, nor of its padding, which these layers mask; so a prompt
    takes a slot by writing its states there.
    """

    def __init__(self, layer: LinearAttentionLayer, slots: int):
        super().__init__(layer.number_of_states)
        self.device, self.dtype, self.conv_kernel_size = layer.device, layer.dtype, layer.conv_kernel_size
        self.conv_states, self.recurrent_states = (
            {i: state.new_zeros(slots, *state.shape[1:]) for i, state in states.items()}
            for states in (layer.conv_states, layer.recurrent_states)
        )
        for known in (
            self.is_conv_states_initialized,
            self.is_recurrent_states_initialized,
            self.has_previous_state,
        ):
            known.update(dict.fromkeys(known, True))

    def fill(self, slots: list[int], layer: LinearAttentionLayer, end: int) -> None:
        """Take over the states that a prefill left in another layer."""
        for i in range(self.number_of_states):
            self.conv_states[i][slots] = layer.conv_states[i]
            self.recurrent_states[i][slots] = layer.recurrent_states[i]

    def move(self, moved: Move, clock: int) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: moved(state, None) for i, state in states.items()})
