"""One model for four jobs beside a model of the same size for each job alone, which sees as many samples of it.

    uv run benchmarks/four_jobs.py [--seeds 0] [--write]         about 25 CPU-minutes a seed

--write writes the table to benchmarks/results/four_jobs.md.
"""

import tempfile

from benchmarks import data, report, script


def main() -> None:
    options = script.parser(__doc__, "seeds", "write")
    options.add_argument("options", nargs="*", help="passed on to the example, after --")
    args = script.parsed(options)
    one_model_four_jobs, jobs = data.example("one_model_four_jobs"), data.example("job_sets").JOBS
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for seed in args.seeds:

            def run(name: str, *more: str, seed: int = seed) -> dict[str, float]:
                common = ["--folder", f"{folder}/{name}{seed}", "--seed", str(seed), "--workers", "0"]
                with script.cpu_time(f"{name}, seed {seed}:"):
                    return one_model_four_jobs.main([*common, *more, *args.options])

            together = run("together")
            alone = {key: value for job in jobs for key, value in run(job, "--only", job).items()}
            for key, value in together.items():
                rows.append([key, str(seed), f"{value:.1%}", f"{alone[key]:.1%}", f"{100 * (value - alone[key]):+.1f}"])
    head = ["what is right", "seed", "one model, four jobs", "a model for this job alone", "difference"]
    table = script.table(head, rows)
    print(table)
    if args.write:
        report.keep("four_jobs", "One model, four jobs", "uv run benchmarks/four_jobs.py --write", table)


if __name__ == "__main__":
    main()
