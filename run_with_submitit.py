"""Submits `main.py` to Slurm through submitit: one task per GPU, requeued when its time is up.

    python -m run_with_submitit --nodes 2 --ngpus 8 --timeout 2800 --job-dir jobs/%j \\
        --partition gpu --data-path /imagenet --model deit_base_patch16_224 --batch-size 64

Flags of this command and of main.py may be mixed in any order. The job's folder is the output
folder, and every start resumes the run in it. Slurm sends SIGUSR2 before the time limit: all ranks
save, then submitit requeues the job. On SIGTERM (preemption or scancel) all ranks save too, and
Slurm decides about the job. With --local the same job runs on this machine. The idea of such a
launcher is DeiT's and submitit's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from config import flags
from config.checks import check_args
from config.parser import Parser, explicit_flags
from config.value_checks import check_values
from errors import InputError, StopRun, run_command

FIRST_PORT, PORTS = 15000, 10000  # below the ports that Linux assigns by itself
SECONDS_TO_END = 600.0  # time for Slurm to end or requeue a job that has saved
MAX_REQUEUES = 30  # how often a job is requeued when its time is up
SIGNAL_VARIABLE = "SUBMITIT_PREEMPT_SIGNAL"  # submitit's variable for the name of its signal
MAIN_SIGNALS = ("TERM", "INT", "USR1", "HUP")  # main.py handles these itself


# ------------------------------------------------------------------------------------ within a task
# submitit pickles this part by value if the file is run as a command. It must not import torch or
# the project before the environment is set.


def task_environment(job: Any) -> dict[str, str]:
    """The variables that torchrun would set for this task of a job (`submitit.JobEnvironment`)."""
    local = job.num_tasks // job.num_nodes
    environment = {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(FIRST_PORT + int(re.sub(r"\D", "", job.job_id)) % PORTS),
    }
    if local > 1:
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return environment


class SignalRelay:
    """Passes submitit's signal to `main.py` as SIGUSR1, on which it saves and returns.

    Before and after training, submitit's own handler runs: rank 0 requeues the job at once.
    """

    def __init__(self, number: int) -> None:
        self.number, self.process, self.relayed = number, os.getpid(), False
        self.submitit_handler: Any = signal.getsignal(number)

    def __enter__(self) -> SignalRelay:
        # Without a handler, SIGUSR1 would kill the process.
        self.previous = signal.signal(signal.SIGUSR1, self.ignore)
        signal.signal(self.number, self.on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(self.number, self.submitit_handler)
        signal.signal(signal.SIGUSR1, self.previous)

    def ignore(self, number: int, frame: FrameType | None) -> None:
        pass

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a loader worker, forked with this handler: the training process decides
        handler: Any = signal.getsignal(signal.SIGUSR1)
        if handler == self.ignore:
            self.submitit_handler(number, frame)
        elif not self.relayed:
            self.relayed = True
            handler(signal.SIGUSR1, frame)


@dataclass(frozen=True)
class Trainer:
    """The function that each task runs.

    Args:
        arguments: the arguments of main.py, without the output folder.
        job_dir: the output folder; %j is replaced by the number of the job.
        code: the folder of main.py.
    """

    arguments: tuple[str, ...]
    job_dir: str
    code: str

    def command(self, folder: str) -> list[str]:
        return [*self.arguments, "--output-dir", folder, "--auto-resume"]

    def __call__(self) -> str:
        """Trains.

        Returns:
            On rank 0 the last state of the run: `done`, or `preempted` if it is not requeued.
        """
        import submitit

        job = submitit.JobEnvironment()
        os.environ.update(task_environment(job))
        sys.path.insert(0, self.code)
        # Imported after the environment is set: torch reads OMP_NUM_THREADS on import.
        from errors import run_command, show
        from main import main as train

        folder = self.job_dir.replace("%j", job.job_id)
        before = _status(folder)
        with SignalRelay(getattr(signal, f"SIG{job.USR_SIG}")) as relay:
            code = run_command(partial(train, self.command(folder)))
        if code:
            raise RuntimeError(f"main.py exited with code {code}, see above and in {folder}")
        status = _status(folder)
        if job.global_rank or status == before or json.loads(status)["state"] != "preempted":
            return "done"
        if relay.relayed:
            # submitit calls `checkpoint`, requeues the job and exits.
            signal.raise_signal(relay.number)
        elif job.cluster == "slurm":
            wait = f"{SECONDS_TO_END:g} s"
            show(f"saved; waiting {wait} for Slurm to end or requeue this job")
            time.sleep(SECONDS_TO_END)
        return "preempted"

    def checkpoint(self) -> Any:
        """What the job runs after it was requeued; submitit calls this."""
        import submitit

        return submitit.helpers.DelayedSubmission(self)


def _status(folder: str) -> str:
    path = Path(folder) / "status.json"
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


# -------------------------------------------------------------------------------------- the command


def get_args_parser() -> Parser:
    parser = Parser("submission of main.py; all other flags are main.py's", allow_abbrev=False)
    parser.add_argument(
        "--job-dir", "--job_dir", required=True, help="output folder; %%j: the job's number"
    )
    parser.add_argument("--nodes", default=1, type=int)
    parser.add_argument("--ngpus", default=8, type=int, help="GPUs, and processes, on each node")
    parser.add_argument(
        "--timeout", default=2800, type=int, help="minutes until the job is requeued"
    )
    parser.add_argument(
        "--signal-delay",
        default=120,
        type=int,
        help="seconds before --timeout at which the job saves: time for a step and 2 saves",
    )
    parser.add_argument(
        "--cpus-per-task", default=10, type=int, help="cores for each process and its loader"
    )
    parser.add_argument("--mem-gb", type=int, help="memory of each node; default: the cluster's")
    parser.add_argument("--partition", help="default: the cluster's")
    parser.add_argument("--comment", help="for the scheduler, where jobs of some kinds need one")
    parser.add_argument(
        "--sbatch",
        default=[],
        action="append",
        metavar="NAME=VALUE",
        help="any other option of sbatch",
    )
    parser.add_argument(
        "--local",
        action="store_true",
        help="run on this machine, without Slurm, and wait for the end",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be submitted")
    return parser


def read_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The flags of this command, and the arguments of main.py.

    Both are checked here, because the job may start hours later.

    Raises:
        InputError: a flag is invalid; the message names it and the fix.
    """
    launch_parser = get_args_parser()
    launch, arguments = launch_parser.parse_known_args(argv)
    launch_parser.check_kinds(launch)
    parser = flags.get_args_parser()
    given = explicit_flags(parser, arguments)
    if "output_dir" in given:
        raise InputError("--output-dir: the job's folder is the output folder; use --job-dir only")
    check_args(parser.parse_args([*arguments, "--output-dir", launch.job_dir]))
    counts = ("nodes", "ngpus", "timeout", "cpus_per_task", "mem_gb", "signal_delay")
    check_values(vars(launch), positive=counts)
    for pair in launch.sbatch:
        if not re.fullmatch(r"[\w-]+=.+", pair):
            raise InputError(f"--sbatch {pair}: must be NAME=VALUE, such as account=vision")
    if launch.local and launch.nodes > 1:
        raise InputError(
            f"--nodes {launch.nodes}: --local runs on this machine only; use --nodes 1"
        )
    if (name := os.environ.get(SIGNAL_VARIABLE, "USR2")) in MAIN_SIGNALS:
        raise InputError(f"{SIGNAL_VARIABLE}={name}: main.py handles this signal itself; use USR2")
    launch.gpus = given.get("device") != "cpu"
    # On Slurm a task has the cores of --cpus-per-task for itself.
    if "num_workers" not in given and not launch.local:
        arguments += ["--num-workers", str(min(10, launch.cpus_per_task))]
    return launch, arguments


