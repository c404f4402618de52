"""What earlier runs left and users hand on: reports, journals, answers, checkpoints, GGUF files."""

from .cases import Case, cases
from .flags import HUGE
from .makers import (
    REMOVED,
    change,
    cut,
    edit,
    edit_line,
    folder,
    index,
    line,
    loop,
    remove,
    tensors,
    without,
    write,
)
from .workplace import CHECKPOINT, GO_ON

REPORT, JOURNAL, PARTIAL = "selection.json", "selection.journal.jsonl", "earlier/answers.jsonl"
LAST, STATE = (
    "scaled/model_scaled_epoch_1/hopscotch.json",
    "scaled/model_scaled_epoch_1/training_state.adam",
)
TABLE = "scaled/report.json"
CONFIG, INDEX = f"{CHECKPOINT}/config.json", f"{CHECKPOINT}/model.safetensors.index.json"
SCALES, BASE = f"{CHECKPOINT}/scales.safetensors", f"{CHECKPOINT}/base-00001-of-00001.safetensors"
FIRST_SCALE = "model.layers.0.s_scale_attn"
BLOCKS = {
    "block_selection": "--starting_skipped_blocks",
    "param_scale": "--blocks_to_skip",
    "unscaled_ckpt": "--blocks_to_skip",
}
ANOTHER = {"model": "another"}
ANOTHER_ANSWER = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
NOT_A_REPORT = "selection.json: .*give --[a-z_]+ indices, or a report of block_selection.py"
REPORT_TWICE = '{"model": "model", "num_layers": 4, "skipped_blocks": [2], "skipped_blocks": [1]}'
NOT_GGUF = "folded.gguf: not a GGUF file"
NAN = float("nan")


def _reports(scripts, *rows: tuple) -> list[Case]:
    """Selection reports that are no good, where block indices may be."""
    return [case for s in scripts for case in cases(s, BLOCKS[s], *rows, more=(BLOCKS[s], REPORT))]


def _picks(scripts, **picks) -> list[Case]:
    """Reports whose `skipped_blocks` are no good."""
    message = REPORT
    rows = ((n.replace("_", " "), message, edit(REPORT, skipped_blocks=value)) for n, value in picks.items())
    return _reports(scripts, *rows)


def _kept(script: str, about: str, file: str, *rows: tuple, **third_lines: dict) -> list[Case]:
    """Files that a run left for the next one to go on with. third_lines: changes of line 3, by name."""
    rows += (
        ("no settings", file, line(file, 1, "{}")),
        (
            "of an earlier version",
            f"{file}: an earlier version made it, which did not record [a-z_]+; [^;]*(remove|name another)",
            edit_line(file, 1, settings=ANOTHER),
        ),
        ("line of text", f"{file}, line 3: not JSON", line(file, 3, "so far so good")),
        ("a folder", file, folder(file)),
        *(
            (name.replace("_", " "), f"{file}.*line 3", edit_line(file, 3, **changes))
            for name, changes in third_lines.items()
        ),
    )
    return cases(script, about, *((f"kept: {name}", *rest) for name, *rest in rows), more=GO_ON[script])


def _value(value: float):
    """The scales with one of them changed."""
    return tensors(SCALES, lambda found: found | {FIRST_SCALE: found[FIRST_SCALE] * 0 + value})


