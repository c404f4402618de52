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


@pytest.fixture(scope="module")
def lm_eval_results(tiny_folder, tmp_path_factory):
    """Folders that two runs of lm-eval wrote, of a task each, for two tiny models."""
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed")
    root = tmp_path_factory.mktemp("lm_eval")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_CACHE": str(root / "data"),
        "OMP_NUM_THREADS": "1",
    }
    folders = {"original": tiny_folder("llama"), "skipped": tiny_folder("llama", num_hidden_layers=3)}
    for name, model in folders.items():
        words = f"--model hf --model_args pretrained={model},dtype=float32 --device cpu --batch_size 3"
        words += f" --tasks local_choices --include_path . --output_path {root / name}"
        run = subprocess.run(
            [sys.executable, "-m", "lm_eval", *words.split()],
            cwd=TASKS,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-4000:]
    return root


def test_a_real_run(lm_eval_results, capsys):
    words = [f"{name}={lm_eval_results / name}" for name in ("original", "skipped")]
    assert tables.main([*words, "--columns", "local_choices:acc,none"]) == 0
    title, _, original, skipped = capsys.readouterr().out.splitlines()
    assert title == "| model | local_choices:acc,none |"
    values = {}
    for name in ("original", "skipped"):
        (path,) = (lm_eval_results / name).rglob("results_*.json")
        found = json.loads(path.read_text())["results"]["local_choices"]
        values[name] = 100 * found["acc,none"], 100 * found["acc_stderr,none"]
    (a, ea), (b, eb) = values["original"], values["skipped"]
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
