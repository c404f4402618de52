"""Step 1: answers equal those of one prompt at a time, nothing is lost, bad input is one line."""

import functools
import hashlib
import importlib.util
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILY_SIZES, MORE_FAMILIES, ROOT, byte_tokenizer, check_refused, stock_config
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import generate_model_gt_data
import process_gt_data
from hopscotch_common import checkpoints
from hopscotch_common.answers import EngineOptions, decoding, engines
from hopscotch_common.answers.prompts import answer_text
from hopscotch_common.errors import HopscotchError, InputError
from hopscotch_common.loading.loader import hopscotch_config, read_config
from hopscotch_common.loading.models import model_ref
from hopscotch_common.scales.modeling_hopscotch import attention_blocks

STOP = set(range(40, 45))  # a random model rarely says <|im_end|>, so that more tokens end an answer
SCRIPT_STOP = {2, 14, 160}  # in generation_config.json; 2 is <|im_end|>
MAX_TOKENS = 40


def stock_answer(model, prompt: list[int], limit: int, stop: set[int]) -> list[int]:
    """What the stock model says to one prompt on its own."""
    ids = torch.tensor([prompt])
    options = dict(max_new_tokens=limit, do_sample=False, eos_token_id=sorted(stop), pad_token_id=0)
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


def random_prompts(count: int) -> list[list[int]]:
    generator = random.Random(1)
    return [[generator.randrange(4, 260) for _ in range(generator.randrange(2, 50))] for _ in range(count)]


def attention_of(folder) -> str | None:
    """The attention kernel that the engine chooses by itself."""
    chosen = []

    class Chosen(Exception):
        pass

    def load(*_, attn_implementation, **__):
        chosen.append(attn_implementation)
        raise Chosen

    ref, options = model_ref(str(folder)), EngineOptions(device="cpu")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Chosen):
        patch.setattr(engines, "load_whole", load)
        engines.TransformersEngine(ref, read_config(ref, checkpoint=True), {2}, options, 100)
    return chosen[0]


@pytest.mark.parametrize(
    "family, changes, skipped",
    [
        *((family, {}, []) for family in [*FAMILY_SIZES, *MORE_FAMILIES]),
        ("mistral", {"sliding_window": 8}, []),
        ("llama", {}, [0, 2]),
        ("gemma2", {}, [0, 1]),
        ("granitemoehybrid", {}, [4]),
    ],
)
def test_batched_answers_equal_one_prompt_at_a_time(
    tiny_folder, tmp_path, monkeypatch, family, changes, skipped
):
    """Token for token, within the budget: neither padding nor other rows change an answer, in recurrent and
    sliding layers either, and the skipped blocks of a checkpoint fill no layers of the cache."""
    folder, load = tiny_folder(family, **changes), AutoModelForCausalLM.from_pretrained
    if skipped:
        ref = model_ref(str(folder))
        values = torch.ones(read_config(ref).num_hidden_layers, 4)
        values[skipped, 0] = 0
        folder, load = tmp_path / "checkpoint", checkpoints.load_checkpoint
        checkpoints.save_checkpoint(folder, ref, skipped, values, {})
    monkeypatch.setattr(decoding, "ROOM", 6)  # so small that batches are full before their answers end
    kernel = attention_of(folder)
    stock = load(folder, dtype=torch.float32, attn_implementation="eager" if kernel == "eager" else None)
    model = load(folder, dtype=torch.float32, attn_implementation=kernel)
    # repeating what was said would cost so much that nothing would be said twice
    model.generation_config = GenerationConfig(repetition_penalty=9.0, do_sample=True, max_length=3)
    prompts = random_prompts(8)
    limits = [MAX_TOKENS - index % 3 for index in range(len(prompts))]
    steps, batches = [], []
    generate = model.generate

    def watched(ids, attention_mask, **options):
        output = generate(ids, attention_mask=attention_mask, **options)
        batches.append(output.shape)
        return output

    model.generate = watched
    answers = list(decoding.decode(model, prompts, limits, STOP, 250, steps.append))

    assert sorted(answer.index for answer in answers) == list(range(len(prompts)))
    for answer in answers:
        assert answer.token_ids == stock_answer(stock, prompts[answer.index], limits[answer.index], STOP)
        assert answer.finish_reason == ("stop" if answer.token_ids[-1] in STOP else "length")
    assert sum(steps) == sum(len(answer.token_ids) for answer in answers)
    assert all(rows * columns <= 250 for rows, columns in batches if rows > 1)
    assert max(rows for rows, _ in batches) >= 4 and len(batches) > 3