CASES = [
    # a selection report
    *_reports(
        BLOCKS,
        ("missing", NOT_A_REPORT, remove(REPORT)),
        (
            "of another depth",
            r"a report of model model \(32 layers\), not of model model \(4\)",
            edit(REPORT, num_layers=32),
        ),
    ),
    *_picks(BLOCKS, a_block_is_text=["1"]),
    *_reports(
        ["unscaled_ckpt"],
        ("a folder", NOT_A_REPORT, folder(REPORT)),
        ("a link to itself", NOT_A_REPORT, loop(REPORT)),
        ("not JSON", NOT_A_REPORT, cut(REPORT, 0.5)),
        ("not UTF-8", NOT_A_REPORT, write(REPORT, b'{"model": "\xff"}')),
        ("JSON of depth 200,000", REPORT, write(REPORT, "[" * 200_000)),
        ("a list", NOT_A_REPORT, write(REPORT, "[1, 2]")),
        ("no blocks", NOT_A_REPORT, edit(REPORT, skipped_blocks=REMOVED)),
        ("of another model", "a report of model other .*, not of model", edit(REPORT, model="other")),
        ("of a model with escapes", "a report of model ", edit(REPORT, model="\x1b[31m\nother\x07")),
        ("a block is NaN", f"block nan does not exist|{REPORT}", edit(REPORT, skipped_blocks=[NAN])),
        ("a block beyond the last", "block 1000+ does not exist", edit(REPORT, skipped_blocks=[int(HUGE)])),
        ("a block twice", "block 1 is named twice", edit(REPORT, skipped_blocks=[1, 1])),
        ("blocks twice", "selection.json.*skipped_blocks", write(REPORT, REPORT_TWICE)),
    ),
    *_picks(
        ["unscaled_ckpt"],
        blocks_are_text="1",
        blocks_are_null=None,
        a_block_is_null=[None],
        a_block_is_half=[1.5],
        a_block_is_true=[True],
        a_block_is_a_list=[[1]],
    ),
    # a search's journal
    *_kept(
        "block_selection",
        "--output",
        JOURNAL,
        ("no losses", f"{JOURNAL}.*line 3", line(JOURNAL, 3, '{"skipped": [], "block": 1}')),
        ("settings twice", f"{JOURNAL}.*line 3", line(JOURNAL, 3, {"settings": ANOTHER})),
        loss_is_NaN=dict(losses=[1.0, NAN]),
        losses_are_a_number=dict(losses=1.5),
        more_losses_than_batches=dict(losses=[1.0] * 9),
        block_is_a_list=dict(block=[1]),
        skipped_is_a_number=dict(skipped=1),
        state_is_no_base64=dict(losses=[1.0], state="not base64!"),
    ),
    # answers that step 1 kept
    *_kept(
        "generate_model_gt_data",
        "--output_file",
        PARTIAL,
        (
            "answers another prompt",
            "line 3: answers another prompt than prompts.jsonl",
            edit_line(PARTIAL, 3, messages=ANOTHER_ANSWER),
        ),
        index_is_text=dict(index="1"),
        index_below_0=dict(index=-1),
        no_finish_reason=dict(finish_reason=REMOVED),
        tokens_are_text=dict(num_generated_tokens="8"),
        messages_are_numbers=dict(messages=[1, 2]),
    ),
    # epochs to resume from
    *cases(
        "param_scale",
        "--resume",
        ("of other blocks", r"with blocks_to_skip = \[1\], now it is \[2\]; repeat", "--blocks_to_skip 2"),
        ("of another granularity", "granularity = layer, now it is channel; repeat", "--granularity channel"),
        ("of another loss", "was made with loss = ce, now it is kl; repeat", "--loss kl"),
        (
            "of an earlier version",
            "epoch_1: .* not record tensors; name another --",
            edit(LAST, settings=ANOTHER),
        ),
        ("hopscotch.json is not JSON", LAST, cut(LAST, 0.5)),
        ("hopscotch.json is a list", "model_scaled_epoch_1", write(LAST, "[]")),
        ("no settings", "model_scaled_epoch_1", edit(LAST, settings=REMOVED)),
        ("settings are text", "model_scaled_epoch_1", edit(LAST, settings="the same")),
        ("epoch is text", "model_scaled_epoch_1", edit(LAST, epoch="last")),
        ("no losses", "model_scaled_epoch_1", edit(LAST, held_out=REMOVED, loss=REMOVED)),
        ("no training state", "no training_state.adam", remove(STATE)),
        ("training state cut short", "model_scaled_epoch_1", cut(STATE, 0.5)),
        (
            "training state of another shape",
            "model_scaled_epoch_1",
            tensors(STATE, lambda found: {"scale_state": found["scale_state"][:2]}),
        ),
        (
            "training state of NaN",
            "model_scaled_epoch_1",
            tensors(STATE, lambda found: {"scale_state": found["scale_state"] * NAN}),
        ),
        more=GO_ON["param_scale"],
    ),
    # the table of what scaling came to
    *cases(
        "report",
        "runs",
        ("missing", "none: no such file; make it again, or give", "none"),
        ("a file", "data.jsonl", "data.jsonl"),
        ("report.json is not JSON", TABLE, cut(TABLE, 0.5)),
        ("report.json is a list", TABLE, write(TABLE, "[]")),
        ("report.json is another's", TABLE, write(TABLE, "{}")),
        ("report.json of depth 200,000", TABLE, write(TABLE, "[" * 200_000)),
        ("best epoch is gone", f"{TABLE}.*best_epoch is 7", edit(TABLE, best_epoch=7)),
        ("best epoch elsewhere", TABLE, edit(TABLE, best_epoch="0/../../model_scaled_epoch_0")),
        ("weights are text", f"{TABLE}.*weights: ", edit(TABLE, weights="all")),
        ("scales are text", f"{TABLE}.*scales: ", edit(TABLE, scales="all")),
    ),
    # checkpoints to export
    *cases(
        "export",
        "checkpoint",
        ("config is not JSON", CONFIG, write(CONFIG, "{")),
        ("no config", "scaled_epoch_0: no config.json, so not a checkpoint", remove(CONFIG)),
        ("of another family", "'gpt2' is not a supported one", edit(CONFIG, model_type="gpt2")),
        ("model type with escapes", "architecture ", edit(CONFIG, model_type="\x1b[31m\n")),
        ("skips text", "config.json", edit(CONFIG, skipped_attention_blocks="1")),
        ("skips block 9", "block 9 does not exist.*config.json", edit(CONFIG, skipped_attention_blocks=[9])),
        ("other skips", f"{CHECKPOINT}: .*(missing|skip)", edit(CONFIG, skipped_attention_blocks=[2])),
        ("more layers than it has", CHECKPOINT, edit(CONFIG, num_hidden_layers=6)),
        ("fewer layers than it has", CHECKPOINT, edit(CONFIG, num_hidden_layers=3)),
        ("scales cut short", "scales.safetensors", cut(SCALES, 0.5)),
        ("scales missing", f"{CHECKPOINT}.*scale", remove(SCALES)),
        ("a scale missing", f"{CHECKPOINT}.*{FIRST_SCALE}", tensors(SCALES, without(FIRST_SCALE))),
        ("a scale of NaN", f"{CHECKPOINT}.*{FIRST_SCALE} is .nan", _value(NAN)),
        ("a scale of 0", "s_scale_attn of layer 0 is 0, .* train with", _value(0)),
        ("a scale of 1e38", "(s_scale_attn|finite|exact)", _value(1e38)),
        (
            "a scale of another shape",
            f"{CHECKPOINT}.*{FIRST_SCALE}",
            tensors(SCALES, lambda found: found | {FIRST_SCALE: found[FIRST_SCALE].expand(2).clone()}),
        ),
        ("weights cut short", "base-00001-of-00001", cut(BASE, 0.5)),
        ("weights missing", "base-00001-of-00001", remove(BASE)),
        (
            "index out of the folder",
            rf"{CHECKPOINT}.*\.\./",
            index(lambda found: dict.fromkeys(found, "../../model/model.safetensors"), INDEX),
        ),
        ("index is not JSON", "index.json", write(INDEX, "{")),
    ),
    # GGUF files
    *cases(
        "export",
        "--from",
        ("missing", "folded.gguf: no such file; make it with", remove("folded.gguf")),
        ("a folder", "folded.gguf.*folder", folder("folded.gguf")),
        ("empty", NOT_GGUF, write("folded.gguf", "")),
        ("cut in the header", NOT_GGUF, cut("folded.gguf", 0.00005)),
        ("cut in the metadata", NOT_GGUF, cut("folded.gguf", 0.005)),
        ("cut in the weights", NOT_GGUF, cut("folded.gguf", 0.9)),
        ("text", NOT_GGUF, write("folded.gguf", "{}" * 100)),
        ("2^60 tensors", NOT_GGUF, write("folded.gguf", b"GGUF\x03\0\0\0" + bytes(7) + b"\x10" + bytes(8))),
        (
            "a key of 2^60 bytes",
            NOT_GGUF,
            write("folded.gguf", b"GGUF\x03\0\0\0" + bytes(8) + b"\x01" + bytes(7) + bytes(7) + b"\x10"),
        ),
        (  # the architecture's name, of the same length
            "names with escapes",
            "folded.gguf",
            change("folded.gguf", lambda old: old.replace(b"llama", b"\x1b[2J\n")),
        ),
        more=("--format", "gguf"),
    ),
    *cases("export", "--tolerance", ("not kept", "not exact enough .* --tolerance", "--tolerance 1e-30")),
    *cases(
        "export",
        "--format",
        (
            "that cannot hold the model",
            "nemotron_nas has no sliding window",
            "--format nemotron_nas",
            edit(CONFIG, model_type="hopscotch_mistral", sliding_window=8),
        ),
    ),
]
