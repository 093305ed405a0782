"""`make gpu`: what has to hold on a CUDA device, the notebooks on it, and the bench; one JSON says
what passed, and in how many seconds.

    python tests/gpu.py --out build/gpu

Without a CUDA device it says so, and exits with 0.
"""
import argparse
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path

import torch

from mythos_core.provenance import commit

ROOT = Path(__file__).parent.parent
#: Of CUDA's libraries, where torch is asked for deterministic algorithms.
REPEATABLE = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}


def run(*command, **environment) -> tuple[int, float]:
    """The exit code of a Python command, and its seconds."""
    start = time.perf_counter()
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT,
                          env={**os.environ, **environment}).returncode
    return code, round(time.perf_counter() - start, 1)


def tests(out: Path, device: str, workers: int) -> dict:
    """tests/model/test_device.py on the device."""
    report = out / "tests.xml"
    _, seconds = run("-m", "pytest", "tests/model/test_device.py", "-q", "-n", workers, "-p",
                     "no:cacheprovider", f"--junitxml={report}", MYTHOS_DEVICE=device,
                     OMP_NUM_THREADS="1", **REPEATABLE)
    return {**read(report), "seconds": seconds}


def read(report: Path) -> dict:
    """What pytest's XML says: how many passed, which did not, and what tests recorded."""
    cases = list(ET.parse(report).iter("testcase")) if report.exists() else []
    found = {"passed": 0, "skipped": 0, "failed": [], "recorded": {}}
    for case in cases:
        if case.find("failure") is not None or case.find("error") is not None:
            found["failed"].append(case.get("name"))
        else:
            found["passed" if case.find("skipped") is None else "skipped"] += 1
        if properties := case.findall("properties/property"):
            found["recorded"][case.get("name")] = {p.get("name"): json.loads(p.get("value"))
                                                   for p in properties}
    if not found["passed"]:
        found["failed"].append("no test passed")
    return found


def notebooks(out: Path, device: str, workers: int) -> dict:
    """All notebooks by papermill, as `make tutorial`, with their `device` named."""
    chosen = sorted((ROOT / "notebooks").glob("*.ipynb"))
    _, seconds = run("-m", "mythos_core", "batch", *chosen, "--workers", workers, "--grid",
                     f"device={device}", "--out", out / "notebooks",
                     MYTHOS_FIGURES=str(out / "figures"))
    rows = [{"run": path.parent.name, **json.loads(path.read_text(encoding="utf-8"))}
            for path in sorted((out / "notebooks").glob("*/result.json"))]
    failed = {row["run"]: row["error"] for row in rows if row["status"] != "passed"}
    if len(rows) < len(chosen):
        failed["notebooks"] = f"{len(rows)} of {len(chosen)} ran"
    return {"passed": len(rows) - len(failed), "failed": failed, "seconds": seconds,
            "claims": {row["run"]: row["claims"] for row in rows},
            "seconds_each": {row["run"]: row["seconds"] for row in rows}}


def bench(out: Path) -> dict:
    """The bench's rows on the device; which bars are reached is not asked there."""
    code, seconds = run("-m", "pytest", "tests/bench/test_model_bench.py", "-q", "-k", "cuda", "-p",
                        "no:cacheprovider", MYTHOS_FIGURES=str(out))
    table = out / "bench_cuda.json"
    rows = json.loads(table.read_text(encoding="utf-8"))[0]["rows"] if table.exists() else []
    return {"failed": [f"pytest ended with {code}"] * (code != 0), "seconds": seconds, "rows": rows}


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="gpu.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu")
    parser.add_argument("--workers", type=int, default=max(1, min(9, (os.cpu_count() or 2) - 1)))
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no CUDA device here: nothing to do")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    start, about = time.perf_counter(), torch.cuda.get_device_properties(0)
    found = {"command": "make gpu", "device": about.name,
             "memory_GB": round(about.total_memory / 1e9, 1),
             "versions": {"python": sys.version.split()[0], "torch": torch.__version__,
                          "cuda": torch.version.cuda}, "commit": commit()}
    parts = {"tests": partial(tests, device="cuda", workers=args.workers),
             "notebooks": partial(notebooks, device="cuda", workers=args.workers), "bench": bench}
    for name, part in parts.items():
        found |= {name: part(args.out), "seconds": round(time.perf_counter() - start, 1)}
        (args.out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    failed = {name: found[name]["failed"] for name in parts if found[name]["failed"]}
    print(f"{about.name}: {found['tests']['passed']} tests and {found['notebooks']['passed']} "
          f"notebooks passed, {len(found['bench']['rows'])} rows of the bench, in "
          f"{found['seconds']:.0f} s; {args.out / 'gpu.json'}")
    for part, what in failed.items():
        print(f"failed in {part}: {what}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
