"""Outputs that would replace an input, or something that this project did not make."""

from .cases import Case, cases
from .makers import copy, folder, special_file, write
from .workplace import CHECKPOINT

FOREIGN = "written by hand"  # and without a line break at its end
RECORDS = '{"question": "1?"}\n{"question": "2?"}'
LONG = "a" * 300
KEPT = "--output_file prompts_final.jsonl, which needs prompts.jsonl: would take the place of an input"
OTHERS = "is not of this script, and would be deleted with the folder; move it away, or name another"
NOT_AN_EXPORT = "exists and is not an earlier export: name another"


def _files(script: str, flag: str, file: str) -> list[Case]:
    """What no file can be written to. file: a file in the workplace."""
    return cases(
        script,
        flag,
        ("a folder", "--output[a-z_]* model: is a folder; name a file", f"{flag} model"),
        ("in a file", f"{file} is a file; name another folder", f"{flag} {file}/x.jsonl"),
        ("neither file nor folder", "socket", f"{flag} socket", special_file("socket")),
        ("name too long", "aaa", f"{flag} {LONG}.json"),
    )


CASES = [
    # step 1: the answers, those kept while they come, the report
    *_files("generate_model_gt_data", "--output_file", "prompts.jsonl"),
    *cases(
        "generate_model_gt_data",
        "--output_file",
        ("is the input", "prompts.jsonl", "--output_file prompts.jsonl"),
        ("is the input by another path", "prompts.jsonl", "--output_file model/../prompts.jsonl"),
        (
            "is no JSONL by its name",
            "answers.csv: is written as JSONL; name it",
            "--output_file new/answers.csv",
        ),
        ("is packed by its name", "a.jsonl.GZ: is written as JSONL", "--output_file new/a.jsonl.GZ"),
        ("kept answers are the input", KEPT, "--output_file prompts_final.jsonl"),
        (
            "kept answers are the input, without a last line break",
            KEPT,
            "--output_file prompts_final.jsonl",
            write("prompts.jsonl", '{"question": "1 + 1?"}'),
        ),
        ("kept answers are the user's", "new/answers.jsonl", write("new/answers.jsonl", FOREIGN)),
        ("kept answers are records", "new/answers.jsonl", write("new/answers.jsonl", RECORDS)),
        (
            "report is the input",
            "--output_file a.jsonl, which needs a_report.json: would take the place of an input",
            "--input_file a_report.json --output_file a.jsonl",
            copy("prompts.jsonl", "a_report.json"),
        ),
        ("kept answers are a folder", "new/answers.jsonl", folder("new/answers.jsonl")),
        ("report is a folder", "final_report.json", folder("new/answers_final_report.json")),
    ),
    # step 2
    *cases(
        "process_gt_data",
        "--output_dir",
        (
            "holds the input",
            "data.jsonl",
            "--input_file data.jsonl --output_dir .",
            copy("answers.jsonl", "data.jsonl"),
        ),
        (
            "report is the input",
            "data_report.json",
            "--input_file data_report.json --output_dir .",
            copy("answers.jsonl", "data_report.json"),
        ),
        ("data.jsonl is a folder", "new/data.jsonl", folder("new/data.jsonl")),
    ),
    *cases(
        ("process_gt_data", "param_scale", "unscaled_ckpt"),
        "--output_dir",
        ("a file", "prompts.jsonl is a file; name another folder", "--output_dir prompts.jsonl"),
        ("not UTF-8", r"new/caf\\udce9: not UTF-8 text", "--output_dir new/caf\udce9"),
        ("name too long", "aaa", f"--output_dir {LONG}"),
    ),
    # step 3: report, journal, plot
    *_files("block_selection", "--output", "data.jsonl"),
    *cases(
        "block_selection",
        "--output",
        ("is the data", "data.jsonl", "--output data.jsonl"),
        (
            "journal is the data",
            "data.journal.jsonl",
            "--output data.json --data_path data.journal.jsonl",
            copy("data.jsonl", "data.journal.jsonl"),
        ),
        (
            "is the report read",
            "--output selection.json: would take the place of an input",
            "--starting_skipped_blocks selection.json --output selection.json",
        ),
        ("journal is the user's", "n.journal.jsonl", write("new/selection.journal.jsonl", FOREIGN)),
        ("journal is records", "n.journal.jsonl", write("new/selection.journal.jsonl", RECORDS)),
        ("is the model's config", "model/config.json", "--output model/config.json"),
    ),
    *cases(
        "block_selection",
        "--plot",
        ("is the data", "data.png", "--plot data.png --data_path data.png", copy("data.jsonl", "data.png")),
        ("is the output", "new/report.png", "--plot new/report.png --output new/report.png"),
        ("a folder", "losses.png", "--plot losses.png", folder("losses.png")),
        ("in a file", "data.jsonl is a file", "--plot data.jsonl/losses.png"),
        (
            "is the report read",
            "report.png",
            "--plot report.png --starting_skipped_blocks report.png",
            copy("selection.json", "report.png"),
        ),
    ),
    # step 4
    *cases(
        "param_scale",
        "--output_dir",
        (
            "an epoch that is not ours",
            "new/model_scaled_epoch_0",
            write("new/model_scaled_epoch_0/thesis.txt", FOREIGN),
        ),
        ("an epoch that is a file", "new/model_scaled_epoch_0", write("new/model_scaled_epoch_0", FOREIGN)),
        (
            "a GGUF in an earlier epoch",
            f"scaled/model_scaled_epoch_1/model-F16.gguf: {OTHERS}",
            "--output_dir scaled --num_epochs 2",
            write("scaled/model_scaled_epoch_1/model-F16.gguf", FOREIGN),
        ),
        (
            "report.json is the report read",
            "new/report.json",
            "--blocks_to_skip new/report.json",
            copy("selection.json", "new/report.json"),
        ),
        ("report.json is a folder", "new/report.json", folder("new/report.json")),
        (
            "report.json is the data",
            "new/report.json",
            "--data_path new/report.json",
            copy("data.jsonl", "new/report.json"),
        ),
    ),
    *cases(
        "unscaled_ckpt",
        "--output_dir",
        (
            "a checkpoint that is not ours",
            "new/model_unscaled",
            write("new/model_unscaled/thesis.txt", FOREIGN),
        ),
        ("a checkpoint that is a file", "new/model_unscaled", write("new/model_unscaled", FOREIGN)),
        ("a model that is not ours", "new/model_unscaled", copy("model", "new/model_unscaled")),
        (
            "results of lm_eval in an earlier checkpoint",
            f"new/model_unscaled/new__model_unscaled: {OTHERS}",
            copy(CHECKPOINT, "new/model_unscaled"),
            write("new/model_unscaled/new__model_unscaled/results_2026.json", "{}"),
        ),
        (
            "a git repository",
            f"new/model_unscaled/.git: {OTHERS}",
            copy(CHECKPOINT, "new/model_unscaled"),
            write("new/model_unscaled/.git/config", ""),
        ),
    ),
    *cases(
        ("param_scale", "unscaled_ckpt"),
        "--export",
        (
            "to a folder that is not an export's",
            NOT_AN_EXPORT,
            "--export folded",
            write("new/model_unscaled_folded/mine.txt", FOREIGN),
            write("new/model_scaled_folded/mine.txt", FOREIGN),
        ),
        (
            "the first of two to a folder that is not an export's",
            NOT_AN_EXPORT,
            "--export folded --export nemotron_nas",
            write("new/model_unscaled_folded/mine.txt", FOREIGN),
            write("new/model_scaled_folded/mine.txt", FOREIGN),
        ),
    ),
    # exports
    *cases(
        "export",
        "--output",
        ("is the checkpoint", NOT_AN_EXPORT, f"--output {CHECKPOINT}"),
        (
            "below the checkpoint",
            "lies in the checkpoint; name a place",
            f"--output {CHECKPOINT}/new/folded",
        ),
        ("this folder", "--output .: is a folder without a name", "--output ."),
        (
            "a GGUF in an earlier export",
            f"new/folded/model-F16.gguf: {OTHERS}",
            write("new/folded/hopscotch_export.json", "{}"),
            write("new/folded/model-F16.gguf", FOREIGN),
        ),
        ("a folder of the user's", NOT_AN_EXPORT, "--output model"),
        ("a file", f"data.jsonl {NOT_AN_EXPORT}", "--output data.jsonl"),
        ("in a file", "data.jsonl is a file; name another folder", "--output data.jsonl/folded"),
        ("name too long", "aaa", f"--output {LONG}"),
    ),
    *cases(
        "export",
        "--output",
        (
            "is the GGUF read",
            "--output folded.gguf: would take the place of an input",
            "--output folded.gguf",
        ),
        ("a folder for a GGUF", "--output model: is a folder; name a file", "--output model"),
        (
            "GGUF over the checkpoint's config",
            f"{CHECKPOINT}/config.json",
            f"--output {CHECKPOINT}/config.json",
        ),
        (
            "GGUF below the checkpoint",
            "lies in the checkpoint; name a place",
            f"--output {CHECKPOINT}/new/x.gguf",
        ),
        ("GGUF over the data", "data.jsonl", "--output data.jsonl"),
        ("GGUF over neither file nor folder", "socket", "--output socket", special_file("socket")),
        more=("--format", "gguf"),
    ),
]
