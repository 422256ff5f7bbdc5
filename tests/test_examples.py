"""Scripts that no test machine runs for real: their syntax, their agreement, and SLURM among stand-ins."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lite.config import load_config

ROOT = Path(__file__).resolve().parent.parent
SBATCH = ROOT / "examples/slurm/pretrain.sbatch"
SHELL_SCRIPTS = [SBATCH, ROOT / ".ci/run", *ROOT.glob("tools/*.sh"), *ROOT.glob("examples/**/*.sh")]


@pytest.mark.parametrize("script", SHELL_SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_parse(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert "set -euo pipefail" in script.read_text()


def test_pre_commit_runs_what_make_check_runs() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    check = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert check is not None
    assert len(hooks) == len(check[1].splitlines())
    for hook, step in zip(hooks, check[1].splitlines(), strict=True):
        what = (
            " ".join(hook["name"].split()[:2]) if hook["id"] != "floor-plan" else "tests/test_floor_plan.py"
        )
        assert what in step


# -------------------------------------------------------------------------------------------------- SLURM


def start_sbatch(folder: Path, srun: str, **environ: str) -> "subprocess.Popen[str]":
    """Runs the batch script with stand-ins for SLURM's commands; each notes its call in `folder/calls`."""
    commands = {
        "srun": f'echo "srun $MASTER_ADDR $MASTER_PORT $OMP_NUM_THREADS $*" >> calls\n{srun}',
        "scontrol": 'echo "scontrol $*" >> calls\n[ "$1" != show ] || printf "node7\\nnode8\\n"',
        "scancel": 'echo "scancel $*" >> calls\ntouch told',
    }
    for name, body in commands.items():
        command = folder / name
        command.write_text(f"#!/bin/sh\n{body}\n")
        command.chmod(0o755)
    variables = {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "SLURM_SUBMIT_DIR": str(folder),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "12",
        **environ,
    }
    arguments = ["bash", str(SBATCH), "configs/tiny.json", "--set", "train.steps=3 "]
    return subprocess.Popen(
        arguments, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize("status", [0, 2])
def test_sbatch_starts_the_tasks_and_returns_their_status(tmp_path: Path, status: int) -> None:
    job = start_sbatch(tmp_path, f"exit {status}", VENV="/opt/venv")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == status, output
    expand, srun = calls(tmp_path)
    assert expand == "scontrol show hostnames node[7-8]"
    assert srun.startswith("srun node7 23456 12 --kill-on-bad-exit=1 ")
    assert " --distribution=block:block " in srun, "a tensor group must not span nodes"
    assert srun.endswith(
        "/opt/venv/bin/python pretrain_gpt.py --config configs/tiny.json --set train.steps=3 "
    )


def test_sbatch_saves_and_requeues_near_the_time_limit(tmp_path: Path) -> None:
    # The tasks need a while to save after they are told; the job must not go back into the queue before.
    srun = 'until [ -e told ]; do sleep 0.05; done; sleep 0.3; echo "saved" >> calls; exit 3'
    job = start_sbatch(tmp_path, srun)
    while not (tmp_path / "calls").exists() or len(calls(tmp_path)) < 2:
        assert job.poll() is None
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=60)
    assert calls(tmp_path)[2:] == ["scancel --signal=USR1 123456", "saved", "scontrol requeue 123456"], output
    assert job.returncode == 3


def test_sbatch_asks_for_the_signal_that_it_handles() -> None:
    directives = re.findall(r"^#SBATCH --(\S+)", SBATCH.read_text(), re.MULTILINE)
    assert "requeue" in directives
    assert any(re.fullmatch(r"signal=B:USR1@\d+", directive) for directive in directives)
    options = dict(directive.partition("=")[::2] for directive in directives)
    assert options["ntasks-per-node"] == options["gpus-per-node"]


# --------------------------------------------------------------------------------------------- Kubernetes


@pytest.fixture
def manifests() -> dict[str, Any]:
    text = (ROOT / "examples/kubernetes/pretrain.yaml").read_text()
    return {manifest["kind"]: manifest for manifest in yaml.safe_load_all(text)}


def test_the_pods_find_each_other(manifests: dict[str, Any]) -> None:
    service, job = manifests["Service"], manifests["Job"]
    pod = job["spec"]["template"]["spec"]
    [script] = pod["containers"][0]["args"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert service["metadata"]["name"] == pod["subdomain"]
    assert f"--master-addr={job['metadata']['name']}-0.{pod['subdomain']} " in script
    assert f"--master-port={service['spec']['ports'][0]['port']} " in script


def test_the_numbers_of_the_job_agree(manifests: dict[str, Any]) -> None:
    spec = manifests["Job"]["spec"]
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    options = dict(re.findall(r"--([a-z-]+)=(\d+)", container["args"][0]))
    assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc-per-node"])
    assert pod["terminationGracePeriodSeconds"] > int(options["shutdown-timeout"])
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    uid = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
    assert uid is not None
    assert pod["securityContext"]["runAsUser"] == int(uid[1])


def test_the_job_runs_a_config_that_fits_its_ranks(manifests: dict[str, Any]) -> None:
    [script] = manifests["Job"]["spec"]["template"]["spec"]["containers"][0]["args"]
    options = dict(re.findall(r"--(nnodes|nproc-per-node)=(\d+)", script))
    [path] = re.findall(r"--config (\S+)", script)
    config = load_config(str(ROOT / path), re.findall(r"--set (\S+)", script), None)
    config.check_world(int(options["nnodes"]) * int(options["nproc-per-node"]))
    # The image has neither data nor tokenizer: they come with the volume.
    assert {"data.train", "data.tokenizer", "train.output_dir"} == {
        key for key, path in re.findall(r"--set (\S+)=(?:gpt2:)?(\S+)", script) if path.startswith("/runs/")
    }
