"""Benchmarks: run by ``pytest --benchmark`` alone; see `bench.pytest_benchmarks`."""
