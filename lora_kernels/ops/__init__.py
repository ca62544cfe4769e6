"""The public functions: validation, registration, backend choice and gradients."""
