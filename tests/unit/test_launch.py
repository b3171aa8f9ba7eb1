"""Where a run is trained: on one node, on several, with fewer than it began with.

Nodes are processes of this machine: `srun` is a script that starts the torchruns it is asked for
side by side, and everything below it is real. The scheduler's own is in tests/slurm.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import given, metrics

from olmo.cluster.launch import (
    Geometry,
    build_command,
    launch,
    request_stop_on_signal,
    requeue_slurm_job,
)
from olmo.io import sealed
from olmo.pipeline.recipe import RunConfig
from olmo.runtime.process import PAUSED_FILE, SEGMENTS_FILE, Paused
from olmo.train.segments import read_segments, training_conditions

SRUN = """#!/bin/sh
# As srun, for as many tasks as --ntasks says: each beside the others, the first failure's status.
while case "$1" in --ntasks=*) n=${1#*=};; --*) ;; *) false;; esac; do shift; done
i=0; pids=; status=0
while [ $i -lt $n ]; do SLURM_NODEID=$i "$@" & pids="$pids $!"; i=$((i + 1)); done
echo "$pids" >"$(dirname "$0")/tasks"
for pid in $pids; do wait $pid || status=$?; done
exit $status
"""
SCONTROL = """#!/bin/sh
case "$*" in
  "show hostnames n[1-2]") echo n1; echo n2;;
  "show hostnames n[1-3]") echo n1; echo n2; echo n3;;
  "show hostnames n1") echo n1;;
  "--oneliner show node n1,n2"*)  # in an order of its own
    echo "NodeName=n2 Arch=x86_64 NodeAddr=127.0.0.2 NodeHostName=n2"
    echo "NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=n1";;
  "--oneliner show node n1") echo "NodeName=n1 Arch=x86_64 NodeAddr=127.0.0.1 NodeHostName=n1";;
  "--oneliner show job "*) echo "JobId=1 ReqNodeList=(null) NodeList=n[1-2] CPUs/Task=3 Gres=";;
  *) echo "slurm_load: $*" >&2; exit 1;;
esac
"""


@pytest.fixture
def allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the stand-ins, first on PATH, and an allocation of two nodes."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", str(os.getpid()))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-2]")
    return folder


def prologue(words: list[str]) -> list[str]:
    """What stands in front of torchrun on each node."""
    start = words.index(sys.executable)
    assert words[start + 1 : start + 3] == ["-m", "olmo.cluster.node"]
    return words[start : start + 4]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_torchrun_lives_through_what_a_scheduler_sends_to_every_process(
    number: signal.Signals,
) -> None:
    """Ours heed it and save; torchrun would die of SIGUSR1, and at SIGTERM give them 30 seconds."""
    words = build_command(Geometry(2), Path("run/given.yaml"))
    heard = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"]
    deaf = signal.signal(number, signal.SIG_DFL)  # a child begins with what we have
    try:
        assert subprocess.run(heard).returncode == -number
        assert subprocess.run([*prologue(words), *heard]).returncode == 0
    finally:
        signal.signal(number, deaf)
    assert "SIGTERM" not in words[words.index("--signals-to-handle") + 1]


def test_a_node_that_cannot_be_reached_is_told_at_once() -> None:
    node = [sys.executable, "-m", "olmo.cluster.node", "127.0.0.1,no-such-node.invalid", "true"]
    environment = os.environ | {"SLURM_NODEID": "0"}
    said = subprocess.run(node, env=environment, capture_output=True, text=True)
    assert said.returncode == 1
    assert "expected a route to the node no-such-node.invalid, found none" in said.stderr
    assert "Traceback" not in said.stderr


def test_one_node_needs_no_scheduler() -> None:
    assert build_command(Geometry(), Path("run/given.yaml"))[-2:] == ["", sys.executable]
    words = build_command(Geometry(processes=2, max_restarts=1), Path("run/given.yaml"))
    assert "srun" not in words and "--standalone" in words
    assert words[words.index("--nproc-per-node") + 1] == "2"
    assert words[words.index("--max-restarts") + 1] == "1"


@pytest.mark.slow
def test_a_machine_whose_own_name_nobody_knows_trains(tmp_path: Path) -> None:
    named = ["unshare", "--uts", "sh", "-c", 'hostname nobody-knows-me; exec "$@"', "sh"]
    if subprocess.run([*named, "true"], stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this process may not give its machine another name")
    (tmp_path / "meet.py").write_text("import os; print('rank', os.environ['RANK'])")
    words = [*named, *build_command(Geometry(max_restarts=1), tmp_path), tmp_path / "meet.py"]
    said = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert said.stdout == "rank 0\n", said.stderr


def test_many_nodes_are_srun_and_torchrun(allocation: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    words = build_command(Geometry(processes=4, nodes=2), Path("run/given.yaml"))
    assert words[:4] == ["srun", "--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert {"--overlap", "--cpus-per-task=3", "--kill-on-bad-exit=1", "--nnodes=2"} <= set(words)
    (endpoint,) = [w for w in words if w.startswith("--rdzv-endpoint=")]
    assert endpoint.startswith("--rdzv-endpoint=127.0.0.1:"), "the address, not the name"
    (meeting,) = [w for w in words if w.startswith("--rdzv-id=")]
    other = build_command(Geometry(processes=4, nodes=2), Path("another/given.yaml"))
    assert endpoint not in other and meeting not in other, "two runs in one job meet apart"
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert meeting not in build_command(Geometry(processes=4, nodes=2), Path("run/given.yaml"))


@pytest.mark.slow
def test_the_first_node_holds_the_rendezvous(allocation: Path) -> None:
    words = build_command(Geometry(nodes=2), Path("run/given.yaml"))
    given = words[words.index("olmo.cluster.torchrun") + 1 :]
    asks = (
        "import sys; from torch.distributed.run import config_from_args, parse_args; "
        "config = config_from_args(parse_args(sys.argv[1:]))[0].rdzv_configs; "
        "print(config['is_host'], config['join_timeout'])"
    )
    for node in ("0", "1"):
        command = [*prologue(words), sys.executable, "-c", asks, *given, "-m", "olmo.train"]
        environment = os.environ | {"SLURM_NODEID": node}
        said = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert said.stdout.split() == ["01"[node == "0"], "600"], said.stderr


MEET = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
number = torch.ones(1)
dist.all_reduce(number)
print("sum", number.item(), os.environ["GLOO_SOCKET_IFNAME"])
dist.destroy_process_group()  # a process that ends with gloo's threads running may abort
"""


