"""Cases are timed in turns, then replayed to pytest-benchmark, which keeps the statistics and writes the JSON."""

import json
import sys
import tempfile
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import machine  # noqa: E402
import report  # noqa: E402
from compare import Rounds  # noqa: E402
from roofs import Roofs  # noqa: E402


class Clock:
    """A clock that stands still until a time that was measured passes."""

    __name__ = "turns"
    now = 0.0

    def __call__(self):
        return self.now


clock = Clock()


def pytest_addoption(parser):
    group = parser.getgroup("lora_kernels")
    group.addoption("--quick", action="store_true", help="3 rounds a case: the times mean nothing")
    group.addoption("--save", action="store_true", help="keep the results in benchmarks/results/<device>/")


def pytest_configure(config):
    config.option.benchmark_quiet = True
    if config.option.benchmark_json is None:
        folder = tempfile.TemporaryDirectory()
        config.add_cleanup(folder.cleanup)
        config.option.benchmark_json = Path(folder.name, "results.json")


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture(scope="session")
def rounds(request):
    """``rounds(fewest, most, seconds)``, or three of them with ``--quick``."""
    return (lambda *bounds: Rounds(3, 3)) if request.config.getoption("--quick", default=False) else Rounds


@pytest.fixture(scope="module")
def roofs():
    return Roofs()


@pytest.fixture
def replay(benchmark):
    """``replay(case, provider)`` gives pytest-benchmark the times of one provider."""

    def run(case, provider):
        times = iter(case.times[provider])

        def step():
            clock.now += next(times)

        benchmark.group = case.group
        benchmark.pedantic(step, rounds=len(case.times[provider]))
        benchmark.extra_info.update(case.extra_info(provider))

    return run


def pytest_benchmark_generate_machine_info():
    return machine.describe()


def pytest_benchmark_generate_commit_info():
    return machine.commit()


def pytest_benchmark_update_json(output_json):
    """Leaves out the single times, a megabyte of them, and settings that do not apply."""
    for entry in output_json["benchmarks"]:
        del entry["options"], entry["params"], entry["param"], entry["stats"]["data"]


def pytest_terminal_summary(terminalreporter, exitstatus, config):
    path = config.option.benchmark_json
    if path is None or not path.is_file():
        return
    found = json.loads(path.read_text())
    report.show([report.Result(found)])
    if config.getoption("--save", default=False) and exitstatus == 0:
        for saved in save(found):
            terminalreporter.write_line(f"saved {saved}")


def save(found):
    """One file for each ``bench_*.py``: ``results/<device>/low_rank.json`` and so on."""
    folder = HERE / "results" / found["machine_info"]["device"]
    folder.mkdir(parents=True, exist_ok=True)
    families = {Path(entry["fullname"].split("::")[0]).stem.removeprefix("bench_") for entry in found["benchmarks"]}
    for family in sorted(families):
        own = [entry for entry in found["benchmarks"] if f"bench_{family}.py" in entry["fullname"]]
        path = folder / f"{family}.json"
        path.write_text(json.dumps({**found, "benchmarks": own}, indent=1) + "\n")
        yield path.relative_to(HERE)
