"""Long searches, many records, long answers and long journals stay within stated memory and time."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from driving import (
    Outcome,
    Running,
    conversation,
    record,
    resident_bytes,
    samples,
    start,
    succeed,
    write_lines,
)

import block_selection

MIB = 1 << 20


def follow(running: Running, see: Callable[[int], None]) -> Outcome:
    """Wait for a command's end; see(its resident bytes) every few milliseconds."""
    while not running.poll():
        see(resident_bytes(running.pid))
        time.sleep(0.01)
    outcome = running.wait()
    assert outcome.code == 0, outcome.err
    return outcome


def check_flat_memory(model: Path, folder: Path, candidates: int, growth: int) -> None:
    """A search over `candidates`: memory after the first quarter against the most until the end."""
    write_lines(folder / "data.jsonl", samples(8))
    command = ("block_selection.py", "--model", model, "--data_path", "data.jsonl", "--device", "cpu")
    running = start(folder, *command, "--batch_size", 4, "--output", "report.json")
    journal = folder / "report.journal.jsonl"
    early, late = [0], [0]

    def see(size: int) -> None:
        done = journal.read_bytes().count(b"\n") if journal.exists() else 0
        if candidates // 8 < done <= candidates // 4:
            early.append(size)
        elif done > candidates // 4:
            late.append(size)

    follow(running, see)
    (iteration,) = json.loads((folder / "report.json").read_text())["iterations"]
    assert len(iteration["losses"]) == candidates and max(early) > 0
    grown = max(late) - max(early)
    assert grown < growth, f"{grown / MIB:.0f} MiB more"
    record(f"memory over a search of {candidates} candidates", f"{grown / MIB:.1f} MiB growth")


def test_memory_stays_flat_over_a_search(tiny_folder, tmp_path):
    check_flat_memory(tiny_folder(num_hidden_layers=24), tmp_path, 24, 24 * MIB)


@pytest.mark.slow
def test_memory_stays_flat_over_200_candidates(tiny_folder, tmp_path):
    check_flat_memory(tiny_folder(num_hidden_layers=200), tmp_path, 200, 48 * MIB)


def process_and_load(model: Path, folder: Path, records: int) -> None:
    """Step 2 on many short records, then a search that loads them, within memory and time."""
    write_lines(folder / "in.jsonl", (conversation(f"{n}?", f"It is {n}.") for n in range(records)))
    peak = [0]
    started = time.monotonic()
    command = ("process_gt_data.py", "--model", model, "--input_file", "in.jsonl", "--output_dir", "out")
    follow(start(folder, *command, "--num_cpu_procs", 2), lambda size: peak.append(size))
    processing, seconds = max(peak), time.monotonic() - started
    report = json.loads((folder / "out/data_report.json").read_text())
    assert report["samples"] == report["kept"] == records

    peak, started = [0], time.monotonic()
    loading = start(folder, "block_selection.py", "--model", model, "--data_path", "out/data.jsonl",
                    "--device", "cpu", "--output", "report.json")  # fmt: skip
    while not re.search(rf"\b{records} answers in ", loading.text("err")):
        assert not loading.poll(), loading.text("err")
        peak.append(resident_bytes(loading.pid))
        time.sleep(0.01)
    loading_seconds, loading_bytes = time.monotonic() - started, max(peak)
    loading.kill(9)
    loading.wait()
    figure = (
        f"step 2: {seconds:.0f} s, {processing / MIB:.0f} MiB; "
        f"loading: {loading_seconds:.0f} s, {loading_bytes / MIB:.0f} MiB"
    )
    for size in (processing, loading_bytes):
        assert size < START_BYTES + records * BYTES_EACH, figure
    for taken in (seconds, loading_seconds):
        assert taken < START_SECONDS + records * SECONDS_EACH, figure
    record(f"{records:,} short records", figure)


START_BYTES, BYTES_EACH = 900 * MIB, 6000  # torch, transformers and datasets, loaded; a record's share
START_SECONDS, SECONDS_EACH = 20, 2e-3


