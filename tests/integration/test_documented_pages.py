"""The code blocks of the pages on single topics run on tiny models, and do what the sentences beside them say."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from support.commands import call
from support.documented import blocks, commands, run_commands
from support.places import ROOT, TESTS
from support.tiny import build_model, save_model

import lcc_lens as lcc
from lcc_lens.core.reading import read_json
from lcc_lens.evaluation.paper.recipes import read_recipe
from lcc_lens.frontends.cli.main import parse
from lcc_lens.frontends.demo import DemoConfig
from lcc_lens.models.architecture.zeros import zero_pattern
from lcc_lens.models.loading.plain import load_plain

TOKENS = torch.arange(1, 17)[None]


@pytest.fixture
def wide(place: Path) -> Path:
    """A tiny model whose linear layers have multiples of four inputs, as 2:4 needs them."""
    return save_model(build_model(head_dim=8), place / "wide")


@pytest.mark.slow
def test_causes(after_readme: Path) -> None:
    assert run_commands("docs/causes.md") == ["scan"]
    pair = lcc.load_pair("smollm2", "out/wanda50")
    space: dict[str, Any] = {"lcc": lcc, "pair": pair, "data": lcc.load_data("wikitext", n=8, role="probe")}
    (block,) = blocks("docs/causes.md", "python")
    exec(block, space)
    for scan in (space["scan"], lcc.Scan.load("runs/mine")):
        table = scan.causes.table()
        assert {"inherited", "pattern", "value"} <= set(table)
        assert (table[["inherited", "pattern", "value"]].sum(axis=1) - 1).abs().max() < 1e-4


@pytest.mark.slow
def test_prompts(after_readme: Path) -> None:
    Path("prompts.txt").write_text("Name some rivers.\n\nList 3 rivers, step by step.\n")
    rewriting = [command for command in commands("docs/prompts.md") if command[0] == "rewrite"]
    assert run_commands("docs/prompts.md") == ["merits", "prompts", "rewrite fit", "rewrite"]
    assert rewriting[0][1] == "fit"
    assert Path("runs/mine/rewriter/rewriter.safetensors").exists()
    (block,) = blocks("docs/prompts.md", "python")
    space: dict[str, Any] = {}
    exec(block.replace("n=96", "n=4"), space)
    assert set(space["study"].variants) == {"raw", "clear", "filler"}
    assert set(space["study"].models) == {"dense", "pruned", "restored"}


@pytest.mark.slow
def test_exports(place: Path) -> None:
    lcc.prune("smollm2", "out/wanda50", method="magnitude")
    restore = ["restore", "smollm2", "out/wanda50", "runs/restored", "--hooks-only", "--data", "alpaca", "--quiet"]
    assert call(*restore, "--selector", "mse", "--examples", 32, "--scan-examples", 16, "--panel-blocks", 0) == 0
    block, steering = blocks("docs/export.md", "python")
    space: dict[str, Any] = {"lcc_lens": lcc, "tokens": TOKENS}
    exec(block.replace("generate(...)", "generate(tokens, max_new_tokens=4)"), space)
    assert float((space["model"](TOKENS).logits - load_plain(Path("out/wanda50"))(TOKENS).logits).abs().max()) > 1e-3

    pair = lcc.load_pair("smollm2", "out/wanda50")
    lcc.save_components(lcc.Restoration.load("runs/restored"), "out/components", pair.pruned)
    alone = steering.partition("# steering-vectors")[0]
    exec(alone, space := {"pruned": pair.pruned, "tokens": TOKENS})
    assert float((space["logits"] - pair.pruned(TOKENS)).abs().max()) > 1e-3

    (clone,) = (block for block in blocks("docs/export.md", "") if block.startswith("git clone"))
    assert clone.startswith("git clone https://github.com/ggml-org/llama.cpp")
    Path("llama.cpp").mkdir()
    Path("llama.cpp/convert_hf_to_gguf.py").write_text(
        f"import runpy\nrunpy.run_path({str(TESTS / 'support' / 'gguf_writing.py')!r}, run_name='__main__')\n"
    )
    run_commands("docs/export.md", lambda command: command[0] == "export", RUN="runs/restored")
    names = {tensor.name for tensor in gguf.GGUFReader("out/restored.gguf").tensors}
    assert "blk.0.attn_output.bias" in names


@pytest.mark.slow
def test_one_model_at_a_time_with_layers_on_disk(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export, *_ = (block for block in blocks("docs/scale.md", "") if block.startswith("export "))
    name, value = re.match(r"export (\w+)=(\w+)", export).groups()
    monkeypatch.setenv(name, value)
    ran = run_commands("docs/scale.md", DENSE=wide, PRUNED="pruned", RUN="run", OUT="out")
    assert ran == ["prune", "scan", "restore", "export"]
    monkeypatch.delenv(name)
    assert zero_pattern(Path("pruned")).pattern == "2:4"
    change = load_plain(Path("out"))(TOKENS).logits - load_plain(Path("pruned"))(TOKENS).logits
    assert float(change.abs().max()) > 1e-3


@pytest.mark.slow
def test_several_processes(after_readme: Path, trained: Path) -> None:
    (block,) = (block for block in blocks("docs/scale.md", "") if block.startswith("accelerate launch"))
    for line in block.splitlines():
        words = shlex.split(line.replace("--num_processes 4", "--num_processes 2"))[2:]
        places = {"DENSE": str(trained), "PRUNED": "out/wanda50", "RUN": "run"}
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no"]
        launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
        smaller = ["--examples", "16"]
        done = subprocess.run([*launch, *(places.get(word, word) for word in words), *smaller], env=_environment())
        assert done.returncode == 0, line
    losses = lcc.Restoration.load("run").record.losses
    assert losses["restored"] < losses["pruned"]


@pytest.mark.slow
def test_layers_divided_among_processes(after_readme: Path, trained: Path) -> None:
    (block,) = blocks("docs/scale.md", "python")
    Path("divided.py").write_text(
        "import sys\nimport torch\nimport lcc_lens as lcc\n"
        "dense, pruned, run = sys.argv[1:]\ndata = lcc.load_data('boolq', n=12, role='probe')\n"
        "training = lcc.load_data('alpaca', n=12, role='train')\n" + block
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run([*launch, "divided.py", str(trained), "out/wanda50", "run"], env=_environment())
    assert done.returncode == 0
    alone = lcc.scan(lcc.load_pair(trained, "out/wanda50"), lcc.load_data("boolq", n=12, role="probe"))
    divided = lcc.Scan.load("run")._tensors()
    assert all(torch.equal(divided[name], value) for name, value in alone._tensors().items())
    assert lcc.Restoration.load("run").record.method == "lcc"


def test_the_job_for_slurm_starts_these_commands(place: Path) -> None:
    """SLURM's programs and the launcher are stood in for by scripts that run or note what they are given."""
    (job,) = (block for block in blocks("docs/scale.md", "bash") if block.startswith("#!"))
    scripts = {
        "scontrol": "echo node1; echo node2",
        "srun": 'while [ "${1#--}" != "$1" ]; do shift 2; done; exec "$@"',
        "accelerate": 'while [ "$1" != lcc_lens ]; do shift; done; shift; echo "$@" >> noted',
        "lcc-lens": 'echo "$@" >> noted',
    }
    for name, script in scripts.items():
        (place / "bin").mkdir(exist_ok=True)
        (place / "bin" / name).write_text(f"#!/bin/bash\n{script}\n")
        (place / "bin" / name).chmod(0o755)
    variables = {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NNODES": "2", "SLURM_NODEID": "0", "SCRATCH": "scratch"}
    environment = {**os.environ, **variables, "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-eu", "-c", job], env=environment, check=True)
    noted = Path("noted").read_text().splitlines()
    assert [type(parse(shlex.split(line))).__name__ for line in noted] == ["ScanPair", "Restore", "Export"]
    assert noted[2] == "export scratch/run scratch/restored"


