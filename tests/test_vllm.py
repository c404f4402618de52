"""Exports in the real vLLM: the same greedy tokens as transformers, and KV cache for what is left.

One engine process loads all folders, one after another: starting vLLM is most of this file's time.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch

from hopscotch_common import checkpoints
from hopscotch_common.export.formats import FORMATS, export_checkpoint
from hopscotch_common.models import ModelRef, model_ref

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEW_TOKENS = 24
PROMPTS = ["A farmer has 12 hens. Each lays 5 eggs a week. How many eggs is that?", "Name three planets."]
TINY_PROMPTS = [[5, 60, 7, 200, 31], [9, 8, 7, 6, 5, 4, 3]]
# vLLM's attention needs a head size of at least 32.
TINY = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=512)
ENGINE = f"""
import gc, json, sys
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    results = {{}}
    for folder, prompts in json.load(sys.stdin).items():
        llm = LLM(
            folder,
            dtype="float32",
            trust_remote_code=True,
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=4,
            skip_tokenizer_init=True,
        )
        sampling = SamplingParams(temperature=0, max_tokens={NEW_TOKENS}, ignore_eos=True, detokenize=False)
        outputs = llm.generate([{{"prompt_token_ids": ids}} for ids in prompts], sampling, use_tqdm=False)
        engine = llm.llm_engine.engine_core.engine_core
        groups = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        results[folder] = {{
            "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            "cached_layers": sorted(int(n.split(".")[2]) for g in groups for n in g.layer_names),
            "architecture": llm.llm_engine.model_config.architecture,
        }}
        del llm, engine, groups
        gc.collect()
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
"""


def near_one(layers: int, skipped: list[int]) -> torch.Tensor:
    values = torch.empty(layers, 4).uniform_(0.95, 1.05, generator=torch.Generator().manual_seed(0))
    values[skipped, 0] = 0.0
    return values


def greedy(checkpoint, prompts):
    model = checkpoints.load_checkpoint(checkpoint)
    answers = []
    for ids in prompts:
        row = torch.tensor([ids])
        output = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=-1,
            pad_token_id=0,
        )
        answers.append(output[0, len(ids) :].tolist())
    return answers


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder):
    """{case: (transformers' tokens, what the engine process reports)}"""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("vllm")
    tokenizer = AutoTokenizer.from_pretrained(model_ref("smollm").folder())
    chats = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True)
        for text in PROMPTS
    ]
    chats = [list(chat["input_ids"]) if hasattr(chat, "keys") else chat for chat in chats]
    sources = {"smollm": (model_ref("smollm"), 30, [3, 9], chats)}
    for family in ("llama", "qwen2", "granite", "mistral"):
        folder = tiny_folder(family, **TINY)
        sources[family] = (ModelRef(family, str(folder)), 4, [0, 2], TINY_PROMPTS)
    expected, jobs = {}, {}
    for name, (ref, layers, skipped, prompts) in sources.items():
        checkpoint = root / name
        checkpoints.save_checkpoint(checkpoint, ref, skipped, near_one(layers, skipped), {})
        for format in FORMATS if name == "smollm" else ("nemotron_nas",):
            output = root / f"{name}-{format}"
            export_checkpoint(checkpoint, format, output)
            expected[output.name] = greedy(checkpoint, prompts)
            jobs[str(output)] = prompts
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
    }
    engine = subprocess.run(
        [sys.executable, "-c", ENGINE, str(root / "results.json")],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
        env=os.environ | settings,
    )
    assert engine.returncode == 0, engine.stderr[-4000:]
    results = json.loads((root / "results.json").read_text())
    return {name: (tokens, results[str(root / name)]) for name, tokens in expected.items()}


@pytest.mark.parametrize(
    "case, architecture, layers, without_cache",
    [
        ("smollm-nemotron_nas", "DeciLMForCausalLM", 30, [3, 9]),
        ("smollm-folded", "LlamaForCausalLM", 30, []),
        # Block 0 is skipped too, but vLLM's code needs it: it stays, adding 0.
        ("llama-nemotron_nas", "DeciLMForCausalLM", 4, [2]),
        ("qwen2-nemotron_nas", "DeciLMForCausalLM", 4, [2]),
        ("granite-nemotron_nas", "DeciLMForCausalLM", 4, [2]),
        ("mistral-nemotron_nas", "DeciLMForCausalLM", 4, [2]),
    ],
)
def test_same_tokens_as_transformers_and_less_cache(runs, case, architecture, layers, without_cache):
    expected, result = runs[case]
    assert result["architecture"] == architecture
    assert result["tokens"] == expected
    assert result["cached_layers"] == [i for i in range(layers) if i not in without_cache]