def test_what_is_begun_is_finished_before_more_is_begun(tiny_folder, monkeypatch):
    """A run that is killed loses what it keeps in memory alone: few of all tokens."""
    lengths = random.Random(0).choices(range(800, 1200), k=900)
    made = [0]

    def generate(model, rows, limits, stop_ids, columns, on_tokens):
        left = [lengths[row[0]] - (len(row) - 1) for row in rows]
        steps = min(sorted(left)[(len(left) - 1) // 2], columns - len(rows[-1]) if len(rows) > 1 else 9999)
        made[0] += sum(min(steps, most) for most in left)
        return [[7] * (most - 1) + [2] if most <= steps else [7] * steps for most in left]

    monkeypatch.setattr(decoding, "_generate", generate)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder())
    model.config.max_position_embeddings = 4096
    prompts, kept, most = [[index] for index in range(900)], 0, 0
    for answer in decoding.decode(model, prompts, [4096] * 900, {2}, 2**15):
        assert len(answer.token_ids) == lengths[answer.index]
        most = max(most, made[0] - kept)
        kept += len(answer.token_ids)
    assert kept == sum(lengths) and most < 0.2 * kept


def test_a_prompt_longer_than_the_budget_runs_alone(tiny_folder):
    model = AutoModelForCausalLM.from_pretrained(tiny_folder())
    prompts = [[9] * 60, [8] * 3]
    answers = decoding.decode(model, prompts, [5, 5], set(), max_tokens_per_batch=10)
    assert {answer.index: len(answer.token_ids) for answer in answers} == {0: 5, 1: 5}


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("masked", [True, False])
def test_grouped_attention_equals_stock_sdpa(queries, masked):
    class Module(torch.nn.Module):
        num_key_value_groups = 3
        is_causal = True

    torch.manual_seed(0)
    query = torch.randn(2, 6, queries, 8)
    key, value = torch.randn(2, 2, 2, 7, 8)
    mask = torch.rand(2, 1, queries, 7) > 0.4 if masked else None
    if masked:
        mask[..., -1] = True
    ours, _ = decoding.grouped_sdpa(Module(), query, key, value, mask, scaling=0.3)
    stock, _ = sdpa_attention_forward(Module(), query, key, value, mask, scaling=0.3)
    assert torch.allclose(ours, stock, atol=1e-6)
    other, _ = sdpa_attention_forward(Module(), query, key.flip(1), value, mask, scaling=0.3)
    assert not torch.allclose(ours, other, atol=1e-2)


def config_of(heads: int, kv_heads: int, width: int) -> LlamaConfig:
    sizes = dict(intermediate_size=width, hidden_size=8 * heads)
    return LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, **sizes)


QWEN, LLAMA, SMOLLM = (28, 4, 18944), (32, 8, 14336), (9, 3, 1536)


@pytest.mark.parametrize(
    ("gpus", "sizes", "size"),
    [
        (0, SMOLLM, 1),
        (8, QWEN, 4),  # 7 divides the heads, but not the width, nor does it fit 4 KV heads
        (7, QWEN, 4),
        (8, LLAMA, 8),
        (6, LLAMA, 4),
        (16, LLAMA, 16),  # KV heads are repeated
        (3, SMOLLM, 3),
        (9, SMOLLM, 3),  # 1536 is no multiple of 9
    ],
)
def test_tensor_parallel_size_keeps_vllms_rules(monkeypatch, gpus, sizes, size):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert engines.tensor_parallel_size(None, config_of(*sizes)) == size


@pytest.mark.parametrize("settings", [{"group_size": 128}, {"weight_block_size": [128, 128]}])
def test_no_group_of_quantised_weights_is_cut(monkeypatch, settings):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    config = config_of(12, 2, 8960)  # of Qwen2.5-1.5B
    assert engines.tensor_parallel_size(None, config) == 4
    config.quantization_config = settings
    assert engines.tensor_parallel_size(None, config) == 2
    with pytest.raises(InputError, match="4: cuts the MLP's width of 8960 within groups of 128"):
        engines.tensor_parallel_size(4, config)


