"""Checkpoints in the real vLLM, by this project's plugin, and exports: the answers of transformers.

The project is installed into a folder of its own, so that vLLM finds the real entry point. One process
imports vLLM, tries in a fork what must fail without the plugin, and loads all folders, one after another.
"""

import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILY_SIZES, MORE_FAMILIES, ROOT

from hopscotch_common import checkpoints, scales
from hopscotch_common.export.formats import FORMATS, export_checkpoint
from hopscotch_common.loading.models import ModelRef, model_ref
from hopscotch_common.scales import modeling_hopscotch
from hopscotch_common.vllm_plugin import AttentionWhereItIs, family_obstacle

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

NEW_TOKENS = 16
TOLERANCE = 2e-3  # of log-probabilities in float32
PROMPTS = [[5, 60, 7, 200, 31, 77, 150, 21], [9, 8, 7, 6, 5, 4, 3]]  # longer than a sliding window
QUESTION = "A farmer has 12 hens. Each lays 5 eggs a week. How many eggs is that?"
# vLLM's attention needs a head size of at least 32.
SIZES = dict(hidden_size=64, num_attention_heads=2, num_key_value_heads=1, intermediate_size=64)
LARGER = dict(head_dim=32, query_pre_attn_scalar=48, moe_intermediate_size=64)
DENSE = {  # without recurrent layers and experts, as Granite 4 micro, 1b and 350m
    "granitemoehybrid": dict(
        layer_types=["full_attention"] * 4, num_hidden_layers=4, num_local_experts=0, mamba_n_heads=16
    ),
}
# Family -> (skipped blocks, granularity of the scales, layers if not 4); one of each way through the plugin.
QUICK = {
    "llama": ([0], "channel", 2),  # compiled, with maps
    "qwen3_moe": ([0, 3], "layer"),  # experts
    "granite": ([3], "layer"),  # multipliers
    "gemma2": ([0], "layer"),  # sliding and full attention, capped, of a scale of its own
    "olmo2": ([0, 2], "layer"),  # norms after the blocks
}
WITH_MAPS = ("llama", "gemma2", "olmo2", "starcoder2")  # in the skipped blocks' place
SLOW = {
    "gemma2": ([0], "layer"),  # compiled
    "phi3": ([0, 1], "layer"),
    "qwen3": ([0], "layer"),
    "smollm3": ([1, 2], "channel"),
    "gemma3_text": ([0, 1], "channel"),
    "glm4": ([0, 3], "layer"),
    "qwen2": ([1, 2], "layer"),
    "mistral": ([0, 2], "layer"),
    "ministral3": ([0, 2], "layer"),
    "mixtral": ([0, 2], "channel"),
    "granite_swa": ([0], "layer"),
    "gemma": ([0, 2], "layer"),
    "olmo3": ([0, 1], "layer"),
    "olmoe": ([1], "layer"),
    "exaone4": ([0], "layer"),
    "glm": ([0, 2], "layer"),
    "seed_oss": ([0, 2], "layer"),
    "starcoder2": ([0, 2], "layer"),
    "gpt_oss": ([0], "layer"),
    "granitemoehybrid": ([0, 2], "layer"),
}
FLOAT16 = {"llama": True, "gemma2": False, "gemma3_text": False, "glm4": False}  # whether vLLM runs it
REFUSED = {"qwen3_5_text": "recurrent", "phimoe": "router"}
SMOLLM = ([3, 9], "layer")
# Export -> (architecture in vLLM, layers, those without KV cache).
EXPORTS = {
    # Block 0 is skipped too, but vLLM's code needs it: it stays, adding 0.
    "llama-nemotron_nas": ("DeciLMForCausalLM", 4, [2]),
    "qwen2-nemotron_nas": ("DeciLMForCausalLM", 4, [2]),
    "granite-nemotron_nas": ("DeciLMForCausalLM", 4, [2]),
    "granite-folded": ("GraniteForCausalLM", 4, []),
}
SLOW_EXPORTS = {
    "smollm-nemotron_nas": ("DeciLMForCausalLM", 30, [3, 9]),
    "smollm-folded": ("LlamaForCausalLM", 30, []),
    "mistral-nemotron_nas": ("DeciLMForCausalLM", 4, [2]),
}