def test_twenty_thousand_records(tiny_folder, tmp_path):
    process_and_load(tiny_folder(), tmp_path, 20_000)


@pytest.mark.slow
def test_a_million_records(tiny_folder, tmp_path):
    process_and_load(tiny_folder(), tmp_path, 1_000_000)


LONG = 30_000  # tokens, one a byte


def test_a_long_answer_goes_through_training(tiny_folder, tmp_path):
    """It is dropped by default, and counted."""
    model = tiny_folder(
        hidden_size=8, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=2,
        max_position_embeddings=32_768,
    )  # fmt: skip
    answers = [conversation("Count.", "ab" * (LONG // 2)), conversation("Briefly?", "Yes, and that is all.")]
    write_lines(tmp_path / "answers.jsonl", answers)
    process = ("process_gt_data.py", "--model", model, "--input_file", "answers.jsonl",
               "--output_dir", "out", "--num_cpu_procs", 1)  # fmt: skip
    assert "1 of 2 samples kept (1 too long, 0 too short)" in succeed(tmp_path, *process).out
    report = json.loads((tmp_path / "out/data_report.json").read_text())
    assert report["dropped_too_long"] == 1 and report["longest"] < 100
    succeed(tmp_path, *process, "--max_seq_len", 32_000)
    report = json.loads((tmp_path / "out/data_report.json").read_text())
    assert report["kept"] == 2 and LONG < report["longest"] < 32_000
    command = ("param_scale.py", "--model", model, "--data_path", "out/data.jsonl", "--device", "cpu",
               "--blocks_to_skip", 0, "--num_epochs", 1, "--output_dir", "scaled")  # fmt: skip
    peak, started = [0], time.monotonic()
    running = start(tmp_path, *command, "--max_tokens_per_batch", 32_000)
    follow(running, lambda size: peak.append(size))
    (epoch,) = json.loads((tmp_path / "scaled/report.json").read_text())["epochs"]
    assert 0 < epoch["loss"] < 20
    figure = f"{time.monotonic() - started:.0f} s, {max(peak) / MIB:.0f} MiB"
    assert max(peak) < 2048 * MIB, figure  # one float32 matrix of its attention would be 3434 MiB
    record(f"an answer of {LONG:,} tokens, a training step", figure)

    refused = start(tmp_path, *command, "--max_tokens_per_batch", 20_000).wait()
    assert not refused.faults_as_error([2], "line 1: .* tokens do not fit --max_tokens_per_batch")


def test_a_journal_of_10_000_lines_loads_in_seconds(tiny_folder, tmp_path, monkeypatch):
    """Against the same finished search with its own short journal, in this process."""
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "data.jsonl", samples(4))
    command = ["--model", str(tiny_folder()), "--data_path", "data.jsonl", "--device", "cpu"]
    command += ["--output", "report.json"]

    def seconds() -> float:
        started = time.process_time()
        assert block_selection.main(command) == 0
        return time.process_time() - started

    seconds()
    report, short = Path("report.json").read_text(), min(seconds() for _ in range(2))
    journal = Path("report.journal.jsonl")
    settings, *candidates = journal.read_text().splitlines()
    lines = [settings]
    for number in range(10_000):  # of iterations that skipped other blocks before
        other = json.loads(candidates[number % len(candidates)])
        lines.append(json.dumps(other | {"skipped": [5 + number // len(candidates)]}))
    journal.write_text("\n".join([*lines, *candidates]) + "\n")
    long = min(seconds() for _ in range(2))
    assert len(journal.read_text().splitlines()) == 10_001 + len(candidates)  # all known: none was added
    assert json.loads(Path("report.json").read_text()) == json.loads(report)
    assert long - short < 10, f"{long - short:.2f} s more"  # a line that reads all others would take minutes
    record("a journal of 10,000 lines", f"{max(long - short, 0):.2f} s to load")
