"""A checkpoint's KV cache: all that transformers does to its layers, and no slot that stays empty.

Each operation is held against the same model run over whole sequences, without a cache.
"""

import copy

import pytest
import torch
from test_modeling import skipping_model
from torch.testing import assert_close
from transformers import DynamicCache, StaticCache

PROMPT = torch.randint(3, 300, (2, 8), generator=torch.Generator().manual_seed(0))
MORE = torch.randint(3, 300, (2, 3), generator=torch.Generator().manual_seed(1))
KINDS = [("full", "own"), ("full", "dynamic"), ("full", "lazy"), ("mixed", "own"), ("mixed", "dynamic")]
STATIC = [("full", "static"), ("mixed", "static")]
BLOCKS = [[0], [3], [1, 2], [0, 1, 2]]
# Two full layers and two sliding ones; the window is longer than what these tests read, so that none forgets.
MIXED = dict(use_sliding_window=True, sliding_window=32, max_window_layers=2)


@pytest.fixture(params=["full", "mixed"])
def make(request, tiny_folder):
    """make(blocks) -> a model that skips them, of full attention, or half of it sliding."""

    def made(blocks: list[int]):
        if request.param == "full":
            return skipping_model(tiny_folder("llama"), "llama", blocks)
        blocks = [block for block in blocks if block != 1 or 0 not in blocks]  # a block of each kind is left
        return skipping_model(tiny_folder("qwen2", **MIXED), "qwen2", blocks, **MIXED)

    return made


def caches(model) -> dict:
    """Empty caches as a user makes them, and None: the model makes its own."""
    return {
        "own": None,
        "dynamic": DynamicCache(config=model.config),
        "lazy": DynamicCache(),  # it cannot know which layers have a window
        "static": StaticCache(config=model.config, max_cache_len=16),
    }


def step(model, ids: torch.Tensor, cache):
    output = model(ids, past_key_values=cache, use_cache=True)
    return output.logits, output.past_key_values


def whole(model, ids: torch.Tensor, new: int) -> torch.Tensor:
    """Logits of the last `new` tokens, without a cache."""
    return model(ids, use_cache=False).logits[:, -new:]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("make", "kind"), KINDS + STATIC, indirect=["make"])
@torch.no_grad()
def test_a_cache_has_a_slot_for_each_layer_that_fills_it(make, blocks, kind):
    model = make(blocks)
    logits, cache = step(model, PROMPT, caches(model)[kind])
    assert_close(logits, whole(model, PROMPT, 8))
    left = [layer for layer in model.model.layers if not layer.skip_attention]
    assert len(cache) == len(cache.layers) == len(left)
    assert all(layer.is_initialized and layer.get_seq_length() == 8 for layer in cache.layers)
    logits, cache = step(model, MORE, cache)
    assert_close(logits, whole(model, torch.cat([PROMPT, MORE], 1), 3))
    cache.reset()
    if kind == "static":
        assert_close(step(model, PROMPT, cache)[0], whole(model, PROMPT, 8))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(("make", "kind"), KINDS, indirect=["make"])
@torch.no_grad()
def test_what_is_done_to_all_layers_of_a_cache(make, blocks, kind):
    model = make(blocks)
    filled = step(model, PROMPT, caches(model)[kind])[1]

    def after(change, rows: torch.Tensor, kept: int = 8):
        cache = copy.deepcopy(filled)
        change(cache)
        ids = torch.cat([PROMPT[rows, :kept], MORE[rows]], 1)
        assert_close(step(model, MORE[rows], cache)[0], whole(model, ids, 3))

    both, twice = torch.tensor([0, 1]), torch.tensor([0, 0, 1, 1])
    after(lambda cache: None, both)
    after(lambda cache: cache.crop(-2), both, 6)
    after(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), both.flip(0))
    after(lambda cache: cache.batch_repeat_interleave(2), twice)
    after(lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1]))
    states = [(layer.keys, layer.values) for layer in filled.layers]
    copied = DynamicCache(ddp_cache_data=states, config=model.config)
    assert_close(step(model, MORE, copied)[0], whole(model, torch.cat([PROMPT, MORE], 1), 3))


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize(
    "options",
    [
        dict(assistant_early_exit=2),
        dict(prompt_lookup_num_tokens=2),
        dict(num_beams=3),
        dict(cache_implementation="static"),
    ],
)
def test_generation_with_each_use_of_a_cache(make, blocks, options):
    model = make(blocks)
    common = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    beams = {name: value for name, value in options.items() if name == "num_beams"}
    expected = model.generate(PROMPT[:1], use_cache=False, **common, **beams)
    assert torch.equal(model.generate(PROMPT[:1], **common, **options), expected)


def test_what_is_set_in_the_config_of_a_cache_is_set_in_the_models(make):
    model = make([1])
    view = model.config.get_text_config(decoder=True)
    assert view.num_hidden_layers == 3 and model.config.num_hidden_layers == 4
    view.tie_word_embeddings, view.num_hidden_layers = True, 2  # the latter as assistant_early_exit does
    assert model.config.tie_word_embeddings and model.config.num_hidden_layers == 2
    assert view.num_hidden_layers == 1 and "hopscotch" in repr(view)
    assert "uncached_layers" not in model.config.to_dict()


def test_continuous_batching_of_full_and_sliding_layers_is_refused(tiny_folder):
    """It numbers layers as the whole config does, and would let a full one forget what a window passed."""
    model = skipping_model(tiny_folder("qwen2", **MIXED), "qwen2", [0], **MIXED)
    with pytest.raises(ValueError, match="continuous batching cannot skip blocks"):
        model.init_continuous_batching()
