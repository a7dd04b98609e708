"""Stand-ins for the commands of a Slurm cluster with two machines: the same script under the name of each command.

`installed(folder, monkeypatch)` puts them on the path. States are files in `folder`, one for each job.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

COMMANDS = ("sbatch", "srun", "sacct", "scancel", "job")
MACHINES = 2


def installed(folder, monkeypatch):
    """Make the commands available to this process and its children."""
    (folder / "bin").mkdir(parents=True)
    for name in COMMANDS:
        command = folder / "bin" / name
        command.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN", str(folder))
    return folder


def states(folder):
    """The state of each job by its number."""
    return {p.stem: p.read_text().split()[0] for p in sorted(folder.glob("*.state"))}


def write(folder, job, state, pid=0):
    temporary = folder / f"{job}.{os.getpid()}"
    temporary.write_text(f"{state} {pid}")
    temporary.replace(folder / f"{job}.state")


def sbatch(folder, script):
    text = Path(script).read_text()
    if "partition=closed" in text:
        sys.exit("sbatch: error: invalid partition specified: closed")
    number = next(n for n in itertools.count(1) if not (folder / f"{n}.sh").exists())
    (folder / f"{number}.sh").write_text(text)
    array = re.search(r"#SBATCH --array='?0-(\d+)%(\d+)", text)
    jobs = [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [str(number)]
    for job in jobs:
        write(folder, job, "PENDING")
    print(f"Submitted batch job {number}", flush=True)
    if os.fork():
        return
    os.setsid()
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    running = []
    for job in jobs:
        while len(running) >= min(MACHINES, int(array[2]) if array else 1):
            running = [p for p in running if p.poll() is None]
            time.sleep(0.1)
        running.append(subprocess.Popen([folder / "bin" / "job", job], start_new_session=True))
    for process in running:
        process.wait()


def job(folder, name):
    """Run one job; not a command of Slurm."""
    if states(folder)[name] != "PENDING":
        return
    number, _, place = name.partition("_")
    given = {"SLURM_JOB_ID": number, "SLURM_PROCID": "0"}
    given |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": place} if place else {}
    process = subprocess.Popen(
        ["bash", str(folder / f"{number}.sh")], env={**os.environ, **given}, start_new_session=True
    )
    write(folder, name, "RUNNING", process.pid)
    code = process.wait()
    if states(folder)[name] == "RUNNING":
        write(folder, name, "FAILED" if code else "COMPLETED")


def srun(folder, *words):
    number, place = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_ARRAY_TASK_ID", "")
    filled = {"%A": number, "%a": place, "%j": number, "%t": "0"}
    for option, stream in (("--output", 1), ("--error", 2)):
        path = words[words.index(option) + 1]
        for pattern, value in filled.items():
            path = path.replace(pattern, value)
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    command = words[words.index("--error") + 2 :]
    os.execvp(command[0], command)


def sacct(folder, *words):
    print("JobID|State|NodeList")
    asked = {value for option, value in itertools.pairwise(words) if option == "-j"}
    for name, state in states(folder).items():
        if name.split("_")[0] in asked:
            print(f"{name}|{state}|machine")
    (folder / "asked").touch()


def scancel(folder, name):
    state, pid = (folder / f"{name}.state").read_text().split()
    write(folder, name, "CANCELLED")
    if state == "RUNNING":
        for number in (signal.SIGTERM, signal.SIGKILL):  # the second after a time for a checkpoint
            try:
                os.killpg(int(pid), number)
            except ProcessLookupError:
                return
            time.sleep(10)


if __name__ == "__main__":
    globals()[Path(sys.argv[0]).name](Path(os.environ["STAND_IN"]), *sys.argv[1:])
