"""benchmarks/lm_eval_tables.py on results that a real lm-eval run wrote, and on the poster's columns."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import lm_eval_tables as tables  # noqa: E402

TASKS = ROOT / "tests" / "lm_eval"


def test_a_real_run(tiny_folder, tmp_path, capsys):
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    words = f"--model hf --model_args pretrained={tiny_folder()},dtype=float32 --device cpu --batch_size 3"
    words += f" --tasks local_choices --include_path . --output_path {tmp_path / 'original'}"
    more = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "data"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lm_eval", *words.split()]
    run = subprocess.run(command, cwd=TASKS, env=os.environ | more, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    (path,) = (tmp_path / "original").rglob("results_*.json")
    content = json.loads(path.read_text())
    found = content["results"]["local_choices"]
    a, ea, b, eb = 100 * found["acc,none"], 100 * found["acc_stderr,none"], 12.5, 4.0
    found |= {"acc,none": b / 100, "acc_stderr,none": eb / 100}  # another model's
    (tmp_path / "skipped").mkdir()
    (tmp_path / "skipped" / path.name).write_text(json.dumps(content))
    words = [f"{name}={tmp_path / name}" for name in ("original", "skipped")]
    assert tables.main([*words, "--columns", "local_choices:acc,none"]) == 0
    title, _, original, skipped = capsys.readouterr().out.splitlines()
    assert title == "| model | local_choices:acc,none |"
    assert original == f"| original | {a:.2f} ± {ea:.2f} |"
    assert skipped == f"| skipped | {b:.2f} ± {eb:.2f} ({b - a:+.2f} ± {(ea**2 + eb**2) ** 0.5:.2f}) |"


def write(folder, date: float, results: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"results_{date}.json").write_text(json.dumps({"date": date, "results": results}))


def gsm8k(flexible: float, strict: float) -> dict:
    return {
        "alias": "gsm8k",
        "sample_len": 1319,
        "exact_match,flexible-extract": flexible,
        "exact_match_stderr,flexible-extract": 0.01,
        "exact_match,strict-match": strict,
        "exact_match_stderr,strict-match": 0.02,
    }


def test_the_posters_columns_over_several_runs(tmp_path, capsys):
    write(tmp_path / "base" / "model", 1.0, {"gsm8k": gsm8k(0.1, 0.1)})  # run again since
    write(tmp_path / "base" / "model", 2.0, {"gsm8k": gsm8k(0.8310, 0.6694)})
    write(
        tmp_path / "base" / "other",
        3.0,
        {"pawsx": {"alias": "pawsx", "acc,none": 0.6326, "acc_stderr,none": "N/A"}},
    )
    write(tmp_path / "four", 1.0, {"gsm8k": gsm8k(0.8105, 0.7703)})
    assert tables.main([f"original={tmp_path / 'base'}", str(tmp_path / "four")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "| model | gsm8k FE | gsm8k SM | pawsx |",
        "|---|---|---|---|",
        "| original | 83.10 ± 1.00 | 66.94 ± 2.00 | 63.26 |",
        "| four | 81.05 ± 1.00 (-2.05 ± 1.41) | 77.03 ± 2.00 (+10.09 ± 2.83) | - |",
    ]


def test_what_cannot_be_told_is_refused(tmp_path):
    with pytest.raises(SystemExit, match="no results"):
        tables.main([str(tmp_path)])
    write(tmp_path / "a", 1.0, {"local": {"acc,none": 0.5, "acc_stderr,none": 0.1}})
    with pytest.raises(SystemExit, match="--columns takes any of: local:acc,none"):
        tables.main([str(tmp_path / "a")])
    with pytest.raises(SystemExit, match="no model has local:f1,none"):
        tables.main([str(tmp_path / "a"), "--columns", "local:f1,none"])
    with pytest.raises(SystemExit, match="named twice"):
        tables.main([str(tmp_path / "a"), str(tmp_path / "a")])
