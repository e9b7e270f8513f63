"""Whole jobs through submitit: on this machine, and by its way to Slurm, stopped by signals and
started again.

Slurm itself is not here: its programs are stood in for by scripts that note what they were asked,
submitit is real.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from storage.checkpoints import load_checkpoint
from tests import launches
from tests.image_folders import make_image_folder
from tests.runs import ROOT, SMALL, read_log, split

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGUSR2"), reason="this system has no SIGUSR2")

# Honours main.py's side of the bargain: takes SIGTERM and SIGUSR1 while it "trains", which its
# second start ends.
STUB = """
import json, os, signal, sys, time
from pathlib import Path

def main(argv):
    folder, rank = Path(argv[argv.index("--output-dir") + 1]), os.environ["RANK"]
    folder.mkdir(parents=True, exist_ok=True)
    seen = {name: os.environ.get(name) for name in NAMES}
    seen |= {"argv": argv, "torch": "torch" in sys.modules}
    asked, before = [], {}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before[number] = signal.signal(number, lambda number, frame: asked.append(number))
    with open(folder / f"starts{rank}", "a") as file:
        file.write(json.dumps(seen) + "\\n")
    again = len((folder / f"starts{rank}").read_text().splitlines()) > 1
    while not (again or asked or "--once" in argv):
        time.sleep(0.05)
    for number, handler in before.items():
        signal.signal(number, handler)
    if rank == "0":
        state = {"state": "preempted" if asked else "done", "pid": os.getpid()}
        (folder / "status.json").write_text(json.dumps(state))

NAMES = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"]
NAMES += ["OMP_NUM_THREADS"]
"""
# Instead of the project's, which imports torch.
STUB_ERRORS = """
def run_command(command):
    command()
    return 0

def show(text):
    print(text, flush=True)
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do case $1 in --unbuffered) shift ;; *) shift 2 ;; esac; done
for rank in 0 1; do
  SLURM_PROCID=$rank SLURM_NODEID=$rank SLURM_LOCALID=0 "$@" >>"$FAKE/said$rank" 2>&1 &
  echo $! >>"$FAKE/pids"
done
wait
"""


def wait_until(holds: Callable[[], Any], job: Job, timeout: float = 120) -> Any:
    """What `holds` finds at last, while a job lives."""
    begun = time.monotonic()
    while not (found := holds()):
        assert job.poll() is None, "the job has left"
        assert time.monotonic() - begun < timeout, "waited in vain"
        time.sleep(0.05)
    return found


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def stubbed(tmp_path: Path) -> Path:
    """A folder with our file and a main.py that only waits for signals."""
    shutil.copy(ROOT / "run_with_submitit.py", tmp_path)
    (tmp_path / "main.py").write_text(STUB)
    (tmp_path / "errors.py").write_text(STUB_ERRORS)
    return tmp_path


class Job(NamedTuple):
    """A command that was started, and where it says what."""

    process: launches.Forked | subprocess.Popen[bytes]
    said: Path

    def poll(self) -> int | None:
        return self.process.poll()


Start = Callable[..., Job]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a command, with `environment` added to ours; what is left of it is ended with the
    test. One of our file is forked from where torch is imported already."""
    started: list[Job] = []

    def begin(command: list[str], folder: Path = tmp_path, **environment: str) -> Job:
        clean = {
            name: value
            for name, value in os.environ.items()
            if name not in ("OMP_NUM_THREADS", "RANK")
        }
        clean.update(PYTHONPATH=str(ROOT), **environment)
        said = tmp_path / f"job{len(started)}.log"
        process: launches.Forked | subprocess.Popen[bytes]
        if command[0] == "run_with_submitit.py":
            process = launches.start(submit, command, folder, clean, said)
        else:
            with open(said, "wb") as stream:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=clean,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                )
        started.append(Job(process, said))
        return started[-1]

    yield begin
    for job in started:
        with suppress(ProcessLookupError):
            os.killpg(job.process.pid, signal.SIGKILL)
        job.process.wait()


