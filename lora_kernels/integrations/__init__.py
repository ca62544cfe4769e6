"""Other projects' models and engines on the package's kernels; each module imports its project when it is imported."""
