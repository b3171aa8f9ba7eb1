"""A folder that several machines see through a network file system, each with a client of its own.

GlusterFS, from Debian's glusterfs-server: one server on this machine, without the daemon that
manages many. A machine is a name and a mount of its own here, so it has its own memory of names
and attributes, and finds what others wrote when its client does.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SERVER = """\
volume posix
  type storage/posix
  option directory {brick}
end-volume
volume locks
  type features/locks
  subvolumes posix
end-volume
volume brick
  type performance/io-threads
  subvolumes locks
end-volume
volume server
  type protocol/server
  option transport-type tcp
  option transport.socket.bind-address 127.0.0.1
  option transport.socket.listen-port {port}
  option auth.addr.brick.allow 127.0.0.1
  subvolumes brick
end-volume
"""
# What gluster's own daemon writes for a client, but for what has to do with many servers.
CLIENT = """\
volume remote
  type protocol/client
  option transport-type tcp
  option remote-host 127.0.0.1
  option remote-port {port}
  option remote-subvolume brick
end-volume
volume write-behind
  type performance/write-behind
  subvolumes remote
end-volume
volume md-cache
  type performance/md-cache
  option md-cache-timeout {seconds}
  subvolumes write-behind
end-volume
"""
MACHINE = """\
#!/bin/sh
# machine NAME COMMAND…: the command as another machine runs it
[ -n "$INSIDE" ] || exec env INSIDE=1 unshare --mount --uts "$0" "$@"
name=$1 here=$PWD; shift; cd /
hostname "$name"
echo "127.0.0.1 localhost $name" >"{folder}/hosts-$name"
mount --bind "{folder}/hosts-$name" /etc/hosts
umount "{path}"
{mount} --log-file="{folder}/$name.log" --pid-file="{folder}/$name-$$.pid" "{path}"
until mountpoint -q "{path}"; do sleep 0.1; done
unset INSIDE
cd "$here" && exec "$@"
"""


class SharedFolder:
    """`path` is the folder; `machine` a command that runs another one as a machine of that name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path, self.machine = folder, folder / "shared", folder / "machine"


def why_not() -> str | None:
    """Why there is no such folder here; None where there is."""
    if os.geteuid() or not Path("/dev/fuse").exists():
        return "a network file system is mounted by root, through /dev/fuse"
    if not (shutil.which("glusterfsd") and shutil.which("unshare")):
        return "no glusterfsd here; apt-get install glusterfs-server"
    tried = subprocess.run(["unshare", "--mount", "--uts", "true"], stderr=subprocess.PIPE)
    return tried.stderr.decode().strip() or None  # a container may not be allowed to mount


@contextmanager
def shared_folder(folder: Path, cached_s: int = 1) -> Iterator[SharedFolder]:
    """The folder for the block. Clients remember attributes and names for `cached_s` seconds."""
    made = SharedFolder(folder)
    (folder / "brick").mkdir()
    made.path.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "server.vol").write_text(SERVER.format(brick=folder / "brick", port=port))
    (folder / "client.vol").write_text(CLIENT.format(port=port, seconds=cached_s))
    mount = ["glusterfs", f"--volfile={folder / 'client.vol'}"]
    mount += [f"--{what}-timeout={cached_s}" for what in ("entry", "attribute")]
    made.machine.write_text(MACHINE.format(folder=folder, path=made.path, mount=" ".join(mount)))
    made.machine.chmod(0o755)
    log, pid = f"--log-file={folder}/log", f"--pid-file={folder}/server.pid"
    subprocess.run(["glusterfsd", f"--volfile={folder}/server.vol", log, pid], check=True)
    own = [f"--log-file={folder}/own.log", f"--pid-file={folder}/own.pid", str(made.path)]
    try:
        subprocess.run([*mount, *own], check=True)
        end = time.monotonic() + 20
        while not made.path.is_mount():
            assert time.monotonic() < end, (folder / "own.log").read_text()[-2000:]
            time.sleep(0.1)
        yield made
    finally:
        subprocess.run(["umount", "--lazy", made.path], check=False)
        for file in folder.glob("*.pid"):
            with suppress(ProcessLookupError, ValueError):
                os.kill(int(file.read_text()), signal.SIGTERM)
