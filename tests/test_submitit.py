"""Submission through submitit: what is asked of Slurm, what a task finds, and whom its signals
reach.

Whole jobs are in `tests/test_submitit_jobs.py`.
"""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import run_with_submitit
from config import flags
from errors import InputError, run_command
from run_with_submitit import SignalRelay, Trainer, get_args_parser, read_args

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="this system has no SIGUSR2")

# ------------------------------------------------------------------------------------ what is asked


def parameters_of(words: str) -> tuple[dict[str, Any], list[str]]:
    launch, arguments = read_args(words.split())
    return run_with_submitit.job_parameters(launch), arguments


def test_what_is_submitted_is_shown_without_submitit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    words = (
        "--nodes 2 --model deit_tiny_patch16_224 --ngpus 4 --partition gpu --job_dir jobs/%j --lr "
        "1e-3 --dry-run"
    )
    run_with_submitit.main(words.split())
    shown = capsys.readouterr().out
    wanted = (
        "cluster = slurm",
        "nodes = 2",
        "tasks_per_node = 4",
        "gpus_per_node = 4",
        "timeout_min = 2800",
        "slurm_partition = gpu",
        "slurm_signal_delay_s = 120",
        f"folder = {Path.cwd()}/jobs/submitit",
    )
    for line in wanted:
        assert f"{line}\n" in shown
    assert "comment" not in shown
    command = shown.splitlines()[-1].split()
    assert command[:2] == ["python", "main.py"]
    args = flags.get_args_parser().parse_args(command[2:])
    assert (args.model, args.lr, args.num_workers) == ("deit_tiny_patch16_224", 1e-3, 10)
    assert (args.output_dir, args.auto_resume) == (f"{Path.cwd()}/jobs/%j", True)


def test_cores_gpus_and_other_options_follow_the_flags() -> None:
    parameters, arguments = parameters_of(
        "--job-dir x --device cpu --cpus-per-task 4 --sbatch account=a=b --sbatch qos=low"
    )
    assert (
        parameters["gpus_per_node"],
        parameters["tasks_per_node"],
        parameters["cpus_per_task"],
    ) == (None, 8, 4)
    assert parameters["slurm_additional_parameters"] == {"account": "a=b", "qos": "low"}
    assert arguments == ["--device", "cpu", "--num-workers", "4"]
    assert parameters_of("--job-dir x --num_workers 3")[1] == ["--num_workers", "3"]
    assert parameters_of("--job-dir x --local")[1] == []


def test_no_flag_of_ours_is_one_of_main() -> None:
    ours, theirs = (
        {flag for action in parser._actions for flag in action.option_strings}
        for parser in (get_args_parser(), flags.get_args_parser())
    )
    assert ours & theirs == {"-h", "--help"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--nodes 0", "--nodes 0: must be above 0"),
        ("--ngpus -1", "--ngpus -1: must be above 0"),
        ("--timeout 0", "--timeout 0: must be above 0"),
        ("--sbatch account", "--sbatch account: must be NAME=VALUE"),
        ("--local --nodes 2", "--nodes 2: --local runs on this machine only"),
        (
            "--output_dir y",
            "--output-dir: the job's folder is the output folder; use --job-dir only",
        ),
        ("--epochs 0", "--epochs 0: must be above 0"),
        ("--nodes=--", "--nodes []: no value that this flag can have"),
    ],
)
def test_wrong_values_are_refused_before_anything_is_submitted(words: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_args(["--job-dir", "x", *words.split()])


@pytest.mark.parametrize(
    "words", ["", "--job-dir x --nosuch", "--job-dir x --nodes two", "--job-dir x --node 2"]
)
def test_wrong_flags_leave_with_code_2(words: str) -> None:
    with pytest.raises(SystemExit) as leaving:
        read_args(words.split())
    assert leaving.value.code == 2


def test_a_signal_that_main_takes_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBMITIT_PREEMPT_SIGNAL", "USR1")
    with pytest.raises(InputError, match=r"SUBMITIT_PREEMPT_SIGNAL=USR1: .*; use USR2"):
        read_args(["--job-dir", "x"])


def test_without_submitit_or_slurm_it_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def submit() -> None:
        run_with_submitit.main(["--job-dir", str(tmp_path)])

    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_command(submit) == 2
    assert "or add --local" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert run_command(submit) == 2
    assert (
        capsys.readouterr().err
        == "error: submitit is not installed: pip install -r requirements-slurm.txt\n"
    )


# ---------------------------------------------------------------------------------------- in a task


def slurm_task(monkeypatch: pytest.MonkeyPatch, rank: int, job: str = "4711") -> Any:
    """A task on two nodes of four GPUs, as Slurm describes it."""
    import submitit

    values = {
        "SUBMITIT_EXECUTOR": "slurm",
        "SLURM_JOB_ID": job,
        "SLURM_NTASKS": "8",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": str(rank // 4),
        "SLURM_JOB_NODELIST": "gpu[07-08]",
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % 4),
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return submitit.JobEnvironment()


def test_a_task_finds_what_torchrun_would_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert run_with_submitit.task_environment(slurm_task(monkeypatch, rank=6)) == {
        "RANK": "6",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "19711",
        "OMP_NUM_THREADS": "1",
    }
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "1")
    assert run_with_submitit.task_environment(slurm_task(monkeypatch, 0))["OMP_NUM_THREADS"] == "1"


def test_ports_differ_between_jobs_and_are_free_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [*map(str, range(99990, 100010)), "123456_7"]  # the last: one of an array
    ports = [
        int(run_with_submitit.task_environment(slurm_task(monkeypatch, 0, job))["MASTER_PORT"])
        for job in jobs
    ]
    assert len(set(ports)) == len(jobs)
    assert all(1024 < port < 32768 and port != 29500 for port in ports)


def test_submitits_signal_reaches_whoever_listens() -> None:
    """submitit before main.py does, then main.py once, and a forked worker of a loader never."""
    calls: list[tuple[str, int]] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: calls.append(("submitit", number)))
    try:
        with SignalRelay(signal.SIGUSR2) as relay:
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGUSR2)
            signal.signal(signal.SIGUSR1, lambda number, frame: calls.append(("main", number)))
            relay.process += 1
            signal.raise_signal(signal.SIGUSR2)
            relay.process -= 1
            assert not relay.relayed
            signal.raise_signal(signal.SIGUSR2)
            signal.raise_signal(signal.SIGUSR2)
            assert relay.relayed
            signal.signal(signal.SIGUSR1, relay.ignore)
        assert calls == [("submitit", signal.SIGUSR2), ("main", signal.SIGUSR1)]
        signal.raise_signal(signal.SIGUSR2)
        assert calls[2:] == [("submitit", signal.SIGUSR2)]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_trainer_goes_on_as_itself() -> None:
    trainer = Trainer(("--lr", "1e-3"), "jobs/%j", "code")
    delayed = trainer.checkpoint()
    assert delayed.function == trainer
    assert (delayed.args, delayed.kwargs) == ((), {})
