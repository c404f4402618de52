"""A folder with good input for every command line, and the arguments that go with it.

    model/                 a tiny model          prompts.jsonl, answers.jsonl, data.jsonl
    earlier/               step 1's output, with the answers kept while they came
    selection.json         a search's report, its journal beside it
    scaled/                two epochs of scaling, and their report
    folded.gguf            what llama.cpp would make of the first epoch's folded export

Scripts write to new/, except where a case says otherwise.
"""

import json
import random
from pathlib import Path

CHECKPOINT = "scaled/model_scaled_epoch_0"
GOOD: dict[str, tuple[str, ...]] = {
    "generate_model_gt_data": (
        *("--model", "model", "--input_file", "prompts.jsonl", "--output_file", "new/answers_final.jsonl"),
        *("--backend", "transformers", "--device", "cpu", "--max_tokens", "8", "--keep_truncated"),
    ),
    "process_gt_data": (
        *("--model", "model", "--input_file", "answers.jsonl", "--output_dir", "new"),
        *("--num_cpu_procs", "1"),
    ),
    "block_selection": (
        *("--model", "model", "--data_path", "data.jsonl", "--output", "new/selection.json"),
        *("--device", "cpu", "--batch_size", "3"),
    ),
    "param_scale": (
        *("--model", "model", "--data_path", "data.jsonl", "--output_dir", "new"),
        *("--blocks_to_skip", "1", "--num_epochs", "1", "--device", "cpu", "--batch_size", "3"),
    ),
    "unscaled_ckpt": ("--model", "model", "--blocks_to_skip", "1", "--output_dir", "new"),
    "export": (CHECKPOINT, "--format", "folded", "--output", "new/folded", "--device", "cpu"),
    "report": ("scaled",),
}
# Arguments that go on with what the workplace holds, instead of starting anew.
GO_ON: dict[str, tuple[str, ...]] = {
    "generate_model_gt_data": ("--output_file", "earlier/answers_final.jsonl"),
    "block_selection": ("--output", "selection.json"),
    "param_scale": ("--output_dir", "scaled", "--num_epochs", "3", "--resume"),
}
GGUF = (CHECKPOINT, "--format", "gguf", "--from", "folded.gguf", "--output", "new.gguf")


def write_inputs(folder: Path) -> None:
    """The three JSONL files that users bring, 6 records each."""
    generator = random.Random(0)
    prompts, answers, data = [], [], []
    for number in range(6):
        question = f"What is {number} + {number}?"
        turns = [{"role": "user", "content": question}]
        prompts.append({"question": question})
        answers.append({"messages": [*turns, {"role": "assistant", "content": f"It is {2 * number}."}]})
        ids = [generator.randrange(4, 260) for _ in range(20)]
        data.append({"input_ids": ids, "labels": [-100] * 8 + ids[8:], "len": len(ids)})
    for name, records in (("prompts", prompts), ("answers", answers), ("data", data)):
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(text)
