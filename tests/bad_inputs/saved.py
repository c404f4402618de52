"""What earlier runs left and users hand on: reports, journals, answers, checkpoints, GGUF files."""

import json
from collections.abc import Callable

from .cases import Case, for_scripts, going_on, points_to
from .flags import HUGE
from .makers import (
    REMOVED,
    Spoil,
    all_of,
    cut,
    edit,
    edit_line,
    folder,
    index,
    line,
    loop,
    nothing,
    remove,
    tensors,
    write,
)
from .workplace import CHECKPOINT

REPORT, JOURNAL, PARTIAL = "selection.json", "selection.journal.jsonl", "earlier/answers.jsonl"
LAST = "scaled/model_scaled_epoch_1"
FIRST_SCALE = "model.layers.0.s_scale_attn"
BLOCKS = {"block_selection": "--starting_skipped_blocks", "param_scale": "--blocks_to_skip"}
BLOCKS |= {"unscaled_ckpt": "--blocks_to_skip"}


def _report(name: str, message: str, spoil: Spoil, scripts=("unscaled_ckpt",)) -> list[Case]:
    """A selection report that is no good, where block indices may be."""
    return [
        Case(script, BLOCKS[script], name, message, (BLOCKS[script], REPORT), spoil) for script in scripts
    ]


def _journal(name: str, message: str, spoil: Spoil) -> Case:
    return going_on(Case("block_selection", "--output", f"journal: {name}", message, (), spoil))


def _partial(name: str, message: str, spoil: Spoil) -> Case:
    return going_on(
        Case("generate_model_gt_data", "--output_file", f"kept answers: {name}", message, (), spoil)
    )


def _resume(name: str, message: str, spoil: Spoil, *more: str) -> Case:
    return going_on(Case("param_scale", "--resume", name, message, more, spoil))


def _table(name: str, message: str, spoil: Spoil) -> Case:
    return Case("report", "output_dir", name, message, (), spoil)


def _export(name: str, message: str, spoil: Spoil, *more: str) -> Case:
    return Case("export", "checkpoint", name, message, more, spoil)


def _gguf(name: str, message: str, spoil: Spoil) -> Case:
    return Case("export", "--from", name, message, ("--format", "gguf"), spoil)


def _value(value: float):
    """The scales with one of them changed."""
    return lambda found: found | {FIRST_SCALE: found[FIRST_SCALE] * 0 + value}


def _rename_architecture(work) -> None:
    """The architecture's name is `llama` in ten places; here it is of the same length, with escapes."""
    path = work / "folded.gguf"
    path.write_bytes(path.read_bytes().replace(b"llama", b"\x1b[2J\n"))


def _each_epoch(make: Callable[[str], Spoil]) -> Spoil:
    """The hopscotch.json of both epochs."""
    return all_of(*(make(f"scaled/model_scaled_epoch_{epoch}/hopscotch.json") for epoch in (0, 1)))


ANOTHER = {"model": "another"}
SETTINGS = json.dumps({"settings": ANOTHER})
NOT_A_REPORT = points_to("selection.json: ", "give --[a-z_]+ indices, or a report of block_selection.py")
NOT_BLOCKS = points_to("selection.json")