def test_paper_tables(wide: Path) -> None:
    whole, dry = commands("docs/paper_tables.md")
    assert read_recipe(ROOT / parse(whole).file).entries
    command = parse([str(wide) if word == "path/to/tiny-llama" else word for word in dry])
    assert (command.file, command.dry_run, command.out) == (parse(whole).file, str(wide), Path("runs/dry"))
    # that every recipe runs so, to its last row, is a test of its own: test_paper_recipes.py


def test_pruning(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lcc_lens.models.loading.references.embedded_model", lambda: wide)
    assert run_commands("docs/results/pruning.md") == ["prune", "prune", "report"]
    models = read_json(Path("report.json"))["models"]
    assert models["sparse24"]["pattern"] == "2:4"
    assert models["slim20"]["parameters"] < models["smollm2"]["parameters"]
    assert models["slim20"]["sparsity"] == 0


@pytest.mark.slow
def test_training_cost(place: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, collect = blocks("docs/results/training_cost.md", "")[0].splitlines()
    small = functools.partial(
        DemoConfig, n_calibration=4, calibration_length=64, n_probe=8, n_train=24, n_validation=4, n_held_out=10,
        max_length=160, n_text_blocks=3, text_length=64, n_items=5,
    )  # fmt: skip
    monkeypatch.setattr("lcc_lens.frontends.demo.DemoConfig", small)
    seeds, command = re.fullmatch(r"for seed in ([\d ]+); do lcc-lens (.*); done", loop).groups()
    for seed in seeds.split():
        assert call(*shlex.split(command.replace("$seed", seed)), "--quiet") == 0
    _, script, *folders = shlex.split(collect)
    spec = importlib.util.spec_from_file_location("collect_demo", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    results = module.collect([Path(folder) for folder in folders])
    assert [run["seed"] for run in results["runs"]] == [0, 1, 2]
    for task, key, *_ in module.COLUMNS.values():  # of the table, whose last row needs models that lost something
        assert all(run["models"][model][task][key] > 0 for run in results["runs"] for model in ("dense", "restored"))


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
