"""What a node has to pass before a job trains on it. One process a node; launch/preflight_report.py judges.

    srun --ntasks-per-node=1 python -m launch.preflight FOLDER single      disk, GPUs, connections to two other nodes
    srun --ntasks-per-node=1 python -m launch.preflight FOLDER together    a product on every GPU, a sum over all nodes

FOLDER lies on the shared file system and holds plan.json (launch/preflight_report.py writes it): the nodes, their
addresses, limits. Each node writes what it finds to FOLDER/PART/NODE.json before and after every check, so that a check
that never ends is known by its name. The second part, which needs all nodes and torch, is for nodes that passed the
first.
"""

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mm_train.files import write_atomic

LISTENS = "listens"  # key of a node's findings: port at which others can try the network
NEIGHBOURS = 2  # nodes that each one tries, those after it in a ring
PIECE = 2**20  # bytes sent there and back
SMI = {  # field of nvidia-smi -> what value makes a GPU unfit
    "ecc.errors.uncorrected.volatile.total": lambda value: value.isdecimal() and int(value) > 0,
    "clocks_event_reasons.hw_slowdown": lambda value: value == "Active",
    "clocks_throttle_reasons.hw_slowdown": lambda value: value == "Active",  # its name until driver 535
    "reset_status.reset_required": lambda value: value == "Yes",
}
FACTS = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "temperature.gpu")  # for the record
ROWS = "gpu_bus_id,remapped_rows.failure,remapped_rows.pending"


class Unfit(Exception):
    """A check that the node does not pass, in words."""


class Node:
    """This node, and what was found on it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.found: dict[str, Any] = {"node": name, "host": socket.gethostname(), "problems": {}, "facts": {}}
        self.plan: dict[str, Any] = {}

    def check(self, name: str, work: Callable[[], Any]) -> None:
        """Do `work`; note its result, or why the node is unfit."""
        self.found["doing"] = name
        self.write()
        try:
            self.found["facts"][name] = work()
        except Unfit as error:
            self.found["problems"][name] = str(error)
        except Exception as error:  # whatever a broken node does
            self.found["problems"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.found["doing"] = None
        self.write()

    def write(self) -> None:
        write_atomic(self.folder / f"{self.name}.json", json.dumps(self.found).encode())

    def fit(self) -> bool:
        return not self.found["problems"]


def main(argv: list[str]) -> int:
    folder, part = Path(argv[0]), argv[1]
    name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    node = Node(folder / part, name)
    try:
        node.plan = json.loads((folder / "plan.json").read_text())
        node.write()
    except OSError as error:
        print(f"{name}: the run folder is not usable here: {error.strerror}: {error.filename}", file=sys.stderr)
        return 1
    PARTS[part](node)
    return 0 if node.fit() else 1


def single(node: Node) -> None:
    plan = node.plan
    node.check("disk", lambda: disk(Path(plan["run_dir"]), plan["disk_gib"]))
    if plan["scratch"]:
        node.check("scratch", lambda: scratch(os.path.expandvars(plan["scratch"])))
    if plan["gpus"]:
        node.check("gpus", lambda: gpus(plan["gpus"]))
    if len(plan["nodes"]) > 1 and node.fit():
        with listening() as port:
            node.found[LISTENS] = port
            node.check("neighbours", lambda: neighbours(node))
            wait_for_others(node)


def together(node: Node) -> None:
    if node.plan["gpus"]:
        node.check("matrix product", lambda: matrix_product(node.plan["gpus"]))
    if len(node.plan["nodes"]) > 1 and node.fit():
        node.check("all-reduce", lambda: all_reduce(node))


# --- by itself ----------------------------------------------------------------------------------------------------


def disk(run_dir: Path, gib: float) -> dict[str, float]:
    """GiB free where the run goes. The folder is shared: this node has just written there."""
    free = shutil.disk_usage(run_dir).free / 2**30
    if free < gib:
        raise Unfit(f"{free:.1f} GiB are free in {run_dir}, {gib:g} wanted (MM_MIN_DISK_GIB)")
    return {"free_gib": round(free, 1)}


def scratch(folder: str) -> dict[str, float]:
    """GiB free on the node's own disk, after a write to it."""
    probe = Path(folder) / f".mm-preflight-{os.getpid()}"
    try:
        write_atomic(probe, b"x" * 4096)
        probe.unlink()
        return {"free_gib": round(shutil.disk_usage(folder).free / 2**30, 1)}
    except OSError as error:
        raise Unfit(f"{folder} (MM_SCRATCH) cannot be written: {error.strerror}") from None


def gpus(wanted: int) -> list[dict[str, str]]:
    """What nvidia-smi says of each GPU. Raises Unfit."""
    found = smi([*FACTS, *SMI])
    if len(found) < wanted:
        raise Unfit(f"{len(found)} GPUs instead of {wanted}")
    for index, gpu in enumerate(found):
        for field, unfit in SMI.items():
            if unfit(gpu.get(field, "")):
                raise Unfit(f"GPU {index} ({gpu['name']}): {field} is {gpu[field]}")
    try:
        rows = ask_smi(f"--query-remapped-rows={ROWS}")
    except Unfit:  # GPUs without row remapping
        rows = []
    for index, line in enumerate(rows):
        if {"Yes", "1"} & set(line.split(", ")[1:]):
            raise Unfit(f"GPU {index}: rows of its memory failed, or wait for a reset to be remapped ({line})")
    return found