@pytest.fixture
def two_machines() -> Iterator[list[list[str]]]:
    """Commands that run another one on a machine. The two share a network; each has a name that
    only itself knows, as 127.0.1.1, which is how Debian writes it."""
    names = [f"olmo{os.getpid()}{letter}" for letter in "ab"]
    ip = ["ip", "-netns"]
    try:
        for name in names:
            if not shutil.which("ip") or subprocess.run(["ip", "netns", "add", name]).returncode:
                pytest.skip("this process may not make networks; ip (iproute2), as root, does")
        far = ["peer", "wire", "netns", names[1]]
        command = [*ip, names[0], "link", "add", "wire", "type", "veth", *far]
        subprocess.run(command, check=True)
        for number, name in enumerate(names, 1):
            address = f"10.9.8.{number}/24"
            subprocess.run([*ip, name, "addr", "add", address, "dev", "wire"], check=True)
            for interface in ("wire", "lo"):
                subprocess.run([*ip, name, "link", "set", interface, "up"], check=True)
            etc = Path("/etc/netns", name)  # what `ip netns exec` puts over /etc
            etc.mkdir(parents=True)
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0"; exec "$@"']
        yield [["ip", "netns", "exec", name, *named, name] for name in names]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], stderr=subprocess.DEVNULL)
            shutil.rmtree(Path("/etc/netns", name), ignore_errors=True)


@pytest.mark.slow
def test_machines_that_know_each_other_by_address_only_meet(
    tmp_path: Path, allocation: Path, two_machines: list[list[str]]
) -> None:
    scontrol = (allocation / "scontrol").read_text().replace("127.0.0.", "10.9.8.")
    (allocation / "scontrol").write_text(scontrol)
    (tmp_path / "meet.py").write_text(MEET)
    words = build_command(Geometry(nodes=2), tmp_path / "given.yaml")
    words = [*words[words.index(sys.executable) :], str(tmp_path / "meet.py")]
    logs = [tmp_path / f"node{number}.log" for number in range(2)]
    nodes = [
        subprocess.Popen(
            [*machine, *words],
            env=os.environ | {"SLURM_NODEID": str(number)},
            stdout=subprocess.PIPE,
            stderr=logs[number].open("w"),
            text=True,
        )
        for number, machine in enumerate(two_machines)
    ]
    try:
        said = [node.communicate(timeout=300)[0] for node in nodes]
    except subprocess.TimeoutExpired as late:
        raise AssertionError([log.read_text() for log in logs]) from late
    finally:
        for node in nodes:
            node.kill()
    assert said == ["sum 2.0 wire\n"] * 2, [log.read_text() for log in logs]


