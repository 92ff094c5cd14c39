"""A lab for use by hand: `python -m tests.lab FOLDER` starts hosts, storage and Ray, and waits for Ctrl-C.

FOLDER must not exist. It gets a script for every host: `FOLDER/on w1 COMMAND …` runs a command there.
"""

import argparse
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

from tests.lab.cluster import Cluster, Storage, prepare_client
from tests.lab.hosts import Lab, lack


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lab", description="Hosts with Ray and S3, until Ctrl-C.")
    parser.add_argument("folder", type=Path, help="new folder for the files of the lab")
    parser.add_argument("--workers", type=int, default=3, help="hosts on which Ray is started beside the head")
    arguments = parser.parse_args()
    if missing := lack():
        sys.exit(missing)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Lab(arguments.folder) as lab:
        prepare_client(lab["client"])
        storage = Storage(lab["storage"])
        cluster = Cluster(lab, storage)
        _write_script(lab, cluster)
        storage.start()
        cluster.start([f"w{number}" for number in range(1, arguments.workers + 1)])
        print(f"Ray at {cluster.url}; bucket s3://lab at {storage.environment['AWS_ENDPOINT_URL']}")
        print(f"{lab.folder}/on HOST COMMAND … runs a command; hosts: {' '.join(lab.hosts)}. Ctrl-C ends the lab.")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            print("ending")
    shutil.rmtree(arguments.folder)


def _write_script(lab: Lab, cluster: Cluster) -> None:
    """Hosts other than the client get the environment of Ray's nodes, with the keys of the storage."""
    cases = ""
    for host in lab.hosts.values():
        extra = {} if host.name == "client" else cluster.environment
        cwd = "/tmp/work" if host.name == "client" else "/tmp"
        settings = [f"{name}={value}" for name, value in host.variables(extra).items()]
        cases += f'{host.name}) exec {shlex.join(["env", "-i", *settings, *host.enter(cwd)])} "$@" ;;\n'
    script = lab.folder / "on"
    script.write_text(f"#!/bin/sh\nhost=$1\nshift\ncase $host in\n{cases}esac\n")
    script.chmod(0o700)


main()
