"""Values of flags that can be refused for what they are."""

from .cases import Case, for_scripts, points_to

ALL = ("generate_model_gt_data", "process_gt_data", "block_selection", "param_scale", "unscaled_ckpt")
LOADING = ("generate_model_gt_data", "block_selection", "param_scale", "unscaled_ckpt")
TRAINING = ("block_selection", "param_scale")
HUGE = "1" + "0" * 20
WHOLE = "must be a whole number above 0"


def _flag(script: str, flag: str, value: str, message: str, *more: str) -> Case:
    name = " ".join((value, *more))
    return Case(script, flag, f"= {name[:30]!r}", message, (flag, value, *more))


def _switches(script: str, *flags: str) -> list[Case]:
    """A flag that takes no value, given one."""
    return [
        Case(script, flag, "with a value", f"{flag}: .*explicit argument", (f"{flag}=yes",)) for flag in flags
    ]


CASES = [
    # the model's name
    *for_scripts(
        ALL, "--model", "misspelt", "unknown model 'quen': give one of qwen, llama", "--model", "quen"
    ),
    _flag("unscaled_ckpt", "--model", "", "unknown model ''|no config.json"),
    _flag("unscaled_ckpt", "--model", "-x", "--model: expected one argument"),
    _flag("unscaled_ckpt", "--model", "foo/bar.git", points_to("foo/bar.git")),
    _flag("block_selection", "--model", "~nobody-has-this-name/x", points_to("~nobody-has-this-name/x")),
    _flag(
        "generate_model_gt_data", "--model", "nobody/nothing", "nobody/nothing cannot be fetched .* --model "
    ),
    _flag("process_gt_data", "--model", "x" * 5000, points_to("xxx")),
    _flag("param_scale", "--model", "data.jsonl", points_to("data.jsonl")),
    _flag("unscaled_ckpt", "--model", "no\nmodel\x1b[31m", r"unknown model 'no\\nmodel\\x1b\[31m'"),
    # flags of every script that loads a model
    *for_scripts(LOADING, "--dtype", "unknown", "--dtype: invalid choice: 'float8'", "--dtype", "float8"),
    *for_scripts(LOADING, "--device", "unknown", "--device gpu: not a device", "--device", "gpu"),
    *for_scripts(LOADING, "--device", "not there", "--device cuda:9: .* try cpu", "--device", "cuda:9"),
    *for_scripts(LOADING, "--device", "mps", points_to("--device mps"), "--device", "mps"),
    *for_scripts(LOADING, "--device", "meta", points_to("--device meta"), "--device", "meta"),
    *for_scripts(
        LOADING,
        "--attn_implementation",
        "unknown",
        "--attn_implementation: invalid choice: 'fast'",
        "--attn_implementation",
        "fast",
    ),
    *for_scripts(
        LOADING,
        "--attn_implementation",
        "not installed",
        points_to("--attn_implementation", "FlashAttention2"),
        "--attn_implementation",
        "flash_attention_2",
    ),
    *for_scripts(
        TRAINING,
        "--attn_implementation",
        "that cannot train here",
        points_to("--attn_implementation flex_attention"),
        "--attn_implementation",
        "flex_attention",
    ),
    *for_scripts(LOADING, "--seed", "no number", "--seed: ", "--seed", "one"),
    *for_scripts(LOADING, "--seed", "below 0", points_to("--seed"), "--seed", "-1"),
    *for_scripts(LOADING, "--seed", "of 33 bits", points_to("--seed"), "--seed", str(2**32)),
    # step 1
    _flag("generate_model_gt_data", "--dataset", "no/such", "not allowed with argument --input_file"),
    _flag("generate_model_gt_data", "--dataset_config", "main", "--dataset_config: goes with --dataset"),
    _flag("generate_model_gt_data", "--split", "test", "--split: goes with --dataset"),
    _flag("generate_model_gt_data", "--prompt_field", "task", "line 1: has no 'task', only 'question'"),
    _flag("generate_model_gt_data", "--num_samples", "0", WHOLE),
    _flag("generate_model_gt_data", "--max_tokens", "many", "must be a whole number"),
    _flag("generate_model_gt_data", "--max_tokens", "1e3", "must be a whole number"),
    _flag("generate_model_gt_data", "--backend", "sglang", "--backend: invalid choice: 'sglang'"),
    _flag("generate_model_gt_data", "--tensor_parallel_size", "-2", WHOLE),
    _flag("generate_model_gt_data", "--max_tokens_per_batch", "0", WHOLE),
    *_switches("generate_model_gt_data", "--keep_truncated"),
    # step 2
    _flag("process_gt_data", "--max_seq_len", "0", WHOLE),
    _flag("process_gt_data", "--max_seq_len", "1e4", "must be a whole number"),
    _flag("process_gt_data", "--num_cpu_procs", "-1", WHOLE),
    # training
    *for_scripts(
        TRAINING, "--learning_rate", "below 0", "must be a finite number above 0", "--learning_rate", "-1"
    ),
    *for_scripts(
        TRAINING, "--learning_rate", "nan", "must be a finite number above 0", "--learning_rate", "nan"
    ),
    *for_scripts(TRAINING, "--batch_size", "0", WHOLE, "--batch_size", "0"),
    *for_scripts(
        TRAINING,
        "--max_tokens_per_batch",
        "too small",
        "data.jsonl, line 1: .*--max_tokens_per_batch 2",
        "--max_tokens_per_batch",
        "2",
    ),
    *for_scripts(
        TRAINING,
        "--max_tokens_per_batch",
        "beyond 64 bits",
        points_to("--max_tokens_per_batch"),
        "--max_tokens_per_batch",
        HUGE,
    ),
    *for_scripts(TRAINING, "--max_samples", "-3", WHOLE, "--max_samples", "-3"),
    *_switches("block_selection", "--gradient_checkpointing", "--compile"),
    *_switches("param_scale", "--gradient_checkpointing", "--compile", "--resume"),
    *for_scripts(
        (*TRAINING, "unscaled_ckpt"),
        "--replacement_rank",
        "below 0",
        "--replacement_rank: must be a whole number, 0 or above",
        "--replacement_rank",
        "-1",
    ),
    *for_scripts(
        (*TRAINING, "unscaled_ckpt"),
        "--replacement_rank",
        "above the hidden size",
        "--replacement_rank 33: at most 32",
        "--replacement_rank",
        "33",
    ),
    _flag("unscaled_ckpt", "--replacement_rank", "2", "its maps are fitted on data; give --data_path"),
    _flag("unscaled_ckpt", "--data_path", "none.jsonl", "no such file", "--replacement_rank", "2"),
    # step 3
    _flag("block_selection", "--num_blocks", "4", "--num_blocks 4: .* at most 3 more"),
    _flag("block_selection", "--num_blocks", HUGE, WHOLE),
    _flag("block_selection", "--kv_budget", "1", "--kv_budget: .*must be above 0 and below 1"),
    _flag("block_selection", "--kv_budget", "0.1", "--kv_budget 0.1: .* at most 3 more"),
    _flag("block_selection", "--kv_budget", "0.5", "not allowed with", "--num_blocks", "1"),
    _flag(
        "block_selection",
        "--kv_budget",
        "0.75",
        "--kv_budget 0.75: .* 0.75 of it; give a smaller share",
        "--starting_skipped_blocks",
        "2",
    ),
    _flag("block_selection", "--max_loss_increase", "0", "must be a finite number above 0"),
    _flag("block_selection", "--max_loss_increase", "inf", "must be a finite number above 0"),
    _flag("block_selection", "--validation_split", "1", "at least 0 and below 1"),
    _flag("block_selection", "--prev", "1", "--prev: the scales behind", "--validation_split", "0.5"),
    _flag("block_selection", "--prev", "1", "--prev: the scales behind", "--search", "cosine"),
    _flag("block_selection", "--search", "fast", "--search: invalid choice: 'fast'"),
    _flag("block_selection", "--screening", "0", "must be above 0 and at most 1"),
    _flag("block_selection", "--screening", "nan", "must be above 0 and at most 1"),
    _flag("block_selection", "--prev", "nan", "--prev: the loss of layer 0 is nan; give a finite number"),
    _flag("block_selection", "--prev", "1", "--prev: 5 losses, .* 4 layers", "1", "1", "1", "1"),
    _flag("block_selection", "--prev", "none", "--prev: "),
    _flag(
        "block_selection",
        "--starting_skipped_blocks",
        "4",
        "--starting_skipped_blocks: block 4 does not exist",
    ),
    _flag("block_selection", "--starting_skipped_blocks", "-1", "block -1 does not exist"),
    _flag("block_selection", "--starting_skipped_blocks", "1", "block 1 is named twice", "1"),
    _flag("block_selection", "--starting_skipped_blocks", "1", "give block indices or one .* report", "x"),
    _flag("block_selection", "--starting_skipped_blocks", HUGE, "block 1000+ does not exist"),
    _flag("block_selection", "--plot", "losses.pgn", "--plot losses.pgn: .* ends in .png"),
    _flag("block_selection", "--plot", "losses", "--plot losses: .* ends in .png"),
    # step 4
    _flag("param_scale", "--num_epochs", "0", WHOLE),
    _flag("param_scale", "--granularity", "head", "--granularity: invalid choice: 'head'"),
    *for_scripts(TRAINING, "--loss", "unknown", "--loss: invalid choice: 'mse'", "--loss", "mse"),
    _flag("param_scale", "--quantization", "int3", "--quantization: invalid choice: 'int3'"),
    _flag("param_scale", "--validation_split", "1", "at least 0 and below 1"),
    _flag("param_scale", "--validation_split", "nan", "at least 0 and below 1"),
    _flag("param_scale", "--validation_split", "0.5", points_to("--validation_split"), "--max_samples", "1"),
    _flag("param_scale", "--blocks_to_skip", "0", "all 4 attention blocks would be skipped", "1", "2", "3"),
    _flag("param_scale", "--blocks_to_skip", "²", points_to("--blocks_to_skip")),
    _flag("param_scale", "--blocks_to_skip", "1.0", points_to("--blocks_to_skip", r"1\.0")),
    _flag("param_scale", "--export", "gguf", "--export: invalid choice: 'gguf'"),
    _flag("unscaled_ckpt", "--blocks_to_skip", "7", "--blocks_to_skip: block 7 does not exist"),
    _flag("unscaled_ckpt", "--device", "gpu", "--device gpu: not a device", "--export", "folded"),
    _flag("unscaled_ckpt", "--export", "onnx", "--export: invalid choice: 'onnx'"),
    # exports, and the table
    _flag("export", "--format", "onnx", "--format: invalid choice: 'onnx'"),
    _flag("export", "--format", "gguf", "--from goes with --format gguf|no such file", "--from", "none.gguf"),
    _flag("export", "--tolerance", "0", "must be a finite number above 0"),
    _flag("export", "--tolerance", "much", "must be a finite number above 0"),
    _flag("export", "--device", "gpu", "--device gpu: not a device"),
    _flag("export", "--device", "meta", points_to("--device meta")),
    _flag("export", "--from", "folded.gguf", "--from goes with --format gguf"),
    Case("report", "output_dir", "two of them", "a: no such file; make it again, or give", ("a", "b")),
]