ENGINE = f"""
import gc, json, multiprocessing, os, sys
import torch, vllm
from vllm import LLM, SamplingParams
from vllm.config.model import _check_valid_dtype
from vllm.model_executor.models import registry

def look_here(look):  # at a model's class; vLLM starts a process for it, which imports what is here already
    return look()

def failure(folder, **options):
    try:
        memory = dict(kv_cache_memory_bytes=2**26, gpu_memory_utilization=0.05)
        LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, **memory, **options)
    except Exception as error:
        return str(error)

def failures(folder):
    os.environ["VLLM_PLUGINS"] = ""
    registry._run_in_subprocess = look_here
    found = {{"no plugin": failure(folder)}}
    found["no plugin, but remote code"] = failure(folder, trust_remote_code=True)
    from hopscotch_common import vllm_plugin
    vllm.__version__ = "0.33.1"
    vllm_plugin.register()
    return found | {{"another version": failure(folder)}}

def refusal(kind, dtype):
    try:
        _check_valid_dtype(kind, dtype)
    except ValueError as error:
        return str(error)

def scales(model):
    found = {{k: v for k, v in (*model.named_parameters(), *model.named_buffers()) if "_scale_" in k}}
    return {{k: [str(v.dtype), v.flatten().tolist()] for k, v in found.items()}}

if __name__ == "__main__":
    folders, without_plugin = json.load(sys.stdin)
    results = {{}}
    if without_plugin:
        with multiprocessing.get_context("fork").Pool(1) as pool:
            results["failures"] = pool.apply(failures, [without_plugin])
    collect, gc.collect = gc.collect, lambda generation=2: 0  # vLLM's, four a model, take half of the time
    for folder, (prompts, changes) in folders.items():
        options = changes | dict(
            max_model_len=256,
            max_num_seqs=4,
            max_num_batched_tokens=256,
            kv_cache_memory_bytes=2**26,
            gpu_memory_utilization=0.05,  # checked against free memory, even without a GPU
            skip_tokenizer_init=True,
        )
        try:
            llm = LLM(folder, dtype="float32", **options)
        except ValueError as error:
            results[folder] = {{"error": str(error)}}
            continue
        sampling = SamplingParams(
            temperature=0, max_tokens={NEW_TOKENS}, ignore_eos=True, detokenize=False, logprobs=1
        )
        outputs = llm.generate([{{"prompt_token_ids": ids}} for ids in prompts], sampling, use_tqdm=False)
        engine = llm.llm_engine.engine_core.engine_core
        groups = engine.scheduler.kv_cache_manager.kv_cache_config.kv_cache_groups
        answers = [output.outputs[0] for output in outputs]
        results[folder] = {{
            "tokens": [list(answer.token_ids) for answer in answers],
            "log_probabilities": [
                [chosen[token].logprob for token, chosen in zip(a.token_ids, a.logprobs)] for a in answers
            ],
            "cached_layers": sorted(int(n.split(".")[2]) for g in groups for n in g.layer_names),
            "scales": llm.apply_model(scales)[0],
            "architecture": llm.llm_engine.model_config.architecture,
        }}
        del llm, engine, groups
        collect()
        registry._run_in_subprocess = look_here  # at the classes that follow
    results["float16"] = {{
        kind: [refusal(kind, dtype) for dtype in (torch.float16, torch.bfloat16)]
        for family in {FLOAT16}
        for kind in (family, f"hopscotch_{{family}}")
    }}
    with open(sys.argv[1], "w") as file:
        json.dump(results, file)
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """Environment variables of a process that finds the project installed, as pip installs it."""
    root = tmp_path_factory.mktemp("installed")
    source, target = root / "source", root / "target"  # pip leaves files in the folder that it installs
    shutil.copytree(ROOT / "hopscotch_common", source / "hopscotch_common")
    for name in ("pyproject.toml", "requirements-cpu.txt"):
        shutil.copyfile(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True)
    return os.environ | {
        "PYTHONPATH": str(target),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model sends a function
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CACHE_ROOT": str(root / "cache"),  # of compiled models
    }


def random_scales(layers: int, hidden_size: int, skipped: list[int], granularity: str) -> torch.Tensor:
    """Scales far enough from 1, and from one another, that a model without them answers otherwise."""
    values = torch.ones(layers, 2 * hidden_size + 2 if granularity == "channel" else 4)
    values.uniform_(0.7, 1.3, generator=torch.Generator().manual_seed(0))
    columns = hidden_size if granularity == "channel" else 1
    values[skipped, :columns] = 0.0
    return values


def forbid_code(checkpoint: Path) -> None:
    """Make a checkpoint fail that runs its own code."""
    code = checkpoint / Path(modeling_hopscotch.__file__).name
    code.write_text("raise SystemExit('code of a checkpoint ran')\n")


def greedy(checkpoint: Path, prompts: list[list[int]]) -> tuple[list, list]:
    """transformers' tokens and their log-probabilities, a list for each prompt."""
    model = checkpoints.load_checkpoint(checkpoint, attn_implementation="eager")  # sdpa knows no soft cap
    tokens, log_probabilities = [], []
    for ids in prompts:
        row = torch.tensor([ids])
        output = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, len(ids) :]
        logits = torch.cat(output.logits)
        tokens.append(new.tolist())
        log_probabilities.append(logits.log_softmax(-1)[range(len(new)), new].tolist())
    return tokens, log_probabilities


