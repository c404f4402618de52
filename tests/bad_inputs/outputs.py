"""Outputs that would replace an input, or something that this project did not make."""

from .cases import Case, for_scripts, points_to
from .makers import Spoil, all_of, copy, folder, nothing, special_file, write
from .workplace import CHECKPOINT

FOREIGN = "written by hand"  # and without a line break at its end
LONG = "a" * 300


def _step1(name: str, message: str, *more: str, spoil: Spoil = nothing) -> Case:
    return Case("generate_model_gt_data", "--output_file", name, message, more, spoil)


def _step2(name: str, message: str, *more: str, spoil: Spoil = nothing) -> Case:
    return Case("process_gt_data", "--output_dir", name, message, more, spoil)


def _search(flag: str, name: str, message: str, *more: str, spoil: Spoil = nothing) -> Case:
    return Case("block_selection", flag, name, message, more, spoil)


def _export(name: str, message: str, *more: str, spoil: Spoil = nothing) -> Case:
    return Case("export", "--output", name, message, more, spoil)


CASES = [
    # step 1: the answers, those kept while they come, the report
    _step1("is the input", points_to("prompts.jsonl"), "--output_file", "prompts.jsonl"),
    _step1(
        "is the input by another path", points_to("prompts.jsonl"), "--output_file", "model/../prompts.jsonl"
    ),
    _step1("kept answers are the input", points_to("prompts.jsonl"), "--output_file", "prompts_final.jsonl"),
    _step1(
        "kept answers are the input, without a last line break",
        points_to("prompts.jsonl"),
        "--output_file",
        "prompts_final.jsonl",
        spoil=write("prompts.jsonl", '{"question": "1 + 1?"}'),
    ),
    _step1(
        "kept answers are a file of the user's",
        points_to("new/answers.jsonl"),
        spoil=write("new/answers.jsonl", FOREIGN),
    ),
    _step1(
        "kept answers are records of the user's",
        points_to("new/answers.jsonl"),
        spoil=write("new/answers.jsonl", '{"question": "1?"}\n{"question": "2?"}'),
    ),
    _step1(
        "report is the input",
        points_to("a_report.json"),
        "--input_file",
        "a_report.json",
        "--output_file",
        "a.jsonl",
        spoil=copy("prompts.jsonl", "a_report.json"),
    ),
    _step1("a folder", points_to("model"), "--output_file", "model"),
    _step1(
        "in a file", "prompts.jsonl is a file; name another folder", "--output_file", "prompts.jsonl/a.jsonl"
    ),
    _step1(
        "neither file nor folder",
        points_to("socket"),
        "--output_file",
        "socket",
        spoil=special_file("socket"),
    ),
    _step1("name too long", points_to("aaa"), "--output_file", f"{LONG}.jsonl"),
    _step1("kept answers are a folder", points_to("new/answers.jsonl"), spoil=folder("new/answers.jsonl")),
    _step1(
        "report is a folder",
        points_to("new/answers_final_report.json"),
        spoil=folder("new/answers_final_report.json"),
    ),
    # step 2
    _step2(
        "holds the input",
        points_to("data.jsonl"),
        "--input_file",
        "data.jsonl",
        "--output_dir",
        ".",
        spoil=copy("answers.jsonl", "data.jsonl"),
    ),
    _step2(
        "report is the input",
        points_to("data_report.json"),
        "--input_file",
        "data_report.json",
        "--output_dir",
        ".",
        spoil=copy("answers.jsonl", "data_report.json"),
    ),
    _step2("a file", "prompts.jsonl is a file; name another folder", "--output_dir", "prompts.jsonl"),
    _step2("data.jsonl is a folder", points_to("new/data.jsonl"), spoil=folder("new/data.jsonl")),
    _step2("name too long", points_to("aaa"), "--output_dir", LONG),
    # step 3: report, journal, plot
    _search("--output", "is the data", points_to("data.jsonl"), "--output", "data.jsonl"),
    _search(
        "--output",
        "journal is the data",
        points_to("data.journal.jsonl"),
        "--output",
        "data.json",
        "--data_path",
        "data.journal.jsonl",
        spoil=copy("data.jsonl", "data.journal.jsonl"),
    ),
    _search(
        "--output",
        "is the report read",
        points_to("--output selection.json: would take the place of an input"),
        "--starting_skipped_blocks",
        "selection.json",
        "--output",
        "selection.json",
    ),
    _search(
        "--output",
        "journal is a file of the user's",
        points_to("new/selection.journal.jsonl"),
        spoil=write("new/selection.journal.jsonl", FOREIGN),
    ),
    _search(
        "--output",
        "journal is records of the user's",
        points_to("new/selection.journal.jsonl"),
        spoil=write("new/selection.journal.jsonl", '{"question": "1?"}\n{"question": "2?"}'),
    ),
    _search(
        "--output", "in a file", "data.jsonl is a file; name another folder", "--output", "data.jsonl/r.json"
    ),
    _search("--output", "a folder", "--output model: is a folder; name a file", "--output", "model"),
    _search(
        "--output",
        "neither file nor folder",
        points_to("socket"),
        "--output",
        "socket",
        spoil=special_file("socket"),
    ),
    _search("--output", "name too long", points_to("aaa"), "--output", f"{LONG}.json"),
    _search(
        "--output", "is the model's config", points_to("model/config.json"), "--output", "model/config.json"
    ),
    _search(
        "--plot",
        "is the data",
        points_to("data.png"),
        "--plot",
        "data.png",
        "--data_path",
        "data.png",
        spoil=copy("data.jsonl", "data.png"),
    ),
    _search(
        "--plot",
        "is the output",
        points_to("new/report.png"),
        "--plot",
        "new/report.png",
        "--output",
        "new/report.png",
    ),
    _search(
        "--plot", "a folder", points_to("losses.png"), "--plot", "losses.png", spoil=folder("losses.png")
    ),
    _search("--plot", "in a file", "data.jsonl is a file", "--plot", "data.jsonl/losses.png"),
    _search(
        "--plot",
        "is the report read",
        points_to("report.png"),
        "--plot",
        "report.png",
        "--starting_skipped_blocks",
        "report.png",
        spoil=copy("selection.json", "report.png"),
    ),
    # step 4
    *for_scripts(
        ["param_scale", "unscaled_ckpt"],
        "--output_dir",
        "a file",
        "data.jsonl is a file; name another folder",
        "--output_dir",
        "data.jsonl",
    ),
    *for_scripts(
        ["param_scale", "unscaled_ckpt"],
        "--output_dir",
        "name too long",
        points_to("aaa"),
        "--output_dir",
        LONG,
    ),
    Case(
        "param_scale",
        "--output_dir",
        "an epoch that is not ours",
        points_to("new/model_scaled_epoch_0"),
        (),
        write("new/model_scaled_epoch_0/thesis.txt", FOREIGN),
    ),
    Case(
        "param_scale",
        "--output_dir",
        "an epoch that is a file",
        points_to("new/model_scaled_epoch_0"),
        (),
        write("new/model_scaled_epoch_0", FOREIGN),
    ),
    Case(
        "param_scale",
        "--output_dir",
        "report.json is the report read",
        points_to("new/report.json"),
        ("--blocks_to_skip", "new/report.json"),
        copy("selection.json", "new/report.json"),
    ),
    Case(
        "param_scale",
        "--output_dir",
        "report.json is a folder",
        points_to("new/report.json"),
        (),
        folder("new/report.json"),
    ),
    Case(
        "param_scale",
        "--output_dir",
        "report.json is the data",
        points_to("new/report.json"),
        ("--data_path", "new/report.json"),
        copy("data.jsonl", "new/report.json"),
    ),
    Case(
        "unscaled_ckpt",
        "--output_dir",
        "a checkpoint that is not ours",
        points_to("new/model_unscaled"),
        (),
        write("new/model_unscaled/thesis.txt", FOREIGN),
    ),
    Case(
        "unscaled_ckpt",
        "--output_dir",
        "a checkpoint that is a file",
        points_to("new/model_unscaled"),
        (),
        write("new/model_unscaled", FOREIGN),
    ),
    Case(
        "unscaled_ckpt",
        "--output_dir",
        "a model that is not ours",
        points_to("new/model_unscaled"),
        (),
        copy("model", "new/model_unscaled"),
    ),
    *for_scripts(
        ["param_scale", "unscaled_ckpt"],
        "--export",
        "to a folder that is not an export's",
        "exists and is not an earlier export: name a new folder",
        "--export",
        "folded",
        spoil=all_of(
            write("new/model_unscaled_folded/mine.txt", FOREIGN),
            write("new/model_scaled_folded/mine.txt", FOREIGN),
        ),
    ),
    # exports
    _export(
        "is the checkpoint", "exists and is not an earlier export: name a new folder", "--output", CHECKPOINT
    ),
    _export("a folder of the user's", "exists and is not an earlier export", "--output", "model"),
    _export("a file", "data.jsonl exists and is not an earlier export", "--output", "data.jsonl"),
    _export("in a file", "data.jsonl is a file; name another folder", "--output", "data.jsonl/folded"),
    _export("name too long", points_to("aaa"), "--output", LONG),
    _export(
        "is the GGUF read",
        points_to("--output folded.gguf: would take the place of an input"),
        "--format",
        "gguf",
        "--output",
        "folded.gguf",
    ),
    _export(
        "a folder for a GGUF",
        "--output model: is a folder; name a file",
        "--format",
        "gguf",
        "--output",
        "model",
    ),
    _export(
        "GGUF over the checkpoint's config",
        points_to(f"{CHECKPOINT}/config.json"),
        "--format",
        "gguf",
        "--output",
        f"{CHECKPOINT}/config.json",
    ),
    _export("GGUF over the data", points_to("data.jsonl"), "--format", "gguf", "--output", "data.jsonl"),
    _export(
        "GGUF over neither file nor folder",
        points_to("socket"),
        "--format",
        "gguf",
        "--output",
        "socket",
        spoil=special_file("socket"),
    ),
]
