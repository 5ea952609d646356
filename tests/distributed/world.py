"""Several ranks on the CPU: ``run(cases, ranks)`` starts them, and answers with what each case raised or returned.

A world is one ``torch.distributed`` process group (gloo) that runs many cases one after the other; starting it costs
seconds, a case milliseconds. Ranks are processes of this very file, which dies with its parent's patience: whatever a
rank waits for, ``TIMEOUT`` ends it.
"""

from __future__ import annotations

import faulthandler
import os
import subprocess
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACK = HERE.parents[1]
TIMEOUT = 240
"""Seconds for all cases of one world."""
WORLD = "the world"
"""Among the answers of ``run``: what the ranks said, where one of them did not come to its end."""
END = "\x1e\x1e"


def run(module: str, ranks: int, backend: str = "gloo") -> dict[str, str]:
    """Run the ``cases`` of ``module`` (beside this file) on ``ranks`` ranks: by name, "" or the traceback of a rank
    that failed. ``nccl``: each rank has a GPU of its own; a rank that fails takes the cases after it along, which are
    then missing from the answer."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", __file__, module, str(ranks), folder, backend]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        logs = [open(Path(folder) / f"log{rank}", "w+") for rank in range(ranks)]  # noqa: SIM115 - closed below
        started = [
            subprocess.Popen([*command, str(rank)], stdout=log, stderr=subprocess.STDOUT, env=environment)
            for rank, log in enumerate(logs)
        ]
        try:
            for process in started:
                process.wait(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            pass  # the rank did not end well: said below
        finally:
            for process in started:
                process.kill()
                process.wait()
            said = []
            for log in logs:
                log.seek(0)
                said.append(log.read()[-4000:])
                log.close()
        found: dict[str, str] = {}
        for rank in range(ranks):
            done = Path(folder) / f"done{rank}"
            written = done.read_text() if done.exists() else ""
            if not written.endswith(END):
                found[WORLD] = f"rank {rank} of {ranks} did not end well:\n" + "\n".join(said)
            for line in written.removesuffix(END).split("\x1e"):
                name, _, failure = line.partition("\x1f")
                if name:
                    found[name] = found.get(name, "") + (f"rank {rank}:\n{failure}" if failure else "")
        return found


def _rank(module_name: str, ranks: int, folder: Path, backend: str, rank: int) -> None:
    faulthandler.dump_traceback_later(TIMEOUT - 5, exit=True)
    sys.path += [str(HERE), str(HERE.parent / "unit"), str(PACK)]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    cases = __import__(module_name)
    done = open(folder / f"done{rank}", "w")  # noqa: SIM115 - written to as long as this process lives
    for name, case in cases.cases(ranks).items():
        began, failure = time.perf_counter(), ""
        try:
            with torch.inference_mode():
                case()
        except Exception:
            failure = traceback.format_exc()
        failed = torch.tensor([float(bool(failure))], device=device)
        dist.all_reduce(failed)
        done.write(f"{name}\x1f{failure}\x1e")
        done.flush()
        print(f"{time.perf_counter() - began:6.2f} s  {name}", flush=True)
    dist.destroy_process_group()
    done.write(END)
    done.close()


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]))
