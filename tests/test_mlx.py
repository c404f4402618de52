"""`nemotron_nas` exports in mlx-lm, the engine of Apple's laptops: transformers' tokens, less KV cache.

mlx-lm wants a transformers of its own, so it gets an environment of its own, which takes half a minute.
"""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch

from hopscotch_common import checkpoints
from hopscotch_common.export.formats import export_checkpoint
from hopscotch_common.loading.models import ModelRef, model_ref
from hopscotch_common.scales.modeling_hopscotch import REPLACEMENT_NAMES

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="mlx has no build for it"),
]

PACKAGES = ["mlx-lm==0.32.2", "mlx[cpu]==0.32.4" if sys.platform == "linux" else "mlx==0.32.4"]
NEW_TOKENS = 30
QUESTION = "A farmer has 12 hens. Each lays 5 eggs a week. How many eggs is that?"
SKIPPED = {
    "smollm": [3, 9],
    "llama": [0, 2],
    "llama maps": [0, 2],
    "granite maps": [1],
    "mistral": [1, 2],
    "granite": [1, 3],
    "qwen2": [1],
}
ENGINE = f"""
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

def answer(folder, ids):
    try:
        model = load_model(Path(folder))[0]
    except ValueError as error:
        return {{"error": str(error)}}
    cache = make_prompt_cache(model)
    steps = generate_step(mx.array(ids), model, max_tokens={NEW_TOKENS}, prompt_cache=cache)
    return {{
        "tokens": [int(token) for token, _ in steps],
        "logits": model(mx.array([ids]))[0].astype(mx.float32).tolist(),
        "caches": sum(layer.offset > 0 for layer in cache),  # a linear layer's stays empty
    }}

json.dump({{folder: answer(folder, ids) for folder, ids in json.load(sys.stdin).items()}}, sys.stdout)
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """The Python of an environment with mlx-lm."""
    folder = tmp_path_factory.mktemp("mlx")
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return python


def ask_transformers(checkpoint: Path, ids: list[int]) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the prompt's logits [tokens, vocab]."""
    model, row = checkpoints.load_checkpoint(checkpoint, dtype=torch.float32), torch.tensor([ids])
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    with torch.inference_mode():
        tokens = model.generate(row, attention_mask=torch.ones_like(row), **options)
        return tokens[0, len(ids) :].tolist(), model(row).logits[0]


@pytest.fixture(scope="module")
def runs(python, tiny_folder, tmp_path_factory) -> dict[str, tuple]:
    """{model: (transformers' tokens and logits, what mlx-lm said)}"""
    from transformers import AutoTokenizer

    root, expected, jobs = tmp_path_factory.mktemp("exports"), {}, {}
    tokenizer = AutoTokenizer.from_pretrained(model_ref("smollm").folder())
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    for name, skipped in SKIPPED.items():
        real = name == "smollm"
        family, _, with_maps = name.partition(" ")
        ref = model_ref(name) if real else ModelRef(name, str(tiny_folder(family)))
        values = torch.empty(30 if real else 4, 4)
        values.uniform_(0.95, 1.05, generator=torch.Generator().manual_seed(0))
        values[skipped, 0] = 0.9 if with_maps else 0.0
        random = torch.Generator().manual_seed(1)
        maps = {
            f"model.layers.{block}.{part}": 0.3 * torch.randn(shape, generator=random)
            for block in (skipped if with_maps else [])
            for part, shape in zip(REPLACEMENT_NAMES, ((4, 32), (32, 4)), strict=True)
        }
        checkpoint, export = root / f"{name}-checkpoint", root / name
        checkpoints.save_checkpoint(checkpoint, ref, skipped, values, {}, maps=maps)
        export_checkpoint(checkpoint, "nemotron_nas", export, device="cpu")
        ids = prompt if real else [5, 60, 7, 200, 31]
        expected[name], jobs[str(export)] = ask_transformers(checkpoint, ids), ids
    command = [python, "-c", ENGINE]
    done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout)
    return {name: (*expected[name], results[str(root / name)]) for name in SKIPPED}


@pytest.mark.parametrize(
    "name, caches",
    [("smollm", 28), ("llama", 3), ("llama maps", 2), ("mistral", 2), ("granite", 2), ("granite maps", 3)],
)
def test_same_tokens_as_transformers_and_less_cache(runs, name, caches):
    tokens, logits, result = runs[name]
    assert result["tokens"] == tokens
    torch.testing.assert_close(torch.tensor(result["logits"]), logits, rtol=1e-3, atol=2e-3)
    assert result["caches"] == caches  # block 0 keeps its own, as in every runtime of the format


def test_biases_that_it_does_not_read_are_refused(runs):
    assert "q_proj.bias" in runs["qwen2"][-1]["error"]