@pytest.mark.parametrize(
    ("gpus", "size", "reason"),
    [
        (64, 5, "5: does not divide the model's .* attention heads; leave it out"),
        (64, 7, "4 KV heads"),
        (64, 14, "4 KV heads"),
        (64, 28, "width of 18944"),
        (1, 4, "only 1 device"),
    ],
)
def test_a_tensor_parallel_size_that_vllm_refuses_is_refused(monkeypatch, gpus, size, reason):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    with pytest.raises(InputError, match=reason):
        engines.tensor_parallel_size(size, config_of(*QWEN))


def test_backend_is_chosen_by_what_can_run(monkeypatch):
    config = config_of(*QWEN)

    def check_refused(reason: str, **options) -> None:
        with pytest.raises(InputError, match=reason):
            engines.resolve_backend(EngineOptions(**options), config)

    monkeypatch.setattr(engines, "vllm_obstacle", lambda config: None)
    assert engines.resolve_backend(EngineOptions(), config) == "vllm"
    assert engines.resolve_backend(EngineOptions(device="cpu"), config) == "transformers"
    check_refused("--device cpu", backend="vllm", device="cpu")
    monkeypatch.setattr(engines, "vllm_obstacle", lambda config: "vLLM is not installed")
    assert engines.resolve_backend(EngineOptions(), config) == "transformers"
    check_refused("not installed", backend="vllm")
    check_refused("tensor_parallel_size", tensor_parallel_size=2)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(
    "family, reason", [("llama", None), ("qwen3_next", "recurrent"), ("phimoe", "its router is more")]
)
def test_a_checkpoint_that_vllm_cannot_run_is_left_to_transformers(monkeypatch, family, reason):
    from vllm import envs
    from vllm.platforms import current_platform

    monkeypatch.delenv("VLLM_WORKER_MULTIPROC_METHOD", raising=False)
    monkeypatch.setattr(engines, "entry_points", lambda **_: ["installed"])
    stock = stock_config(family, hidden_size=128, head_dim=32)
    config = hopscotch_config(stock, [attention_blocks(stock)[0]])
    small = stock_config(family, hidden_size=64, head_dim=16)
    if current_platform.is_cpu():
        assert "no CPU kernel for attention heads of 16" in engines.vllm_obstacle(small)
    chosen = engines.resolve_backend(EngineOptions(), config)
    assert chosen == ("transformers" if reason else "vllm")
    assert envs.VLLM_WORKER_MULTIPROC_METHOD == "spawn"  # a fork cannot use CUDA once anything asked for it
    if reason:
        with pytest.raises(InputError, match=f"{reason}.*use --backend transformers"):
            engines.resolve_backend(EngineOptions(backend="vllm"), config)
    monkeypatch.setattr("vllm.__version__", "0.33.1")
    assert engines.resolve_backend(EngineOptions(), config) == "transformers"


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_a_vllm_engine_that_dies_ends_in_one_line():
    from vllm.v1.engine.exceptions import EngineDeadError

    def step():
        raise EngineDeadError

    engine = object.__new__(engines.VllmEngine)
    engine.stop_ids, engine.num_asked = {2}, 0
    core = SimpleNamespace(has_unfinished_requests=lambda: True, step=step)
    engine.llm = SimpleNamespace(enqueue=lambda *_, **__: None, llm_engine=core)
    with pytest.raises(HopscotchError, match="vLLM's engine died .*the same command goes on from here"):
        next(engine.answers([[3]], [4]))


QUESTIONS = [f"{'What is ' * (index % 4)}{index} + {index}?" for index in range(8)]


@pytest.fixture(scope="module")
def model(tiny_folder, tmp_path_factory):
    """A folder of a model that ends some of its answers by SCRIPT_STOP."""
    folder = shutil.copytree(tiny_folder(), tmp_path_factory.mktemp("model") / "tiny")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": sorted(SCRIPT_STOP)}))
    return folder


@pytest.fixture
def work(model, tmp_path, monkeypatch):
    """A working folder with prompts; returns the command line that answers them."""
    monkeypatch.chdir(tmp_path)
    records = [{"question": question} for question in QUESTIONS]
    turns = zip(("system", "user", "assistant"), ("Be brief.", QUESTIONS[2], "left out"), strict=True)
    records[2] = {"messages": [{"role": role, "content": content} for role, content in turns]}
    write_lines(Path("prompts.jsonl"), records)
    return ["--model", str(model), "--input_file", "prompts.jsonl", "--output_file", "a_final.jsonl"] + [
        "--backend", "transformers", "--max_tokens", str(MAX_TOKENS), "--dtype", "float32",
    ]  # fmt: skip