def smi(fields: list[str]) -> list[dict[str, str]]:
    """The fields of each GPU, without those that this driver does not know."""
    while True:
        try:
            lines = ask_smi(f"--query-gpu={','.join(fields)}")
        except Unfit as error:
            unknown = re.search(r'Field "(\S+)" is not a valid field', str(error))
            if not unknown or unknown[1] not in fields:
                raise
            fields = [field for field in fields if field != unknown[1]]
        else:
            return [dict(zip(fields, line.split(", "), strict=True)) for line in lines]


def ask_smi(query: str) -> list[str]:
    try:
        words = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    except OSError:
        raise Unfit("no nvidia-smi: is there a driver?") from None
    except subprocess.TimeoutExpired:
        raise Unfit("nvidia-smi does not answer: the driver hangs") from None
    if done.returncode:
        raise Unfit(f"nvidia-smi: {' '.join((done.stdout + done.stderr).split())[:300]}")
    return [line for line in done.stdout.splitlines() if line.strip()]


def matrix_product(gpus: int) -> list[float]:
    """A product of known outcome on every GPU; milliseconds that it took."""
    import torch

    times = []
    for index in range(gpus):
        device = torch.device("cuda", index)
        ones = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
        product = ones @ ones  # a first one, which also loads the library
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        product = ones @ ones
        torch.cuda.synchronize(device)
        times.append(round(1000 * (time.perf_counter() - began), 2))
        if not bool((product == 4096).all()):
            raise Unfit(f"GPU {index} multiplies wrongly")
    return times


# --- with others --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening() -> Iterator[int]:
    """Send back whatever comes, as long as the block lasts."""
    with socket.create_server(("", 0), backlog=64) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=echo, args=(connection,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]


def echo(connection: socket.socket) -> None:
    with contextlib.suppress(OSError), connection:
        while piece := connection.recv(2**16):
            connection.sendall(piece)


def neighbours(node: Node) -> dict[str, Any]:
    """Send PIECE there and back to the next nodes of the ring. What fails is noted, whoever is to blame."""
    names, seconds = node.plan["nodes"], node.plan["seconds"] / 4
    place = names.index(node.name)
    result: dict[str, Any] = {}
    for number in range(1, min(NEIGHBOURS, len(names) - 1) + 1):
        other = names[(place + number) % len(names)]
        end = time.monotonic() + seconds
        port = None
        while port is None and time.monotonic() < end:
            port = findings(node.folder, other).get(LISTENS)
            if findings(node.folder, other).get("problems"):
                break
            time.sleep(0.05 if port is None else 0)
        if port is None:
            result[other] = None  # not there, which it has to answer for itself
            continue
        try:
            began = time.perf_counter()
            address = (node.plan["addresses"][other], port)
            with socket.create_connection(address, timeout=max(1.0, end - time.monotonic())) as there:
                sender = threading.Thread(target=there.sendall, args=(bytes(PIECE),), daemon=True)
                sender.start()
                missing = PIECE
                while missing:
                    piece = there.recv(2**16)
                    if not piece:
                        raise OSError("the connection broke off")
                    missing -= len(piece)
            result[other] = round(time.perf_counter() - began, 4)
        except OSError as error:
            result[other] = f"{error.strerror or error}"
    return result


def all_reduce(node: Node) -> dict[str, Any]:
    """One sum over all nodes, on GPUs too where there are any; MB/s of a larger one."""
    import datetime

    import torch
    import torch.distributed as dist

    plan, world = node.plan, len(node.plan["nodes"])
    timeout = datetime.timedelta(seconds=plan["seconds"] / 3)
    rank = plan["nodes"].index(node.name)
    address = plan["addresses"][plan["nodes"][0]]
    meet = f"tcp://{f'[{address}]' if ':' in address else address}:{plan['port']}"
    result: dict[str, Any] = {}
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world, timeout=timeout)
    groups = {"gloo": (dist.new_group(backend="gloo", timeout=timeout), "cpu")}
    if plan["gpus"]:
        os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")  # a time limit raises instead of ending the process
        groups["nccl"] = (dist.new_group(backend="nccl", timeout=timeout), "cuda:0")
    for name, (group, device) in groups.items():
        node.found["doing"] = f"all-reduce, {name}"
        node.write()
        for size in (1, PIECE):  # the first one connects
            values = torch.full((size,), float(rank + 1), device=device)
            began = time.perf_counter()
            dist.all_reduce(values, group=group)
            if float(values[-1]) != world * (world + 1) / 2:
                raise Unfit(f"{name}: the sum over all nodes is {float(values[-1])}")
            seconds = time.perf_counter() - began
        result[f"{name}, MB/s"] = round(4 * PIECE / seconds / 1e6, 1)
    dist.destroy_process_group()
    return result


def wait_for_others(node: Node) -> None:
    """Stay reachable until the nodes that try this one are through with it."""
    names = node.plan["nodes"]
    place = names.index(node.name)
    before = {names[(place - number) % len(names)] for number in range(1, NEIGHBOURS + 1)} - {node.name}
    end = time.monotonic() + node.plan["seconds"] / 4
    while time.monotonic() < end:
        states = [findings(node.folder, other) for other in before]
        if all("neighbours" in state.get("facts", {}) or state.get("problems") for state in states):
            return
        time.sleep(0.1)


def findings(folder: Path, name: str) -> dict[str, Any]:
    """What a node has written so far."""
    try:
        return dict(json.loads((folder / f"{name}.json").read_text()))
    except (OSError, ValueError):
        return {}


PARTS = {"single": single, "together": together}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
