"""Values of flags that can be refused for what they are."""

from .cases import ALL, LOADING, TRAINING, Case, cases, values

HUGE = "1" + "0" * 20
WHOLE = "must be a whole number above 0"
FINITE = "must be a finite number above 0"
GENERATE, PROCESS, SEARCH, SCALE, UNSCALED = ALL
WITH_MAPS = (*TRAINING, UNSCALED)


def _unknown(scripts, flag: str, value: str) -> list[Case]:
    return values(scripts, flag, (value, f"{flag}: invalid choice: '{value}'"))


def _switches(script: str, *flags: str) -> list[Case]:
    """Flags that take no value, given one."""
    message = "{}: .*explicit argument"
    return [case for f in flags for case in cases(script, f, ("with a value", message.format(f), f"{f}=yes"))]


CASES = [
    # the model's name
    *values(ALL, "--model", ("quen", "unknown model 'quen': give one of qwen, llama")),
    *values(
        UNSCALED,
        "--model",
        ("", "unknown model ''|no config.json"),
        ("-x", "--model: expected one argument"),
        ("foo/bar.git", "foo/bar.git"),
        ("~nobody-has-this-name/x", "~nobody-has-this-name/x"),
        ("no\nmodel\x1b[31m", r"unknown model 'no\\nmodel\\x1b\[31m'"),
        ("x" * 5000, "xxx"),
        ("data.jsonl", "data.jsonl"),
    ),
    *values(GENERATE, "--model", ("nobody/nothing", "nobody/nothing cannot be fetched .* --model ")),
    # flags of every script that loads a model
    *_unknown(LOADING, "--dtype", "float8"),
    *_unknown(LOADING, "--attn_implementation", "fast"),
    *values(
        SEARCH,
        "--attn_implementation",
        ("flash_attention_2", "FlashAttention2.*--attn_implementation"),
        ("flex_attention", "--attn_implementation flex_attention"),  # cannot train here
    ),
    *values(LOADING, "--device", ("gpu", "--device gpu: not a device")),
    *values(
        (SEARCH, UNSCALED),
        "--device",
        ("cuda:9", "--device cuda:9: .* try cpu"),
        ("mps", "--device mps"),
        ("meta", "--device meta"),
    ),
    *values(LOADING, "--seed", ("one", "--seed: ")),
    *values(SCALE, "--seed", ("-1", "--seed"), (str(2**32), "--seed")),
    # step 1
    *values(GENERATE, "--dataset", ("no/such", "not allowed with argument --input_file")),
    *values(GENERATE, "--dataset_config", ("main", "--dataset_config: goes with --dataset")),
    *values(GENERATE, "--split", ("test", "--split: goes with --dataset")),
    *values(GENERATE, "--prompt_field", ("task", "line 1: has no 'task', only 'question'")),
    *values(GENERATE, "--num_samples", ("0", WHOLE)),
    *values(GENERATE, "--max_tokens", ("many", "must be a whole number"), ("1e3", "must be a whole number")),
    *_unknown(GENERATE, "--backend", "sglang"),
    *values(GENERATE, "--tensor_parallel_size", ("-2", WHOLE)),
    *values(GENERATE, "--max_tokens_per_batch", ("0", WHOLE)),
    *_switches(GENERATE, "--keep_truncated"),
    # step 2
    *values(PROCESS, "--max_seq_len", ("0", WHOLE)),
    *values(PROCESS, "--num_cpu_procs", ("-1", WHOLE)),
    # training
    *values(TRAINING, "--learning_rate", ("nan", FINITE)),
    *values(SCALE, "--learning_rate", ("-1", FINITE)),
    *values(TRAINING, "--batch_size", ("0", WHOLE)),
    *values(TRAINING, "--max_tokens_per_batch", ("2", "data.jsonl, line 1: .*--max_tokens_per_batch 2")),
    *values(SCALE, "--max_tokens_per_batch", (HUGE, "--max_tokens_per_batch")),
    *values(WITH_MAPS, "--max_samples", ("-3", WHOLE)),
    *_unknown(TRAINING, "--loss", "mse"),
    *_switches(SEARCH, "--gradient_checkpointing"),
    *_switches(SCALE, "--gradient_checkpointing", "--resume"),
    *values(WITH_MAPS, "--replacement_rank", ("33", "--replacement_rank 33: at most 32")),
    *values(
        UNSCALED,
        "--replacement_rank",
        ("-1", "--replacement_rank: must be a whole number, 0 or above"),
        ("2", "its maps are fitted on data; give --data_path"),
    ),
    *values(UNSCALED, "--data_path", ("none.jsonl", "--replacement_rank", "2", "no such file")),
    # step 3
    *values(SEARCH, "--num_blocks", ("4", "--num_blocks 4: .* at most 3 more"), (HUGE, WHOLE)),
    *values(
        SEARCH,
        "--kv_budget",
        ("1", "--kv_budget: .*must be above 0 and below 1"),
        ("0.1", "--kv_budget 0.1: .* at most 3 more"),
        ("0.5", "--num_blocks", "1", "not allowed with"),
        ("0.75", "--starting_skipped_blocks", "2", "--kv_budget 0.75: .* 0.75 of it; give a smaller share"),
    ),
    *values(SEARCH, "--max_loss_increase", ("0", FINITE), ("inf", FINITE)),
    *values(SEARCH, "--validation_split", ("1", "at least 0 and below 1")),
    *_unknown(SEARCH, "--search", "fast"),
    *values(SEARCH, "--screening", ("0", "must be above 0 and at most 1"), ("nan", "above 0 and at most 1")),
    *values(
        SEARCH,
        "--prev",
        ("1", "--validation_split", "0.5", "--prev: the scales behind"),
        ("1", "--search", "cosine", "--prev: the scales behind"),
        ("nan", "--prev: the loss of layer 0 is nan; give a finite number"),
        ("1", "1", "1", "1", "1", "--prev: 5 losses, .* 4 layers"),
        ("1", "1", "1", "1", "--prev", "1", "--prev: 5 losses, .* 4 layers"),
        ("none", "--prev: "),
    ),
    *values(
        SEARCH,
        "--starting_skipped_blocks",
        ("4", "--starting_skipped_blocks: block 4 does not exist"),
        ("-1", "block -1 does not exist"),
        ("1", "1", "block 1 is named twice"),
        ("1", "--starting_skipped_blocks", "1", "block 1 is named twice"),
        ("1", "x", "give block indices or one .* report"),
        (HUGE, "block 1000+ does not exist"),
    ),
    *values(SEARCH, "--plot", ("losses.pgn", "--plot losses.pgn: .* ends in .png")),
    # step 4
    *values(SCALE, "--num_epochs", ("0", WHOLE)),
    *_unknown(SCALE, "--granularity", "head"),
    *_unknown(SCALE, "--quantization", "int3"),
    *_unknown(SCALE, "--export", "gguf"),
    *values(
        SCALE,
        "--validation_split",
        ("nan", "at least 0 and below 1"),
        ("0.5", "--max_samples", "1", "--validation_split"),
    ),
    *values(
        SCALE,
        "--blocks_to_skip",
        ("0", "1", "2", "3", "all 4 attention blocks would be skipped"),
        ("0", "1", "--blocks_to_skip", "2", "3", "all 4 attention blocks would be skipped"),
        ("²", "--blocks_to_skip"),
        ("1.0", r"1\.0: .*--blocks_to_skip"),
    ),
    *values(UNSCALED, "--blocks_to_skip", ("7", "--blocks_to_skip: block 7 does not exist")),
    *values(UNSCALED, "--device", ("gpu", "--export", "folded", "--device gpu: not a device")),
    *_unknown(UNSCALED, "--export", "onnx"),
    # exports, and the table
    *_unknown("export", "--format", "onnx"),
    *values(
        "export", "--format", ("gguf", "--from", "none.gguf", "--from goes with --format gguf|no such file")
    ),
    *values("export", "--from", ("folded.gguf", "--from goes with --format gguf")),
    *values("export", "--without_maps", ("--format", "gguf", "--from", "x", "goes with --format folded")),
    *values("export", "--tolerance", ("0", FINITE), ("much", FINITE)),
    *values("export", "--device", ("gpu", "--device gpu: not a device"), ("meta", "--device meta")),
    *values("report", "--html", ("page.txt", "scaled", "--html page.txt: .* ends in .html")),
    *values("report", "--pictures", ("data.jsonl", "scaled", "data.jsonl")),
    *_unknown("report", "--format", "gif"),
    *cases("report", "runs", ("two of them", "a: no such file; make it again, or give", "a b")),
]
