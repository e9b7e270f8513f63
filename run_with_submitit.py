"""Submits `main.py` to Slurm through submitit: one task for each GPU, sent to the queue again when
its time is up.

    python -m run_with_submitit --nodes 2 --ngpus 8 --timeout 2800 --job-dir jobs/%j \\
        --partition gpu --data-path /imagenet --model deit_base_patch16_224 --batch-size 64

Its own flags may stand anywhere among those of main.py. The job's folder is the output folder, and
every start goes on with what is there. SIGUSR2, which Slurm sends before the time limit, makes all
ranks save; then submitit sends the job to the queue again. SIGTERM (preemption, or scancel) makes
them save too, and what becomes of the job is left to Slurm. With --local the same runs on this
machine. The idea of such a launcher is DeiT's and submitit's.
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

import utils
from config import flags
from config.checks import check_args
from config.parser import Parser, explicit_flags
from config.value_checks import check_values

PORTS = 15000, 10000  # the first, and how many: below those that Linux gives out by itself
GRACE = 600.0  # seconds in which Slurm may end or requeue a job that was asked to stop
TIMEOUTS = 30  # how often a job whose time is up is sent to the queue again
SIGNAL = "SUBMITIT_PREEMPT_SIGNAL"  # submitit's own variable
TAKEN = ("TERM", "INT", "USR1", "HUP")  # by main.py


# ------------------------------------------------------------------------------------ within a task
# submitit pickles this part by value when the file is run as a command: nothing here may lead to
# torch or the project before the environment is set.


def task_environment(job: Any) -> dict[str, str]:
    """What torchrun would set for this task of a job (`submitit.JobEnvironment`)."""
    first, count = PORTS
    local = job.num_tasks // job.num_nodes
    environment = {
        "RANK": str(job.global_rank),
        "WORLD_SIZE": str(job.num_tasks),
        "LOCAL_RANK": str(job.local_rank),
        "LOCAL_WORLD_SIZE": str(local),
        "MASTER_ADDR": job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1",
        "MASTER_PORT": str(first + int(re.sub(r"\D", "", job.job_id)) % count),
    }
    if local > 1:
        environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")
    return environment


class Relay:
    """While `main.py` listens to signals, submitit's means the same as SIGUSR1: save, and return.

    Before and after that it is submitit's: rank 0 sends the job to the queue again at once.
    """

    def __init__(self, number: int) -> None:
        self.number, self.process, self.told = number, os.getpid(), False
        self.submitits: Any = signal.getsignal(number)

    def __enter__(self) -> Relay:
        self.previous = signal.signal(
            signal.SIGUSR1, self.ignore
        )  # without main.py's handler it would kill
        signal.signal(self.number, self.on_signal)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(self.number, self.submitits)
        signal.signal(signal.SIGUSR1, self.previous)

    def ignore(self, number: int, frame: FrameType | None) -> None:
        pass

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            return  # a worker of a loader, forked with this handler: its trainer decides
        listening: Any = signal.getsignal(signal.SIGUSR1)
        if listening == self.ignore:
            self.submitits(number, frame)
        elif not self.told:
            self.told = True
            listening(signal.SIGUSR1, frame)


@dataclass(frozen=True)
class Trainer:
    """What each task calls.

    Args:
        arguments: of main.py, without the output folder.
        job_dir: the output folder; %j stands for the job's number.
        code: the folder of main.py.
    """

    arguments: tuple[str, ...]
    job_dir: str
    code: str

    def command(self, folder: str) -> list[str]:
        return [*self.arguments, "--output-dir", folder, "--auto-resume"]

    def __call__(self) -> str:
        """Returns the run's last state, on rank 0: `done`, or `preempted` where nobody sends it to
        the queue again."""
        import submitit

        job = submitit.JobEnvironment()
        os.environ.update(task_environment(job))
        sys.path.insert(0, self.code)
        from main import main as train  # only now: torch reads OMP_NUM_THREADS when it is imported
        from utils import run_command

        folder = self.job_dir.replace("%j", job.job_id)
        before = _status(folder)
        with Relay(getattr(signal, f"SIG{job.USR_SIG}")) as relay:
            code = run_command(partial(train, self.command(folder)))
        if code:
            raise RuntimeError(f"main.py left with code {code}, see above and in {folder}")
        status = _status(folder)
        if job.global_rank or status == before or json.loads(status)["state"] != "preempted":
            return "done"
        if relay.told:
            signal.raise_signal(
                relay.number
            )  # submitit calls `checkpoint`, requeues the job and leaves
        elif job.cluster == "slurm":
            print(
                f"saved; Slurm has {GRACE:g} s to end this job or to send it to the queue again",
                flush=True,
            )
            time.sleep(GRACE)
        return "preempted"

    def checkpoint(self) -> Any:
        """Called by submitit: what runs when the job starts again."""
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
        "--timeout", default=2800, type=int, help="minutes until the job is sent to the queue again"
    )
    parser.add_argument(
        "--signal-delay",
        default=120,
        type=int,
        help="seconds for saving before that: a step and 2 saves",
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
    """Our own flags, and the arguments of main.py; both checked here, not when the job starts hours
    later.

    Raises:
        InputError: names the flag and the fix.
    """
    own = get_args_parser()
    launch, arguments = own.parse_known_args(argv)
    own.check_kinds(launch)
    parser = flags.get_args_parser()
    given = explicit_flags(parser, arguments)
    if "output_dir" in given:
        raise utils.InputError(
            "--output-dir: the job's folder is the output folder; use --job-dir alone"
        )
    check_args(parser.parse_args([*arguments, "--output-dir", launch.job_dir]))
    counts = ("nodes", "ngpus", "timeout", "cpus_per_task", "mem_gb", "signal_delay")
    check_values(vars(launch), positive=counts)
    for pair in launch.sbatch:
        if not re.fullmatch(r"[\w-]+=.+", pair):
            raise utils.InputError(f"--sbatch {pair}: must be NAME=VALUE, such as account=vision")
    if launch.local and launch.nodes > 1:
        raise utils.InputError(
            f"--nodes {launch.nodes}: --local runs on this machine alone; use --nodes 1"
        )
    if (name := os.environ.get(SIGNAL, "USR2")) in TAKEN:
        raise utils.InputError(
            f"{SIGNAL}={name}: main.py gives this signal a meaning of its own; use USR2"
        )
    launch.gpus = given.get("device") != "cpu"
    if (
        "num_workers" not in given and not launch.local
    ):  # the cores that a task may use are its own here
        arguments += ["--num-workers", str(min(10, launch.cpus_per_task))]
    return launch, arguments


def job_parameters(launch: argparse.Namespace) -> dict[str, Any]:
    """Keywords of submitit's `update_parameters`; what is `None` is left to the cluster."""
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
    """submitit's executor, ready to submit.

    Raises:
        InputError: submitit is not installed, or Slurm is not here.
    """
    try:
        import submitit
    except ImportError as error:
        raise utils.InputError(
            "submitit is not installed: pip install -r requirements-slurm.txt"
        ) from error
    try:
        executor = submitit.AutoExecutor(
            logs, cluster, slurm_max_num_timeout=TIMEOUTS, local_max_num_timeout=TIMEOUTS
        )
    except RuntimeError as error:
        raise utils.InputError(
            f"{error} Start this on a machine of the cluster, or add --local"
        ) from error
    executor.update_parameters(**parameters)
    return executor


