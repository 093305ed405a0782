"""One machine stands in for others: what trains is run again under other arithmetics.

    python tests/arithmetics.py                        # all of `SETTINGS`
    python tests/arithmetics.py --only aten-default    # one of them

A processor's instructions decide how sums are rounded, and rounding what a training becomes. The
libraries under torch can be told by environment variables to leave instructions aside. Which of
these variables act, depends on the processor. So each setting first trains for 20 steps, and where
the weights come out as under an earlier setting nothing is run a second time.
"""
import argparse
import os
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

TESTS = Path(__file__).parent
NOTEBOOKS = ("03_spectral_stability", "04_training", "05_depth_extrapolation", "09_state_tracking",
             "10_text")
FILES = [TESTS / "proof" / "test_certificate.py", TESTS / "model" / "test_strict.py",
         *(TESTS.parent / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS)]

#: ATEN_CPU_CAPABILITY is for torch's own loops. MKL makes most matrix products: MKL_CBWR acts on
#: every processor, MKL_ENABLE_INSTRUCTIONS on Intel's. oneDNN makes those in bfloat16.
SETTINGS = {
    "native": {},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "mkl-sse4": {"MKL_CBWR": "SSE4_2"},
    "mkl-avx2": {"MKL_CBWR": "AVX2"},
    "intel-sse4": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "intel-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "onednn-sse4": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "all-oldest": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE",
                   "ONEDNN_MAX_CPU_ISA": "SSE41"},
    "all-avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
}
NAMES = {name for setting in SETTINGS.values() for name in setting}


def environment(setting: dict[str, str]) -> dict[str, str]:
    """This process's, with one thread, and of the variables in `SETTINGS` with those given."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    return {**kept, "OMP_NUM_THREADS": "1", **setting}


def trained() -> str:
    """A checksum of the weights after 20 steps of training, in this process."""
    from mythos_core.training import train
    from mythos_core.training.recipes import get_recipe
    model = train(replace(get_recipe("parity-carrying"), steps=20), progress=False).model
    weights = b"".join(tensor.numpy().tobytes() for tensor in model.state_dict().values())
    return sha256(weights).hexdigest()[:12]


def checksum(setting: dict[str, str]) -> str:
    """`trained` in a fresh process."""
    command = [sys.executable, "-c", "import arithmetics; print(arithmetics.trained())"]
    done = subprocess.run(command, cwd=TESTS, env=environment(setting), stdout=subprocess.PIPE,
                          text=True, check=True)
    return done.stdout.strip()


def run(setting: dict[str, str], files: list[Path], workers: str) -> bool:
    """Whether tests pass, and notebooks by nbval with those of their exercises that do not train.
    Figures are not compared: the committed ones are of another arithmetic."""
    command = [sys.executable, "-m", "pytest", *map(str, files), "-p", "no:cacheprovider",
               "-n", workers, "--dist", "loadfile", "-m", "not training", "-k", "not figures",
               "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=900"]
    return subprocess.run(command, cwd=TESTS.parent, env=environment(setting)).returncode == 0


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(prog="arithmetics.py", description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, default=FILES, help="instead of what trains")
    parser.add_argument("--only", metavar="NAME", help="one setting; nothing if it acts as native")
    parser.add_argument("--workers", default="1", help="files at a time, of one thread each")
    args = parser.parse_args(argv)
    if args.only not in (None, *SETTINGS):
        parser.exit(2, f"{parser.prog}: --only {args.only}: must be one of {', '.join(SETTINGS)}\n")
    sums, rows = {}, []
    for name in dict.fromkeys(["native", args.only]) if args.only else SETTINGS:
        sums[name] = checksum(SETTINGS[name])
        same = next(earlier for earlier in sums if sums[earlier] == sums[name])
        if args.only not in (None, name):
            result = "not asked for"
        elif same != name:
            result = f"skipped: as {same}"
        else:
            print(f"\n{name}: {SETTINGS[name]}, weights {sums[name]}", flush=True)
            start = time.perf_counter()
            passed = run(SETTINGS[name], args.files, args.workers)
            result = f"{'passed' if passed else 'FAILED'} in {time.perf_counter() - start:.0f} s"
        differs = "" if name == "native" else "no" if sums[name] == sums["native"] else "yes"
        rows.append((name, sums[name], differs, result))
    print()
    for row in [("arithmetic", "weights", "other", "result"), *rows]:
        print("{:16}{:14}{:7}{}".format(*row))
    return 1 if any(row[-1].startswith("FAILED") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