def test_of_a_larger_allocation_as_many_as_asked_for(allocation: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    words = build_command(Geometry(nodes=2), Path("run/given.yaml"))
    assert {"--nodes=2", "--ntasks=2", "--nnodes=2"} <= set(words)


def test_a_job_that_knows_only_its_number_asks(allocation: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    words = build_command(Geometry(nodes=2), Path("run/given.yaml"))
    assert {"--nodes=2", "--cpus-per-task=3"} <= set(words)


def test_elastic(allocation: Path, monkeypatch: Any) -> None:
    geometry = Geometry(nodes=4, min_nodes=1, max_restarts=3)
    words = build_command(geometry, Path("run/given.yaml"))
    assert {"--nodes=2", "--nnodes=1:2", "--no-kill", "--kill-on-bad-exit=0"} <= set(words)
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n1")
    words = build_command(geometry, Path("run/given.yaml"))
    assert "srun" not in words and "--standalone" in words, "one node is left"


def test_no_number_of_nodes_that_a_batch_cannot_be_shared_by(
    allocation: Path, monkeypatch: Any
) -> None:
    nodes = "echo n1; echo n2; echo n3; echo n4"
    (allocation / "scontrol").write_text(SCONTROL.replace("echo n1; echo n2; echo n3", nodes))
    monkeypatch.setenv("SLURM_JOB_NODELIST", "n[1-3]")
    geometry = Geometry(processes=8, nodes=4, min_nodes=2, batch=64)
    words = build_command(geometry, Path("run/given.yaml"))
    assert {"--nodes=4", "--nnodes=4", "--kill-on-bad-exit=1"} <= set(words), "3 would not do"
    words = build_command(Geometry(8, nodes=4, min_nodes=2, batch=192), Path("run/given.yaml"))
    assert {"--nodes=4", "--nnodes=2:4"} <= set(words)
    (allocation / "scontrol").write_text(SCONTROL)
    words = build_command(geometry, Path("run/given.yaml"))
    assert {"--nodes=2", "--nnodes=2"} <= set(words), "of three that are left, two"


@pytest.mark.parametrize(
    "nodes, said",
    [
        (None, r"nodes: 2 needs a SLURM allocation.*profiles/slurm.*salloc --nodes=2.*nodes: 1"),
        ("n1", r"nodes: 2 needs at least 2 nodes, and the allocation \d+ has 1: n1.*nodes: 1"),
        ("x", r"scontrol show hostnames x failed: slurm_load: show hostnames x"),
    ],
)
def test_too_few_nodes(allocation: Path, monkeypatch: Any, nodes: str | None, said: str) -> None:
    monkeypatch.delenv("SLURM_JOB_NODELIST")
    monkeypatch.delenv("SLURM_JOB_ID")
    if nodes:
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NODELIST", nodes)
    with pytest.raises(ValueError, match=said):
        build_command(Geometry(nodes=2), Path("run/given.yaml"))


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"processes": 2, "gpus_per_node": 4}, "processes: expected one per GPU"),
        ({"nodes": 2, "min_nodes": 3}, r"min_nodes: expected at most nodes \(2\), found 3"),
        ({"nodes": 0}, "nodes: expected at least 1, found 0"),
    ],
)
def test_a_geometry_that_cannot_be(settings: dict[str, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RunConfig.new(train="x.yaml", **settings)
    assert RunConfig.new(train="x.yaml", gpus_per_node=4).geometry.processes == 4


def test_conditions_of_a_run_that_was_taken_up() -> None:
    one = {"after": 0, "processes": 1, "device": "cpu", "threads": 1, "torch": "2", "host": "a"}
    again = one | {"after": 8, "host": "b", "restart": 1}
    assert training_conditions([one, again]) == training_conditions([one])
    assert training_conditions([one]) == {
        "processes": 1,
        "device": "cpu",
        "threads": 1,
        "torch": "2",
    }
    two = again | {"processes": 2}
    changed = training_conditions([one, two])
    assert changed["processes"] == 2 and changed["after"] == 8
    assert changed["earlier"] == [training_conditions([one]) | {"after": 0}]
    assert training_conditions([one, two | {"after": 9}]) != changed, "another step, other bits"


@pytest.mark.slow
def test_two_nodes_compute_what_two_processes_do(tmp_path: Path, allocation: Path) -> None:
    files = []
    for name, geometry in (("here", Geometry(2)), ("nodes", Geometry(nodes=2))):
        config = given(tmp_path, save_folder=str(tmp_path / name))
        launch(config, geometry, threads=1)
        files.append([(config.parent / f"latest/{n}.pt").read_bytes() for n in ("model", "optim")])
        (segment,) = read_segments(config.parent)
        assert segment["processes"] == 2 and segment["hosts"] == geometry.nodes
    assert files[0] == files[1]


def test_a_second_signal_ends_it_at_once(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with request_stop_on_signal(tmp_path / "stop"):
        signal.raise_signal(signal.SIGUSR1)
        assert (tmp_path / "stop").read_text() == "SIGUSR1\n"
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
    assert ended.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.slow
def test_a_node_that_was_lost_fails_no_run_that_came_to_its_end(
    tmp_path: Path, allocation: Path
) -> None:
    """At the end srun tells of it by its status; with min_nodes that was allowed for."""
    (allocation / "srun").write_text(SRUN.replace("exit $status", "exit 137"))
    config = given(tmp_path, max_duration=2, evaluators=[])
    with pytest.raises(ChildProcessError, match="training ended early"):
        launch(config, Geometry(nodes=2), threads=1)
    launch(config, Geometry(nodes=2, min_nodes=1), threads=1)
    assert metrics(config.parent)[-1]["step"] == 2


@pytest.mark.parametrize(
    "why, after, asked",
    [
        ("SIGUSR1", 0, True),
        ("SIGTERM", 0, False),  # it was cancelled
        ("the time limit", 0, False),  # its own, not the scheduler's
        ("SIGUSR1", 5, False),  # it has made no step
    ],
)
def test_before_its_time_is_up_a_job_waits_again(
    tmp_path: Path, allocation: Path, monkeypatch: Any, why: str, after: int, asked: bool
) -> None:
    (allocation / "scontrol").write_text(f'#!/bin/sh\necho "$@" >{tmp_path / "asked"}\n')
    left = {"step": 5, "by": why, "checkpoint": f"{tmp_path}/step5"}
    (tmp_path / SEGMENTS_FILE).write_text(sealed.dump_lines([{"after": 0}, {"after": after}]))
    requeue_slurm_job(tmp_path, left)
    job = os.environ["SLURM_JOB_ID"]
    said = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert said == f"requeue {job}\n" * asked
    monkeypatch.delenv("SLURM_JOB_ID")
    (tmp_path / "asked").unlink(missing_ok=True)
    requeue_slurm_job(tmp_path, left)
    assert not (tmp_path / "asked").exists(), "no job, no queue"


def test_a_job_that_is_back_at_once_takes_no_words_from_the_one_before(
    tmp_path: Path, allocation: Path, monkeypatch: Any
) -> None:
    """Put back, it may start on another node, and remove the marker, before we have said why."""
    (allocation / "scontrol").write_text(f"#!/bin/sh\nrm {tmp_path / PAUSED_FILE}\n")
    left = sealed.dumps({"step": 5, "by": "SIGUSR1", "checkpoint": "step5"})
    (tmp_path / SEGMENTS_FILE).write_text(sealed.dump_lines([{"after": 0}]))
    paused = ["sh", "-c", f"printf %s '{left}' >{tmp_path / PAUSED_FILE}; exit 75"]
    monkeypatch.setattr("olmo.cluster.launch.build_command", lambda *_: paused)
    with pytest.raises(Paused, match="at step 5 by SIGUSR1, saved to step5"):
        launch(tmp_path / "given.yaml", Geometry(), threads=1)
    assert not (tmp_path / PAUSED_FILE).exists(), "it was asked to put the job back"


def test_a_cluster_that_puts_no_job_back(tmp_path: Path, allocation: Path, capsys: Any) -> None:
    (tmp_path / SEGMENTS_FILE).write_text(sealed.dump_lines([{"after": 0}]))
    requeue_slurm_job(tmp_path, {"step": 5, "by": "SIGUSR1", "checkpoint": "step5"})
    assert "requeue" in capsys.readouterr().err