def main(argv: Sequence[str] | None = None) -> None:
    """Submits one job; with `--local`, waits until it has ended."""
    launch, arguments = read_args(argv)
    job_dir = Path(launch.job_dir).expanduser().absolute()
    cluster, parameters = "local" if launch.local else "slurm", job_parameters(launch)
    logs = (
        next(
            (part.parent for part in reversed([job_dir, *job_dir.parents]) if "%j" in part.name),
            job_dir,
        )
        / "submitit"
    )
    trainer = Trainer(tuple(arguments), str(job_dir), str(Path(__file__).resolve().parent))
    if launch.dry_run:
        for name, value in {"cluster": cluster, "folder": logs, **parameters}.items():
            if value is not None:
                print(f"{name} = {value}")
        print(f"{launch.nodes} x {launch.ngpus} processes, each like one of torchrun's:")
        print(shlex.join(["python", "main.py", *trainer.command(trainer.job_dir)]))
        return
    job = make_executor(cluster, logs, parameters).submit(trainer)
    said = job.paths.stdout
    print(
        f"job {job.job_id}: output in {trainer.job_dir.replace('%j', job.job_id)}, messages of "
        f"rank 0 in {said}",
        flush=True,
    )
    if launch.local:
        wait_for(job)


def wait_for(job: Any) -> None:
    """Until a job on this machine has ended.

    Raises:
        StopRun: it failed, or was asked to stop.
    """
    from submitit.core.utils import UncompletedJobError

    try:
        state = job.results()[0]
    except UncompletedJobError as error:
        raise utils.StopRun(f"the job failed: {error}") from error
    if state != "done":
        raise utils.StopRun(
            "the job was asked to stop and has saved; the same command goes on with it"
        )


if __name__ == "__main__":
    raise SystemExit(utils.run_command(main))
