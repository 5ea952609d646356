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


def run(module: str, ranks: int) -> dict[str, str]:
    """Run every ``case_*`` function of ``module`` on ``ranks`` ranks: by name, "" or the traceback of a rank that
    failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-P", __file__, module, str(ranks), folder]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        logs = [open(Path(folder) / f"log{rank}", "w+") for rank in range(ranks)]  # noqa: SIM115 - closed below
        started = [
            subprocess.Popen([*command, str(rank)], stdout=log, stderr=subprocess.STDOUT, env=environment)
            for rank, log in enumerate(logs)
        ]
        try:
            for process in started:
                process.wait(timeout=TIMEOUT)
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
            assert done.exists(), f"rank {rank} of {ranks} did not end well:\n" + "\n".join(said)
            for line in done.read_text().split("\x1e"):
                name, _, failure = line.partition("\x1f")
                if name:
                    found[name] = found.get(name, "") + (f"rank {rank}:\n{failure}" if failure else "")
        return found


def _rank(module_name: str, ranks: int, folder: Path, rank: int) -> None:
    faulthandler.dump_traceback_later(TIMEOUT - 5, exit=True)
    sys.path += [str(HERE), str(HERE.parent / "unit"), str(PACK)]
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    cases = __import__(module_name)
    done = []
    for name, case in cases.cases(ranks).items():
        began, failure = time.perf_counter(), ""
        try:
            with torch.inference_mode():
                case()
        except Exception:
            failure = traceback.format_exc()
        failed = torch.tensor([float(bool(failure))])
        dist.all_reduce(failed)
        done.append(f"{name}\x1f{failure}")
        print(f"{time.perf_counter() - began:6.2f} s  {name}", flush=True)
    dist.destroy_process_group()
    (folder / f"done{rank}").write_text("\x1e".join(done))


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]))
