"""Whether tests would notice mistakes in device code, by making them.

    MISTAKES = {"no barrier": (FILE, "__syncthreads();\n  y[i]", "y[i]", "test_forward and bf16")}

    def test_mistakes(tmp_path):
        assert unnoticed(tmp_path, MISTAKES, "wht", "tests/sim/test_wht.py") == []

A mistake is the file under csrc/, a text that is in it once, what stands there instead, and which tests of the files
pytest is to run, as for its -k. The family's name is that of its csrc/sim/<family>.cpp, the only one that is built.
"""

import shutil
from concurrent.futures import ThreadPoolExecutor

import elsewhere

CSRC = elsewhere.ROOT / "csrc"


def unnoticed(tmp_path, mistakes, family, *files):
    """The names of the mistakes with which the tests still pass."""
    elsewhere.build(out=tmp_path)  # what the mutated builds begin with
    right = elsewhere.build(out=tmp_path / "right", families=[family])
    for tests in {tests for *_, tests in mistakes.values()}:
        done = elsewhere.run_tests(right, "-x", *files, "-k", tests)
        assert done.returncode == 0, f"fails without a mistake: {tests}\n{done.stdout}{done.stderr}"
    with ThreadPoolExecutor(2) as pool:
        made = {
            name: pool.submit(passes, tmp_path / str(i), family, files, *mistake)
            for i, (name, mistake) in enumerate(mistakes.items())
        }
        return [name for name, passed in made.items() if passed.result()]


def passes(folder, family, files, file, old, new, tests):
    """Whether the tests pass with ``new`` for ``old``; compiles what the file changes, in a copy."""
    shutil.copytree(CSRC, folder / "csrc")
    shutil.copytree(elsewhere.ROOT / "build/sim", folder / "build/sim")
    text = (folder / "csrc" / file).read_text()
    if text.count(old) != 1:
        raise ValueError(f"{text.count(old)} times in {file}: {old!r}")
    (folder / "csrc" / file).write_text(text.replace(old, new))
    module = elsewhere.build(source=folder / "csrc", out=folder, families=[family])
    done = elsewhere.run_tests(module, "-x", *files, "-k", tests)
    if done.returncode not in (0, 1):  # 4 and 5: there is no such test
        raise RuntimeError(done.stdout + done.stderr)
    return done.returncode == 0