def submit(command: list[str], folder: Path, environment: dict[str, str], said: Path) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    launches.say_into(said)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")  # as a command, which is pickled by value


def submission(*words: str | Path) -> list[str]:
    return ["run_with_submitit.py", *split(*words)]


def ending_of(job: Job) -> tuple[int, str]:
    code = job.process.wait(150)
    return code, job.said.read_text()


def pids_of(*marks: str) -> list[int]:
    """Processes whose command line has all of these words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(any(mark in word for word in command) for mark in marks):
            found.append(int(path.parent.name))
    return found


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/cmdline").exists(), reason="finds processes in /proc"
)


@pytest.mark.slow
@needs_proc
def test_a_local_job_is_started_again_after_submitits_signal(stubbed: Path, start: Start) -> None:
    job = start(submission("--local --ngpus 2 --timeout 5 --device cpu --job-dir", stubbed / "job"))
    wait_until(lambda: lines(stubbed / "job/starts0") and lines(stubbed / "job/starts1"), job)
    tasks = pids_of("submitit.core._submit", str(stubbed))
    assert len(tasks) == 2
    for task in tasks:
        os.kill(task, signal.SIGUSR2)
    code, said = ending_of(job)
    assert code == 0, said
    for rank in range(2):
        first, second = (json.loads(line) for line in lines(stubbed / f"job/starts{rank}"))
        assert first == second  # also the port
        assert first["argv"] == [
            "--device",
            "cpu",
            "--output-dir",
            str(stubbed / "job"),
            "--auto-resume",
        ]
        # torch reads it when it is imported, and nothing has imported it before it was set
        assert (first["OMP_NUM_THREADS"], first["torch"]) == ("1", False)
        assert [first[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == [
            str(rank),
            "2",
            str(rank),
        ]
    assert "Requeued job" in next((stubbed / "job/submitit").glob("*_0_log.out")).read_text()


@pytest.mark.slow
@needs_proc
def test_a_local_job_that_is_ended_saves_and_stays_ended(stubbed: Path, start: Start) -> None:
    job = start(submission("--local --ngpus 2 --timeout 5 --device cpu --job-dir", stubbed / "job"))
    wait_until(lambda: lines(stubbed / "job/starts0") and lines(stubbed / "job/starts1"), job)
    (controller,) = pids_of("submitit.local._local", str(stubbed))
    os.kill(controller, signal.SIGTERM)
    code, said = ending_of(job)
    assert code == 1
    assert "error: the job saved and stopped on a signal; the same command resumes it" in said
    assert [len(lines(stubbed / f"job/starts{rank}")) for rank in range(2)] == [1, 1]


@pytest.fixture
def slurm(stubbed: Path) -> dict[str, str]:
    """An environment with Slurm's programs: sbatch and scontrol note their words, srun starts two
    tasks."""
    programs = stubbed / "bin"
    programs.mkdir()
    notes = {
        "sbatch": 'cp "$1" "$FAKE/script"\necho "Submitted batch job 4711"',
        "scontrol": 'echo "$@" >>"$FAKE/asked"',
    }
    for name, text in {
        **{name: f"#!/bin/sh\n{text}\n" for name, text in notes.items()},
        "srun": SRUN,
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "FAKE": str(stubbed),
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "gpu[07-08]",
    }


@pytest.mark.slow
@pytest.mark.parametrize("preempted", [False, True])
def test_a_slurm_job_saves_and_goes_to_the_queue_again(
    stubbed: Path, slurm: dict[str, str], start: Start, preempted: bool
) -> None:
    """After SIGUSR2; or after SIGTERM, which requeues nothing by itself, and a SIGUSR2 that follows
    it."""
    words = (
        "--nodes 2 --ngpus 1 --partition gpu --comment hello --sbatch account=vision --mem-gb 100 "
        "--job-dir"
    )
    code, said = ending_of(start(submission(words, stubbed / "job%j"), **slurm))
    assert code == 0, said
    assert "job 4711" in said
    script, folder = (stubbed / "script").read_text(), stubbed / "job4711"
    wanted = (
        "nodes=2",
        "ntasks-per-node=1",
        "gpus-per-node=1",
        "cpus-per-task=10",
        "partition=gpu",
        "time=2800",
        "comment=hello",
        "account=vision",
        "mem=100GB",
        "signal=USR2@120",
        "open-mode=append",
    )
    assert all(f"#SBATCH --{line}\n" in script for line in wanted)

    job = start(["bash", "script"], **slurm)
    wait_until(lambda: lines(folder / "starts0") and lines(folder / "starts1"), job)
    tasks = [int(pid) for pid in lines(stubbed / "pids")]
    if preempted:
        for task in tasks:
            os.kill(task, signal.SIGTERM)
        wait_until(lambda: "saved; waiting 600 s for Slurm" in (stubbed / "said0").read_text(), job)
        assert not lines(stubbed / "asked")
    for task in tasks[:1] if preempted else tasks:
        os.kill(task, signal.SIGUSR2)
    assert ending_of(job)[0] == 0
    assert lines(stubbed / "asked") == ["requeue 4711"]
    assert json.loads((folder / "status.json").read_text())["state"] == "preempted"

    assert ending_of(start(["bash", "script"], **slurm))[0] == 0
    assert lines(stubbed / "asked") == ["requeue 4711"]
    assert json.loads((folder / "status.json").read_text())["state"] == "done"
    first, second = (json.loads(line) for line in lines(folder / "starts1"))
    assert first == second
    assert (first["RANK"], first["MASTER_ADDR"], first["MASTER_PORT"]) == ("1", "gpu07", "19711")
    assert first["argv"] == ["--num-workers", "10", "--output-dir", str(folder), "--auto-resume"]


@pytest.mark.slow
def test_what_main_could_not_do_fails_the_job_with_its_message(
    tmp_path: Path, start: Start
) -> None:
    words = f"{SMALL} --local --ngpus 1 --timeout 5 --resume {tmp_path}/nosuch.pth".split()
    words += ["--job-dir", f"{tmp_path}/job"]
    code, said = ending_of(start(["run_with_submitit.py", *words], ROOT))
    assert code == 1
    assert "error: the job failed" in said
    assert (
        f"{tmp_path}/nosuch.pth"
        in next((tmp_path / "job/submitit").glob("*_0_log.err")).read_text()
    )


@pytest.mark.slow
@needs_proc
def test_a_real_run_on_two_processes_is_stopped_started_again_and_finished(
    tmp_path: Path, start: Start
) -> None:
    photos = make_image_folder(tmp_path / "photos", per_class=64, size=(20, 20))
    words = split(
        f"--local --ngpus 2 --timeout 5 {SMALL} --batch-size 4 --epochs 3 --num-workers 1",
        "--data-path",
        photos,
        "--job-dir",
        tmp_path / "%j",
    )
    job = start(submission(*map(Path, words)), ROOT, OMP_NUM_THREADS="1")
    log = wait_until(lambda: [path for path in tmp_path.glob("*/log.txt") if lines(path)], job)[0]
    for task in pids_of("submitit.core._submit", str(tmp_path)):
        os.kill(task, signal.SIGUSR2)
    code, said = ending_of(job)
    assert code == 0, said
    assert f"job {log.parent.name}: output in {log.parent}" in said
    assert [line["epoch"] for line in read_log(log.parent)] == [0, 1, 2]
    assert json.loads((log.parent / "status.json").read_text())["state"] == "done"
    assert load_checkpoint(log.parent / "checkpoint.pth")["world_size"] == 2
    told = (log.parent / "train.log").read_text()
    assert "stopped at epoch" in told
    assert "resumed from" in told
