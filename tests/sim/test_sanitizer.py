"""The kernels on the host under AddressSanitizer and UndefinedBehaviorSanitizer: tests/sim in another process."""

import re
from pathlib import Path

import elsewhere
import pytest
from sanitizing import environment

HERE = Path(__file__).parent
#: They build, or expect the executor to find what a sanitizer finds before it.
APART = ("test_sanitizer", "mutations", "test_writes_beside_shared_memory", "test_reads_of_a_block_that_ended")


@pytest.fixture(scope="module")
def instrumented(tmp_path_factory):
    """The module with both sanitizers, and the variables its process needs."""
    variables = environment()
    module = elsewhere.build(out=tmp_path_factory.mktemp("sanitized"), sanitize="address,undefined")
    assert b"__asan_report_load" in module.read_bytes()
    assert b"__ubsan_handle" in module.read_bytes()
    return module, variables


def test_everything(instrumented):
    module, variables = instrumented
    keep = " and ".join(f"not {name}" for name in APART)
    done = elsewhere.run_tests(module, HERE, "-x", "--capture=no", "-m", "not slow", "-k", keep, **variables)
    report = done.stdout + done.stderr
    assert done.returncode == 0, report[-20_000:]
    assert "Sanitizer" not in report, report[-20_000:]
    assert int(re.search(r"(\d+) passed", report)[1]) > 300


CALLS = {
    "count": ("count(torch.empty(100), 101)", "heap-buffer-overflow"),
    "staged": ("staged(torch.empty(1, 64, 4).expand(2, 64, 4), torch.empty(512), 0, 1, 1)", "heap-buffer-overflow"),
    "write_shared": ("write_shared(250, 250)", "use-after-poison"),
    "read_late": ("read_late(torch.empty(64))", "use-after-poison"),
}


@pytest.mark.parametrize("kernel", CALLS)
def test_reported_where_it_is_done(instrumented, kernel):
    module, variables = instrumented
    call, kind = CALLS[kernel]
    done = elsewhere.run(module, f"lora_kernels._sim.set_seed(1); lora_kernels._sim.self_test.{call}", **variables)
    assert done.returncode == 99, done.stdout + done.stderr
    assert f"AddressSanitizer: {kind}" in done.stderr
    assert re.search(rf"::{kernel}\b.*csrc/sim/self_test\w*.cuh:\d+", done.stderr), done.stderr[:5000]