def write_lines(path: Path, records) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def read_lines(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@functools.cache
def expected_records(folder: str) -> list[dict]:
    """The final file, truncated answers included, by the stock model, a prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    records = []
    for index, question in enumerate(QUESTIONS):
        messages = [{"role": "user", "content": question}]
        if index == 2:
            messages.insert(0, {"role": "system", "content": "Be brief."})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        tokens = stock_answer(model, prompt, MAX_TOKENS, SCRIPT_STOP)
        stopped = tokens[-1] in SCRIPT_STOP
        text = tokenizer.decode(tokens[:-1] if stopped else tokens)
        record = {"messages": [*messages, {"role": "assistant", "content": text}]}
        record |= {"finish_reason": "stop" if stopped else "length", "num_generated_tokens": len(tokens)}
        records.append(record | {"prompt_token_ids": prompt, "answer_token_ids": tokens})
    return records


def test_script_writes_the_models_answers_in_input_order(work, monkeypatch, capsys):
    """More samples extend an earlier run; what has been answered needs no model."""
    expected = expected_records(work[1])
    assert generate_model_gt_data.main([*work, "--num_samples", "3", "--keep_truncated"]) == 0
    assert read_lines("a_final.jsonl") == expected[:3]
    assert generate_model_gt_data.main([*work, "--keep_truncated"]) == 0
    assert read_lines("a_final.jsonl") == expected
    reasons = [record["finish_reason"] for record in expected]
    assert {"stop", "length"} == set(reasons)
    assert "a_final.jsonl: 8 answers to 8 prompts (0 truncated" in capsys.readouterr().out
    assert sorted(os.listdir()) == ["a.jsonl", "a_final.jsonl", "a_final_report.json", "prompts.jsonl"]

    # without the flag the truncated ones go, and nothing is generated again
    Path("a_final.jsonl").unlink()
    forbid_models(monkeypatch)
    assert generate_model_gt_data.main(work) == 0
    assert read_lines("a_final.jsonl") == [r for r in expected if r["finish_reason"] == "stop"]
    out = capsys.readouterr().out
    assert f"({reasons.count('length')} truncated" in out and len(out.splitlines()) == 1
    report = json.loads(Path("a_final_report.json").read_text())
    assert report["truncated_dropped"] == reasons.count("length") and report["backend"] == "transformers"
    assert report["generated_tokens"] == sum(r["num_generated_tokens"] for r in expected)

    # and what was kept is not taken for the answers to other settings or prompts
    for more, message in (
        (["--max_tokens", "41"], "a.jsonl: was made with max_tokens = 40, now it is 41; .*remove it"),
        (["--dtype", "bfloat16"], "dtype = float32, now it is bfloat16"),
    ):
        check_refused(generate_model_gt_data, [*work, *more], message, capsys)
    lines = read_lines("prompts.jsonl")
    lines[4]["question"] = "Another?"
    write_lines(Path("prompts.jsonl"), lines)
    message = "a.jsonl, line .*another prompt than prompts.jsonl, line 5; remove"
    check_refused(generate_model_gt_data, work, message, capsys)


def test_interrupted_run_loses_nothing_and_goes_on(work, tmp_path, monkeypatch):
    real, asked = engines.generate, []

    def interrupted(ref, config, backend, prompts, *rest, **more):
        asked.append(len(prompts))
        for count, answer in enumerate(real(ref, config, backend, prompts, *rest, **more)):
            if count == 3 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(engines, "generate", interrupted)
    assert generate_model_gt_data.main([*work, "--keep_truncated"]) == 130
    assert not Path("a_final.jsonl").exists()
    kept = Path("a.jsonl").read_bytes()
    assert kept.count(b"\n") == 1 + 3
    Path("a.jsonl").write_bytes(kept + b'{"index": 7, "mess')  # a writer killed in mid-line
    elsewhere = shutil.copytree(work[1], tmp_path / "elsewhere")  # the same model there
    assert generate_model_gt_data.main([*work, "--keep_truncated", "--model", str(elsewhere)]) == 0
    assert asked == [len(QUESTIONS), len(QUESTIONS) - 3]
    assert Path("a.jsonl").read_bytes().startswith(kept)
    assert read_lines("a_final.jsonl") == expected_records(work[1])


def test_answers_under_another_template_or_to_other_stop_tokens_are_refused(work, tmp_path, capsys):
    folder = shutil.copytree(work[1], tmp_path / "own")
    template, stops = folder / "chat_template.jinja", folder / "generation_config.json"
    few = [*work, "--model", str(folder), "--keep_truncated", "--num_samples"]
    assert generate_model_gt_data.main([*few, "1"]) == 0
    before, before_stops = template.read_text(), json.loads(stops.read_text())
    sha256 = hashlib.sha256(before.encode()).hexdigest()
    header, _ = read_lines("a.jsonl")
    assert header["settings"]["chat_template"] == sha256 and header["settings"]["stop_tokens"] == [2, 14, 160]

    template.write_text(before.replace("{% for", "Today is {{ strftime_now('%A') }}.{% for", 1))
    message = "a.jsonl: was made with another chat template of --model; .*remove it"
    check_refused(generate_model_gt_data, [*few, "2"], message, capsys)
    template.write_text(before)
    stops.write_text('{"eos_token_id": [2, 14]}')
    message = r"stop_tokens = \[2, 14, 160\], now it is \[2, 14\]; .*remove it"
    check_refused(generate_model_gt_data, [*few, "2"], message, capsys)

    stops.write_text(json.dumps(before_stops))
    file = folder / "tokenizer.json"
    content = file.read_text()
    other = json.loads(content)
    vocabulary = other["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    file.write_text(json.dumps(other))
    message = "a.jsonl: was made with another tokenizer of --model; .*remove it"
    check_refused(generate_model_gt_data, [*few, "2"], message, capsys)
    file.write_text(content)
    file = folder / "model.safetensors"  # of another fine-tune
    weights = file.read_bytes()
    file.write_bytes(weights[:-2] + bytes([weights[-2] ^ 1]) + weights[-1:])
    message = "a.jsonl: was made with other weights or another config of --model; .*remove it"
    check_refused(generate_model_gt_data, [*few, "2"], message, capsys)
    file.write_bytes(weights)
    assert generate_model_gt_data.main([*few, "2"]) == 0
    earlier, later = read_lines("a_final.jsonl")
    del earlier["prompt_token_ids"]  # as of a prompt that was edited
    write_lines(Path("a_final.jsonl"), [earlier, later])
    step_2 = ["--model", str(folder), "--input_file", "a_final.jsonl", "--output_dir", "out"]
    assert process_gt_data.main(step_2) == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for sample, record in zip(read_lines("out/data.jsonl"), (earlier, later), strict=True):
        prompt = tokenizer.apply_chat_template(record["messages"][:1], add_generation_prompt=True)[
            "input_ids"
        ]
        assert sample["input_ids"] == prompt + record["answer_token_ids"]


def test_a_checkpoint_answers_as_it_does_alone(work, tmp_path):
    """And where fewer prompts are asked for than were answered, no more than these are written."""
    values = torch.ones(4, 4)
    values[1, 0] = 0
    checkpoints.save_checkpoint(tmp_path / "c", model_ref(work[1]), [1], values, {})
    few = [*work, "--model", str(tmp_path / "c"), "--keep_truncated", "--num_samples"]
    assert generate_model_gt_data.main([*few, "2"]) == 0
    answers, model = read_lines("a_final.jsonl"), checkpoints.load_checkpoint(tmp_path / "c")
    for answer, expected in zip(answers, expected_records(work[1])[:2], strict=True):
        tokens = stock_answer(model, expected["prompt_token_ids"], MAX_TOKENS, SCRIPT_STOP)
        assert answer["answer_token_ids"] == tokens != expected["answer_token_ids"]
    assert generate_model_gt_data.main([*few, "1"]) == 0
    assert read_lines("a_final.jsonl") == answers[:1]


def test_empty_answers_are_dropped_and_counted():
    def record(content, reason):
        messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]
        return {"messages": messages, "finish_reason": reason, "num_generated_tokens": 2}

    records = {1: record("4", "stop"), 0: record(" \n", "stop"), 2: record("5", "length")}
    for keep, answers, truncated in ((False, ["4"], "truncated_dropped"), (True, ["4", "5"], "truncated")):
        kept, figures = generate_model_gt_data.select_answers(records, keep_truncated=keep)
        assert [r["messages"][-1]["content"] for r in kept] == answers
        assert (figures["empty_dropped"], figures[truncated]) == (1, 1)


def forbid_models(monkeypatch):
    """Names and shapes may be read, to no device; weights may not."""
    load = AutoModelForCausalLM.from_pretrained

    def fail(*args, **kwargs):
        if kwargs.get("device_map") != "meta":
            pytest.fail("a model was loaded")
        return load(*args, **kwargs)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)


def test_bad_input_is_refused_before_a_model_loads(work, monkeypatch, capsys):
    """Which input is bad, `test_bad_inputs.py` says."""
    forbid_models(monkeypatch)
    check_refused(generate_model_gt_data, [*work, "--device", "cuda:77"], "--device cuda:77", capsys)
    write_lines(Path("prompts.jsonl"), [{"question": "x" * 500}])
    check_refused(generate_model_gt_data, work, "line 1: 5.. tokens leave no room .* context of 512", capsys)


def test_prompts_that_cannot_be_fetched_name_the_id_and_the_remedy(work, monkeypatch, capsys):
    forbid_models(monkeypatch)
    without_input = [word for word in work if word not in ("--input_file", "prompts.jsonl")]
    message = "openai/gsm8k cannot be read.*--input_file"
    check_refused(generate_model_gt_data, without_input, message, capsys)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_gives_the_same_answers(work, tiny_folder, tmp_path):
    # vLLM's attention needs a head size of at least 32
    folder = tiny_folder("llama", hidden_size=64, num_attention_heads=2, num_key_value_heads=1)
    finals = {}
    for backend in ("vllm", "transformers"):
        arguments = [*work, "--model", str(folder), "--backend", backend, "--keep_truncated"]
        arguments += ["--output_file", f"{backend}.jsonl"]
        command = [sys.executable, str(ROOT / "generate_model_gt_data.py"), *arguments]
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
        assert run.returncode == 0, run.stderr
        assert len(run.stdout.splitlines()) == 1, run.stdout
        finals[backend] = read_lines(f"{backend}.jsonl")
    assert finals["vllm"] == finals["transformers"] and len(finals["vllm"]) == len(QUESTIONS)


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize("error", [RuntimeError("Engine core\nfailed."), ValueError("No such quantization.")])
def test_a_vllm_that_cannot_start_is_one_line(work, monkeypatch, capsys, error):
    def fail(**_):
        raise error

    monkeypatch.setattr("vllm.LLM", fail)
    monkeypatch.setattr(engines, "vllm_obstacle", lambda config: None)  # its heads are too small for a CPU
    assert generate_model_gt_data.main([*work, "--backend", "vllm"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    reason = " ".join(str(error).split())
    assert f"vLLM cannot run {work[1]} here ({reason}; see above): free memory, give a smaller" in last


def test_longrope_rows_end_where_a_batch_would_turn_otherwise(tiny_folder, tmp_path):
    """Beyond the original context transformers turns all rows' positions by other factors."""
    rope = dict(rope_type="longrope", rope_theta=10000.0, partial_rotary_factor=1.0)
    rope |= dict(short_factor=[1.0] * 4, long_factor=[4.0, 3.0, 5.0, 6.0])
    rope |= dict(original_max_position_embeddings=32)
    changes = dict(original_max_position_embeddings=32, rope_parameters=rope)
    folder = shutil.copytree(tiny_folder("phi3"), tmp_path / "longrope")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    prompts = [list(range(5, 5 + length)) for length in (6, 9, 28)]
    ref = model_ref(str(folder))
    options, config = EngineOptions(device="cpu"), read_config(ref)
    told = []
    answers = engines.generate(ref, config, "transformers", prompts, {2}, 16, options, told.append)
    found = {answer.index: answer for answer in answers}
    assert sum(told) == sum(len(answer.token_ids) for answer in found.values()) and len(told) > 2
    model = AutoModelForCausalLM.from_pretrained(folder)
    for index, prompt in enumerate(prompts):
        limit = min(16, 32 - len(prompt))
        assert found[index].token_ids == stock_answer(model, prompt, limit, {2})


def test_of_an_answer_in_channels_the_final_one_is_kept():
    tokenizer = byte_tokenizer()
    marks = ["<|channel|>", "<|message|>", "<|start|>", "<|end|>"]

    def text(answer: str) -> str:
        return answer_text(tokenizer, tokenizer.encode(answer, add_special_tokens=False))

    assert text("4<|im_start|>") == "4<|im_start|>"
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    thought = "<|channel|>analysis<|message|>Easy.<|end|><|start|>assistant"
    assert text(thought + "<|channel|>final<|message|>It is 4.") == "It is 4."
    assert text("<|channel|>final <|constrain|>json<|message|>{}") == "{}"
    for unfinished in ("", "Easy.", thought, thought + "<|channel|>final", "<|channel|>analysis<|message|>E"):
        assert text(unfinished) == ""
