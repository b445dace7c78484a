"""One model for four jobs beside a model of the same size for each job alone, which sees as many samples of it.

    uv run benchmarks/four_jobs.py [--seeds 0] [--write]         about 25 CPU-minutes a seed

--write keeps the table in benchmarks/results/four_jobs.md.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "examples"))

import one_model_four_jobs  # noqa: E402
import report  # noqa: E402
from job_sets import JOBS  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--write", action="store_true")
    parser.add_argument("options", nargs="*", help="passed on to the example, after --")
    args = parser.parse_args()
    torch.set_num_threads(1)
    table = "| what is right | seed | one model, four jobs | a model for this job alone | difference |\n|---|---|---|---|---|\n"
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:

            def run(name: str, *more: str, seed: int = seed) -> dict[str, float]:
                options = ["--folder", f"{folder}/{name}{seed}", "--seed", str(seed), "--workers", "0"]
                start = time.process_time()
                found = one_model_four_jobs.main([*options, *more, *args.options])
                print(f"{name}, seed {seed}: {(time.process_time() - start) / 60:.1f} CPU-minutes", flush=True)
                return found

            together = run("together")
            alone = {key: value for job in JOBS for key, value in run(job, "--only", job).items()}
            for key, value in together.items():
                table += f"| {key} | {seed} | {value:.1%} | {alone[key]:.1%} | {100 * (value - alone[key]):+.1f} |\n"
    print(table)
    if args.write:
        report.keep("four_jobs", "One model, four jobs", "uv run benchmarks/four_jobs.py --write", table)


if __name__ == "__main__":
    main()