def job_parameters(launch: argparse.Namespace) -> dict[str, Any]:
    """Keywords of submitit's `update_parameters`; with `None` the cluster's default holds."""
    return {
        "name": "smmix",
        "nodes": launch.nodes,
        "tasks_per_node": launch.ngpus,
        "gpus_per_node": launch.ngpus if launch.gpus else None,
        "cpus_per_task": launch.cpus_per_task,
        "mem_gb": launch.mem_gb,
        "timeout_min": launch.timeout,
        "slurm_partition": launch.partition,
        "slurm_comment": launch.comment,
        "slurm_signal_delay_s": launch.signal_delay,
        "slurm_additional_parameters": dict(pair.split("=", 1) for pair in launch.sbatch) or None,
    }


def make_executor(cluster: str, logs: Path, parameters: dict[str, Any]) -> Any:
    """submitit's executor with its parameters.

    Raises:
        InputError: submitit is not installed, or this machine has no Slurm.
    """
    try:
        import submitit
    except ImportError as error:
        raise InputError(
            "submitit is not installed: pip install -r requirements-slurm.txt"
        ) from error
    try:
        executor = submitit.AutoExecutor(
            logs, cluster, slurm_max_num_timeout=MAX_REQUEUES, local_max_num_timeout=MAX_REQUEUES
        )
    except RuntimeError as error:
        raise InputError(
            f"{error} Run this command on a machine of the cluster, or add --local"
        ) from error
    executor.update_parameters(**parameters)
    return executor


def main(argv: Sequence[str] | None = None) -> None:
    """Submits one job; with `--local`, waits until it has ended."""
    launch, arguments = read_args(argv)
    job_dir = Path(launch.job_dir).expanduser().absolute()
    cluster, parameters = "local" if launch.local else "slurm", job_parameters(launch)
    # The logs must be in a folder without %j: it is made before the job has a number.
    outer = (path.parent for path in reversed([job_dir, *job_dir.parents]) if "%j" in path.name)
    logs = next(outer, job_dir) / "submitit"
    trainer = Trainer(tuple(arguments), str(job_dir), str(Path(__file__).resolve().parent))
    if launch.dry_run:
        for name, value in {"cluster": cluster, "folder": logs, **parameters}.items():
            if value is not None:
                print(f"{name} = {value}")
        print(f"{launch.nodes} x {launch.ngpus} processes, each with the environment of torchrun:")
        print(shlex.join(["python", "main.py", *trainer.command(trainer.job_dir)]))
        return
    job = make_executor(cluster, logs, parameters).submit(trainer)
    output = trainer.job_dir.replace("%j", job.job_id)
    messages = f"messages of rank 0 in {job.paths.stdout}"
    print(f"job {job.job_id}: output in {output}, {messages}", flush=True)
    if launch.local:
        wait_for(job)


def wait_for(job: Any) -> None:
    """Waits until a job on this machine has ended.

    Raises:
        StopRun: the job failed, or was stopped by a signal.
    """
    from submitit.core.utils import UncompletedJobError

    try:
        state = job.results()[0]
    except UncompletedJobError as error:
        raise StopRun(f"the job failed: {error}") from error
    if state != "done":
        raise StopRun("the job saved and stopped on a signal; the same command resumes it")


if __name__ == "__main__":
    raise SystemExit(run_command(main))