def make_tiny(
    root: Path, tiny_folder, family: str, skipped: list[int], granularity: str, layers: int = 4
) -> Path:
    dense = DENSE.get(family, {})
    own = (FAMILY_SIZES | MORE_FAMILIES)[family] | dense
    larger = {name: size for name, size in LARGER.items() if name in own}
    layers = own.get("num_hidden_layers", layers)
    folder = tiny_folder(family, **(SIZES | larger | dense | {"num_hidden_layers": layers}))
    hidden, maps = SIZES["hidden_size"], {}
    values = random_scales(layers, hidden, skipped, granularity)
    if family in WITH_MAPS:
        values[values == 0] = 1.2  # b_attn of the maps
        random = torch.Generator().manual_seed(0)
        maps = {
            f"model.layers.{block}.{name}": 0.2 * torch.randn(shape, generator=random)
            for block in skipped
            for name, shape in zip(
                modeling_hopscotch.REPLACEMENT_NAMES, ((8, hidden), (hidden, 8)), strict=True
            )
        }
    ref = ModelRef(family, str(folder))
    checkpoints.save_checkpoint(root / family, ref, skipped, values, {}, maps=maps)
    return root / family


def run_engine(
    root: Path,
    environment: dict[str, str],
    cases: dict[str, tuple],
    compiled: str,
    without_plugin: Path | None = None,
) -> dict:
    """{case: ((transformers' tokens, log-probabilities), scales of the checkpoint, vLLM's results)}, and
    what ENGINE says besides, of "failures" and "float16".

    cases: the checkpoint, prompts, and the export of it that vLLM loads instead, if any. compiled: the case
    that vLLM compiles, as it does unless told otherwise. without_plugin: a checkpoint for `failures`.
    """
    expected = {
        checkpoint: (greedy(checkpoint, prompts), checkpoints.load_scales(checkpoint)[0])
        for checkpoint, prompts in {case[0]: case[1] for case in cases.values()}.items()
    }
    jobs, served = {}, {}
    for name, (checkpoint, prompts, *export) in cases.items():
        if not export:
            forbid_code(checkpoint)
        served[name] = str((export or [checkpoint])[0])
        options = dict(enforce_eager=name != compiled, trust_remote_code=bool(export))
        jobs[served[name]] = [prompts, options]
    process = subprocess.run(
        [sys.executable, "-c", ENGINE, "results.json"],
        input=json.dumps([jobs, without_plugin and str(without_plugin)]),
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,  # away from this project's folder
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((root / "results.json").read_text())
    runs = {name: (*expected[case[0]], results.pop(served[name])) for name, case in cases.items()}
    return runs | results


def make_exports(root: Path, tiny_folder, names, smollm: Path, chat: list[int]) -> dict[str, tuple]:
    """The cases of run_engine for exports, by their names."""
    cases = {}
    for name in names:
        family, format = name.split("-")
        checkpoint, prompts = smollm, [chat]
        if family != "smollm":
            checkpoint, prompts = root / f"{family}-checkpoint", PROMPTS
        if not checkpoint.exists():
            changes = SIZES | dict(intermediate_size=512, tie_word_embeddings=family == "qwen2")
            ref = ModelRef(family, str(tiny_folder(family, **changes)))
            values = 1 + (random_scales(4, 64, [], "layer") - 1) / 6
            values[[0, 2], 0] = 0.0
            checkpoints.save_checkpoint(checkpoint, ref, [0, 2], values, {})
        export_checkpoint(checkpoint, format, root / name)
        cases[name] = checkpoint, prompts, root / name
    return cases


@pytest.fixture(scope="module")
def smollm(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plugin") / "smollm"
    ref = model_ref("smollm")
    values = 1 + 0.1 * (random_scales(30, 576, SMOLLM[0], SMOLLM[1]) - 1)
    values[SMOLLM[0], 0] = 0.0
    checkpoints.save_checkpoint(folder, ref, SMOLLM[0], values, {})
    return folder


@pytest.fixture(scope="module")
def chat() -> list[int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_ref("smollm").folder())
    messages = [{"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, smollm, chat, environment):
    root = tmp_path_factory.mktemp("quick")
    cases = {f: (make_tiny(root, tiny_folder, f, *case), PROMPTS) for f, case in QUICK.items()}
    without_plugin = shutil.copytree(cases["granite"][0], root / "without-plugin")  # before its code is gone
    cases |= make_exports(root, tiny_folder, EXPORTS, smollm, chat)
    return run_engine(root, environment, cases, "llama", without_plugin)


@pytest.fixture(scope="module")
def slow_runs(tmp_path_factory, tiny_folder, smollm, chat, environment):
    root = tmp_path_factory.mktemp("slow")
    cases = SLOW | dict.fromkeys(REFUSED, ([1], "layer"))
    cases = {f: (make_tiny(root, tiny_folder, f, *case), PROMPTS) for f, case in cases.items()}
    refused = {family: cases.pop(family) for family in REFUSED}
    cases |= make_exports(root, tiny_folder, SLOW_EXPORTS, smollm, chat) | {"smollm": (smollm, [chat])}
    cases |= refused  # these last: a failed start leaves things behind
    return run_engine(root, environment, cases, "gemma2")


def check_run(run, skipped: list[int]) -> None:
    (tokens, log_probabilities), values, result = run
    assert "error" not in result, result["error"]
    assert result["tokens"] == tokens
    for ours, theirs in zip(result["log_probabilities"], log_probabilities, strict=True):
        assert ours == pytest.approx(theirs, abs=TOLERANCE)
    assert result["cached_layers"] == [i for i in range(len(values)) if i not in skipped]
    for key, scale in scales.as_state_dict(values).items():
        assert result["scales"][key] == ["torch.float32", scale.flatten().tolist()]


@pytest.mark.parametrize("family, skipped", [(f, c[0]) for f, c in QUICK.items()])
def test_as_transformers_with_cache_for_the_other_blocks_only(runs, family, skipped):
    check_run(runs[family], skipped)


def check_export(run, architecture: str, layers: int, without_cache: list[int]) -> None:
    (tokens, _), _, result = run
    assert result["architecture"] == architecture and result["tokens"] == tokens
    assert result["cached_layers"] == [i for i in range(layers) if i not in without_cache]


@pytest.mark.parametrize("name", EXPORTS)
def test_exports_as_transformers_with_less_cache(runs, name):
    check_export(runs[name], *EXPORTS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_EXPORTS)
def test_more_exports(slow_runs, name):
    check_export(slow_runs[name], *SLOW_EXPORTS[name])


def test_every_format_is_served():
    assert {name.split("-")[1] for name in EXPORTS} == set(FORMATS)


@pytest.mark.slow
@pytest.mark.parametrize("family, skipped", [("smollm", SMOLLM[0]), *((f, c[0]) for f, c in SLOW.items())])
def test_more_families_as_transformers(slow_runs, family, skipped):
    check_run(slow_runs[family], skipped)


def test_a_pipeline_stage_without_attention_is_refused():
    layers = torch.nn.ModuleList([torch.nn.Identity()])  # that of another stage
    stage = SimpleNamespace(model=SimpleNamespace(layers=layers), attention_fusers={})
    with pytest.raises(ValueError, match="set VLLM_PP_LAYER_PARTITION"):
        AttentionWhereItIs._create_attention_instances(stage)


@pytest.mark.parametrize("kind, refused", [("default", False), ("longrope", True), ("dynamic", True)])
def test_rope_that_turns_by_the_longest_of_a_batch_is_refused(kind, refused):
    config = modeling_hopscotch.family_config("llama")(num_hidden_layers=4)
    config.rope_parameters = {"rope_type": kind}
    assert bool(family_obstacle(config)) == refused


@pytest.mark.parametrize("family, runs_it", FLOAT16.items())
def test_float16_is_refused_where_the_stock_family_is(runs, family, runs_it):
    for kind in (family, f"hopscotch_{family}"):
        float16, bfloat16 = runs["float16"][kind]
        assert bfloat16 is None
        assert float16 is None if runs_it else "does not support float16" in float16


def test_scales_decide_what_is_answered(runs, tiny_folder, tmp_path):
    """Else the tests above could not tell scales that are left at 1."""
    skipped, _ = QUICK["granite"]
    values = torch.ones(4, 4)
    values[skipped, 0] = 0.0
    ref = ModelRef("granite", str(tiny_folder("granite", **SIZES, num_hidden_layers=4)))
    checkpoints.save_checkpoint(tmp_path / "neutral", ref, skipped, values, {})
    assert greedy(tmp_path / "neutral", PROMPTS)[0] != runs["granite"][2]["tokens"]


@pytest.mark.slow
@pytest.mark.parametrize("family, reason", REFUSED.items())
def test_what_the_backend_would_run_wrongly_is_refused(slow_runs, family, reason):
    error = slow_runs[family][2]["error"]
    assert reason in error.lower() and "with transformers" in error and "\n" not in error


def test_without_the_plugin_nothing_runs(runs):
    failures = runs["failures"]
    assert "trust_remote_code" in failures["no plugin"]
    assert "pip install --no-deps ." in failures["no plugin, but remote code"]


def test_another_version_of_vllm_is_named(runs):
    message = runs["failures"]["another version"]
    assert "0.33.1" in message and "0.32." in message and "\n" not in message


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def name_vllm(folder: Path) -> str:
    """A search path on which `vllm serve` finds a distribution named vllm: vllm-cpu has another name."""
    if not any(importlib.metadata.distributions(name="vllm")):
        version = importlib.metadata.version("vllm-cpu") + "+cpu"
        metadata = folder / f"vllm-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder)


@pytest.fixture(scope="module")
def client(smollm, environment, tmp_path_factory):
    """An openai client of `vllm serve CHECKPOINT`."""
    from openai import OpenAI

    root, port = tmp_path_factory.mktemp("server"), free_port()
    forbid_code(smollm)
    command = [str(Path(sys.executable).parent / "vllm"), "serve", str(smollm), "--port", str(port)]
    command += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4"]
    command += ["--gpu-memory-utilization", "0.05", "--kv-cache-memory-bytes", str(2**26)]
    variables = {k: v for k, v in environment.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    variables["PYTHONPATH"] += os.pathsep + name_vllm(root)
    with open(root / "log", "w") as log:
        server = subprocess.Popen(command, env=variables, cwd=root, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while True:
            assert server.poll() is None and time.monotonic() < deadline, (root / "log").read_text()[-4000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                break
            except OSError:
                time.sleep(0.5)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait(timeout=60)


def test_a_client_chats_with_the_server(client, smollm, chat):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_ref("smollm").folder())
    expected = tokenizer.decode(greedy(smollm, [chat])[0][0], skip_special_tokens=True)
    options = dict(
        model=str(smollm),
        messages=[{"role": "user", "content": QUESTION}],
        temperature=0,
        max_tokens=NEW_TOKENS,
    )

    def ask() -> str:
        return client.chat.completions.create(**options).choices[0].message.content

    def ask_streaming() -> str:
        pieces = list(client.chat.completions.create(**options, stream=True))
        assert len(pieces) > NEW_TOKENS / 2
        return "".join(piece.choices[0].delta.content or "" for piece in pieces)

    assert ask() == expected
    with ThreadPoolExecutor(2) as pool:
        assert [answer.result() for answer in [pool.submit(ask_streaming), pool.submit(ask)]] == [
            expected
        ] * 2