CASES = [
    # a selection report
    *_report("missing", NOT_A_REPORT, remove(REPORT), tuple(BLOCKS)),
    *_report("a folder", NOT_A_REPORT, folder(REPORT)),
    *_report("a link to itself", NOT_A_REPORT, loop(REPORT)),
    *_report("not JSON", NOT_A_REPORT, cut(REPORT, 0.5), tuple(BLOCKS)),
    *_report("not UTF-8", NOT_A_REPORT, write(REPORT, b'{"model": "\xff"}')),
    *_report("JSON of depth 200,000", NOT_BLOCKS, write(REPORT, "[" * 200_000)),
    *_report("a list", NOT_A_REPORT, write(REPORT, "[1, 2]")),
    *_report("no blocks", NOT_A_REPORT, edit(REPORT, skipped_blocks=REMOVED)),
    *_report("of another model", "a report of model other .*, not of model", edit(REPORT, model="other")),
    *_report(
        "of another depth",
        r"a report of model model \(32 layers\), not of model model \(4\)",
        edit(REPORT, num_layers=32),
        tuple(BLOCKS),
    ),
    *_report("of a model with escapes", "a report of model ", edit(REPORT, model="\x1b[31m\nother\x07")),
    *_report("blocks are text", NOT_BLOCKS, edit(REPORT, skipped_blocks="1"), tuple(BLOCKS)),
    *_report("a block is text", NOT_BLOCKS, edit(REPORT, skipped_blocks=["1"]), tuple(BLOCKS)),
    *_report("a block is null", NOT_BLOCKS, edit(REPORT, skipped_blocks=[None]), tuple(BLOCKS)),
    *_report("a block is 1.5", NOT_BLOCKS, edit(REPORT, skipped_blocks=[1.5]), tuple(BLOCKS)),
    *_report("a block is true", NOT_BLOCKS, edit(REPORT, skipped_blocks=[True])),
    *_report(
        "a block is NaN",
        f"block nan does not exist|{NOT_BLOCKS}",
        edit(REPORT, skipped_blocks=[float("nan")]),
    ),
    *_report("a block is a list", NOT_BLOCKS, edit(REPORT, skipped_blocks=[[1]])),
    *_report("blocks are null", NOT_BLOCKS, edit(REPORT, skipped_blocks=None)),
    *_report(
        "a block beyond the last", "block 1000+ does not exist", edit(REPORT, skipped_blocks=[int(HUGE)])
    ),
    *_report("a block twice", "block 1 is named twice", edit(REPORT, skipped_blocks=[1, 1])),
    *_report(
        "blocks twice",
        points_to("selection.json", "skipped_blocks"),
        write(REPORT, '{"model": "model", "num_layers": 4, "skipped_blocks": [2], "skipped_blocks": [1]}'),
    ),
    # a search's journal
    _journal("no settings", points_to(JOURNAL), line(JOURNAL, 1, "{}")),
    _journal("of another model", points_to(JOURNAL, "model"), edit_line(JOURNAL, 1, settings=ANOTHER)),
    _journal("line of text", f"{JOURNAL}, line 3: not JSON", line(JOURNAL, 3, "so far so good")),
    _journal(
        "line without losses", points_to(JOURNAL, "line 3"), line(JOURNAL, 3, '{"skipped": [], "block": 1}')
    ),
    _journal("second settings line", points_to(JOURNAL, "line 3"), line(JOURNAL, 3, SETTINGS)),
    _journal("loss is NaN", points_to(JOURNAL, "line 3"), edit_line(JOURNAL, 3, losses=[1.0, float("nan")])),
    _journal("loss is text", points_to(JOURNAL, "line 3"), edit_line(JOURNAL, 3, losses=["1", "2"])),
    _journal("losses are a number", points_to(JOURNAL, "line 3"), edit_line(JOURNAL, 3, losses=1.5)),
    _journal(
        "more losses than batches", points_to(JOURNAL, "line 3"), edit_line(JOURNAL, 3, losses=[1.0] * 9)
    ),
    _journal("block is a list", points_to(JOURNAL, "line 3"), edit_line(JOURNAL, 3, block=[1])),
    _journal("skipped is a number", points_to(JOURNAL, "line 3"), edit_line(JOURNAL, 3, skipped=1)),
    _journal("a folder", points_to(JOURNAL), folder(JOURNAL)),
    _journal(
        "state is no base64",
        points_to(JOURNAL, "line 3"),
        edit_line(JOURNAL, 3, losses=[1.0], state="not base64!"),
    ),
    # answers that step 1 kept
    _partial("no settings", points_to(PARTIAL), line(PARTIAL, 1, "{}")),
    _partial("of another model", points_to(PARTIAL, "model"), edit_line(PARTIAL, 1, settings=ANOTHER)),
    _partial("line of text", f"{PARTIAL}, line 3: not JSON", line(PARTIAL, 3, "so far so good")),
    _partial("index is text", points_to(PARTIAL, "line 3"), edit_line(PARTIAL, 3, index="1")),
    _partial("index below 0", points_to(PARTIAL, "line 3"), edit_line(PARTIAL, 3, index=-1)),
    _partial(
        "answers another prompt",
        "line 3: answers another prompt than prompts.jsonl",
        edit_line(
            PARTIAL, 3, messages=[{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ),
    ),
    _partial("no finish reason", points_to(PARTIAL, "line 3"), edit_line(PARTIAL, 3, finish_reason=REMOVED)),
    _partial(
        "tokens are text", points_to(PARTIAL, "line 3"), edit_line(PARTIAL, 3, num_generated_tokens="8")
    ),
    _partial("messages are numbers", points_to(PARTIAL, "line 3"), edit_line(PARTIAL, 3, messages=[1, 2])),
    _partial("a folder", points_to(PARTIAL), folder(PARTIAL)),
    # epochs to resume from
    _resume(
        "of other blocks",
        r"was made with blocks_to_skip = \[1\], now it is \[2\]; repeat",
        nothing,
        "--blocks_to_skip",
        "2",
    ),
    _resume(
        "of another granularity",
        "was made with granularity = layer, now it is channel; repeat",
        nothing,
        "--granularity",
        "channel",
    ),
    _resume("of another loss", "was made with loss = ce, now it is kl; repeat", nothing, "--loss", "kl"),
    _resume(
        "hopscotch.json is not JSON", points_to(LAST, "hopscotch.json"), cut(f"{LAST}/hopscotch.json", 0.5)
    ),
    _resume("hopscotch.json is a list", points_to(LAST), write(f"{LAST}/hopscotch.json", "[]")),
    _resume("no settings", points_to(LAST), edit(f"{LAST}/hopscotch.json", settings=REMOVED)),
    _resume("settings are text", points_to(LAST), edit(f"{LAST}/hopscotch.json", settings="the same")),
    _resume("epoch is text", points_to(LAST), edit(f"{LAST}/hopscotch.json", epoch="last")),
    _resume("no losses", points_to(LAST), edit(f"{LAST}/hopscotch.json", held_out=REMOVED, loss=REMOVED)),
    _resume(
        "no training state", "no training_state.safetensors", remove(f"{LAST}/training_state.safetensors")
    ),
    _resume("training state cut short", points_to(LAST), cut(f"{LAST}/training_state.safetensors", 0.5)),
    _resume(
        "training state of another shape",
        points_to(LAST),
        tensors(
            f"{LAST}/training_state.safetensors", lambda found: {"scale_state": found["scale_state"][:2]}
        ),
    ),
    _resume(
        "training state of NaN",
        points_to(LAST),
        tensors(
            f"{LAST}/training_state.safetensors",
            lambda found: {"scale_state": found["scale_state"] * float("nan")},
        ),
    ),
    # the table of what scaling came to
    Case("report", "output_dir", "missing", "none: no such file; make it again, or give", ("none",)),
    Case("report", "output_dir", "a file", points_to("data.jsonl"), ("data.jsonl",)),
    _table("report.json is not JSON", points_to("scaled/report.json"), cut("scaled/report.json", 0.5)),
    _table("report.json is a list", points_to("scaled/report.json"), write("scaled/report.json", "[]")),
    _table("report.json is another's", points_to("scaled/report.json"), write("scaled/report.json", "{}")),
    _table(
        "report.json of depth 200,000",
        points_to("scaled/report.json"),
        write("scaled/report.json", "[" * 200_000),
    ),
    _table(
        "best epoch is gone",
        points_to("scaled/report.json", "best_epoch is 7"),
        edit("scaled/report.json", best_epoch=7),
    ),
    _table(
        "best epoch out of the folder",
        points_to("report.json"),
        edit("scaled/report.json", best_epoch="0/../../model_scaled_epoch_0"),
    ),
    _table(
        "hopscotch.json is not JSON", points_to("hopscotch.json"), _each_epoch(lambda path: cut(path, 0.5))
    ),
    _table(
        "hopscotch.json without weights",
        points_to("hopscotch.json"),
        _each_epoch(lambda path: edit(path, weights=REMOVED)),
    ),
    # checkpoints to export
    _export(
        "config is not JSON", points_to(CHECKPOINT, "config.json"), write(f"{CHECKPOINT}/config.json", "{")
    ),
    _export(
        "no config",
        "scaled_epoch_0: no config.json, so not a checkpoint",
        remove(f"{CHECKPOINT}/config.json"),
    ),
    _export(
        "of another family",
        "architecture 'gpt2' is not a supported one",
        edit(f"{CHECKPOINT}/config.json", model_type="gpt2"),
    ),
    _export(
        "model type with escapes", "architecture ", edit(f"{CHECKPOINT}/config.json", model_type="\x1b[31m\n")
    ),
    _export(
        "skips text",
        points_to(f"{CHECKPOINT}/config.json"),
        edit(f"{CHECKPOINT}/config.json", skipped_attention_blocks="1"),
    ),
    _export(
        "skips a block beyond the last",
        points_to(f"{CHECKPOINT}/config.json", "block 9 does not exist"),
        edit(f"{CHECKPOINT}/config.json", skipped_attention_blocks=[9]),
    ),
    _export(
        "lies about its skips",
        f"{CHECKPOINT}: .*(missing|skip)",
        edit(f"{CHECKPOINT}/config.json", skipped_attention_blocks=[2]),
    ),
    _export(
        "lies about its layers", points_to(CHECKPOINT), edit(f"{CHECKPOINT}/config.json", num_hidden_layers=6)
    ),
    _export(
        "has more layers than it says",
        points_to(CHECKPOINT),
        edit(f"{CHECKPOINT}/config.json", num_hidden_layers=3),
    ),
    _export(
        "scales cut short", points_to("scales.safetensors"), cut(f"{CHECKPOINT}/scales.safetensors", 0.5)
    ),
    _export("scales missing", points_to(CHECKPOINT, "scale"), remove(f"{CHECKPOINT}/scales.safetensors")),
    _export(
        "a scale missing",
        points_to(CHECKPOINT, FIRST_SCALE),
        tensors(
            f"{CHECKPOINT}/scales.safetensors",
            lambda found: {k: v for k, v in found.items() if k != FIRST_SCALE},
        ),
    ),
    _export(
        "a scale of NaN",
        points_to(CHECKPOINT, f"{FIRST_SCALE} is .nan"),
        tensors(f"{CHECKPOINT}/scales.safetensors", _value(float("nan"))),
    ),
    _export(
        "a scale of 0",
        "s_scale_attn of layer 0 is 0, .* train with",
        tensors(f"{CHECKPOINT}/scales.safetensors", _value(0)),
    ),
    _export(
        "a scale of 1e38",
        points_to("(s_scale_attn|finite|exact)"),
        tensors(f"{CHECKPOINT}/scales.safetensors", _value(1e38)),
    ),
    _export(
        "a scale of another shape",
        points_to(CHECKPOINT, FIRST_SCALE),
        tensors(
            f"{CHECKPOINT}/scales.safetensors",
            lambda found: found | {FIRST_SCALE: found[FIRST_SCALE].expand(2).clone()},
        ),
    ),
    _export(
        "weights cut short",
        points_to("base-00001-of-00001"),
        cut(f"{CHECKPOINT}/base-00001-of-00001.safetensors", 0.5),
    ),
    _export(
        "weights missing",
        points_to("base-00001-of-00001"),
        remove(f"{CHECKPOINT}/base-00001-of-00001.safetensors"),
    ),
    _export(
        "index out of the folder",
        points_to(CHECKPOINT, r"\.\./"),
        index(
            lambda found: dict.fromkeys(found, "../../model/model.safetensors"),
            f"{CHECKPOINT}/model.safetensors.index.json",
        ),
    ),
    _export(
        "index is not JSON", points_to("index.json"), write(f"{CHECKPOINT}/model.safetensors.index.json", "{")
    ),
    # GGUF files
    _gguf("missing", "folded.gguf: no such file; make it with", remove("folded.gguf")),
    _gguf("a folder", points_to("folded.gguf", "folder"), folder("folded.gguf")),
    _gguf("empty", "folded.gguf: not a GGUF file", write("folded.gguf", "")),
    _gguf("cut in the header", "folded.gguf: not a GGUF file", cut("folded.gguf", 0.00005)),
    _gguf("cut in the metadata", "folded.gguf: not a GGUF file", cut("folded.gguf", 0.005)),
    _gguf("cut in the weights", "folded.gguf: not a GGUF file", cut("folded.gguf", 0.9)),
    _gguf("text", "folded.gguf: not a GGUF file", write("folded.gguf", "{}" * 100)),
    _gguf(
        "2^60 tensors",
        "folded.gguf: not a GGUF file",
        write("folded.gguf", b"GGUF\x03\0\0\0" + (2**60).to_bytes(8, "little") + bytes(8)),
    ),
    _gguf(
        "a key of 2^60 bytes",
        "folded.gguf: not a GGUF file",
        write(
            "folded.gguf",
            b"GGUF\x03\0\0\0" + bytes(8) + (1).to_bytes(8, "little") + (2**60).to_bytes(8, "little"),
        ),
    ),
    _gguf("names with escapes", points_to("folded.gguf"), _rename_architecture),
    *for_scripts(
        ["export"], "--tolerance", "not kept", "not exact enough .* --tolerance", "--tolerance", "1e-30"
    ),
    *for_scripts(
        ["export"],
        "--format",
        "that cannot hold the model",
        "nemotron_nas has no sliding window",
        "--format",
        "nemotron_nas",
        spoil=edit(f"{CHECKPOINT}/config.json", model_type="hopscotch_mistral", sliding_window=8),
    ),
]
