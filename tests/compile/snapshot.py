"""The resources of a family's kernels as they were, in a file that is read in reviews: a line a kernel."""

import json
from dataclasses import asdict
from pathlib import Path

HERE = Path(__file__).parent
UPDATE = "if this is meant, run `make snapshot` and commit what it writes"


class Snapshot:
    """``<family>.json``: a compiler and, for each architecture, the resources of each kernel by its name.

    ``compiler``: the one of now, with its version; ``written_with``: the file's.
    """

    def __init__(self, family, compiler, folder=HERE):
        self.path, self.compiler = folder / f"{family}.json", compiler
        self.kernels = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.written_with = self.kernels.pop("compiler", compiler)

    @property
    def comparable(self):
        return self.written_with == self.compiler

    def update(self, target, kernels):
        """Resources under another compiler would be compared with nothing, so they go."""
        if not self.comparable:
            self.written_with, self.kernels = self.compiler, {}
        self.kernels[target] = _plain(kernels)
        parts = [f'"compiler": {json.dumps(self.compiler)}']
        for name in sorted(self.kernels):
            lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in self.kernels[name].items()]
            parts.append(f'"{name}": {{\n' + ",\n".join(lines) + "\n}")
        self.path.write_text("{\n" + ",\n".join(parts) + "\n}\n")

    def differences(self, target, kernels):
        """In lines, the last of which says how to update; none where there is no difference."""
        old, new = self.kernels.get(target, {}), _plain(kernels)
        lines = []
        for name in old | new:
            if old.get(name) != new.get(name):
                lines += [
                    f"{sign} {name}: {json.dumps(of[name])}" for sign, of in (("-", old), ("+", new)) if name in of
                ]
        return [*lines, UPDATE] if lines else []


def _plain(kernels):
    """{name: what of its resources is not zero}."""
    return {name: {key: value for key, value in asdict(r).items() if value} for name, r in kernels.items()}
